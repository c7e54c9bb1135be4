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
use super::message::{ActorMessage, CommandReport};
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

/// The shortest time between two checks whether a shim is stopped. Each check reads one small file in `/proc`, which
/// adds up with a thousand agents: the checks are as far apart as a shim may go without an answer, if that is longer.
const MIN_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a shim that did not answer on its old link may take to answer on a new one.
const LAST_CHANCE: Duration = Duration::from_secs(1);

/// Delay before the state of a run that could not be determined is examined again.
const RETRY: Duration = Duration::from_secs(5);

/// How long the processes of a launch without a record may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// Forwards the events of one run's shim to the actor.
pub(super) struct RunWatcher {
    pub agent: AgentName,
    pub run: RunId,
    pub run_dir: PathBuf,
    pub boot_id: String,
    /// How long a live shim may go without an answer.
    pub patience: Duration,
    pub mailbox: mpsc::Sender<ActorMessage>,
    pub stopping: CancellationToken,
    /// For the tasks of new links.
    pub tasks: TaskTracker,
}

enum WatcherWake {
    /// An event of the shim; none when the link has broken.
    Event(Option<ShimEvent>),
    /// A request on the link was not answered in time.
    Doubt,
    /// It is time to check whether the shim is stopped.
    Check,
}

impl RunWatcher {
    /// Forwards events until the run ends or the daemon shuts down.
    pub async fn watch(self, mut link: Arc<ShimLink>, mut events: mpsc::Receiver<ShimEvent>) {
        let pace = self.patience.max(MIN_CHECK_INTERVAL);
        let mut checks = tokio::time::interval_at(tokio::time::Instant::now() + pace, pace);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.report_current_suspension(&link).await;
        loop {
            let wake = tokio::select! {
                event = events.recv() => WatcherWake::Event(event),
                () = link.doubted() => WatcherWake::Doubt,
                _ = checks.tick() => WatcherWake::Check,
                () = self.stopping.cancelled() => return,
            };
            let patience = if matches!(wake, WatcherWake::Event(_)) { self.patience } else { LAST_CHANCE };
            let is_usable = match wake {
                WatcherWake::Event(Some(ShimEvent::Exited(record))) => return self.report_end(&record).await,
                // A pause that is under way notices the loss when it renews the lease. The message is for a project
                // that is paused: its agent is frozen again.
                WatcherWake::Event(Some(ShimEvent::LeaseExpired {})) => {
                    tracing::warn!(agent = %self.agent, "the lease of a freeze expired, and the agent was thawed");
                    let message = ActorMessage::Thawed { agent: self.agent.clone(), run: self.run.clone() };
                    if self.mailbox.send(message).await.is_err() {
                        return;
                    }
                    true
                }
                WatcherWake::Event(Some(ShimEvent::FreezeBroken(broken))) => {
                    self.report_broken_freeze(&broken).await;
                    true
                }
                WatcherWake::Event(Some(ShimEvent::Stopped { .. })) => {
                    self.report_suspended(true).await;
                    true
                }
                WatcherWake::Event(Some(ShimEvent::Continued {})) => {
                    self.report_suspended(false).await;
                    true
                }
                // For viewers, which have connections of their own.
                WatcherWake::Event(Some(ShimEvent::Screen(_) | ShimEvent::Output { .. })) => true,
                WatcherWake::Event(None) => false,
                WatcherWake::Doubt => self.answers(&link).await,
                WatcherWake::Check if is_stopped(&link) => self.answers(&link).await,
                WatcherWake::Check => true,
            };
            if !is_usable {
                // Fails the requests of other users of the old link at once.
                link.close();
                match self.connect_again(patience).await {
                    Some((new_link, new_events)) => {
                        (link, events) = (new_link, new_events);
                        self.report_current_suspension(&link).await;
                    }
                    None => return,
                }
            }
        }
    }

    /// Watches a run that has no link yet.
    pub async fn find_end(self) {
        if let Some((link, events)) = self.connect_again(self.patience).await {
            self.watch(link, events).await;
        }
    }

