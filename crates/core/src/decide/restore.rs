//! Restores: they begin, are planned, carried out, retried, and at last given up.
//!
//! ```text
//! started -> planned -> restored
//!    |          |  ^ retried
//!    v          v--/   failing for too long
//!  failed   given up: the project is broken until a restore succeeds
//! ```

use fermata_protocol::checkpoint::CheckpointView;
use fermata_protocol::event::Event;
use fermata_protocol::{CheckpointNumber, Code, ErrorObject, OperationId, Refusal, UnixMillis};

use super::checks::{given_up, refuse_during_operation};
use crate::agent::AgentState;
use crate::clock::millis;
use crate::command::{Decision, RestoredProject};
use crate::effect::Effect;
use crate::project::{Project, ProjectState, RestoreOperation, RestoreStage, StableState};

/// The fewest attempts before a restore is given up, however long they take.
const MIN_TRIES: u32 = 6;

/// The most attempts, in case the clock is set back.
const MAX_TRIES: u32 = 1_000;

/// The wait before the second attempt; each later wait is twice the one before.
const FIRST_WAIT_MS: u64 = 100;

/// The longest wait between two attempts.
const MAX_WAIT_MS: u64 = 10_000;

pub(super) fn begin(
    project: &Project,
    operation: OperationId,
    checkpoint: CheckpointNumber,
    paths: Vec<String>,
) -> Result<Decision, Refusal> {
    refuse_during_operation(project)?;
    let paused = match &*project.state {
        ProjectState::Paused(_) => true,
        ProjectState::Broken(broken) => matches!(broken.before, StableState::Paused(_)),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_) => false,
    };
    if paused {
        if let Some(agent) = project.agents.values().find(|agent| matches!(agent.state, AgentState::Stopping { .. })) {
            return Err(Refusal::new(
                Code::OperationInProgress,
                format!("agent '{}' of project '{}' is being stopped", agent.name, project.name),
            )
            .hint("try again in a moment"));
        }
    } else if let Some(agent) = project.unfinished_agents().next() {
        return Err(Refusal::new(
            Code::AgentsRunning,
            format!(
                "agent '{}' of project '{}' is {} and would write into the restored files",
                agent.name,
                project.name,
                agent.status(false)
            ),
        )
        .hint(format!("fermatactl pause {0} && fermatactl resume {0} --checkpoint {checkpoint}", project.name)));
    }
    let safety = project.counters.checkpoint + 1;
    let event = Event::RestoreStarted { operation: operation.clone(), checkpoint, safety, paths: paths.clone() };
    Ok(Decision::events(vec![event]).then(Effect::PlanRestore { operation, checkpoint, safety, paths }))
}

fn in_stage<'a>(project: &'a Project, operation: &OperationId, stage: RestoreStage) -> Option<&'a RestoreOperation> {
    match &*project.state {
        ProjectState::Restoring(restore) if restore.operation == *operation && restore.stage == stage => Some(restore),
        ProjectState::Restoring(_)
        | ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Paused(_)
        | ProjectState::Resuming(_)
        | ProjectState::Broken(_) => None,
    }
}

pub(super) fn planned(
    project: &Project,
    operation: OperationId,
    outcome: Result<Box<CheckpointView>, ErrorObject>,
) -> Decision {
    let Some(restore) = in_stage(project, &operation, RestoreStage::Preparing) else { return Decision::default() };
    match outcome {
        Ok(safety) => {
            let effect = apply_effect(restore, 0);
            Decision::events(vec![Event::RestorePlanned { operation, safety: *safety }]).then(effect)
        }
        Err(error) => Decision::events(vec![Event::RestoreFailed { operation: operation.clone(), error }])
            .then(Effect::ForgetPlan { operation }),
    }
}

/// The effect that carries out the plan; recovery requests it too.
pub(super) fn apply_effect(restore: &RestoreOperation, after_ms: u64) -> Effect {
    let (operation, checkpoint, safety) = (restore.operation.clone(), restore.checkpoint, restore.safety);
    Effect::ApplyRestore { operation, checkpoint, safety, after_ms }
}

pub(super) fn failing(
    project: &Project,
    operation: OperationId,
    error: ErrorObject,
    patience_ms: u64,
    now: UnixMillis,
) -> Decision {
    let Some(restore) = in_stage(project, &operation, RestoreStage::Applying) else { return Decision::default() };
    let tries = restore.trouble.as_ref().map_or(0, |trouble| trouble.tries) + 1;
    let failed_for = restore.trouble.as_ref().map_or(0, |trouble| now.since(trouble.since));
    let out_of_patience = tries >= MIN_TRIES && failed_for >= millis(patience_ms);
    if out_of_patience || tries >= MAX_TRIES {
        return give_up(project, restore, tries, &error);
    }
    let again_in_ms = (FIRST_WAIT_MS << (tries - 1).min(16)).min(MAX_WAIT_MS);
    let effect = apply_effect(restore, again_in_ms);
    Decision::events(vec![Event::RestoreRetried { operation, tries, error, again_in_ms }]).then(effect)
}

/// Frozen agents are ended: they must not be thawed over half restored files, nor over those that a later restore
/// brings back.
fn give_up(project: &Project, restore: &RestoreOperation, tries: u32, error: &ErrorObject) -> Decision {
    let (operation, checkpoint, safety) = (restore.operation.clone(), restore.checkpoint, restore.safety);
    let error = given_up(project, checkpoint, safety, tries, error);
    let event = Event::RestoreGivenUp { operation: operation.clone(), checkpoint, safety, error: error.into() };
    let decision = Decision::events(vec![event]).then(Effect::ForgetPlan { operation });
    let runs = project.frozen_runs();
    if runs.is_empty() { decision } else { decision.then(Effect::Park { runs }) }
}

pub(super) fn restored(
    project: &Project,
    operation: OperationId,
    rows: Option<RestoredProject>,
    written: u64,
    removed: u64,
) -> Decision {
    let Some(restore) = in_stage(project, &operation, RestoreStage::Applying) else { return Decision::default() };
    let here = || RestoredProject {
        phase: project.facts.phase,
        tasks: project.tasks.values().map(|task| (**task).clone()).collect(),
    };
    let RestoredProject { phase, tasks } = rows.unwrap_or_else(here);
    let restored = Event::ProjectRestored {
        operation: operation.clone(),
        checkpoint: restore.checkpoint,
        safety: restore.safety,
        phase,
        tasks,
        written,
        removed,
    };
    Decision::events(vec![restored]).then(Effect::ForgetPlan { operation })
}
