//! Which events end an operation, and with which result.

use fermata_protocol::event::Event;
use fermata_protocol::{ErrorObject, OperationId, Refusal};
use serde_json::{Value, json};

use crate::errors::Failure;

/// The end of an operation.
pub(super) struct Conclusion {
    pub operation: OperationId,
    pub result: Result<Value, ErrorObject>,
}

impl Conclusion {
    /// Returns the reply of the call that began the operation.
    pub fn answer(&self) -> Result<Value, Failure> {
        self.result.clone().map_err(|error| Refusal::from(error).into())
    }
}

/// Returns the conclusions among events. `reply` is the result that the step itself has reported; without one the
/// result is derived from the event.
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
