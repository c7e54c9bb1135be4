//! The pause: begins, goes from step to step, commits, or is undone.

use fermata_protocol::event::Event;
use fermata_protocol::operation::OperationKind;
use fermata_protocol::pause::{PauseCause, PauseMode, PauseResult};
use fermata_protocol::{AgentName, Code, ErrorObject, OperationId, Refusal, UnixMillis};

use super::refuse_while_moving;
use crate::agent::AgentState;
use crate::apply::parks;
use crate::command::{Decision, Effect, Sealed, StepReport};
use crate::context::reduction_percentage;
use crate::project::{Course, PauseRun, PauseStep, Project, ProjectState, Resting};

/// The pause that is wanted.
pub(super) struct Wanted {
    pub(super) cause: PauseCause,
    pub(super) reason: Option<String>,
    pub(super) mode: PauseMode,
    pub(super) grace_ms: Option<u64>,
}

pub(super) fn begin(project: &Project, operation: OperationId, wanted: Wanted) -> Result<Decision, Refusal> {
    let Wanted { cause, reason, mode, grace_ms } = wanted;
    if let ProjectState::Paused(paused) = &*project.state {
        return Err(Refusal::new(
            Code::AlreadyPaused,
            format!("project '{}' is paused already, with checkpoint {}", project.name, paused.checkpoint),
        )
        .hint(format!("fermatactl resume {}", project.name))
        .details(serde_json::json!({ "checkpoint_id": paused.checkpoint, "operation_id": paused.operation })));
    }
    refuse_while_moving(project)?;
    if let ProjectState::Broken(broken) = &*project.state {
        return Err(super::restore::broken(project, broken));
    }
    match &*project.state {
        ProjectState::Resting(Resting::Active) if project.unfinished_agents().next().is_some() => {}
        _ => {
            return Err(Refusal::new(
                Code::NothingToPause,
                format!("project '{}' is {} and has no running agent", project.name, project.state.status()),
            )
            .hint(format!("to save its state: fermatactl checkpoint create {}", project.name)));
        }
    }
    // Processes that appear behind the freeze would run on in a paused project, and so would those
    // that have a grace to end in, which a shim does not freeze.
    let moving = |agent: &&std::sync::Arc<crate::agent::Agent>| {
        matches!(agent.state, AgentState::Starting | AgentState::Stopping(_))
    };
    if let Some(agent) = project.agents.values().find(moving) {
        let doing = if agent.state == AgentState::Starting { "started" } else { "stopped" };
        return Err(Refusal::new(
            Code::OperationInProgress,
            format!("agent '{}' of project '{}' is just being {doing}", agent.name, project.name),
        )
        .hint("try again in a moment"));
    }
    if mode == PauseMode::Image {
        return Err(Refusal::new(Code::ModeUnavailable, "no loaded plugin can save process images")
            .hint("use --mode freeze or --mode park"));
    }
    let event = Event::PauseStarted {
        operation: operation.clone(),
        checkpoint: project.counters.checkpoint + 1,
        mode,
        cause,
        reason,
        grace_ms,
    };
    Ok(Decision::events(vec![event]).then(Effect::PauseStep { operation, step: PauseStep::Validate }))
}

/// Finds the pause with that id.
fn run<'a>(project: &'a Project, operation: &OperationId) -> Option<&'a PauseRun> {
    match &*project.state {
        ProjectState::Pausing(run) if run.operation == *operation => Some(run),
        _ => None,
    }
}

pub(super) fn stepped(
    project: &Project,
    operation: OperationId,
    step: PauseStep,
    took_ms: f64,
    outcome: Result<StepReport, ErrorObject>,
    now: UnixMillis,
) -> Decision {
    let Some(run) = run(project, &operation) else { return Decision::default() };
    if run.step != step || run.course != Course::Forward {
        return Decision::default();
    }
    match (outcome, step.next()) {
        (Err(error), _) => undo(project, run, error),
        (Ok(StepReport::Sealed(sealed)), None) => commit(project, run, *sealed, took_ms, now),
        (Ok(_), Some(next)) => {
            let event = Event::OperationStepped {
                operation: operation.clone(),
                operation_kind: OperationKind::Pause,
                step: next.as_str().into(),
                concluded: Some((step.as_str().into(), took_ms)),
            };
            Decision::events(vec![event]).then(Effect::PauseStep { operation, step: next })
        }
        (Ok(StepReport::Done), None) => {
            let error = Refusal::new(Code::InternalError, "the last step of the pause brought no checkpoint");
            undo(project, run, error.into())
        }
    }
}

