//! One agent: how it is started, where it stands, its current or last run.
//!
//! ```text
//!            launched            stop                exit
//!  Starting ──────────► Running ──────► Stopping ─────────────► Ended(Stopped)
//!     │ launch failed    │  ▲                                      │ restart
//!     ▼                  │  │ thaw                                 ▼
//!  Failed ◄── exit ≠ 0 ──┤  │        park                       Starting
//!                        ├──┴─ Held(Frozen) ──► Held(Parked) ── resume ──► Starting
//!  Ended(ByItself) ◄ 0 ──┤
//!  Interrupted ◄─ lost ──┘
//! ```

use fermata_protocol::agent::{AgentSpec, AgentStatus, ExitStatus, Progress, RunProcesses, Usage};
use fermata_protocol::{AgentName, RunId, UnixMillis};
use serde::{Deserialize, Serialize};

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
    /// A new run.
    Restart,
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
    /// How and when it ended.
    pub ended: Option<RunEnd>,
    /// Why its shim cannot be spoken to, where that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<String>,
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
    /// Says whether there are, or soon will be, processes: everything but ended and parked.
    pub fn is_alive(&self) -> bool {
        match self.state {
            AgentState::Starting | AgentState::Running | AgentState::Held(Held::Frozen) | AgentState::Stopping(_) => {
                true
            }
            AgentState::Held(Held::Parked)
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
            AgentState::Starting | AgentState::Running | AgentState::Held(_) | AgentState::Stopping(_) => false,
        }
    }

    /// Returns the id of the current run, `None` when the agent has ended or never ran.
    pub fn current_run(&self) -> Option<&RunId> {
        if self.is_terminal() { None } else { self.run.as_ref().map(|run| &run.id) }
    }

    /// Returns the status of the wire; `asks` says whether a question of the agent is open.
    pub fn status(&self, asks: bool) -> AgentStatus {
        match self.state {
            AgentState::Starting => AgentStatus::Starting,
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
