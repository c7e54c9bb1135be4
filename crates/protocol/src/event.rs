//! Events: durable, numbered facts in the past tense.
//!
//! The same type is stored in the database, folded into the state by `fermata_core::apply`, and
//! sent to subscribers; a variant or field, once released, is only ever added to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::{AgentSpec, ExitStatus, Progress, RunProcesses, StartCause, StopCause};
use crate::budget::Usage;
use crate::checkpoint::{CheckpointView, Trigger};
use crate::context::FlashSaveResult;
use crate::error::ErrorObject;
use crate::ids::{AgentName, CheckpointNumber, OperationId, RunId, UnixMillis};
use crate::operation::OperationKind;
use crate::pause::{PauseCause, PauseMode, PauseResult, ResumeResult};
use crate::project::{ProjectConfig, WorkspaceSource};
use crate::question::QuestionView;
use crate::retention::RemovalReason;
use crate::task::{Phase, TaskView};

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", content = "data")]
pub enum Event {
    #[serde(rename = "project.created")]
    ProjectCreated {
        /// The workspace's absolute path.
        workspace: String,
        description: String,
        source: Option<WorkspaceSource>,
        config: ProjectConfig,
    },
    /// Description or settings of a project changed.
    #[serde(rename = "project.changed")]
    ProjectChanged { description: Option<String>, config: Option<ProjectConfig> },
    /// The phase of the work changed.
    #[serde(rename = "project.phase_changed")]
    PhaseChanged { from: Phase, to: Phase },
    #[serde(rename = "project.removed")]
    ProjectRemoved {},
    /// An agent was added to a project.
    #[serde(rename = "agent.created")]
    AgentCreated { agent: AgentName, spec: AgentSpec },
    /// A run of an agent is being started.
    #[serde(rename = "agent.starting")]
    AgentStarting {
        agent: AgentName,
        run: RunId,
        /// The program and arguments of this run.
        argv: Vec<String>,
        cause: StartCause,
        /// SHA-256 of the run's token, in hexadecimal.
        token_sha256: String,
    },
    /// A run of an agent has started.
    #[serde(rename = "agent.started")]
    AgentStarted { agent: AgentName, run: RunId, processes: RunProcesses },
    /// A run of an agent could not be started.
    #[serde(rename = "agent.launch_failed")]
    AgentLaunchFailed { agent: AgentName, run: RunId, reason: String },
    /// A new daemon took over a running agent.
    #[serde(rename = "agent.adopted")]
    AgentAdopted { agent: AgentName, run: RunId },
    /// The shim of a running agent cannot be spoken to, for instance because it is of another version:
    /// the agent runs on, but can only be ended.
    #[serde(rename = "agent.unreachable")]
    AgentUnreachable { agent: AgentName, run: RunId, detail: String },
    /// A frozen agent ran although Fermata had not thawed it: another program continued it, or its lease
    /// expired. A pause in progress fails; the freeze of a committed pause is repeated.
    #[serde(rename = "agent.freeze_broken")]
    AgentFreezeBroken {
        agent: AgentName,
        run: RunId,
        /// How often since this was told last.
        times: u64,
        /// What happened.
        detail: String,
    },
    /// A stop of an agent began.
    #[serde(rename = "agent.stopping")]
    AgentStopping {
        agent: AgentName,
        /// Whether a new run follows at once.
        restart: bool,
        #[serde(default, skip_serializing_if = "StopCause::is_asked")]
        cause: StopCause,
    },
    /// The start of an agent waits until others have come far enough.
    #[serde(rename = "agent.waiting")]
    AgentWaiting {
        agent: AgentName,
        /// Those that it waits for now.
        for_agents: Vec<AgentName>,
    },
    /// A run of an agent is ready.
    #[serde(rename = "agent.ready")]
    AgentReady { agent: AgentName, run: RunId },
    /// The time of an agent's run is over; a checkpoint is taken, then it is ended.
    #[serde(rename = "agent.time_up")]
    AgentTimeUp {
        agent: AgentName,
        run: RunId,
        /// How long it has run, paused time not counted, milliseconds.
        ran_ms: i64,
    },
    /// An agent has not reported for too long.
    #[serde(rename = "agent.stale")]
    AgentStale {
        agent: AgentName,
        run: RunId,
        /// How long it has not reported, paused time not counted, milliseconds.
        silent_ms: i64,
        /// Whether it is stopped and started again, after a checkpoint.
        restart: bool,
    },
    /// An agent that has ended is started again later.
    #[serde(rename = "agent.backoff")]
    AgentBackoff {
        agent: AgentName,
        until: UnixMillis,
        /// Which start in a row that is.
        start: u32,
        /// Why it will be.
        cause: StartCause,
        /// How it ended.
        detail: String,
    },
    /// A start that was to come is called off.
    #[serde(rename = "agent.given_up")]
    AgentGivenUp {
        agent: AgentName,
        /// Why it counts as failed; none when a person called it off.
        reason: Option<String>,
    },
    /// A run of an agent ended.
    #[serde(rename = "agent.exited")]
    AgentExited {
        agent: AgentName,
        run: RunId,
        exit: ExitStatus,
        /// What is known beyond that.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
        ended_at: UnixMillis,
    },
    /// A run of an agent ended without a recorded exit: its shim or the machine went down.
    #[serde(rename = "agent.interrupted")]
    AgentInterrupted {
        agent: AgentName,
        run: RunId,
        /// What is known of it.
        detail: String,
        /// When it was last known to run, where it was found to be gone only later.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last_seen: Option<UnixMillis>,
    },
    /// The processes of a parked agent were ended; it stays paused.
    #[serde(rename = "agent.parked")]
    AgentParked { agent: AgentName, run: RunId },
    #[serde(rename = "agent.removed")]
    AgentRemoved { agent: AgentName },
    /// A signal that was not Fermata's stopped an agent's main process, for instance by Ctrl-Z.
    #[serde(rename = "agent.suspended")]
    AgentSuspended { agent: AgentName, run: RunId },
    /// An agent that was suspended goes on.
    #[serde(rename = "agent.continued")]
    AgentContinued { agent: AgentName, run: RunId },
    /// Something was typed into an agent's terminal without attaching to it.
    #[serde(rename = "agent.typed")]
    AgentTyped {
        agent: AgentName,
        run: RunId,
        /// Who typed: a user.
        by: String,
        bytes: u64,
    },
    /// The profile found the tool's own session id.
    #[serde(rename = "agent.session_found")]
    AgentSessionFound { agent: AgentName, session: String },
    /// An agent reported progress.
    #[serde(rename = "agent.progressed")]
    AgentProgressed { agent: AgentName, progress: Progress },
    /// An agent reported usage.
    #[serde(rename = "agent.used")]
    AgentUsed {
        agent: AgentName,
        /// What was used since the last report.
        usage: Usage,
    },
    /// An agent saved its own state blob.
    #[serde(rename = "agent.state_saved")]
    AgentStateSaved {
        agent: AgentName,
        /// The blob's size as JSON text.
        bytes: u64,
    },
    /// A task was created or changed.
    #[serde(rename = "task.changed")]
    TaskChanged { task: TaskView },
    /// An agent asked a question.
    #[serde(rename = "question.asked")]
    QuestionAsked { question: QuestionView },
    #[serde(rename = "question.answered")]
    QuestionAnswered { id: u64, agent: AgentName, answer: String, answered_at: UnixMillis },
    /// Context items were put.
    #[serde(rename = "context.added")]
    ContextAdded { agent: AgentName, items: u64, tokens: u64 },
    /// A flash save was applied outside a pause.
    #[serde(rename = "context.flash_saved")]
    FlashSaved { agent: AgentName, result: FlashSaveResult },
    /// A context item was pinned or unpinned.
    #[serde(rename = "context.pinned")]
    ContextPinned { id: i64, pinned: bool },
    /// Archived context items were brought back.
    #[serde(rename = "context.recalled")]
    ContextRecalled { ids: Vec<i64> },
    /// An operation went on to another step.
    #[serde(rename = "operation.stepped")]
    OperationStepped {
        operation: OperationId,
        /// What it does.
        operation_kind: OperationKind,
        /// The step that begins.
        step: String,
        /// The step that was concluded, and how long it took in milliseconds.
        concluded: Option<(String, f64)>,
    },
    /// A step of an operation failed or it was cancelled; what was done is being undone.
    #[serde(rename = "operation.undoing")]
    OperationUndoing { operation: OperationId, step: String, error: ErrorObject },
    /// A pause began.
    #[serde(rename = "pause.started")]
    PauseStarted {
        operation: OperationId,
        /// The number that its checkpoint will have.
        checkpoint: CheckpointNumber,
        mode: PauseMode,
        /// Who or what brought it about.
        #[serde(default, skip_serializing_if = "PauseCause::is_person")]
        cause: PauseCause,
        reason: Option<String>,
        /// How long agents with a channel have to acknowledge, milliseconds.
        grace_ms: Option<u64>,
    },
    #[serde(rename = "project.paused")]
    ProjectPaused {
        checkpoint: CheckpointView,
        /// Tokens that the flash save archived.
        tokens_archived: u64,
        result: PauseResult,
        /// The agents that were frozen.
        agents: Vec<AgentName>,
    },
    /// A pause failed or was cancelled, and was undone.
    #[serde(rename = "pause.failed")]
    PauseFailed { operation: OperationId, error: ErrorObject },
    /// The project would have been paused automatically, and was not.
    #[serde(rename = "pause.withheld")]
    PauseWithheld {
        /// What would have brought it about.
        cause: PauseCause,
        /// What was the matter.
        reason: String,
        /// Why it was not paused.
        because: String,
    },
    /// A resume began.
    #[serde(rename = "resume.started")]
    ResumeStarted {
        operation: OperationId,
        /// Whether it goes on over its budget.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        over_budget: bool,
    },
    #[serde(rename = "project.resumed")]
    ProjectResumed { result: ResumeResult },
    /// A checkpoint outside a pause began.
    #[serde(rename = "checkpoint.started")]
    CheckpointStarted { operation: OperationId, checkpoint: CheckpointNumber, trigger: Trigger },
    /// A checkpoint was made.
    #[serde(rename = "checkpoint.created")]
    CheckpointCreated {
        operation: OperationId,
        checkpoint: CheckpointView,
        /// How long the agents stood still, milliseconds.
        frozen_ms: f64,
        /// Whether it came from a file: then it says nothing about the project as it is.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        imported: bool,
    },
    /// A checkpoint could not be made.
    #[serde(rename = "checkpoint.failed")]
    CheckpointFailed { operation: OperationId, error: ErrorObject },
    /// A checkpoint was pinned or unpinned.
    #[serde(rename = "checkpoint.pinned")]
    CheckpointPinned {
        checkpoint: CheckpointNumber,
        /// Whether retention must leave it alone.
        pinned: bool,
    },
    #[serde(rename = "checkpoint.removed")]
    CheckpointRemoved {
        checkpoint: CheckpointNumber,
        trigger: Trigger,
        reason: RemovalReason,
        /// Bytes that it had added to the disk.
        size_bytes: u64,
    },
    /// A restore began.
    #[serde(rename = "restore.started")]
    RestoreStarted {
        operation: OperationId,
        /// The checkpoint to restore.
        checkpoint: CheckpointNumber,
        /// The number of the checkpoint of what is there now.
        safety: CheckpointNumber,
        /// Only these paths are restored, and no rows; everything when there are none.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        paths: Vec<String>,
    },
    /// The safety checkpoint was made and the plan written down: from here on the restore only rolls forward.
    #[serde(rename = "restore.planned")]
    RestorePlanned {
        operation: OperationId,
        /// The safety checkpoint.
        safety: CheckpointView,
    },
    /// A restore could not be carried out and is tried again.
    #[serde(rename = "restore.retried")]
    RestoreRetried {
        operation: OperationId,
        /// How often it has failed.
        tries: u32,
        error: ErrorObject,
        /// When the next try begins, milliseconds from now.
        again_in_ms: u64,
    },
    /// A restore failed for too long and was given up half way: nothing is started in its project until a restore has
    /// succeeded.
    #[serde(rename = "restore.given_up")]
    RestoreGivenUp {
        operation: OperationId,
        /// The checkpoint that was to be restored.
        checkpoint: CheckpointNumber,
        /// The checkpoint of what was there before.
        safety: CheckpointNumber,
        error: ErrorObject,
    },
    /// After a restore the whole workspace was compared with the checkpoint.
    #[serde(rename = "restore.checked")]
    RestoreChecked {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        /// How many paths were compared.
        paths: u64,
        /// How many are not as the checkpoint has them.
        differing: u64,
        /// Some of them, each with what is different.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        examples: Vec<String>,
    },
    /// A checkpoint was restored.
    #[serde(rename = "project.restored")]
    ProjectRestored {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        /// The safety checkpoint.
        safety: CheckpointNumber,
        phase: Phase,
        tasks: Vec<TaskView>,
        written: u64,
        removed: u64,
    },
    /// A restore failed before anything was changed.
    #[serde(rename = "restore.failed")]
    RestoreFailed { operation: OperationId, error: ErrorObject },
}

