//! Links to shims: what they tell becomes the project's business; one that breaks is made anew,
//! and where its shim is gone, what is left of the tree is ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::{AfterEnd, Command, Observed};
use fermata_protocol::agent::ExitStatus;
use fermata_protocol::{AgentName, RunId, UnixMillis};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::handle::{Message, Outcome};
use super::ids::new_run;
use crate::errors::chain;
use crate::os::controllers::OutOfMemory;
use crate::os::process;
use crate::shim::link::{ShimLink, end_lost_tree, read_exit, read_run};
use crate::shim::record::{ExitRecord, abandon, read_cut_short};
use crate::shim::wire::ShimEvent;
use crate::steps::Site;
use crate::steps::launch::processes_of;

/// How long the processes of a lost tree may take to go.
const ENDING: Duration = Duration::from_secs(10);

/// How often a link that broke is tried again while its shim lives.
const RECONNECTS: u32 = 50;

/// What a watcher of one run needs.
pub(super) struct Watcher {
    pub agent: AgentName,
    pub run: RunId,
    pub run_dir: PathBuf,
    pub boot_id: String,
    pub mailbox: mpsc::Sender<Message>,
    pub stopping: CancellationToken,
}

impl Watcher {
    /// Passes on what the shim tells, until the run has ended or the daemon ends.
    pub async fn watch(self, mut link: Arc<ShimLink>, mut events: mpsc::Receiver<ShimEvent>) {
        self.ask_suspended(&link).await;
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.stopping.cancelled() => return,
            };
            match event {
                Some(ShimEvent::Exited(record)) => return self.tell_end(&record).await,
                // The pause that holds the lease finds out when it renews; recovery from a pause
                // that lost its daemon needs no more than this.
                Some(ShimEvent::LeaseExpired {}) => {
                    tracing::warn!(agent = %self.agent, "a freeze ended by itself: nobody renewed it");
                    let message = Message::Thawed { agent: self.agent.clone(), run: self.run.clone() };
                    if self.mailbox.send(message).await.is_err() {
                        return;
                    }
                }
                Some(ShimEvent::Stopped { .. }) => self.tell_suspended(true).await,
                Some(ShimEvent::Continued {}) => self.tell_suspended(false).await,
                // For viewers, which have connections of their own.
                Some(ShimEvent::Screen(_) | ShimEvent::Output { .. }) => {}
                None => match self.link_again().await {
                    Some((again, more)) => {
                        drop(link);
                        link = again;
                        events = more;
                        self.ask_suspended(&link).await;
                    }
                    None => return,
                },
            }
        }
    }

    /// Watches a run that there is no link to yet.
    pub async fn look(self) {
        if let Some((link, events)) = self.link_again().await {
            self.watch(link, events).await;
        }
    }

    async fn link_again(&self) -> Option<(Arc<ShimLink>, mpsc::Receiver<ShimEvent>)> {
        let (link, events) = self.after_break().await?;
        let message = Message::Linked { agent: self.agent.clone(), run: self.run.clone(), link: Arc::clone(&link) };
        self.mailbox.send(message).await.ok()?;
        Some((link, events))
    }

    /// What happened while there was no link was told to nobody.
    async fn ask_suspended(&self, link: &ShimLink) {
        if let Some(held) = link.suspended() {
            self.tell_suspended(held).await;
        }
    }

    async fn tell_suspended(&self, held: bool) {
        let command = Command::Suspended { agent: self.agent.clone(), run: self.run.clone(), held };
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
        self.send(Outcome { tokens: vec![token], ..command.into() }).await;
    }

    async fn send(&self, outcome: Outcome) {
        // The mailbox is gone only when the daemon ends; the next one reads the same records.
        drop(self.mailbox.send(Message::Outcome(Box::new(outcome))).await);
    }

    /// Finds out why the link broke; returns a new one while the shim lives.
    async fn after_break(&self) -> Option<(Arc<ShimLink>, mpsc::Receiver<ShimEvent>)> {
        for attempt in 0..RECONNECTS {
            if let Ok(Some(record)) = read_exit(&self.run_dir) {
                self.tell_end(&record).await;
                return None;
            }
            let Ok(Some(run)) = read_run(&self.run_dir) else { break };
            if !process::is_alive(run.shim).unwrap_or(false) {
                break;
            }
            if let Ok((link, events)) = ShimLink::connect(&run.socket).await {
                return Some((Arc::new(link), events));
            }
            let pause = Duration::from_millis(10 * u64::from(attempt + 1));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopping.cancelled() => return None,
            }
        }
        let detail = end_lost(self.run_dir.clone(), self.boot_id.clone()).await;
        if let Ok(Some(record)) = read_cut_short(&self.run_dir) {
            self.tell_end(&record).await;
            return None;
        }
        let (agent, run) = (self.agent.clone(), self.run.clone());
        let lost = Command::RunLost { agent, run, detail, then: AfterEnd::ByPolicy };
        self.send(lost.into()).await;
        None
    }
}

