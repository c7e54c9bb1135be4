//! Checkpoints outside a pause.

use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::event::Event;
use fermata_protocol::{Code, ErrorObject, OperationId, Refusal};

use super::checks::refuse_during_operation;
use crate::command::Decision;
use crate::effect::Effect;
use crate::project::{CheckpointOperation, Direction, Project};
use crate::retention::{self, Removal};

pub(super) fn begin(project: &Project, operation: OperationId, trigger: Trigger) -> Result<Decision, Refusal> {
    refuse_during_operation(project)?;
    let checkpoint = project.counters.checkpoint + 1;
    let event = Event::CheckpointStarted { operation: operation.clone(), checkpoint, trigger };
    Ok(Decision::events(vec![event]).then(Effect::Checkpoint {
        operation,
        checkpoint,
        trigger,
        runs: project.runs(project.running_agents()),
    }))
}

/// Finds the checkpoint with that id.
fn in_progress<'a>(project: &'a Project, operation: &OperationId) -> Option<&'a CheckpointOperation> {
    project.checkpointing.as_deref().filter(|making| making.operation == *operation)
}

/// Cancels the checkpoint with that id, if it is in progress. Nothing else begins before it is undone: the undo thaws
/// agents.
pub(super) fn cancel(project: &Project, operation: &OperationId) -> Option<Decision> {
    let making = in_progress(project, operation)?;
    if making.direction != Direction::Forward {
        return Some(Decision::default());
    }
    let error = Refusal::new(
        Code::OperationCancelled,
        format!("checkpoint {} of project '{}' was cancelled", making.checkpoint, project.name),
    );
    let event =
        Event::OperationUndoing { operation: operation.clone(), step: "checkpoint".into(), error: error.into() };
    Some(Decision::events(vec![event]).then(undo_effect(project, making)))
}

/// The undo of a checkpoint; recovery decides on it too.
pub(super) fn undo_effect(project: &Project, making: &CheckpointOperation) -> Effect {
    Effect::Undo {
        operation: making.operation.clone(),
        checkpoint: making.checkpoint,
        runs: if project.stays_frozen() { Vec::new() } else { project.runs(project.alive_agents()) },
    }
}

/// The checkpoint with that id is undone: cancelled before, or by the end of the daemon.
pub(super) fn undone(project: &Project, operation: OperationId) -> Decision {
    let Some(making) = in_progress(project, &operation) else { return Decision::default() };
    let error = match &making.direction {
        Direction::Undoing(error) => error.clone(),
        Direction::Forward => Refusal::new(
            Code::CheckpointFailed,
            format!("the daemon exited while it was making checkpoint {}", making.checkpoint),
        )
        .into(),
    };
    Decision::events(vec![Event::CheckpointFailed { operation, error }])
}

pub(super) fn done(
    project: &Project,
    operation: OperationId,
    outcome: Result<(Box<CheckpointView>, f64), ErrorObject>,
    imported: bool,
) -> Decision {
    // The report of one that is being undone comes late: what it made is discarded.
    if in_progress(project, &operation).is_none_or(|making| making.direction != Direction::Forward) {
        return Decision::default();
    }
    Decision::events(vec![match outcome {
        Ok((checkpoint, frozen_ms)) => {
            Event::CheckpointCreated { operation, checkpoint: *checkpoint, frozen_ms, imported }
        }
        Err(error) => Event::CheckpointFailed { operation, error },
    }])
}

/// Removes what [`retention::choose`] has chosen, but for checkpoints that have come into use since.
pub(super) fn remove(project: &Project, removals: Vec<Removal>) -> Decision {
    let in_use = retention::in_use(project);
    let going: Vec<Removal> = removals.into_iter().filter(|r| !in_use.contains(&r.checkpoint.number)).collect();
    if going.is_empty() {
        return Decision::default();
    }
    let checkpoints = going.iter().map(|removal| removal.checkpoint.number).collect();
    let events = going.into_iter().map(|removal| Event::CheckpointRemoved {
        checkpoint: removal.checkpoint.number,
        trigger: removal.checkpoint.trigger,
        reason: removal.reason,
        size_bytes: removal.checkpoint.bytes,
    });
    Decision::events(events.collect()).then(Effect::DiscardCheckpoints { checkpoints })
}
