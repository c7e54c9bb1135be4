//! Links to shims: forwards their events to the project's actor. A broken link is connected again; if its shim has ended,
//! the remaining processes of the agent are ended.
//!
//! A broken link is the first sign of a shim's death, since the kernel closes the sockets of a process that dies.
//! `daemon/src/shims/reconnect.rs` examines a shim that does not answer or is stopped.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fermata_core::command::{AfterEnd, Command, RecoveredRun};
use fermata_protocol::agent::{ExitStatus, RunProcesses};
use fermata_protocol::{AgentName, RunId, UnixMillis};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ids::new_run;
use super::message::{CommandReport, Message};
use crate::operations::StepContext;
use crate::operations::run::launch::processes_of;
use crate::services::Services;
use crate::shims::link::{LinkError, ShimLink, read_exit, read_run};
use crate::shims::lost::end_unrecorded_run;
use crate::shims::reconnect::{self, Linked, ReconnectOutcome};
use fermata_os::controllers::OutOfMemory;
use fermata_os::death::Death;
use fermata_os::process::{self, RunState};
use fermata_protocol::error_chain;
use fermata_shim::record::{ExitRecord, abandon};
use fermata_shim::wire::{FreezeBroken, ShimEvent};

/// How often to look, at most, whether somebody has stopped a shim. One small file is read, which with
/// a thousand agents adds up: the pace is the patience with a shim that does not answer.
const LOOK: Duration = Duration::from_secs(1);

/// How long a shim that was given up on its old link may take to answer at a new one.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// How long to wait before what could not be seen is looked at again.
const AGAIN: Duration = Duration::from_secs(5);

/// How long the processes of a launch that nobody has recorded may take to go.
const ENDING: Duration = Duration::from_secs(10);

/// What a watcher of one run needs.
pub(super) struct Watcher {
    pub agent: AgentName,
    pub run: RunId,
    pub run_dir: PathBuf,
    pub boot_id: String,
    /// How long a shim that lives may go without an answer.
    pub patience: Duration,
    pub mailbox: mpsc::Sender<Message>,
    pub stopping: CancellationToken,
    /// For the tasks of new links.
    pub tasks: TaskTracker,
}

/// What made a watcher wake up.
enum Wake {
    Event(Option<ShimEvent>),
    Doubt,
    Look,
}

