//! One project: its state as the database keeps it and the actor holds it.
//!
//! Parts that change on their own are behind `Arc`, so that the next state is made by a cheap
//! copy and the store sees by pointer which rows changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use fermata_protocol::budget::Usage;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::pause::{Mechanism, PauseCause, PauseMode};
use fermata_protocol::project::{ProjectConfig, ProjectStatus, Source};
use fermata_protocol::question::QuestionView;
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{AgentName, CheckpointNumber, ErrorObject, OperationId, ProjectName, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, AgentState, Held};
use crate::command::AgentRun;
use crate::since::{Since, Tally};

/// The steps of a pause, in order. Committing is no step of its own: it is the transaction that
/// follows the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseStep {
    /// Workspace reachable, enough free space, mode available.
    Validate,
    /// Agents are asked to come to a good place, then told to stop.
    Quiesce,
    /// The trees are frozen under a lease.
    Freeze,
    /// Scores, tiers and what to archive are computed.
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Course {
    /// Its steps run.
    Forward,
    /// What it did is being undone, because of this.
    Undoing(ErrorObject),
}

/// A pause under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PauseRun {
    /// The operation.
    pub operation: OperationId,
    /// The number reserved for its checkpoint.
    pub checkpoint: CheckpointNumber,
    /// How the project will be held.
    pub mode: PauseMode,
    /// Who or what brought it about.
    #[serde(default)]
    pub cause: PauseCause,
    /// Why.
    pub reason: Option<String>,
    /// How long agents have to come to a good place, milliseconds; the configured grace when none.
    pub grace_ms: Option<u64>,
    /// When it began.
    pub started_at: UnixMillis,
    /// The status to return to when it is undone.
    pub before: Resting,
    /// What had come together when it began.
    #[serde(default)]
    pub tally: Tally,
    /// The step under way.
    pub step: PauseStep,
    /// How long each concluded step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    /// Forward or back.
    pub course: Course,
}

/// The statuses that a project rests in while it is not held and no operation moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resting {
    /// Nothing has run yet.
    Init,
    /// Work is being planned.
    Planning,
    /// Agents run or are meant to.
    Active,
    /// Ended by a person.
    Stopped,
    /// Every agent ended well.
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
    /// The operation that paused it.
    pub operation: OperationId,
    /// The checkpoint of the pause.
    pub checkpoint: CheckpointNumber,
    /// Since when.
    pub since: UnixMillis,
    /// How it is held.
    pub mode: PauseMode,
    /// What froze it.
    pub mechanism: Mechanism,
    /// Who or what brought it about.
    #[serde(default)]
    pub cause: PauseCause,
    /// Why.
    pub reason: Option<String>,
    /// The checkpoint restored since: old files under a newer memory, so no thaw.
    pub restored: Option<CheckpointNumber>,
    /// The checkpoint whose context was restored since; that of the pause counts when none was, or only files were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<CheckpointNumber>,
    /// How often an agent ran in this pause although nobody had let it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub breaks: BTreeMap<AgentName, u64>,
}

/// A resume under way; after a crash it is rolled forward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResumeRun {
    /// The operation.
    pub operation: OperationId,
    /// When it began.
    pub started_at: UnixMillis,
    /// The pause that it ends.
    pub paused: Paused,
}

/// How far a restore has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreStage {
    /// The safety checkpoint is being made and the plan computed; nothing was changed yet.
    Preparing,
    /// The plan is on disk and being carried out; after a crash it is rolled forward.
    Applying,
}

/// A restore under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreRun {
    /// The operation.
    pub operation: OperationId,
    /// The checkpoint to restore.
    pub checkpoint: CheckpointNumber,
    /// The number of the safety checkpoint.
    pub safety: CheckpointNumber,
    /// When it began.
    pub started_at: UnixMillis,
    /// What had come together when it began.
    #[serde(default)]
    pub tally: Tally,
    /// How far it has come.
    pub stage: RestoreStage,
    /// Only these paths are restored, and no rows; everything when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// What keeps it from coming to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<Box<Trouble>>,
    /// What the project returns to.
    pub before: BeforeRestore,
}

/// Why a restore has not come to its end yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trouble {
    /// How often it failed.
    pub tries: u32,
    /// Since when it fails.
    pub since: UnixMillis,
    /// How it failed the last time.
    pub error: ErrorObject,
}

/// What a project was when a restore began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BeforeRestore {
    /// Paused.
    Paused(Paused),
    /// At rest, without running agents.
    Resting(Resting),
    /// Left half restored by an earlier one.
    Broken(Box<BrokenRestore>),
}

impl BeforeRestore {
    /// Returns what the project was when its files were whole.
    pub fn whole(self) -> Whole {
        match self {
            Self::Paused(paused) => Whole::Paused(paused),
            Self::Resting(resting) => Whole::Resting(resting),
            Self::Broken(broken) => broken.before,
        }
    }
}