    async fn connect_again(&self, patience: Duration) -> Option<(Arc<ShimLink>, mpsc::Receiver<ShimEvent>)> {
        let (link, events) = self.after_break(patience).await?;
        let link = Arc::new(link);
        let message =
            ActorMessage::Linked { agent: self.agent.clone(), run: self.run.clone(), link: Arc::clone(&link) };
        self.mailbox.send(message).await.ok()?;
        Some((link, events))
    }

    /// Returns whether a shim answers within the patience. A stopped shim is continued first.
    async fn answers(&self, link: &ShimLink) -> bool {
        let started = Instant::now();
        reconnect::wake(link.shim());
        while started.elapsed() < self.patience {
            let left = self.patience.saturating_sub(started.elapsed());
            match tokio::time::timeout(left, link.status()).await {
                Ok(Err(LinkError::Timeout { .. })) | Err(_) => {}
                // A refusal is an answer too; a broken link ends its stream of events.
                Ok(_) => return true,
            }
        }
        false
    }

    /// Reports whether the agent is suspended, since events are lost while there is no link.
    async fn report_current_suspension(&self, link: &ShimLink) {
        if let Some(suspended) = link.suspended() {
            self.report_suspended(suspended).await;
        }
    }

    async fn report_suspended(&self, suspended: bool) {
        let command = Command::Suspended { agent: self.agent.clone(), run: self.run.clone(), suspended };
        self.send(command.into()).await;
    }

