//! Projects: named workspaces with their agents, tasks, context and checkpoints.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::AgentView;
use crate::budget::{Budget, Usage};
use crate::checkpoint::CheckpointView;
use crate::context::ContextSummary;
use crate::error::ErrorObject;
use crate::ids::{CheckpointNumber, OperationId, ProjectName, UnixMillis};
use crate::operation::OperationView;
use crate::pause::{FreezerKind, PauseCause, PauseMode};
use crate::retention::Retention;
use crate::task::Phase;

/// The status of a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProjectStatus {
    /// Created, nothing has run yet.
    Init,
    /// Work is being planned.
    Planning,
    /// At least one agent runs or is meant to.
    Active,
    /// A pause is in progress.
    Pausing,
    /// Held: frozen, parked or as an image.
    Paused,
    /// A resume is in progress.
    Resuming,
    /// A restore is in progress.
    Restoring,
    /// Ended by a person.
    Stopped,
    /// Every agent ended well.
    Completed,
    /// An agent failed and none runs.
    Failed,
}

impl ProjectStatus {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Planning => "planning",
            Self::Active => "active",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Restoring => "restoring",
            Self::Stopped => "stopped",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

impl std::fmt::Display for ProjectStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where the workspace came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceSource {
    /// What kind of source it is: `git`, `directory`, or a word of your own.
    #[serde(rename = "type")]
    pub kind: String,
    /// The URL or path.
    pub location: String,
    /// The branch, where the source has branches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// What of the workspace a checkpoint covers, and when it freezes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProjectConfig {
    /// Glob patterns (as in `.gitignore`) that are covered although an ignore rule excludes them.
    pub include: Vec<String>,
    /// Glob patterns (as in `.gitignore`) that are not covered.
    pub exclude: Vec<String>,
    /// Whether `.gitignore` files and `info/exclude` count.
    pub use_gitignore: bool,
    /// Larger files are skipped and reported; bytes.
    pub max_file_bytes: u64,
    /// The token limit per agent; a flash save is due at `flash_save_at_percent` of it.
    pub token_limit: u64,
    /// At how many percent of the token limit a flash save is due.
    pub flash_save_at_percent: u8,
    /// How much all of its agents together may spend before the project is paused.
    #[serde(skip_serializing_if = "Budget::is_unset")]
    pub budget: Budget,
    /// Which checkpoints are kept, where that differs from the daemon's settings.
    #[serde(skip_serializing_if = "Retention::is_unset")]
    pub retention: Retention,
    /// When automatic checkpoints are made.
    #[serde(skip_serializing_if = "AutomaticCheckpoints::is_default")]
    pub automatic: AutomaticCheckpoints,
}

/// When automatic checkpoints are made: only while agents run, and none where nothing has
/// changed since the newest checkpoint. What is left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AutomaticCheckpoints {
    /// The units of progress since the newest checkpoint after which one is made; 0 for never. A unit is what agents
    /// count in `units_done`, and a task that is completed.
    pub every_units: u64,
    /// After the agents have run for so long since the newest checkpoint, milliseconds; 0 for never.
    pub every_ms: u64,
    /// When the phase of the work has changed.
    pub on_phase_change: bool,
    /// Before the daemon ends and leaves the agents running.
    pub before_shutdown: bool,
}

impl Default for AutomaticCheckpoints {
    fn default() -> Self {
        Self { every_units: 10, every_ms: 120_000, on_phase_change: true, before_shutdown: true }
    }
}

impl AutomaticCheckpoints {
    /// No automatic checkpoints.
    pub const NEVER: Self = Self { every_units: 0, every_ms: 0, on_phase_change: false, before_shutdown: false };

    /// Says whether nothing of it was changed.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for ProjectConfig {
    fn default() -> Self {
        Self {
            include: Vec::new(),
            exclude: Vec::new(),
            use_gitignore: true,
            max_file_bytes: 512 << 20,
            token_limit: 180_000,
            flash_save_at_percent: 80,
            budget: Budget::default(),
            retention: Retention::default(),
            automatic: AutomaticCheckpoints::default(),
        }
    }
}