/// What a project with whole files is while nothing moves it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whole {
    /// Paused.
    Paused(Paused),
    /// At rest.
    Resting(Resting),
}

/// A restore that was given up half way: the files are neither the old nor the new ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BrokenRestore {
    /// The operation.
    pub operation: OperationId,
    /// The checkpoint that was to be restored.
    pub checkpoint: CheckpointNumber,
    /// The checkpoint of what was there before.
    pub safety: CheckpointNumber,
    /// When it was given up.
    pub at: UnixMillis,
    /// Why.
    pub error: ErrorObject,
    /// What the project returns to once a restore has succeeded.
    pub before: Whole,
}

/// A checkpoint outside a pause, under way beside whatever the project is doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRun {
    /// The operation.
    pub operation: OperationId,
    /// Its number.
    pub checkpoint: CheckpointNumber,
    /// What makes it.
    pub trigger: Trigger,
    /// When it began.
    pub started_at: UnixMillis,
    /// What had come together when it began.
    #[serde(default)]
    pub tally: Tally,
}

/// Where a project stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectState {
    /// At rest or at work.
    Resting(Resting),
    /// A pause is under way.
    Pausing(Box<PauseRun>),
    /// Held.
    Paused(Box<Paused>),
    /// A resume is under way.
    Resuming(Box<ResumeRun>),
    /// A restore is under way.
    Restoring(Box<RestoreRun>),
    /// A restore was given up half way; only another restore leads out.
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
    /// Its name.
    pub name: ProjectName,
    /// What changes rarely.
    pub facts: Arc<Facts>,
    /// Where it stands.
    pub state: Arc<ProjectState>,
    /// A checkpoint being made outside a pause.
    pub checkpointing: Option<Arc<CheckpointRun>>,
    /// The numbers given out so far.
    pub counters: Counters,
    /// How long it was paused in all, milliseconds, the current pause excluded.
    pub total_paused_ms: i64,
    /// Its agents.
    pub agents: BTreeMap<AgentName, Arc<Agent>>,
    /// Its tasks.
    pub tasks: BTreeMap<u64, Arc<TaskView>>,
    /// Its questions, answered ones included.
    pub questions: BTreeMap<u64, Arc<QuestionView>>,
}

/// What changes rarely about a project.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The workspace's absolute path.
    pub workspace: String,
    /// What it is for.
    pub description: String,
    /// Where the workspace came from.
    pub source: Option<Source>,
    /// The settings.
    pub config: ProjectConfig,
    /// The phase of the work.
    pub phase: Phase,
    /// When it was created.
    pub created_at: UnixMillis,
}

/// The numbers that a project has given out; none is ever given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// The last task.
    pub task: u64,
    /// The last question.
    pub question: u64,
    /// The last checkpoint.
    pub checkpoint: CheckpointNumber,
    /// The checkpoint whose context an agent goes on with: the last one that was made on purpose, or
    /// the one that was restored since; 0 for none.
    #[serde(default)]
    pub context: CheckpointNumber,
    /// What agents that were removed had used: a budget does not forget them.
    #[serde(default)]
    pub removed_usage: Usage,
    /// What has come together since the newest checkpoint.
    #[serde(default)]
    pub since: Since,
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

    /// Returns the agents that have processes or will have them again by themselves.
    pub fn unfinished_agents(&self) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.values().filter(|agent| !agent.is_terminal() && agent.state != AgentState::Held(Held::Parked))
    }

    /// Returns the agents that a pause or a blip has to freeze.
    pub fn running_agents(&self) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.values().filter(|agent| match agent.state {
            AgentState::Running | AgentState::Stopping(_) => true,
            AgentState::Waiting(_)
            | AgentState::Backoff { .. }
            | AgentState::Starting
            | AgentState::Held(_)
            | AgentState::Ended(_)
            | AgentState::Failed { .. }
            | AgentState::TimedOut
            | AgentState::Interrupted { .. } => false,
        })
    }

    /// Returns the runs of these agents.
    pub fn runs<'a>(&self, agents: impl IntoIterator<Item = &'a Arc<Agent>>) -> Vec<AgentRun> {
        agents
            .into_iter()
            .filter_map(|agent| agent.current_run().map(|run| (agent.name.clone(), run.clone())))
            .collect()
    }

    /// Returns the operation under way, whatever it does.
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

    /// Says whether agents with processes stand still for as long as the state lasts, and must not be thawed by what
    /// goes on beside it.
    pub fn is_held(&self) -> bool {
        match &*self.state {
            ProjectState::Paused(_) | ProjectState::Restoring(_) | ProjectState::Broken(_) => true,
            ProjectState::Resting(_) | ProjectState::Pausing(_) | ProjectState::Resuming(_) => false,
        }
    }

    /// Returns the runs that are frozen.
    pub fn frozen_runs(&self) -> Vec<AgentRun> {
        self.runs(self.agents.values().filter(|agent| agent.state == AgentState::Held(Held::Frozen)))
    }

    /// Returns how long the project has been paused in all, milliseconds, the current pause included.
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
