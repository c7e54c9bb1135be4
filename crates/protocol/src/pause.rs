//! Pause and resume.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{AgentName, CheckpointNumber, OperationId, ProjectName, UnixMillis};

/// How the processes of a paused project are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PauseMode {
    /// The processes stay in memory.
    #[default]
    Freeze,
    /// The processes are ended while frozen; a resume starts them again.
    Park,
    /// A checkpoint plugin saves the process image, then the processes are ended.
    Image,
}

impl PauseMode {
    /// Returns the text of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Park => "park",
            Self::Image => "image",
        }
    }

    /// Says whether the processes are ended while they are frozen, so that a resume has to start them again.
    pub fn ends_processes(self) -> bool {
        match self {
            Self::Park | Self::Image => true,
            Self::Freeze => false,
        }
    }
}

/// Who or what brought a pause about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PauseCause {
    /// A person, or a program of theirs.
    #[default]
    Person,
    /// An agent of the project.
    Agent,
    /// A signal to the daemon.
    Signal,
    /// The end of the daemon.
    Shutdown,
    /// Memory is short.
    MemoryPressure,
    /// A disk is nearly full.
    DiskSpace,
    /// The token budget is reached.
    TokenBudget,
    /// The cost budget is reached.
    CostBudget,
}

impl PauseCause {
    /// Returns the text of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Person => "person",
            Self::Agent => "agent",
            Self::Signal => "signal",
            Self::Shutdown => "shutdown",
            Self::MemoryPressure => "memory_pressure",
            Self::DiskSpace => "disk_space",
            Self::TokenBudget => "token_budget",
            Self::CostBudget => "cost_budget",
        }
    }

    /// Says whether it is a person, which is left out where it is stored or sent.
    pub fn is_person(&self) -> bool {
        *self == Self::Person
    }
}

/// How process trees are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FreezerKind {
    /// The cgroup v2 freezer.
    Cgroup,
    /// SIGSTOP over the tree until it no longer changes.
    Signals,
}

impl FreezerKind {
    /// Returns the text of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Signals => "signals",
        }
    }
}

/// Parameters of `project.pause`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectPause {
    pub project: ProjectName,
    /// Why; kept with the pause and its checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How to hold it.
    #[serde(default)]
    pub mode: PauseMode,
    /// How long agents with a channel have to acknowledge, milliseconds; the configured grace when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
}

/// Result of `project.pause`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PauseResult {
    /// Always true: a pause that fails is an error.
    pub success: bool,
    pub operation_id: OperationId,
    /// The checkpoint that the pause made.
    pub checkpoint_id: CheckpointNumber,
    /// Tokens of the unarchived context items before the flash save.
    pub tokens_before: u64,
    /// The same after it.
    pub tokens_after: u64,
    /// By how many percent that is less.
    pub reduction_percentage: f64,
    /// How many items were archived.
    pub items_archived: u64,
    /// How many hot items stay.
    pub hot_items_retained: u64,
    /// How many warm items stay.
    pub warm_items_retained: u64,
    /// When the pause was committed.
    pub paused_at: UnixMillis,
    pub mode: PauseMode,
    /// Who or what brought it about.
    #[serde(default, skip_serializing_if = "PauseCause::is_person")]
    pub cause: PauseCause,
    /// What froze the processes: `signals` when any agent had to be stopped by signals.
    pub mechanism: FreezerKind,
    /// How many processes were frozen.
    pub processes: u64,
    /// How long the agents stood still before the commit, milliseconds.
    pub frozen_ms: f64,
    /// How long each step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    pub warnings: Vec<String>,
}

/// Parameters of `project.resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectResume {
    pub project: ProjectName,
    /// Restore this checkpoint first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointNumber>,
    /// Let it go on although a budget is reached; that budget then bounds nothing until it is set anew.
    #[serde(default)]
    pub over_budget: bool,
}

/// How one agent came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResumeMethod {
    /// Its frozen processes went on.
    Thawed,
    /// Its process image was restored.
    ImageRestored,
    /// It was started again.
    Respawned,
    /// It could not be brought back.
    Failed,
}

/// How one agent came back, with its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentResumed {
    pub agent: AgentName,
    #[serde(rename = "rung")]
    pub method: ResumeMethod,
    /// The program and arguments, when it was started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// Why it could not be brought back, or why it was not thawed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Result of `project.resume`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResumeResult {
    /// Whether every agent came back.
    pub success: bool,
    pub operation_id: OperationId,
    /// How each agent came back.
    pub agents: Vec<AgentResumed>,
    /// The checkpoint that was restored first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<CheckpointNumber>,
    /// How long the project was paused, milliseconds.
    pub paused_ms: i64,
    /// How long each step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    pub warnings: Vec<String>,
}
