//! Folds one event into the state. The same function runs after every commit and in tests of
//! recovery. It cannot refuse: an event has happened.

mod activity;
mod agents;
mod operations;
mod settle;

use std::sync::Arc;

use fermata_protocol::event::Event;
use fermata_protocol::task::Phase;
use fermata_protocol::{ProjectName, UnixMillis};

use self::settle::{rest, resting};
use crate::project::{Direction, PauseOperation, PauseStep, Project, ProjectFacts, ProjectState, Resting};

/// Makes the project from its first event; returns `None` for any other event.
pub fn create(name: &ProjectName, event: &Event, at: UnixMillis) -> Option<Project> {
    let Event::ProjectCreated { workspace, description, source, config } = event else { return None };
    Some(Project {
        name: name.clone(),
        facts: Arc::new(ProjectFacts {
            workspace: workspace.clone(),
            description: description.clone(),
            source: source.clone(),
            config: config.clone(),
            phase: Phase::default(),
            created_at: at,
        }),
        state: Arc::new(ProjectState::Resting(Resting::Init)),
        checkpointing: None,
        counters: Default::default(),
        total_paused_ms: 0,
        agents: Default::default(),
        tasks: Default::default(),
        questions: Default::default(),
    })
}

/// Folds one event, recorded at `at`, into the state.
pub fn apply(project: &mut Project, event: &Event, at: UnixMillis) {
    let change = activity::change(project, event);
    fold(project, event, at);
    activity::count(project, change, at);
}