impl Event {
    /// Returns the event's kind, for instance `project.paused`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::ProjectCreated { .. } => "project.created",
            Self::ProjectChanged { .. } => "project.changed",
            Self::PhaseChanged { .. } => "project.phase_changed",
            Self::ProjectRemoved {} => "project.removed",
            Self::AgentCreated { .. } => "agent.created",
            Self::AgentStarting { .. } => "agent.starting",
            Self::AgentStarted { .. } => "agent.started",
            Self::AgentLaunchFailed { .. } => "agent.launch_failed",
            Self::AgentAdopted { .. } => "agent.adopted",
            Self::AgentUnreachable { .. } => "agent.unreachable",
            Self::AgentFreezeBroken { .. } => "agent.freeze_broken",
            Self::AgentStopping { .. } => "agent.stopping",
            Self::AgentWaiting { .. } => "agent.waiting",
            Self::AgentReady { .. } => "agent.ready",
            Self::AgentTimeUp { .. } => "agent.time_up",
            Self::AgentStale { .. } => "agent.stale",
            Self::AgentBackoff { .. } => "agent.backoff",
            Self::AgentGivenUp { .. } => "agent.given_up",
            Self::AgentExited { .. } => "agent.exited",
            Self::AgentInterrupted { .. } => "agent.interrupted",
            Self::AgentParked { .. } => "agent.parked",
            Self::AgentRemoved { .. } => "agent.removed",
            Self::AgentSuspended { .. } => "agent.suspended",
            Self::AgentContinued { .. } => "agent.continued",
            Self::AgentTyped { .. } => "agent.typed",
            Self::AgentSessionFound { .. } => "agent.session_found",
            Self::AgentProgressed { .. } => "agent.progressed",
            Self::AgentUsed { .. } => "agent.used",
            Self::AgentStateSaved { .. } => "agent.state_saved",
            Self::TaskChanged { .. } => "task.changed",
            Self::QuestionAsked { .. } => "question.asked",
            Self::QuestionAnswered { .. } => "question.answered",
            Self::ContextAdded { .. } => "context.added",
            Self::FlashSaved { .. } => "context.flash_saved",
            Self::ContextPinned { .. } => "context.pinned",
            Self::ContextRecalled { .. } => "context.recalled",
            Self::OperationStepped { .. } => "operation.stepped",
            Self::OperationUndoing { .. } => "operation.undoing",
            Self::PauseStarted { .. } => "pause.started",
            Self::ProjectPaused { .. } => "project.paused",
            Self::PauseFailed { .. } => "pause.failed",
            Self::PauseWithheld { .. } => "pause.withheld",
            Self::ResumeStarted { .. } => "resume.started",
            Self::ProjectResumed { .. } => "project.resumed",
            Self::CheckpointStarted { .. } => "checkpoint.started",
            Self::CheckpointCreated { .. } => "checkpoint.created",
            Self::CheckpointFailed { .. } => "checkpoint.failed",
            Self::CheckpointPinned { .. } => "checkpoint.pinned",
            Self::CheckpointRemoved { .. } => "checkpoint.removed",
            Self::RestoreStarted { .. } => "restore.started",
            Self::RestorePlanned { .. } => "restore.planned",
            Self::RestoreRetried { .. } => "restore.retried",
            Self::RestoreGivenUp { .. } => "restore.given_up",
            Self::RestoreChecked { .. } => "restore.checked",
            Self::ProjectRestored { .. } => "project.restored",
            Self::RestoreFailed { .. } => "restore.failed",
        }
    }

    /// Returns the agent that the event is about, where it is about one.
    pub fn agent(&self) -> Option<&AgentName> {
        match self {
            Self::AgentCreated { agent, .. }
            | Self::AgentStarting { agent, .. }
            | Self::AgentStarted { agent, .. }
            | Self::AgentLaunchFailed { agent, .. }
            | Self::AgentAdopted { agent, .. }
            | Self::AgentUnreachable { agent, .. }
            | Self::AgentFreezeBroken { agent, .. }
            | Self::AgentStopping { agent, .. }
            | Self::AgentWaiting { agent, .. }
            | Self::AgentReady { agent, .. }
            | Self::AgentTimeUp { agent, .. }
            | Self::AgentStale { agent, .. }
            | Self::AgentBackoff { agent, .. }
            | Self::AgentGivenUp { agent, .. }
            | Self::AgentExited { agent, .. }
            | Self::AgentInterrupted { agent, .. }
            | Self::AgentParked { agent, .. }
            | Self::AgentRemoved { agent }
            | Self::AgentSuspended { agent, .. }
            | Self::AgentContinued { agent, .. }
            | Self::AgentTyped { agent, .. }
            | Self::AgentSessionFound { agent, .. }
            | Self::AgentProgressed { agent, .. }
            | Self::AgentUsed { agent, .. }
            | Self::AgentStateSaved { agent, .. }
            | Self::QuestionAnswered { agent, .. }
            | Self::ContextAdded { agent, .. }
            | Self::FlashSaved { agent, .. } => Some(agent),
            Self::TaskChanged { task } => task.agent.as_ref(),
            Self::QuestionAsked { question } => Some(&question.agent),
            Self::ProjectCreated { .. }
            | Self::ProjectChanged { .. }
            | Self::PhaseChanged { .. }
            | Self::ProjectRemoved {}
            | Self::ContextPinned { .. }
            | Self::ContextRecalled { .. }
            | Self::OperationStepped { .. }
            | Self::OperationUndoing { .. }
            | Self::PauseStarted { .. }
            | Self::ProjectPaused { .. }
            | Self::PauseFailed { .. }
            | Self::PauseWithheld { .. }
            | Self::ResumeStarted { .. }
            | Self::ProjectResumed { .. }
            | Self::CheckpointStarted { .. }
            | Self::CheckpointCreated { .. }
            | Self::CheckpointFailed { .. }
            | Self::CheckpointPinned { .. }
            | Self::CheckpointRemoved { .. }
            | Self::RestoreStarted { .. }
            | Self::RestorePlanned { .. }
            | Self::RestoreRetried { .. }
            | Self::RestoreGivenUp { .. }
            | Self::RestoreChecked { .. }
            | Self::ProjectRestored { .. }
            | Self::RestoreFailed { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serialised_kind_is_the_one_that_kind_returns() {
        let event = Event::AgentRemoved { agent: AgentName::new("coder").expect("valid") };
        let value = serde_json::to_value(&event).expect("serialises");
        assert_eq!(value["kind"], event.kind());
        assert_eq!(value["data"]["agent"], "coder");
    }
}