/// Says how a run ended that could not be brought back: as its shim has recorded, or without.
pub(super) fn end_of(site: &Site, agent: &AgentName, run: &RunId, detail: String) -> Outcome {
    let (agent, run) = (agent.clone(), run.clone());
    match read_exit(&site.dirs().run(&agent, &run)) {
        Ok(Some(record)) => {
            let (new, token) = new_run();
            let ended_at = UnixMillis(record.ended_at_ms);
            let (exit, detail, then) = (exit_status(&record), exit_detail(&record), AfterEnd::ByPolicy);
            let command = Command::RunEnded { agent, run, exit, detail, ended_at, new, then };
            Outcome { tokens: vec![token], ..command.into() }
        }
        Ok(None) | Err(_) => Command::RunLost { agent, run, detail, then: AfterEnd::ByPolicy }.into(),
    }
}

/// Ends what a lost shim has left; says what was found.
async fn end_lost(run_dir: PathBuf, boot_id: String) -> String {
    let work = move || match read_run(&run_dir) {
        Ok(Some(run)) => match end_lost_tree(&run, &boot_id, ENDING) {
            Ok(count) => format!("its shim was killed; {count} processes of it were ended"),
            Err(error) => format!("its shim was killed, and its processes could not be ended: {}", chain(&error)),
        },
        Ok(None) => "it was never started".to_owned(),
        Err(error) => format!("its shim is gone, and so is its record: {}", chain(&error)),
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| "its shim is gone".to_owned())
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
    let OutOfMemory { killed, at_limit } = record.out_of_memory;
    match (killed, at_limit) {
        (0, _) => None,
        (_, 0) => Some("killed because the machine was out of memory".to_owned()),
        _ => Some("killed for exceeding memory.max".to_owned()),
    }
}

fn ended(record: &ExitRecord) -> Observed {
    let at = UnixMillis(record.ended_at_ms);
    Observed::Ended { exit: exit_status(record), detail: exit_detail(record), at }
}

/// What a new daemon found of a run, with the link when it is alive.
pub struct Found {
    /// What recovery is told.
    pub observed: Observed,
    /// The link and its events.
    pub link: Option<(ShimLink, mpsc::Receiver<ShimEvent>)>,
}

/// Finds out what has become of a run while no daemon looked.
pub async fn observe(run_dir: PathBuf, boot_id: &str) -> Found {
    let lost = |detail: &str| Found { observed: Observed::Lost { detail: detail.to_owned() }, link: None };
    if let Ok(Some(record)) = read_exit(&run_dir) {
        let observed = ended(&record);
        return Found { observed, link: None };
    }
    let mut record = read_run(&run_dir);
    if matches!(record, Ok(None)) {
        if let Err(error) = abandon(&run_dir) {
            tracing::warn!(run_dir = %run_dir.display(), %error, "a launch may still be under way");
        }
        record = read_run(&run_dir);
    }
    let run = match record {
        Ok(Some(run)) => run,
        Ok(None) => return lost("the daemon ended while it was being started"),
        Err(error) => return lost(&format!("its record cannot be read: {}", chain(&error))),
    };
    let found = |record: &ExitRecord| Found { observed: ended(record), link: None };
    if run.boot_id != boot_id {
        return match read_cut_short(&run_dir) {
            Ok(Some(record)) => found(&record),
            _ => lost("the machine was restarted"),
        };
    }
    for _ in 0..3 {
        if !process::is_alive(run.shim).unwrap_or(false) {
            break;
        }
        if let Ok((link, events)) = ShimLink::connect(&run.socket).await {
            return Found { observed: Observed::Alive(processes_of(&run)), link: Some((link, events)) };
        }
    }
    // It may have ended between the two looks.
    if let Ok(Some(record)) = read_exit(&run_dir) {
        return found(&record);
    }
    let detail = end_lost(run_dir.clone(), boot_id.to_owned()).await;
    match read_cut_short(&run_dir) {
        Ok(Some(record)) => found(&record),
        _ => lost(&detail),
    }
}
