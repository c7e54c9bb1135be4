//! Checkpoints outside a pause, and restores.

use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::event::Event;
use fermata_protocol::project::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{CheckpointNumber, Code, ErrorObject, OperationId, Refusal};

use super::refuse_while_moving;
use crate::agent::AgentState;
use crate::command::{Decision, Effect};
use crate::project::{Project, ProjectState, RestoreRun, RestoreStage};
use crate::retention::{self, Removal};

pub(super) fn begin(project: &Project, operation: OperationId, trigger: Trigger) -> Result<Decision, Refusal> {
    refuse_while_moving(project)?;
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
) -> Decision {
    if project.checkpointing.as_ref().is_none_or(|run| run.operation != operation) {
        return Decision::default();
    }
    Decision::events(vec![match outcome {
        Ok((checkpoint, frozen_ms)) => Event::CheckpointCreated { operation, checkpoint: *checkpoint, frozen_ms },
        Err(error) => Event::CheckpointFailed { operation, error },
    }])
}

/// Removes what [`retention::choose`] has chosen of the same state.
pub(super) fn remove(project: &Project, removals: Vec<Removal>) -> Decision {
    let in_use = retention::in_use(project);
    let going: Vec<Removal> = removals.into_iter().filter(|r| !in_use.contains(&r.point.number)).collect();
    if going.is_empty() {
        return Decision::default();
    }
    let checkpoints = going.iter().map(|removal| removal.point.number).collect();
    let events = going.into_iter().map(|removal| Event::CheckpointRemoved {
        checkpoint: removal.point.number,
        trigger: removal.point.trigger,
        reason: removal.reason,
        size_bytes: removal.point.bytes,
    });
    Decision::events(events.collect()).then(Effect::DiscardCheckpoints { checkpoints })
}

pub(super) fn begin_restore(
    project: &Project,
    operation: OperationId,
    checkpoint: CheckpointNumber,
) -> Result<Decision, Refusal> {
    refuse_while_moving(project)?;
    match &*project.state {
        ProjectState::Paused(_) => {
            if let Some(agent) = project.agents.values().find(|agent| matches!(agent.state, AgentState::Stopping(_))) {
                return Err(Refusal::new(
                    Code::OperationInProgress,
                    format!("agent '{}' of project '{}' is just being stopped", agent.name, project.name),
                )
                .hint("try again in a moment"));
            }
        }
        _ => {
            if let Some(agent) = project.unfinished_agents().next() {
                return Err(Refusal::new(
                    Code::AgentsRunning,
                    format!(
                        "agent '{}' of project '{}' is {} and would write into the restored files",
                        agent.name,
                        project.name,
                        agent.status(false)
                    ),
                )
                .hint(format!(
                    "fermatactl pause {0} && fermatactl resume {0} --checkpoint {checkpoint}",
                    project.name
                )));
            }
        }
    }
    let safety = project.counters.checkpoint + 1;
    let event = Event::RestoreStarted { operation: operation.clone(), checkpoint, safety };
    Ok(Decision::events(vec![event]).then(Effect::PlanRestore { operation, checkpoint, safety }))
}

/// Finds the restore with that id.
fn run<'a>(project: &'a Project, operation: &OperationId, stage: RestoreStage) -> Option<&'a RestoreRun> {
    match &*project.state {
        ProjectState::Restoring(run) if run.operation == *operation && run.stage == stage => Some(run),
        _ => None,
    }
}

pub(super) fn restore_planned(
    project: &Project,
    operation: OperationId,
    outcome: Result<Box<CheckpointView>, ErrorObject>,
) -> Decision {
    let Some(run) = run(project, &operation, RestoreStage::Preparing) else { return Decision::default() };
    match outcome {
        Ok(safety) => {
            let effect = apply_effect(run);
            Decision::events(vec![Event::RestorePlanned { operation, safety: *safety }]).then(effect)
        }
        Err(error) => Decision::events(vec![Event::RestoreFailed { operation: operation.clone(), error }])
            .then(Effect::ForgetPlan { operation }),
    }
}

/// Carries out the plan; recovery asks for it too.
pub(super) fn apply_effect(run: &RestoreRun) -> Effect {
    Effect::ApplyRestore { operation: run.operation.clone(), checkpoint: run.checkpoint, safety: run.safety }
}

pub(super) fn restored(
    project: &Project,
    operation: OperationId,
    phase: Phase,
    tasks: Vec<TaskView>,
    written: u64,
    removed: u64,
) -> Decision {
    let Some(run) = run(project, &operation, RestoreStage::Applying) else { return Decision::default() };
    let restored = Event::ProjectRestored {
        operation: operation.clone(),
        checkpoint: run.checkpoint,
        safety: run.safety,
        phase,
        tasks,
        written,
        removed,
    };
    Decision::events(vec![restored]).then(Effect::ForgetPlan { operation })
}