impl Watcher {
    /// Passes on what the shim tells, until the run has ended or the daemon ends.
    pub async fn watch(self, mut link: Arc<ShimLink>, mut events: mpsc::Receiver<ShimEvent>) {
        let pace = self.patience.max(LOOK);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + pace, pace);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.ask_suspended(&link).await;
        loop {
            let wake = tokio::select! {
                event = events.recv() => Wake::Event(event),
                () = link.doubted() => Wake::Doubt,
                _ = look.tick() => Wake::Look,
                () = self.stopping.cancelled() => return,
            };
            let patience = if matches!(wake, Wake::Event(_)) { self.patience } else { LAST_CHANCE };
            let goes_on = match wake {
                Wake::Event(Some(ShimEvent::Exited(record))) => return self.tell_end(&record).await,
                // The pause that holds the lease finds out when it renews; recovery from a pause
                // that lost its daemon needs no more than this.
                Wake::Event(Some(ShimEvent::LeaseExpired {})) => {
                    tracing::warn!(agent = %self.agent, "a freeze ended by itself: nobody renewed it");
                    let message = Message::Thawed { agent: self.agent.clone(), run: self.run.clone() };
                    if self.mailbox.send(message).await.is_err() {
                        return;
                    }
                    true
                }
                Wake::Event(Some(ShimEvent::FreezeBroken(broken))) => {
                    self.tell_broken(&broken).await;
                    true
                }
                Wake::Event(Some(ShimEvent::Stopped { .. })) => {
                    self.tell_suspended(true).await;
                    true
                }
                Wake::Event(Some(ShimEvent::Continued {})) => {
                    self.tell_suspended(false).await;
                    true
                }
                // For viewers, which have connections of their own.
                Wake::Event(Some(ShimEvent::Screen(_) | ShimEvent::Output { .. })) => true,
                Wake::Event(None) => false,
                Wake::Doubt => self.is_well(&link).await,
                Wake::Look if is_stopped(&link) => self.is_well(&link).await,
                Wake::Look => true,
            };
            if !goes_on {
                // Whatever else uses the old link must not wait for it.
                link.close();
                match self.link_again(patience).await {
                    Some((again, more)) => {
                        (link, events) = (again, more);
                        self.ask_suspended(&link).await;
                    }
                    None => return,
                }
            }
        }
    }

    /// Watches a run that there is no link to yet.
    pub async fn find_end(self) {
        if let Some((link, events)) = self.link_again(self.patience).await {
            self.watch(link, events).await;
        }
    }

    async fn link_again(&self, patience: Duration) -> Option<(Arc<ShimLink>, mpsc::Receiver<ShimEvent>)> {
        let (link, events) = self.after_break(patience).await?;
        let link = Arc::new(link);
        let message = Message::Linked { agent: self.agent.clone(), run: self.run.clone(), link: Arc::clone(&link) };
        self.mailbox.send(message).await.ok()?;
        Some((link, events))
    }

    /// Asks a shim that may hang until it answers or the patience is over; one that somebody has
    /// stopped is continued first.
    async fn is_well(&self, link: &ShimLink) -> bool {
        let started = Instant::now();
        reconnect::wake(link.shim());
        while started.elapsed() < self.patience {
            let left = self.patience.saturating_sub(started.elapsed());
            match tokio::time::timeout(left, link.status()).await {
                Ok(Err(LinkError::Timeout { .. })) | Err(_) => {}
                // A refusal is an answer, and a link that has ended tells so by itself.
                Ok(_) => return true,
            }
        }
        false
    }

    /// What happened while there was no link was told to nobody.
    async fn ask_suspended(&self, link: &ShimLink) {
        if let Some(held) = link.suspended() {
            self.tell_suspended(held).await;
        }
    }

    async fn tell_suspended(&self, held: bool) {
        let command = Command::Suspended { agent: self.agent.clone(), run: self.run.clone(), suspended: held };
        self.send(command.into()).await;
    }

    async fn tell_end(&self, record: &ExitRecord) {
        if let Some(failure) = &record.post_stop_failure {
            tracing::warn!(agent = %self.agent, run = %self.run, "{failure}");
        }
        if let Some(reason) = &record.start_failure {
            let (agent, run) = (self.agent.clone(), self.run.clone());
            return self.send(Command::Launched { agent, run, outcome: Err(reason.clone()) }.into()).await;
        }
        // Used when the agent is being restarted.
        let (new, token) = new_run();
        let command = Command::RunEnded {
            agent: self.agent.clone(),
            run: self.run.clone(),
            exit: exit_status(record),
            detail: exit_detail(record),
            ended_at: UnixMillis(record.ended_at_ms),
            new,
            then: AfterEnd::ByPolicy,
        };
        self.send(CommandReport { tokens: vec![token], ..command.into() }).await;
    }

    async fn send(&self, outcome: CommandReport) {
        // The mailbox is gone only when the daemon ends; the next one reads the same records.
        drop(self.mailbox.send(Message::CommandReport(Box::new(outcome))).await);
    }

    async fn tell_broken(&self, broken: &FreezeBroken) {
        let (agent, run) = (self.agent.clone(), self.run.clone());
        let detail = describe(broken);
        tracing::warn!(%agent, detail, "a frozen agent ran");
        self.send(Command::FreezeBroken { agent, run, times: broken.times, detail }.into()).await;
    }

    /// Finds out why the link broke; returns a new one while the shim lives.
    async fn after_break(&self, patience: Duration) -> Option<Linked> {
        let mut troubled = false;
        loop {
            let reached = tokio::select! {
                reached = reconnect::reconnect(&self.run_dir, &self.boot_id, patience, &self.tasks) => reached,
                () = self.stopping.cancelled() => return None,
            };
            let (agent, run) = (self.agent.clone(), self.run.clone());
            match reached {
                ReconnectOutcome::Linked(linked) => return Some(*linked),
                ReconnectOutcome::Ended(record) => {
                    self.tell_end(&record).await;
                    return None;
                }
                ReconnectOutcome::Lost { detail, .. } => {
                    self.send(Command::RunLost { agent, run, detail, then: AfterEnd::ByPolicy }.into()).await;
                    return None;
                }
                ReconnectOutcome::Foreign(detail) => {
                    tracing::warn!(%agent, detail, "an agent runs on under a shim that cannot be spoken to");
                    self.send(Command::Unreachable { agent, run, detail }.into()).await;
                    self.wait_for_death().await?;
                }
                ReconnectOutcome::Unknown(detail) => {
                    // Told once: it is tried again until it is known.
                    if !std::mem::replace(&mut troubled, true) {
                        tracing::error!(%agent, detail, "what became of an agent cannot be seen now; it is tried again");
                    }
                    self.pause().await?;
                }
            }
        }
    }

    /// Waits for the end of a shim that is of another version; `None` when the daemon ends first.
    async fn wait_for_death(&self) -> Option<()> {
        let shim = read_run(&self.run_dir).ok().flatten().map(|run| run.shim);
        // Without a descriptor it is looked at again, in good time.
        let Some(Ok(death)) = shim.map(Death::of) else { return self.pause().await };
        tokio::select! {
            () = death.wait() => Some(()),
            () = self.stopping.cancelled() => None,
        }
    }

    /// Lets some time go by; `None` when the daemon ends meanwhile.
    async fn pause(&self) -> Option<()> {
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => Some(()),
            () = self.stopping.cancelled() => None,
        }
    }
}