fn commit(project: &Project, run: &PauseRun, sealed: Sealed, took_ms: f64, now: UnixMillis) -> Decision {
    let mut steps_ms = run.steps_ms.clone();
    steps_ms.insert(PauseStep::Checkpoint.as_str().into(), took_ms);
    let saved = sealed.flash_save;
    let result = PauseResult {
        success: true,
        operation_id: run.operation.clone(),
        checkpoint_id: run.checkpoint,
        tokens_before: saved.tokens_before,
        tokens_after: saved.tokens_after,
        reduction_percentage: reduction_percentage(saved.tokens_before, saved.tokens_after),
        items_archived: saved.items_archived,
        hot_items_retained: saved.hot_items_retained,
        warm_items_retained: saved.warm_items_retained,
        paused_at: now,
        mode: run.mode,
        cause: run.cause,
        mechanism: sealed.mechanism,
        processes: sealed.processes,
        frozen_ms: sealed.frozen_ms,
        steps_ms,
        warnings: sealed.warnings,
    };
    let sessions = sealed
        .sessions
        .into_iter()
        .filter(|(name, session)| project.agents.get(name).is_some_and(|agent| agent.session.as_ref() != Some(session)))
        .map(|(agent, session)| Event::AgentSessionFound { agent, session });
    let mut events: Vec<Event> = sessions.collect();
    // An agent that has ended, or that somebody stops meanwhile, is not held: the stop stands.
    let agents: Vec<AgentName> = sealed
        .agents
        .into_iter()
        .filter(|name| project.agents.get(name).is_some_and(|agent| agent.state == AgentState::Running))
        .collect();
    events.push(Event::ProjectPaused {
        checkpoint: sealed.checkpoint,
        tokens_archived: saved.tokens_archived,
        result,
        agents: agents.clone(),
    });
    let runs = project.runs(agents.iter().filter_map(|name| project.agents.get(name)));
    let decision = Decision::events(events).then(Effect::Hold { runs: runs.clone() });
    if parks(run.mode) { decision.then(Effect::Park { runs }) } else { decision }
}

pub(super) fn undo(project: &Project, run: &PauseRun, error: ErrorObject) -> Decision {
    let event = Event::OperationUndoing { operation: run.operation.clone(), step: run.step.as_str().into(), error };
    Decision::events(vec![event]).then(undo_effect(project, run))
}

/// The undo of a pause; recovery asks for it too.
pub(super) fn undo_effect(project: &Project, run: &PauseRun) -> Effect {
    Effect::Undo {
        operation: run.operation.clone(),
        checkpoint: run.checkpoint,
        runs: project.runs(project.alive_agents()),
    }
}

pub(super) fn undone(project: &Project, operation: OperationId) -> Decision {
    if let Some(run) = run(project, &operation)
        && let Course::Undoing(error) = &run.course
    {
        return Decision::events(vec![Event::PauseFailed { operation, error: error.clone() }]);
    }
    match &project.checkpointing {
        Some(run) if run.operation == operation => {
            let error = Refusal::new(
                Code::CheckpointFailed,
                format!("the daemon ended while it made checkpoint {}", run.checkpoint),
            );
            Decision::events(vec![Event::CheckpointFailed { operation, error: error.into() }])
        }
        _ => Decision::default(),
    }
}

pub(super) fn cancel(project: &Project, operation: OperationId) -> Result<Decision, Refusal> {
    if let Some(run) = run(project, &operation) {
        return match run.course {
            // It is on its way back already.
            Course::Undoing(_) => Ok(Decision::default()),
            Course::Forward => {
                let error = Refusal::new(
                    Code::OperationCancelled,
                    format!("the pause of project '{}' was cancelled", project.name),
                );
                Ok(undo(project, run, error.into()))
            }
        };
    }
    if let Some(run) = project.checkpointing.as_ref().filter(|run| run.operation == operation) {
        let runs = if project.is_held() { Vec::new() } else { project.runs(project.alive_agents()) };
        let error = Refusal::new(
            Code::OperationCancelled,
            format!("checkpoint {} of project '{}' was cancelled", run.checkpoint, project.name),
        );
        // Told first: a step that has just succeeded reports in vain, and what it made is discarded.
        let failed = Event::CheckpointFailed { operation: operation.clone(), error: error.into() };
        let undo = Effect::Undo { operation, checkpoint: run.checkpoint, runs };
        return Ok(Decision::events(vec![failed]).then(undo));
    }
    if project.operation() == Some(&operation) {
        return Err(Refusal::new(
            Code::OperationNotCancellable,
            format!("operation {operation} can no longer be cancelled: it only goes forward"),
        ));
    }
    Err(Refusal::new(Code::OperationNotFound, format!("operation {operation} is not under way")))
}
