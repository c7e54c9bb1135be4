//! One agent: how it is started, its state, its current or last run.
//!
//! ```text
//!  Waiting ── the agents that it depends on are far enough ─┐
//!                                                           ▼
//!            launched            stop                   exit│
//!  Starting ──────────► Running ──────► Stopping ───────────┼────► Ended by a person, TimedOut
//!     │ launch failed    │  ▲                                │        │ restart
//!     ▼                  │  │ thaw                           │        ▼
//!  Failed ◄── exit ≠ 0 ──┤  │   park                         │     Starting
//!     │                  ├──┴─ Frozen ──► Parked ── resume ──► Starting
//!     │ Ended by itself◄0┤                                  │
//!     │ Interrupted ◄lost┘                                  │
//!     └────┴── restart policy ──► Backoff ── the backoff is over ──► Starting
//! ```

mod stored;

use fermata_protocol::agent::{AgentSpec, AgentStatus, ExitStatus, Progress, RunProcesses, StartCause};
use fermata_protocol::budget::Usage;
use fermata_protocol::{AgentName, RunId, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::restart::{RestartKind, StartStreak};

/// One run of one agent. Effects name runs, so that a late effect cannot reach a newer run.
pub type RunKey = (AgentName, RunId);

/// What follows when a stop is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterStop {
    /// The agent stays ended.
    Stay,
    /// A new run begins at once.
    Restart,
    /// A new run continues the work of this one, which was stale.
    GoesOn,
    /// The agent counts as timed out.
    TimedOut,
    /// The agent counts as failed: it was not ready in time.
    NotReady,
}

/// Why a run will be ended as soon as a checkpoint has been taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedEnd {
    /// Its timeout is reached.
    TimeUp,
    /// It has not reported for too long, and will be started again.
    Stale,
}

/// Who ended a run that ended without failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// The agent, with exit code 0.
    #[serde(rename = "by_itself")]
    Itself,
    /// A person, through Fermata.
    #[serde(rename = "stopped")]
    Person,
}

/// The state of an agent, with its run: the current one, or the last one where none is current.
///
/// Its serialised form is that of `stored.rs`, which databases of earlier releases share.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "stored::StoredAgentState")]
pub enum AgentState {
    /// Its start waits for the agents that it depends on.
    Waiting {
        /// Why it will be started.
        cause: StartCause,
        last: Option<Run>,
    },
    /// It has ended and will be started again.
    Backoff {
        until: UnixMillis,
        restart: RestartKind,
        /// Why it will be started.
        cause: StartCause,
        /// How the last run ended.
        detail: String,
        last: Option<Run>,
    },
    /// Its shim is being started.
    Starting(Run),
    Running(Run),
    /// It is paused; its processes are frozen in memory.
    Frozen(Run),
    /// It is paused; its processes were ended, and a resume starts it again.
    Parked(Run),
    Stopping {
        run: Run,
        then: AfterStop,
    },
    /// It ended without failure.
    Ended {
        by: EndedBy,
        last: Option<Run>,
    },
    Failed {
        /// What is known beyond the exit status.
        detail: Option<String>,
        last: Option<Run>,
    },
    /// Its timeout was reached.
    TimedOut {
        last: Option<Run>,
    },
    /// The machine or its shim went down while it ran.
    Interrupted {
        detail: String,
        last: Option<Run>,
    },
}

/// A start that an agent waits for. It also waits until the agent's dependencies are satisfied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingStart {
    /// The earliest time of the start.
    pub at: UnixMillis,
    pub restart: RestartKind,
    pub cause: StartCause,
}

impl AgentState {
    /// Returns the start that the agent waits for.
    pub fn pending_start(&self) -> Option<PendingStart> {
        match self {
            Self::Waiting { cause, .. } => {
                Some(PendingStart { at: UnixMillis(0), restart: RestartKind::Anew, cause: *cause })
            }
            Self::Backoff { until, restart, cause, .. } => {
                Some(PendingStart { at: *until, restart: *restart, cause: *cause })
            }
            Self::Starting(_)
            | Self::Running(_)
            | Self::Frozen(_)
            | Self::Parked(_)
            | Self::Stopping { .. }
            | Self::Ended { .. }
            | Self::Failed { .. }
            | Self::TimedOut { .. }
            | Self::Interrupted { .. } => None,
        }
    }

