//! One project: its state, as the database stores it and the actor has it in memory.
//!
//! Parts that change independently are behind `Arc`, so that the next state is made by a cheap
//! copy and the store sees by comparing pointers which rows changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use fermata_protocol::budget::Usage;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::pause::{FreezerKind, PauseCause, PauseMode};
use fermata_protocol::project::{ProjectConfig, ProjectStatus, WorkspaceSource};
use fermata_protocol::question::QuestionView;
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{AgentName, CheckpointNumber, ErrorObject, OperationId, ProjectName, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::activity::{Activity, ActivityCounters};
use crate::agent::{Agent, AgentState, RunKey};

/// The steps of a pause, in order. The commit is no step of its own: it is the transaction that
/// follows the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseStep {
    /// Workspace reachable, enough free space, mode available.
    Validate,
    /// Agents with a channel are asked to reach a good place to stop; then all are sent the stop signal.
    Quiesce,
    /// The process trees are frozen under a lease.
    Freeze,
    /// Scores, tiers and the items to archive are computed.
    PlanFlashSave,
    /// Workspace, database, context and plugin artifacts are saved.
    Checkpoint,
}

impl PauseStep {
    /// Every step, in order.
    pub const ALL: [Self; 5] = [Self::Validate, Self::Quiesce, Self::Freeze, Self::PlanFlashSave, Self::Checkpoint];

    /// Returns the step's name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validate => "validate",
            Self::Quiesce => "quiesce",
            Self::Freeze => "freeze",
            Self::PlanFlashSave => "plan_flash_save",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// Returns the step after this one; `None` after the last: then the pause commits.
    pub fn next(self) -> Option<Self> {
        match self {
            Self::Validate => Some(Self::Quiesce),
            Self::Quiesce => Some(Self::Freeze),
            Self::Freeze => Some(Self::PlanFlashSave),
            Self::PlanFlashSave => Some(Self::Checkpoint),
            Self::Checkpoint => None,
        }
    }
}

/// Whether an operation goes forward or is being undone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    #[default]
    Forward,
    /// Its steps are being undone because of this error.
    Undoing(ErrorObject),
}

/// A pause in progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PauseOperation {
    pub operation: OperationId,
    /// The number reserved for its checkpoint.
    pub checkpoint: CheckpointNumber,
    pub mode: PauseMode,
    #[serde(default)]
    pub cause: PauseCause,
    pub reason: Option<String>,
    /// How long agents with a channel have to acknowledge; the configured grace when none.
    pub grace_ms: Option<u64>,
    pub started_at: UnixMillis,
    /// The status that an undo returns to.
    pub before: Resting,
    /// The counters when it began.
    #[serde(default, rename = "tally")]
    pub activity: ActivityCounters,
    pub step: PauseStep,
    /// How long each completed step took.
    pub steps_ms: BTreeMap<String, f64>,
    #[serde(rename = "course")]
    pub direction: Direction,
}

/// The statuses of a project that is neither paused nor changed by an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resting {
    /// No agent has run yet.
    Init,
    /// The work is being planned.
    Planning,
    /// Agents run, or will run again by themselves.
    Active,
    /// Ended by a person.
    Stopped,
    /// Every agent ended with exit code 0.
    Completed,
    /// An agent failed and none runs.
    Failed,
}

impl From<Resting> for ProjectStatus {
    fn from(resting: Resting) -> Self {
        match resting {
            Resting::Init => Self::Init,
            Resting::Planning => Self::Planning,
            Resting::Active => Self::Active,
            Resting::Stopped => Self::Stopped,
            Resting::Completed => Self::Completed,
            Resting::Failed => Self::Failed,
        }
    }
}

/// A pause that was committed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paused {
    pub operation: OperationId,
    /// The checkpoint of the pause.
    pub checkpoint: CheckpointNumber,
    pub since: UnixMillis,
    pub mode: PauseMode,
    pub mechanism: FreezerKind,
    #[serde(default)]
    pub cause: PauseCause,
    pub reason: Option<String>,
    /// The checkpoint restored since. The agents' memory is newer than their files then, so that they must not be thawed.
    pub restored: Option<CheckpointNumber>,
    /// The checkpoint whose context was restored since; none, and so that of the pause, when only files were restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<CheckpointNumber>,
    /// How often each agent ran during this pause although Fermata had not thawed it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub breaks: BTreeMap<AgentName, u64>,
}

