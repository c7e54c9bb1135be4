//! What can be told of every event: its kind, and the agent that it is about.

use super::Event;
use crate::ids::AgentName;

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