    /// Returns the current run; none where the agent has ended or its next run is still to come.
    pub fn current_run(&self) -> Option<&Run> {
        match self {
            Self::Starting(run)
            | Self::Running(run)
            | Self::Frozen(run)
            | Self::Parked(run)
            | Self::Stopping { run, .. } => Some(run),
            Self::Waiting { .. }
            | Self::Backoff { .. }
            | Self::Ended { .. }
            | Self::Failed { .. }
            | Self::TimedOut { .. }
            | Self::Interrupted { .. } => None,
        }
    }

    /// Returns the current run, or the last one; none where the agent has never run.
    pub fn run(&self) -> Option<&Run> {
        match self {
            Self::Starting(run)
            | Self::Running(run)
            | Self::Frozen(run)
            | Self::Parked(run)
            | Self::Stopping { run, .. } => Some(run),
            Self::Waiting { last, .. }
            | Self::Backoff { last, .. }
            | Self::Ended { last, .. }
            | Self::Failed { last, .. }
            | Self::TimedOut { last }
            | Self::Interrupted { last, .. } => last.as_ref(),
        }
    }

    /// Returns the run of [`Self::run`], to be changed.
    pub fn run_mut(&mut self) -> Option<&mut Run> {
        match self {
            Self::Starting(run)
            | Self::Running(run)
            | Self::Frozen(run)
            | Self::Parked(run)
            | Self::Stopping { run, .. } => Some(run),
            Self::Waiting { last, .. }
            | Self::Backoff { last, .. }
            | Self::Ended { last, .. }
            | Self::Failed { last, .. }
            | Self::TimedOut { last }
            | Self::Interrupted { last, .. } => last.as_mut(),
        }
    }

    /// Moves the run of [`Self::run`] out of the state, which has to be replaced afterwards.
    pub fn take_run(&mut self) -> Option<Run> {
        match std::mem::replace(self, Self::Ended { by: EndedBy::Itself, last: None }) {
            Self::Starting(run)
            | Self::Running(run)
            | Self::Frozen(run)
            | Self::Parked(run)
            | Self::Stopping { run, .. } => Some(run),
            Self::Waiting { last, .. }
            | Self::Backoff { last, .. }
            | Self::Ended { last, .. }
            | Self::Failed { last, .. }
            | Self::TimedOut { last }
            | Self::Interrupted { last, .. } => last,
        }
    }

    /// Changes to another state with the same current run; does nothing where none is current.
    pub fn change(&mut self, next: impl FnOnce(Run) -> Self) {
        if self.current_run().is_some()
            && let Some(run) = self.take_run()
        {
            *self = next(run);
        }
    }
}

/// One run of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub id: RunId,
    /// The program and arguments of this run.
    pub argv: Vec<String>,
    /// SHA-256 of its token, in hexadecimal.
    pub token_sha256: String,
    pub started_at: UnixMillis,
    /// None until the shim has reported them, and after their end.
    pub processes: Option<RunProcesses>,
    /// When a signal that Fermata did not send stopped its main process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended_at: Option<UnixMillis>,
    pub ended: Option<RunEnd>,
    /// Why its shim does not answer, where that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
    /// Why it began.
    #[serde(default = "requested")]
    pub cause: StartCause,
    /// How long it has run, the runs that it continues included.
    #[serde(default)]
    pub clock: Clock,
    /// What `clock` read when the run began: the time of the runs that it continues.
    #[serde(default)]
    pub carried_ms: i64,
    /// How long it has not reported; none for an agent that never reported.
    #[serde(default)]
    pub silence: Option<Clock>,
    /// What `clock` read at the last report of progress in this run.
    #[serde(default)]
    pub reported_ms: Option<i64>,
    #[serde(default)]
    pub ready_at: Option<UnixMillis>,
    /// When it was found to be stale.
    #[serde(default)]
    pub stale_at: Option<UnixMillis>,
    #[serde(default, rename = "ending")]
    pub planned_end: Option<PlannedEnd>,
}