/// A resume in progress; after a crash it is rolled forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResumeOperation {
    pub operation: OperationId,
    pub started_at: UnixMillis,
    /// The pause that it ends.
    pub paused: Paused,
}

/// The stage of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreStage {
    /// The safety checkpoint is being made and the plan computed; nothing has been changed yet.
    Preparing,
    /// The plan is on disk and is being carried out; after a crash it is rolled forward.
    Applying,
}

/// A restore in progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreOperation {
    pub operation: OperationId,
    pub checkpoint: CheckpointNumber,
    /// The number of the safety checkpoint.
    pub safety: CheckpointNumber,
    pub started_at: UnixMillis,
    /// The counters when it began.
    #[serde(default, rename = "tally")]
    pub activity: ActivityCounters,
    pub stage: RestoreStage,
    /// Only these paths are restored, and no rows; everything when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// The failures of its attempts so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Box<RestoreTrouble>>,
    /// The state that the project returns to.
    pub before: BeforeRestore,
}

/// The failed attempts to carry out the plan of a restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreTrouble {
    pub tries: u32,
    /// When the first attempt failed.
    pub since: UnixMillis,
    /// The error of the last attempt.
    pub error: ErrorObject,
}

/// The state of a project before a restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BeforeRestore {
    Paused(Paused),
    /// Without running agents.
    Resting(Resting),
    /// Half restored: an earlier restore was given up.
    Broken(Box<BrokenRestore>),
}

impl BeforeRestore {
    /// Returns the last state in which the project's files were those of one point in time.
    pub fn stable(self) -> StableState {
        match self {
            Self::Paused(paused) => StableState::Paused(paused),
            Self::Resting(resting) => StableState::Resting(resting),
            Self::Broken(broken) => broken.before,
        }
    }
}

/// The state of a project that no operation changes and whose files are those of one point in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StableState {
    Paused(Paused),
    Resting(Resting),
}

/// A restore that was given up half way: some files are those of the checkpoint, others are not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrokenRestore {
    pub operation: OperationId,
    /// The checkpoint that was being restored.
    pub checkpoint: CheckpointNumber,
    /// The checkpoint taken before the restore.
    pub safety: CheckpointNumber,
    /// When it was given up.
    pub at: UnixMillis,
    pub error: ErrorObject,
    /// The state that a successful restore returns to.
    pub before: StableState,
}

/// A checkpoint outside a pause, in progress beside running agents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointOperation {
    pub operation: OperationId,
    pub checkpoint: CheckpointNumber,
    pub trigger: Trigger,
    pub started_at: UnixMillis,
    /// The counters when it began.
    #[serde(default, rename = "tally")]
    pub activity: ActivityCounters,
    #[serde(default)]
    pub direction: Direction,
}

/// The state of a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectState {
    /// Neither paused nor changed by an operation; agents may run.
    Resting(Resting),
    Pausing(Box<PauseOperation>),
    Paused(Box<Paused>),
    Resuming(Box<ResumeOperation>),
    Restoring(Box<RestoreOperation>),
    /// A restore was given up half way; only another restore leads out of this state.
    Broken(Box<BrokenRestore>),
}

impl ProjectState {
    /// Returns the status of the wire.
    pub fn status(&self) -> ProjectStatus {
        match self {
            Self::Resting(resting) => (*resting).into(),
            Self::Pausing(_) => ProjectStatus::Pausing,
            Self::Paused(_) => ProjectStatus::Paused,
            Self::Resuming(_) => ProjectStatus::Resuming,
            Self::Restoring(_) => ProjectStatus::Restoring,
            Self::Broken(_) => ProjectStatus::Failed,
        }
    }
}

/// One project.
#[derive(Debug, Clone, PartialEq)]
pub struct Project {
    pub name: ProjectName,
    pub facts: Arc<ProjectFacts>,
    pub state: Arc<ProjectState>,
    /// A checkpoint in progress outside a pause.
    pub checkpointing: Option<Arc<CheckpointOperation>>,
    pub counters: Counters,
    /// The sum of all pauses, the current one excluded.
    pub total_paused_ms: i64,
    pub agents: BTreeMap<AgentName, Arc<Agent>>,
    pub tasks: BTreeMap<u64, Arc<TaskView>>,
    /// Answered ones included.
    pub questions: BTreeMap<u64, Arc<QuestionView>>,
}