/// Parameters of `project.create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectCreate {
    /// The new project's name.
    pub name: ProjectName,
    /// The absolute path of the workspace directory.
    pub workspace: String,
    /// What the project is for.
    #[serde(default)]
    pub description: String,
    /// Where the workspace came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<WorkspaceSource>,
    /// Settings; those left out have their defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ProjectConfig>,
}

/// Parameters of `project.set`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectSet {
    pub project: ProjectName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A new phase of the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// New settings, replacing the old ones whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ProjectConfig>,
}

/// Parameters of `project.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectList {}

/// Result of `project.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectListResult {
    /// All projects, by name.
    pub projects: Vec<ProjectView>,
}

/// Parameters of `project.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectShow {
    pub project: ProjectName,
}

/// Parameters of `project.remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectRemove {
    pub project: ProjectName,
    /// Removes the project's checkpoints as well; without it a project with checkpoints is kept.
    #[serde(default)]
    pub with_checkpoints: bool,
}

/// Result of a command that has nothing to report.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// Why and since when a project is paused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PauseView {
    /// The operation that paused it.
    pub operation_id: OperationId,
    /// The checkpoint that the pause made.
    pub checkpoint_id: CheckpointNumber,
    /// Since when.
    pub paused_at: UnixMillis,
    pub mode: PauseMode,
    /// What holds the processes.
    pub mechanism: FreezerKind,
    /// Who or what brought it about.
    #[serde(default, skip_serializing_if = "PauseCause::is_person")]
    pub cause: PauseCause,
    /// The reason that was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The checkpoint that was restored since; a thaw is then impossible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<CheckpointNumber>,
    /// Warnings for people, for instance that another program continued an agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A restore that was given up half way: the files are neither the old nor the new ones, and nothing is started in
/// them until a restore has succeeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BrokenView {
    pub operation_id: OperationId,
    /// The checkpoint that was to be restored.
    pub checkpoint_id: CheckpointNumber,
    /// The checkpoint of what was there before.
    pub safety_checkpoint_id: CheckpointNumber,
    /// When it was given up.
    pub at: UnixMillis,
    /// Why.
    pub error: ErrorObject,
}

/// The progress of a scan of a workspace that runs beside the agents, for instance the warm-up scan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScanProgress {
    /// The current part: `scan`, `read`, `trees`, `pack`.
    pub step: String,
    /// How much of it is done.
    pub done: u64,
    /// How much there is; 0 when that is not known.
    pub total: u64,
    /// What is counted: `files`, `objects`, `paths`.
    pub unit: String,
}

/// A project as `project.list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectView {
    pub name: ProjectName,
    /// What it is for.
    pub description: String,
    /// Where the workspace came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<WorkspaceSource>,
    /// The absolute path of the workspace.
    pub workspace: String,
    pub status: ProjectStatus,
    /// The phase of the work.
    pub phase: Phase,
    pub created_at: UnixMillis,
    /// How long it has been paused in all, milliseconds, the current pause excluded.
    pub total_paused_ms: i64,
    /// The current pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<PauseView>,
    /// A restore that was given up half way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<BrokenView>,
    pub agents: u64,
    /// How many of them run (frozen ones included).
    pub agents_running: u64,
    pub tasks_total: u64,
    /// How many of them are completed.
    pub tasks_completed: u64,
    /// How many questions wait for an answer.
    pub open_questions: u64,
    /// What its agents have reported to have used, those included that were removed since.
    #[serde(default)]
    pub usage: Usage,
    /// Bytes that all of its checkpoints take on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// A scan of the workspace that is in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub look: Option<ScanProgress>,
}

/// A project as `project.show` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectDetail {
    /// What `project.list` shows.
    pub project: ProjectView,
    pub config: ProjectConfig,
    /// Its agents, by name.
    pub agents: Vec<AgentView>,
    /// The operation in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationView>,
    /// The newest checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_checkpoint: Option<CheckpointView>,
    /// How many checkpoints it has.
    pub checkpoints: u64,
    /// What its agents know, in numbers.
    pub context: ContextSummary,
}