fn requested() -> StartCause {
    StartCause::Run
}

impl Run {
    pub fn start_clocks(&mut self, at: UnixMillis) {
        self.clock.start(at);
        if let Some(silence) = &mut self.silence {
            silence.start(at);
        }
    }

    pub fn stop_clocks(&mut self, at: UnixMillis) {
        self.clock.stop(at);
        if let Some(silence) = &mut self.silence {
            silence.stop(at);
        }
    }
}

/// How and when a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEnd {
    /// None where neither shim nor daemon saw the end.
    pub exit: Option<ExitStatus>,
    pub at: UnixMillis,
}

/// One agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    pub name: AgentName,
    pub spec: AgentSpec,
    #[serde(flatten)]
    pub state: AgentState,
    /// How many runs it has had.
    pub runs: u64,
    /// The starts in a row by its restart policy.
    #[serde(default, rename = "row")]
    pub streak: StartStreak,
    pub created_at: UnixMillis,
    /// Its last report.
    pub progress: Option<Progress>,
    /// The tool's own session id.
    pub session: Option<String>,
    /// The sum over all of its runs.
    pub usage: Usage,
}

impl Agent {
    /// Says whether it has processes, or they are just being made: everything but ended, parked and to be started
    /// later.
    pub fn is_alive(&self) -> bool {
        match self.state {
            AgentState::Starting(_) | AgentState::Running(_) | AgentState::Frozen(_) | AgentState::Stopping { .. } => {
                true
            }
            AgentState::Waiting { .. }
            | AgentState::Backoff { .. }
            | AgentState::Parked(_)
            | AgentState::Ended { .. }
            | AgentState::Failed { .. }
            | AgentState::TimedOut { .. }
            | AgentState::Interrupted { .. } => false,
        }
    }

    /// Says whether the agent has ended and Fermata will not start it again by itself.
    pub fn is_terminal(&self) -> bool {
        match self.state {
            AgentState::Ended { .. }
            | AgentState::Failed { .. }
            | AgentState::TimedOut { .. }
            | AgentState::Interrupted { .. } => true,
            AgentState::Waiting { .. }
            | AgentState::Backoff { .. }
            | AgentState::Starting(_)
            | AgentState::Running(_)
            | AgentState::Frozen(_)
            | AgentState::Parked(_)
            | AgentState::Stopping { .. } => false,
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.state, AgentState::Running(_))
    }

    pub fn is_frozen(&self) -> bool {
        matches!(self.state, AgentState::Frozen(_))
    }

    /// Says whether it is paused: frozen or parked.
    pub fn is_paused(&self) -> bool {
        matches!(self.state, AgentState::Frozen(_) | AgentState::Parked(_))
    }

    /// Returns the current run, or the last one; none where the agent has never run.
    pub fn run(&self) -> Option<&Run> {
        self.state.run()
    }

    /// Returns the id of the current run; none where the agent has ended or its next run is still to come.
    pub fn current_run_id(&self) -> Option<&RunId> {
        self.state.current_run().map(|run| &run.id)
    }

    /// Returns the processes of the current run.
    pub fn processes(&self) -> Option<&RunProcesses> {
        self.state.run()?.processes.as_ref()
    }

    /// Returns the status of the wire; `asks` says whether a question of the agent is open.
    pub fn status(&self, asks: bool) -> AgentStatus {
        match self.state {
            AgentState::Waiting { .. } | AgentState::Starting(_) => AgentStatus::Starting,
            AgentState::Backoff { .. } => AgentStatus::Backoff,
            AgentState::Running(_) if asks => AgentStatus::WaitingForInput,
            AgentState::Running(_) => AgentStatus::Running,
            AgentState::Frozen(_) | AgentState::Parked(_) => AgentStatus::Paused,
            AgentState::Stopping { .. } => AgentStatus::Stopping,
            AgentState::Ended { .. } => AgentStatus::Exited,
            AgentState::Failed { .. } => AgentStatus::Failed,
            AgentState::TimedOut { .. } => AgentStatus::TimedOut,
            AgentState::Interrupted { .. } => AgentStatus::Interrupted,
        }
    }
}