/// The parts of a project that change rarely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProjectFacts {
    /// Absolute path.
    pub workspace: String,
    pub description: String,
    pub source: Option<WorkspaceSource>,
    pub config: ProjectConfig,
    pub phase: Phase,
    pub created_at: UnixMillis,
}

/// Numbers that a project counts up; no number is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// The last task.
    pub task: u64,
    /// The last question.
    pub question: u64,
    /// The last checkpoint.
    pub checkpoint: CheckpointNumber,
    /// The checkpoint whose context a continued agent is given: the newest one that was not imported, or the one that
    /// was restored since; 0 for none.
    #[serde(default)]
    pub context: CheckpointNumber,
    /// The usage of agents that were removed, which still counts for the budget.
    #[serde(default)]
    pub removed_usage: Usage,
    #[serde(default, rename = "since")]
    pub activity: Activity,
}

impl Project {
    /// Says whether a question of the agent is open.
    pub fn asks(&self, agent: &AgentName) -> bool {
        self.questions.values().any(|q| q.agent == *agent && q.answer.is_none())
    }

    /// Returns the agents that have processes, frozen ones included.
    pub fn alive_agents(&self) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.values().filter(|agent| agent.is_alive())
    }

    /// Returns the agents that have processes or will be started again by themselves.
    pub fn unfinished_agents(&self) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.values().filter(|agent| !agent.is_terminal() && !matches!(agent.state, AgentState::Parked(_)))
    }

    /// Returns the agents that a pause, or a checkpoint beside them, has to freeze.
    pub fn running_agents(&self) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.values().filter(|agent| match agent.state {
            AgentState::Running(_) | AgentState::Stopping { .. } => true,
            AgentState::Waiting { .. }
            | AgentState::Backoff { .. }
            | AgentState::Starting(_)
            | AgentState::Frozen(_)
            | AgentState::Parked(_)
            | AgentState::Ended { .. }
            | AgentState::Failed { .. }
            | AgentState::TimedOut { .. }
            | AgentState::Interrupted { .. } => false,
        })
    }

    /// Returns the current runs of these agents.
    pub fn runs<'a>(&self, agents: impl IntoIterator<Item = &'a Arc<Agent>>) -> Vec<RunKey> {
        let key = |agent: &Arc<Agent>| Some((agent.name.clone(), agent.current_run_id()?.clone()));
        agents.into_iter().filter_map(key).collect()
    }

    /// Returns the operation in progress.
    pub fn operation(&self) -> Option<&OperationId> {
        match &*self.state {
            ProjectState::Pausing(run) => Some(&run.operation),
            ProjectState::Resuming(run) => Some(&run.operation),
            ProjectState::Restoring(run) => Some(&run.operation),
            ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => {
                self.checkpointing.as_ref().map(|run| &run.operation)
            }
        }
    }

    /// Says whether frozen agents stay frozen for as long as the state lasts, so that an operation beside it must not
    /// thaw them.
    pub fn stays_frozen(&self) -> bool {
        match &*self.state {
            ProjectState::Paused(_) | ProjectState::Restoring(_) | ProjectState::Broken(_) => true,
            ProjectState::Resting(_) | ProjectState::Pausing(_) | ProjectState::Resuming(_) => false,
        }
    }

    pub fn frozen_runs(&self) -> Vec<RunKey> {
        self.runs(self.agents.values().filter(|agent| agent.is_frozen()))
    }

    /// Returns the sum of all pauses, milliseconds, the current one included.
    pub fn paused_ms(&self, now: UnixMillis) -> i64 {
        self.total_paused_ms
            + match &*self.state {
                ProjectState::Paused(paused) => now.since(paused.since),
                ProjectState::Resuming(run) => now.since(run.paused.since),
                ProjectState::Resting(_)
                | ProjectState::Pausing(_)
                | ProjectState::Restoring(_)
                | ProjectState::Broken(_) => 0,
            }
    }
}
