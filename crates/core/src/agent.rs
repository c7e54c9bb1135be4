//! One agent: how it is started, where it stands, its current or last run.
//!
//! ```text
//!  Waiting ── those it depends on have come far enough ──┐
//!                                                        ▼
//!            launched            stop                exit│
//!  Starting ──────────► Running ──────► Stopping ────────┼────► Ended(Stopped), TimedOut
//!     │ launch failed    │  ▲                             │        │ restart
//!     ▼                  │  │ thaw                        │        ▼
//!  Failed ◄── exit ≠ 0 ──┤  │        park                 │     Starting
//!     │                  ├──┴─ Held(Frozen) ──► Held(Parked) ── resume ──► Starting
//!     │ Ended(ByItself)◄0┤                               │
//!     │ Interrupted ◄lost┘                               │
//!     └────┴── by policy ──► Backoff ── its time has come ──► Starting
//! ```

use fermata_protocol::agent::StartCause;
use fermata_protocol::agent::{AgentSpec, AgentStatus, ExitStatus, Progress, RunProcesses};
use fermata_protocol::budget::Usage;
use fermata_protocol::{AgentName, RunId, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::restart::{Again, Row};

/// How the processes of a paused agent are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// Frozen in memory.
    Frozen,
    /// Ended; a resume starts the agent again.
    Parked,
}

/// What follows when a stop is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterStop {
    /// Nothing.
    Stay,
    /// A new run, at once.
    Restart,
    /// A new run that goes on where this one was: it had not reported for too long.
    GoesOn,
    /// It counts as timed out.
    TimedOut,
    /// It counts as failed: it was not ready in time.
    NotReady,
}

/// Why a run is about to be ended, once a checkpoint has been taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Its time is over.
    TimeUp,
    /// It has not reported for too long, and is to be started again.
    Stale,
}

/// Who ended a run that ended without failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The agent, with exit code 0.
    ByItself,
    /// A person, through Fermata.
    Stopped,
}

/// Where an agent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// It is started once those that it depends on have come far enough.
    Waiting(StartCause),
    /// It has ended and is started again.
    Backoff {
        /// When.
        until: UnixMillis,
        /// How.
        again: Again,
        /// Why.
        cause: StartCause,
        /// How it ended.
        detail: String,
    },
    /// Its shim is being started.
    Starting,
    /// It runs.
    Running,
    /// It is held by a pause.
    Held(Held),
    /// It is being stopped.
    Stopping(AfterStop),
    /// It ended well, or was stopped.
    Ended(Ended),
    /// It ended badly.
    Failed {
        /// What is known of it beyond the exit status.
        detail: Option<String>,
    },
    /// Its time was over.
    TimedOut,
    /// The machine or its shim went down under it.
    Interrupted {
        /// What is known of it.
        detail: String,
    },
}

/// One run of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its id.
    pub id: RunId,
    /// The program and arguments of this run.
    pub argv: Vec<String>,
    /// SHA-256 of its token, in hexadecimal.
    pub token_sha256: String,
    /// When it began.
    pub started_at: UnixMillis,
    /// Its processes, once the shim has reported them.
    pub processes: Option<RunProcesses>,
    /// Since when a signal that was not Fermata's holds its main process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended_at: Option<UnixMillis>,
    /// How and when it ended.
    pub ended: Option<RunEnd>,
    /// Why its shim cannot be spoken to, where that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
    /// Why it began.
    #[serde(default = "asked_for")]
    pub cause: StartCause,
    /// How long it has run, the runs that it goes on from included.
    #[serde(default)]
    pub clock: Clock,
    /// What the clock read when the run began, milliseconds: the time of the runs that it goes on from.
    #[serde(default)]
    pub carried_ms: i64,
    /// How long it has not reported; none for an agent that never did.
    #[serde(default)]
    pub silence: Option<Clock>,
    /// What its clock read when it reported progress last, milliseconds; none before that.
    #[serde(default)]
    pub reported_ms: Option<i64>,
    /// Since when it has been ready.
    #[serde(default)]
    pub ready_at: Option<UnixMillis>,
    /// Since when it has been known to be stale.
    #[serde(default)]
    pub stale_at: Option<UnixMillis>,
    /// Why it is about to be ended.
    #[serde(default)]
    pub ending: Option<Ending>,
}

