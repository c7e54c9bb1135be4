//! The pause: begins, goes from step to step, and is committed or undone.

use fermata_protocol::event::Event;
use fermata_protocol::operation::OperationKind;
use fermata_protocol::pause::{PauseCause, PauseMode, PauseResult};
use fermata_protocol::{AgentName, Code, ErrorObject, OperationId, Refusal, UnixMillis};

use super::checkpoints;
use super::checks::{half_restored, refuse_during_operation};
use crate::agent::AgentState;
use crate::command::{Decision, PauseCommit, StepReport};
use crate::context::reduction_percentage;
use crate::effect::Effect;
use crate::project::{Direction, PauseOperation, PauseStep, Project, ProjectState, Resting};

/// What a pause is requested with.
pub(super) struct PauseRequest {
    pub(super) cause: PauseCause,
    pub(super) reason: Option<String>,
    pub(super) mode: PauseMode,
    pub(super) grace_ms: Option<u64>,
}

pub(super) fn begin(project: &Project, operation: OperationId, request: PauseRequest) -> Result<Decision, Refusal> {
    let PauseRequest { cause, reason, mode, grace_ms } = request;
    if let ProjectState::Paused(paused) = &*project.state {
        return Err(Refusal::new(
            Code::AlreadyPaused,
            format!("project '{}' is paused already, with checkpoint {}", project.name, paused.checkpoint),
        )
        .hint(format!("fermatactl resume {}", project.name))
        .details(serde_json::json!({ "checkpoint_id": paused.checkpoint, "operation_id": paused.operation })));
    }
    refuse_during_operation(project)?;
    if let ProjectState::Broken(broken) = &*project.state {
        return Err(half_restored(project, broken));
    }
    let is_active = *project.state == ProjectState::Resting(Resting::Active);
    if !is_active || project.unfinished_agents().next().is_none() {
        return Err(Refusal::new(
            Code::NothingToPause,
            format!("project '{}' is {} and has no running agent", project.name, project.state.status()),
        )
        .hint(format!("to save its state: fermatactl checkpoint create {}", project.name)));
    }
    // Processes that appear after the freeze would run on in a paused project, and so would those of an agent that
    // has a grace to end in, which a shim does not freeze.
    let starting = |state: &AgentState| matches!(state, AgentState::Starting(_));
    let stopping = |state: &AgentState| matches!(state, AgentState::Stopping { .. });
    if let Some(agent) = project.agents.values().find(|agent| starting(&agent.state) || stopping(&agent.state)) {
        let change = if starting(&agent.state) { "started" } else { "stopped" };
        return Err(Refusal::new(
            Code::OperationInProgress,
            format!("agent '{}' of project '{}' is being {change}", agent.name, project.name),
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

fn in_progress<'a>(project: &'a Project, operation: &OperationId) -> Option<&'a PauseOperation> {
    match &*project.state {
        ProjectState::Pausing(pause) if pause.operation == *operation => Some(pause),
        ProjectState::Pausing(_)
        | ProjectState::Resting(_)
        | ProjectState::Paused(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_)
        | ProjectState::Broken(_) => None,
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
    let Some(pause) = in_progress(project, &operation) else { return Decision::default() };
    if pause.step != step || pause.direction != Direction::Forward {
        return Decision::default();
    }
    match (outcome, step.next()) {
        (Err(error), _) => undo(project, pause, error),
        (Ok(StepReport::Sealed(sealed)), None) => commit(project, pause, *sealed, took_ms, now),
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
            undo(project, pause, error.into())
        }
    }
}

fn commit(project: &Project, pause: &PauseOperation, sealed: PauseCommit, took_ms: f64, now: UnixMillis) -> Decision {
    let mut steps_ms = pause.steps_ms.clone();
    steps_ms.insert(PauseStep::Checkpoint.as_str().into(), took_ms);
    let saved = sealed.flash_save;
    let result = PauseResult {
        success: true,
        operation_id: pause.operation.clone(),
        checkpoint_id: pause.checkpoint,
        tokens_before: saved.tokens_before,
        tokens_after: saved.tokens_after,
        reduction_percentage: reduction_percentage(saved.tokens_before, saved.tokens_after),
        items_archived: saved.items_archived,
        hot_items_retained: saved.hot_items_retained,
        warm_items_retained: saved.warm_items_retained,
        paused_at: now,
        mode: pause.mode,
        cause: pause.cause,
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
    // An agent that has ended meanwhile, or is being stopped, is not paused.
    let agents: Vec<AgentName> = sealed
        .agents
        .into_iter()
        .filter(|name| project.agents.get(name).is_some_and(|agent| agent.is_running()))
        .collect();
    events.push(Event::ProjectPaused {
        checkpoint: sealed.checkpoint,
        tokens_archived: saved.tokens_archived,
        result,
        agents: agents.clone(),
    });
    let runs = project.runs(agents.iter().filter_map(|name| project.agents.get(name)));
    let decision = Decision::events(events).then(Effect::CommitFreeze { runs: runs.clone() });
    if pause.mode.ends_processes() { decision.then(Effect::Park { runs }) } else { decision }
}

pub(super) fn undo(project: &Project, pause: &PauseOperation, error: ErrorObject) -> Decision {
    let event = Event::OperationUndoing { operation: pause.operation.clone(), step: pause.step.as_str().into(), error };
    Decision::events(vec![event]).then(undo_effect(project, pause))
}

/// The undo of a pause; recovery requests it too.
pub(super) fn undo_effect(project: &Project, pause: &PauseOperation) -> Effect {
    Effect::Undo {
        operation: pause.operation.clone(),
        checkpoint: pause.checkpoint,
        runs: project.runs(project.alive_agents()),
    }
}

pub(super) fn undone(project: &Project, operation: OperationId) -> Decision {
    if let Some(pause) = in_progress(project, &operation)
        && let Direction::Undoing(error) = &pause.direction
    {
        return Decision::events(vec![Event::PauseFailed { operation, error: error.clone() }]);
    }
    checkpoints::undone(project, operation)
}

pub(super) fn cancel(project: &Project, operation: OperationId) -> Result<Decision, Refusal> {
    if let Some(pause) = in_progress(project, &operation) {
        return match pause.direction {
            // It is being undone already.
            Direction::Undoing(_) => Ok(Decision::default()),
            Direction::Forward => {
                let error = Refusal::new(
                    Code::OperationCancelled,
                    format!("the pause of project '{}' was cancelled", project.name),
                );
                Ok(undo(project, pause, error.into()))
            }
        };
    }
    if let Some(decision) = checkpoints::cancel(project, &operation) {
        return Ok(decision);
    }
    if project.operation() == Some(&operation) {
        return Err(Refusal::new(
            Code::OperationNotCancellable,
            format!("operation {operation} can no longer be cancelled: it only goes forward"),
        ));
    }
    Err(Refusal::new(Code::OperationNotFound, format!("operation {operation} is not in progress")))
}