    async fn report_end(&self, record: &ExitRecord) {
        if let Some(failure) = &record.post_stop_failure {
            tracing::warn!(agent = %self.agent, run = %self.run, "{failure}");
        }
        if let Some(reason) = &record.start_failure {
            let (agent, run) = (self.agent.clone(), self.run.clone());
            return self.send(Command::Launched { agent, run, outcome: Err(reason.clone()) }.into()).await;
        }
        // The identity of the next run, if the agent is being restarted.
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

    async fn send(&self, report: CommandReport) {
        // The mailbox is closed only at shutdown. The next daemon reads the same records.
        drop(self.mailbox.send(ActorMessage::CommandReport(Box::new(report))).await);
    }

    async fn report_broken_freeze(&self, broken: &FreezeBroken) {
        let (agent, run) = (self.agent.clone(), self.run.clone());
        let detail = describe(broken);
        tracing::warn!(%agent, detail, "a frozen agent ran");
        self.send(Command::FreezeBroken { agent, run, times: broken.times, detail }.into()).await;
    }

    /// Reconnects to the shim if it is alive; otherwise reports the end of the run and returns none.
    async fn after_break(&self, patience: Duration) -> Option<Linked> {
        let mut is_logged = false;
        loop {
            let outcome = tokio::select! {
                outcome = reconnect::reconnect(&self.run_dir, &self.boot_id, patience, &self.tasks) => outcome,
                () = self.stopping.cancelled() => return None,
            };
            let (agent, run) = (self.agent.clone(), self.run.clone());
            match outcome {
                ReconnectOutcome::Linked(linked) => return Some(*linked),
                ReconnectOutcome::Ended(record) => {
                    self.report_end(&record).await;
                    return None;
                }
                ReconnectOutcome::Lost { detail, .. } => {
                    self.send(Command::RunLost { agent, run, detail, then: AfterEnd::ByPolicy }.into()).await;
                    return None;
                }
                ReconnectOutcome::Foreign(detail) => {
                    tracing::warn!(%agent, detail, "an agent runs under a shim that this daemon cannot connect to");
                    self.send(Command::Unreachable { agent, run, detail }.into()).await;
                    self.wait_for_death().await?;
                }
                ReconnectOutcome::Unknown(detail) => {
                    // Logged once, tried until it succeeds.
                    if !std::mem::replace(&mut is_logged, true) {
                        tracing::error!(%agent, detail, "failed to determine the state of an agent; trying again");
                    }
                    self.sleep().await?;
                }
            }
        }
    }

    /// Waits for the end of a shim of another version; `None` when the daemon shuts down first.
    async fn wait_for_death(&self) -> Option<()> {
        let shim = read_run(&self.run_dir).ok().flatten().map(|run| run.shim);
        // Without a pidfd the caller examines the shim again after a delay.
        let Some(Ok(death)) = shim.map(Death::of) else { return self.sleep().await };
        tokio::select! {
            () = death.wait() => Some(()),
            () = self.stopping.cancelled() => None,
        }
    }

    /// Sleeps for [`RETRY`]; `None` when the daemon shuts down meanwhile.
    async fn sleep(&self) -> Option<()> {
        tokio::select! {
            () = tokio::time::sleep(RETRY) => Some(()),
            () = self.stopping.cancelled() => None,
        }
    }
}

/// Returns the report of the end of a run that could not be thawed, from its exit record where there is one.
pub(super) fn end_of(step: &StepContext, agent: &AgentName, run: &RunId, detail: String) -> CommandReport {
    let (agent, run) = (agent.clone(), run.clone());
    match read_exit(&step.dirs().run(&agent, &run)) {
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

/// Describes how a frozen tree was made to run.
fn describe(broken: &FreezeBroken) -> String {
    let cause = match broken.processes {
        0 => "another program thawed its control group".to_owned(),
        1 => "another program continued one of its processes".to_owned(),
        count => format!("another program continued {count} of its processes"),
    };
    if broken.frozen_again { format!("{cause}; all are frozen again") } else { format!("{cause}, and it still runs") }
}

/// Returns the exit status of an exit record.
pub fn exit_status(record: &ExitRecord) -> ExitStatus {
    match (record.code, record.signal) {
        (_, Some(signal)) => ExitStatus::Signal(signal),
        (Some(code), None) => ExitStatus::Code(code),
        // A shim that saw the end records one of them.
        (None, None) => ExitStatus::Signal(0),
    }
}

/// Returns what an exit record says beyond the exit status.
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

/// The state of a run at the start of the daemon.
pub struct RunInspection {
    pub state: RecoveredRun,
    /// The link to the shim and its events; none unless the shim is alive and answers.
    pub link: Option<Linked>,
    /// Why a live shim could not be connected to.
    pub unreachable: Option<String>,
}

/// Determines the state of a run at the start of the daemon. `recorded` are its processes as the database has them;
/// a run whose record cannot be read is taken to be alive with these.
pub async fn inspect_run(run_dir: PathBuf, recorded: Option<RunProcesses>, services: &Services) -> RunInspection {
    let without_link = |state| RunInspection { state, link: None, unreachable: None };
    if matches!((read_exit(&run_dir), read_run(&run_dir)), (Ok(None), Ok(None))) {
        if let Err(error) = abandon(&run_dir) {
            tracing::warn!(run_dir = %run_dir.display(), %error, "failed to cancel a launch; it may still be under way");
        }
        if matches!(read_run(&run_dir), Ok(None)) {
            let dir = run_dir.clone();
            match services.tracker.spawn_blocking(move || end_unrecorded_run(&dir, ENDING)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(
                        run_dir = %run_dir.display(),
                        error = error_chain(&error),
                        "failed to end the processes of a launch without a record"
                    );
                }
                // The runtime shuts down, or the task has panicked, which the panic hook has logged.
                Err(_) => {}
            }
            let detail = "the daemon ended while it was being started".to_owned();
            return without_link(RecoveredRun::Lost { detail });
        }
    }
    let alive = |run_dir| match (read_run(run_dir), recorded) {
        (Ok(Some(run)), _) => RecoveredRun::Alive(processes_of(&run)),
        (Err(_), Some(recorded)) => RecoveredRun::Alive(recorded),
        (Ok(None), _) => RecoveredRun::Lost { detail: "its record is gone".to_owned() },
        (Err(error), None) => {
            RecoveredRun::Lost { detail: format!("its record cannot be read: {}", error_chain(&error)) }
        }
    };
    match reconnect::reconnect(&run_dir, &services.boot_id, services.shim_patience(), &services.tracker).await {
        ReconnectOutcome::Ended(record) => without_link(ended(&record)),
        ReconnectOutcome::Lost { detail, .. } => without_link(RecoveredRun::Lost { detail }),
        ReconnectOutcome::Linked(linked) => RunInspection { link: Some(*linked), ..without_link(alive(&run_dir)) },
        ReconnectOutcome::Foreign(why) | ReconnectOutcome::Unknown(why) => {
            RunInspection { unreachable: Some(why), ..without_link(alive(&run_dir)) }
        }
    }
}