#[expect(clippy::too_many_lines, reason = "a table of all events")]
fn fold(project: &mut Project, event: &Event, at: UnixMillis) {
    match event {
        Event::ProjectCreated { .. }
        | Event::ProjectRemoved {}
        | Event::PauseWithheld { .. }
        | Event::AgentTyped { .. }
        | Event::FlashSaved { .. }
        | Event::ContextPinned { .. }
        | Event::ContextRecalled { .. }
        | Event::CheckpointPinned { .. }
        | Event::CheckpointRemoved { .. }
        | Event::RestoreChecked { .. } => {}
        Event::ProjectChanged { description, config } => {
            let facts = Arc::make_mut(&mut project.facts);
            if let Some(description) = description {
                facts.description.clone_from(description);
            }
            if let Some(config) = config {
                facts.config.clone_from(config);
            }
        }
        Event::PhaseChanged { to, .. } => {
            Arc::make_mut(&mut project.facts).phase = *to;
            if *to == Phase::Planning && *project.state == ProjectState::Resting(Resting::Init) {
                rest(project, Resting::Planning);
            }
        }
        Event::AgentCreated { agent, spec } => agents::created(project, agent, spec, at),
        Event::AgentStarting { agent, run, argv, cause, token_sha256 } => {
            let begun = agents::BegunRun { id: run, argv, cause: *cause, token_sha256 };
            agents::starting(project, agent, begun, at);
        }
        Event::AgentStarted { agent, processes, .. } => agents::started(project, agent, processes, at),
        Event::AgentLaunchFailed { agent, reason, .. } => agents::launch_failed(project, agent, reason, at),
        Event::AgentAdopted { agent, .. } => agents::unreachable(project, agent, None),
        Event::AgentUnreachable { agent, detail, .. } => agents::unreachable(project, agent, Some(detail)),
        Event::AgentFreezeBroken { agent, times, .. } => operations::freeze_broken(project, agent, *times),
        Event::AgentStopping { agent, restart, cause } => agents::stopping(project, agent, *restart, *cause),
        Event::AgentWaiting { agent, .. } => agents::waiting(project, agent),
        Event::AgentReady { agent, .. } => agents::ready(project, agent, at),
        Event::AgentTimeUp { agent, .. } => agents::time_up(project, agent),
        Event::AgentStale { agent, restart, .. } => agents::stale(project, agent, *restart, at),
        Event::AgentBackoff { agent, until, start, cause, detail } => {
            let backoff = agents::BegunBackoff { until: *until, start: *start, cause: *cause, detail };
            agents::backoff(project, agent, backoff, at);
        }
        Event::AgentGivenUp { agent, reason } => agents::given_up(project, agent, reason.as_deref()),
        Event::AgentExited { agent, exit, detail, ended_at, .. } => {
            agents::exited(project, agent, *exit, detail.as_deref(), *ended_at);
        }
        Event::AgentInterrupted { agent, detail, last_seen, .. } => {
            agents::interrupted(project, agent, detail, last_seen.map_or(at, |seen| seen.min(at)));
        }
        Event::AgentParked { agent, .. } => agents::parked(project, agent, at),
        Event::AgentRemoved { agent } => agents::removed(project, agent),
        Event::AgentSuspended { agent, run } => agents::suspended(project, agent, run, Some(at)),
        Event::AgentContinued { agent, run } => agents::suspended(project, agent, run, None),
        Event::AgentSessionFound { agent, session } => agents::session_found(project, agent, session),
        Event::AgentProgressed { agent, progress } => agents::progressed(project, agent, progress, at),
        Event::AgentUsed { agent, usage } => agents::used(project, agent, usage, at),
        Event::AgentStateSaved { agent, .. } | Event::ContextAdded { agent, .. } => {
            agents::reported(project, agent, at);
        }
        Event::TaskChanged { task } => {
            project.counters.task = project.counters.task.max(task.id);
            if let Some(agent) = &task.agent {
                agents::reported(project, agent, at);
            }
            project.tasks.insert(task.id, Arc::new(task.clone()));
        }
        Event::QuestionAsked { question } => {
            project.counters.question = project.counters.question.max(question.id);
            agents::reported(project, &question.agent, at);
            project.questions.insert(question.id, Arc::new(question.clone()));
        }
        Event::QuestionAnswered { id, agent, answer, answered_at } => {
            // The agent has waited for a person: its silence begins now.
            agents::reported(project, agent, at);
            if let Some(question) = project.questions.get_mut(id) {
                let question = Arc::make_mut(question);
                question.answer = Some(answer.clone());
                question.answered_at = Some(*answered_at);
            }
        }
        Event::OperationStepped { step, concluded, .. } => operations::stepped(project, step, concluded.as_ref()),
        Event::OperationUndoing { operation, error, .. } => operations::undoing(project, operation, error),
        Event::PauseStarted { operation, checkpoint, mode, cause, reason, grace_ms } => {
            let begun = PauseOperation {
                operation: operation.clone(),
                checkpoint: *checkpoint,
                mode: *mode,
                cause: *cause,
                reason: reason.clone(),
                grace_ms: *grace_ms,
                started_at: at,
                before: resting(project),
                activity: project.counters.activity.counters,
                step: PauseStep::Validate,
                steps_ms: Default::default(),
                direction: Direction::Forward,
            };
            operations::pause_started(project, begun);
        }
        Event::ProjectPaused { checkpoint, result, agents, .. } => {
            operations::paused(project, checkpoint, result, agents);
        }
        Event::PauseFailed { .. } => operations::pause_failed(project),
        Event::ResumeStarted { operation, over_budget } => {
            operations::resume_started(project, operation, *over_budget, at);
        }
        Event::ProjectResumed { result } => operations::resumed(project, result, at),
        Event::CheckpointStarted { operation, checkpoint, trigger } => {
            operations::checkpoint_started(project, operation, *checkpoint, *trigger, at);
        }
        Event::CheckpointCreated { checkpoint, imported, .. } => {
            operations::checkpoint_created(project, checkpoint.id, *imported);
        }
        Event::CheckpointFailed { .. } => project.checkpointing = None,
        Event::RestoreStarted { operation, checkpoint, safety, paths } => {
            operations::restore_started(project, operation, *checkpoint, *safety, paths, at);
        }
        Event::RestorePlanned { .. } => operations::restore_planned(project),
        Event::RestoreRetried { tries, error, .. } => operations::restore_retried(project, *tries, error, at),
        Event::ProjectRestored { checkpoint, phase, tasks, .. } => {
            operations::restored(project, *checkpoint, *phase, tasks);
        }
        Event::RestoreFailed { .. } => operations::restore_failed(project),
        Event::RestoreGivenUp { operation, checkpoint, safety, error } => {
            operations::restore_given_up(project, operation, *checkpoint, *safety, error, at);
        }
    }
}