fn asked_for() -> StartCause {
    StartCause::Run
}

impl Run {
    /// Lets its clocks go on.
    pub fn go_on(&mut self, at: UnixMillis) {
        self.clock.go_on(at);
        if let Some(silence) = &mut self.silence {
            silence.go_on(at);
        }
    }

    /// Lets its clocks stand still.
    pub fn stand_still(&mut self, at: UnixMillis) {
        self.clock.stand_still(at);
        if let Some(silence) = &mut self.silence {
            silence.stand_still(at);
        }
    }
}

/// How and when a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEnd {
    /// The exit status; none when nobody saw it.
    pub exit: Option<ExitStatus>,
    /// When.
    pub at: UnixMillis,
}

/// One agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    /// Its name.
    pub name: AgentName,
    /// How it is started.
    pub spec: AgentSpec,
    /// Where it stands.
    pub state: AgentState,
    /// How many runs it has had.
    pub runs: u64,
    /// The starts in a row by policy.
    #[serde(default)]
    pub row: Row,
    /// The current or last run.
    pub run: Option<Run>,
    /// When it was created.
    pub created_at: UnixMillis,
    /// What it reported last.
    pub progress: Option<Progress>,
    /// The tool's own session id.
    pub session: Option<String>,
    /// What it used, summed.
    pub usage: Usage,
}

impl Agent {
    /// Says whether there are, or are just being made, processes: everything but ended, parked and
    /// to be started later.
    pub fn is_alive(&self) -> bool {
        match self.state {
            AgentState::Starting | AgentState::Running | AgentState::Held(Held::Frozen) | AgentState::Stopping(_) => {
                true
            }
            AgentState::Waiting(_)
            | AgentState::Backoff { .. }
            | AgentState::Held(Held::Parked)
            | AgentState::Ended(_)
            | AgentState::Failed { .. }
            | AgentState::TimedOut
            | AgentState::Interrupted { .. } => false,
        }
    }

    /// Says whether the agent has ended and nothing will start it again by itself.
    pub fn is_terminal(&self) -> bool {
        match self.state {
            AgentState::Ended(_)
            | AgentState::Failed { .. }
            | AgentState::TimedOut
            | AgentState::Interrupted { .. } => true,
            AgentState::Waiting(_)
            | AgentState::Backoff { .. }
            | AgentState::Starting
            | AgentState::Running
            | AgentState::Held(_)
            | AgentState::Stopping(_) => false,
        }
    }

    /// Returns the id of the current run, `None` when there is none: it has ended, or the next one
    /// is still to come.
    pub fn current_run(&self) -> Option<&RunId> {
        match self.state {
            AgentState::Starting | AgentState::Running | AgentState::Held(_) | AgentState::Stopping(_) => {
                self.run.as_ref().map(|run| &run.id)
            }
            AgentState::Waiting(_)
            | AgentState::Backoff { .. }
            | AgentState::Ended(_)
            | AgentState::Failed { .. }
            | AgentState::TimedOut
            | AgentState::Interrupted { .. } => None,
        }
    }

    /// Returns the status of the wire; `asks` says whether a question of the agent is open.
    pub fn status(&self, asks: bool) -> AgentStatus {
        match self.state {
            AgentState::Waiting(_) | AgentState::Starting => AgentStatus::Starting,
            AgentState::Backoff { .. } => AgentStatus::Backoff,
            AgentState::Running if asks => AgentStatus::WaitingForInput,
            AgentState::Running => AgentStatus::Running,
            AgentState::Held(_) => AgentStatus::Paused,
            AgentState::Stopping(_) => AgentStatus::Stopping,
            AgentState::Ended(_) => AgentStatus::Exited,
            AgentState::Failed { .. } => AgentStatus::Failed,
            AgentState::TimedOut => AgentStatus::TimedOut,
            AgentState::Interrupted { .. } => AgentStatus::Interrupted,
        }
    }
}
