//! Restores: begin, are planned, carried out, tried again, and at last given up.
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

use super::refuse_while_moving;
use crate::agent::AgentState;
use crate::command::{Decision, Effect, Rewound};
use crate::due::millis;
use crate::project::{BrokenRestore, Project, ProjectState, RestoreRun, RestoreStage, Whole};

/// A restore is tried at least so often before it is given up: a moment of bad luck is no reason.
const LEAST_TRIES: u32 = 6;

/// And at most so often, should the clock be set back.
const MOST_TRIES: u32 = 1_000;

/// The first wait between two tries, milliseconds; each is twice the one before.
const FIRST_WAIT_MS: u64 = 100;

/// The longest wait between two tries, milliseconds.
const LONGEST_WAIT_MS: u64 = 10_000;

pub(super) fn begin(
    project: &Project,
    operation: OperationId,
    checkpoint: CheckpointNumber,
    paths: Vec<String>,
) -> Result<Decision, Refusal> {
    refuse_while_moving(project)?;
    let held = match &*project.state {
        ProjectState::Paused(_) => true,
        ProjectState::Broken(broken) => matches!(broken.before, Whole::Paused(_)),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_) => false,
    };
    if held {
        if let Some(agent) = project.agents.values().find(|agent| matches!(agent.state, AgentState::Stopping(_))) {
            return Err(Refusal::new(
                Code::OperationInProgress,
                format!("agent '{}' of project '{}' is just being stopped", agent.name, project.name),
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

/// Finds the restore with that id.
fn run<'a>(project: &'a Project, operation: &OperationId, stage: RestoreStage) -> Option<&'a RestoreRun> {
    match &*project.state {
        ProjectState::Restoring(run) if run.operation == *operation && run.stage == stage => Some(run),
        _ => None,
    }
}

pub(super) fn planned(
    project: &Project,
    operation: OperationId,
    outcome: Result<Box<CheckpointView>, ErrorObject>,
) -> Decision {
    let Some(run) = run(project, &operation, RestoreStage::Preparing) else { return Decision::default() };
    match outcome {
        Ok(safety) => {
            let effect = apply_effect(run, 0);
            Decision::events(vec![Event::RestorePlanned { operation, safety: *safety }]).then(effect)
        }
        Err(error) => Decision::events(vec![Event::RestoreFailed { operation: operation.clone(), error }])
            .then(Effect::ForgetPlan { operation }),
    }
}

/// Carries out the plan; recovery asks for it too.
pub(super) fn apply_effect(run: &RestoreRun, after_ms: u64) -> Effect {
    let (operation, checkpoint, safety) = (run.operation.clone(), run.checkpoint, run.safety);
    Effect::ApplyRestore { operation, checkpoint, safety, after_ms }
}

pub(super) fn failing(
    project: &Project,
    operation: OperationId,
    error: ErrorObject,
    patience_ms: u64,
    now: UnixMillis,
) -> Decision {
    let Some(run) = run(project, &operation, RestoreStage::Applying) else { return Decision::default() };
    let tries = run.trouble.as_ref().map_or(0, |trouble| trouble.tries) + 1;
    let failed_for = run.trouble.as_ref().map_or(0, |trouble| now.since(trouble.since));
    let out_of_patience = tries >= LEAST_TRIES && failed_for >= millis(patience_ms);
    if out_of_patience || tries >= MOST_TRIES {
        return give_up(project, run, tries, &error);
    }
    let again_in_ms = (FIRST_WAIT_MS << (tries - 1).min(16)).min(LONGEST_WAIT_MS);
    let effect = apply_effect(run, again_in_ms);
    Decision::events(vec![Event::RestoreRetried { operation, tries, error, again_in_ms }]).then(effect)
}

/// What is frozen is ended: it must not be thawed over files that are neither old nor new, nor over those that a later
/// restore brings back.
fn give_up(project: &Project, run: &RestoreRun, tries: u32, error: &ErrorObject) -> Decision {
    let (operation, checkpoint, safety) = (run.operation.clone(), run.checkpoint, run.safety);
    let text = format!(
        "checkpoint {checkpoint} of project '{}' is only half restored, after {tries} tries: {}",
        project.name, error.message
    );
    let error = Refusal::new(Code::RestoreFailed, text)
        .hint(way_out(project, safety))
        .details(serde_json::json!({ "safety_checkpoint_id": safety, "cause": error.data.code }));
    let given_up = Event::RestoreGivenUp { operation: operation.clone(), checkpoint, safety, error: error.into() };
    let decision = Decision::events(vec![given_up]).then(Effect::ForgetPlan { operation });
    let runs = project.frozen_runs();
    if runs.is_empty() { decision } else { decision.then(Effect::Park { runs }) }
}

fn way_out(project: &Project, safety: CheckpointNumber) -> String {
    format!(
        "once the cause is mended: fermatactl checkpoint restore {0} {safety} brings back what was there",
        project.name
    )
}

/// Refuses what a project with half restored files cannot do.
pub(super) fn broken(project: &Project, broken: &BrokenRestore) -> Refusal {
    let text = format!(
        "the files of project '{}' are half restored: the restore of checkpoint {} was given up",
        project.name, broken.checkpoint
    );
    Refusal::new(Code::RestoreFailed, text)
        .hint(way_out(project, broken.safety))
        .details(serde_json::json!({ "operation_id": broken.operation, "safety_checkpoint_id": broken.safety }))
}

pub(super) fn restored(
    project: &Project,
    operation: OperationId,
    rows: Option<Rewound>,
    written: u64,
    removed: u64,
) -> Decision {
    let Some(run) = run(project, &operation, RestoreStage::Applying) else { return Decision::default() };
    let here =
        || Rewound { phase: project.facts.phase, tasks: project.tasks.values().map(|task| (**task).clone()).collect() };
    let Rewound { phase, tasks } = rows.unwrap_or_else(here);
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
