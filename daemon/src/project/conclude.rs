//! Which events end an operation, and what whoever waits for it is told.

use fermata_protocol::event::Event;
use fermata_protocol::{ErrorObject, OperationId, Refusal};
use serde_json::{Value, json};

use crate::errors::Failure;

/// How an operation ended.
pub(super) struct Conclusion {
    /// The operation.
    pub operation: OperationId,
    /// Its result.
    pub result: Result<Value, ErrorObject>,
}

impl Conclusion {
    /// Returns what a caller gets.
    pub fn answer(&self) -> Result<Value, Failure> {
        self.result.clone().map_err(|error| Refusal::from(error).into())
    }
}

/// Finds the conclusions among events.
///
/// `reply` is the step's own account of an operation that succeeded, where it has one.
pub(super) fn conclusions(events: &[Event], reply: Option<&Value>) -> Vec<Conclusion> {
    events.iter().filter_map(|event| conclusion(event, reply)).collect()
}

fn conclusion(event: &Event, reply: Option<&Value>) -> Option<Conclusion> {
    let success = |operation: &OperationId, otherwise: Value| {
        Some(Conclusion { operation: operation.clone(), result: Ok(reply.cloned().unwrap_or(otherwise)) })
    };
    match event {
        Event::ProjectPaused { result, .. } => success(&result.operation_id, json!(result)),
        Event::ProjectResumed { result } => success(&result.operation_id, json!(result)),
        Event::CheckpointCreated { operation, checkpoint, .. } => {
            success(operation, json!({ "operation_id": operation, "checkpoint_id": checkpoint.id }))
        }
        Event::ProjectRestored { operation, checkpoint, safety, .. } => success(
            operation,
            json!({ "operation_id": operation, "checkpoint_id": checkpoint, "safety_checkpoint_id": safety }),
        ),
        Event::PauseFailed { operation, error }
        | Event::CheckpointFailed { operation, error }
        | Event::RestoreFailed { operation, error }
        | Event::RestoreGivenUp { operation, error, .. } => {
            Some(Conclusion { operation: operation.clone(), result: Err(error.clone()) })
        }
        Event::ProjectCreated { .. }
        | Event::ProjectChanged { .. }
        | Event::PhaseChanged { .. }
        | Event::ProjectRemoved {}
        | Event::AgentCreated { .. }
        | Event::AgentStarting { .. }
        | Event::AgentStarted { .. }
        | Event::AgentLaunchFailed { .. }
        | Event::AgentAdopted { .. }
        | Event::AgentUnreachable { .. }
        | Event::AgentFreezeBroken { .. }
        | Event::AgentStopping { .. }
        | Event::AgentWaiting { .. }
        | Event::AgentReady { .. }
        | Event::AgentTimeUp { .. }
        | Event::AgentStale { .. }
        | Event::AgentBackoff { .. }
        | Event::AgentGivenUp { .. }
        | Event::AgentExited { .. }
        | Event::AgentInterrupted { .. }
        | Event::AgentParked { .. }
        | Event::AgentRemoved { .. }
        | Event::AgentSuspended { .. }
        | Event::AgentContinued { .. }
        | Event::AgentTyped { .. }
        | Event::AgentSessionFound { .. }
        | Event::AgentProgressed { .. }
        | Event::AgentUsed { .. }
        | Event::AgentStateSaved { .. }
        | Event::TaskChanged { .. }
        | Event::QuestionAsked { .. }
        | Event::QuestionAnswered { .. }
        | Event::ContextAdded { .. }
        | Event::FlashSaved { .. }
        | Event::ContextPinned { .. }
        | Event::ContextRecalled { .. }
        | Event::OperationStepped { .. }
        | Event::OperationUndoing { .. }
        | Event::PauseStarted { .. }
        | Event::PauseWithheld { .. }
        | Event::ResumeStarted { .. }
        | Event::CheckpointStarted { .. }
        | Event::CheckpointPinned { .. }
        | Event::CheckpointRemoved { .. }
        | Event::RestoreStarted { .. }
        | Event::RestorePlanned { .. }
        | Event::RestoreRetried { .. }
        | Event::RestoreChecked { .. } => None,
    }
}