/// Says how a run ended that could not be brought back: as its shim has recorded, or without.
pub(super) fn end_of(site: &StepContext, agent: &AgentName, run: &RunId, detail: String) -> CommandReport {
    let (agent, run) = (agent.clone(), run.clone());
    match read_exit(&site.dirs().run(&agent, &run)) {
        Ok(Some(record)) => {
            let (new, token) = new_run();
            let ended_at = UnixMillis(record.ended_at_ms);
            let (exit, detail, then) = (exit_status(&record), exit_detail(&record), AfterEnd::ByPolicy);
            let command = Command::RunEnded { agent, run, exit, detail, ended_at, new, then };
            CommandReport { tokens: vec![token], ..command.into() }
        }
        Ok(None) | Err(_) => Command::RunLost { agent, run, detail, then: AfterEnd::ByPolicy }.into(),
    }
}

fn is_stopped(link: &ShimLink) -> bool {
    process::stat_of(link.shim()).ok().flatten().is_some_and(|stat| stat.state() == RunState::Stopped)
}

/// Says in a sentence how a frozen tree came to run.
fn describe(broken: &FreezeBroken) -> String {
    let who = match broken.processes {
        0 => "its control group was thawed by somebody else".to_owned(),
        1 => "somebody else continued one of its processes".to_owned(),
        count => format!("somebody else continued {count} of its processes"),
    };
    if broken.frozen_again { format!("{who}; all stand still again") } else { format!("{who}, and it still runs") }
}

/// Translates a recorded exit.
pub fn exit_status(record: &ExitRecord) -> ExitStatus {
    match (record.code, record.signal) {
        (_, Some(signal)) => ExitStatus::Signal(signal),
        (Some(code), None) => ExitStatus::Code(code),
        // A shim records one of them; a record without either is of a run nobody saw ending.
        (None, None) => ExitStatus::Signal(0),
    }
}

/// What a recorded exit says beyond the exit status.
fn exit_detail(record: &ExitRecord) -> Option<String> {
    if let Some(reason) = &record.start_failure {
        return Some(reason.clone());
    }
    let OutOfMemory { killed, at_limit } = record.out_of_memory;
    match (killed, at_limit) {
        (0, _) => None,
        (_, 0) => Some("killed because the machine was out of memory".to_owned()),
        _ => Some("killed for exceeding memory.max".to_owned()),
    }
}

fn ended(record: &ExitRecord) -> RecoveredRun {
    let at = UnixMillis(record.ended_at_ms);
    RecoveredRun::Ended { exit: exit_status(record), detail: exit_detail(record), at }
}

/// What a new daemon found of a run.
pub struct RunInspection {
    /// What recovery is told.
    pub observed: RecoveredRun,
    /// The link and its events, when it is alive and can be spoken to.
    pub link: Option<Linked>,
    /// Why it cannot be spoken to although it is alive.
    pub unreachable: Option<String>,
}

/// Finds out what has become of a run while no daemon looked. `known` are its processes as they were
/// told last: what cannot be seen now is taken to be as it was.
pub async fn inspect_run(run_dir: PathBuf, known: Option<RunProcesses>, services: &Services) -> RunInspection {
    let found = |observed| RunInspection { observed, link: None, unreachable: None };
    if matches!((read_exit(&run_dir), read_run(&run_dir)), (Ok(None), Ok(None))) {
        if let Err(error) = abandon(&run_dir) {
            tracing::warn!(run_dir = %run_dir.display(), %error, "a launch may still be under way");
        }
        if matches!(read_run(&run_dir), Ok(None)) {
            let dir = run_dir.clone();
            match tokio::task::spawn_blocking(move || end_unrecorded_run(&dir, ENDING)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(run_dir = %run_dir.display(), error = error_chain(&error), "end a launch without a record");
                }
                // The runtime ends, or it has panicked, which was told.
                Err(_) => {}
            }
            return found(RecoveredRun::Lost { detail: "the daemon ended while it was being started".to_owned() });
        }
    }
    let alive = |run_dir| match (read_run(run_dir), known) {
        (Ok(Some(run)), _) => RecoveredRun::Alive(processes_of(&run)),
        (Err(_), Some(known)) => RecoveredRun::Alive(known),
        (Ok(None), _) => RecoveredRun::Lost { detail: "its record is gone".to_owned() },
        (Err(error), None) => {
            RecoveredRun::Lost { detail: format!("its record cannot be read: {}", error_chain(&error)) }
        }
    };
    match reconnect::reconnect(&run_dir, &services.boot_id, services.shim_patience(), &services.tracker).await {
        ReconnectOutcome::Ended(record) => found(ended(&record)),
        ReconnectOutcome::Lost { detail, .. } => found(RecoveredRun::Lost { detail }),
        ReconnectOutcome::Linked(linked) => RunInspection { link: Some(*linked), ..found(alive(&run_dir)) },
        ReconnectOutcome::Foreign(why) | ReconnectOutcome::Unknown(why) => {
            RunInspection { unreachable: Some(why), ..found(alive(&run_dir)) }
        }
    }
}
