//! Checkpoints outside a pause.

use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::event::Event;
use fermata_protocol::{ErrorObject, OperationId, Refusal};

use super::checks::refuse_during_operation;
use crate::command::Decision;
use crate::effect::Effect;
use crate::project::Project;
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

pub(super) fn done(
    project: &Project,
    operation: OperationId,
    outcome: Result<(Box<CheckpointView>, f64), ErrorObject>,
    imported: bool,
) -> Decision {
    if project.checkpointing.as_ref().is_none_or(|run| run.operation != operation) {
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
