//! Folds one event into the state. The same function runs after every commit and in tests of
//! recovery; it cannot refuse: what it is given has happened.

mod agents;

use std::sync::Arc;

use fermata_protocol::UnixMillis;
use fermata_protocol::event::Event;
use fermata_protocol::pause::{PauseMode, Rung};
use fermata_protocol::task::Phase;

use self::agents::change;
use crate::agent::{AgentState, Ended, Held};
use crate::budget::waive_reached;
use crate::project::{
    BeforeRestore, BrokenRestore, CheckpointRun, Course, Facts, PauseRun, PauseStep, Paused, Project, ProjectState,
    Resting, RestoreRun, RestoreStage, ResumeRun, Trouble, Whole,
};
use crate::since;

/// Makes the project of its first event.
///
/// Returns `None` for any other event.
pub fn create(name: &fermata_protocol::ProjectName, event: &Event, at: UnixMillis) -> Option<Project> {
    let Event::ProjectCreated { workspace, description, source, config } = event else { return None };
    Some(Project {
        name: name.clone(),
        facts: Arc::new(Facts {
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
    let noticed = since::notice(project, event);
    fold(project, event, at);
    since::settle(project, noticed, at);
}

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
        | Event::CheckpointRemoved { .. } => {}
        Event::AgentStateSaved { agent, .. } | Event::ContextAdded { agent, .. } => {
            agents::reported(project, agent, at);
        }
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
        Event::AgentCreated { .. }
        | Event::AgentStarting { .. }
        | Event::AgentStarted { .. }
        | Event::AgentAdopted { .. }
        | Event::AgentUnreachable { .. }
        | Event::AgentLaunchFailed { .. }
        | Event::AgentStopping { .. }
        | Event::AgentExited { .. }
        | Event::AgentInterrupted { .. }
        | Event::AgentParked { .. }
        | Event::AgentRemoved { .. }
        | Event::AgentSuspended { .. }
        | Event::AgentContinued { .. }
        | Event::AgentSessionFound { .. }
        | Event::AgentProgressed { .. }
        | Event::AgentWaiting { .. }
        | Event::AgentReady { .. }
        | Event::AgentTimeUp { .. }
        | Event::AgentStale { .. }
        | Event::AgentBackoff { .. }
        | Event::AgentGivenUp { .. }
        | Event::AgentUsed { .. } => agents::apply(project, event, at),
        Event::AgentFreezeBroken { agent, times, .. } => {
            if let ProjectState::Paused(paused) = Arc::make_mut(&mut project.state) {
                *paused.breaks.entry(agent.clone()).or_default() += times;
            }
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
            // It has been waiting for a person: its silence begins now.
            agents::reported(project, agent, at);
            if let Some(question) = project.questions.get_mut(id) {
                let question = Arc::make_mut(question);
                question.answer = Some(answer.clone());
                question.answered_at = Some(*answered_at);
            }
        }
        Event::OperationStepped { step, concluded, .. } => {
            if let ProjectState::Pausing(run) = Arc::make_mut(&mut project.state) {
                if let Some((name, took_ms)) = concluded {
                    run.steps_ms.insert(name.clone(), *took_ms);
                }
                if let Some(step) = PauseStep::ALL.into_iter().find(|s| s.as_str() == step) {
                    run.step = step;
                }
            }
        }
        Event::OperationUndoing { error, .. } => {
            if let ProjectState::Pausing(run) = Arc::make_mut(&mut project.state) {
                run.course = Course::Undoing(error.clone());
            }
        }
        Event::PauseStarted { .. }
        | Event::ProjectPaused { .. }
        | Event::PauseFailed { .. }
        | Event::ResumeStarted { .. }
        | Event::ProjectResumed { .. } => apply_pause(project, event, at),
        Event::CheckpointStarted { operation, checkpoint, trigger } => {
            project.counters.checkpoint = project.counters.checkpoint.max(*checkpoint);
            project.checkpointing = Some(Arc::new(CheckpointRun {
                operation: operation.clone(),
                checkpoint: *checkpoint,
                trigger: *trigger,
                started_at: at,
                tally: project.counters.since.tally,
            }));
        }
        Event::CheckpointCreated { checkpoint, imported, .. } => {
            if !imported {
                project.counters.context = checkpoint.id;
            }
            project.checkpointing = None;
        }
        Event::CheckpointFailed { .. } => project.checkpointing = None,
        Event::RestoreChecked { .. } => {}
        Event::RestoreStarted { .. }
        | Event::RestorePlanned { .. }
        | Event::RestoreRetried { .. }
        | Event::ProjectRestored { .. }
        | Event::RestoreFailed { .. }
        | Event::RestoreGivenUp { .. } => apply_restore(project, event, at),
    }
}

fn apply_pause(project: &mut Project, event: &Event, at: UnixMillis) {
    match event {
        Event::PauseStarted { operation, checkpoint, mode, cause, reason, grace_ms } => {
            project.counters.checkpoint = project.counters.checkpoint.max(*checkpoint);
            project.state = Arc::new(ProjectState::Pausing(Box::new(PauseRun {
                operation: operation.clone(),
                checkpoint: *checkpoint,
                mode: *mode,
                cause: *cause,
                reason: reason.clone(),
                grace_ms: *grace_ms,
                started_at: at,
                before: resting(project),
                tally: project.counters.since.tally,
                step: PauseStep::Validate,
                steps_ms: Default::default(),
                course: Course::Forward,
            })));
        }
        Event::ProjectPaused { checkpoint, result, agents, .. } => {
            project.counters.context = checkpoint.id;
            for name in agents {
                change(project, name, |agent| {
                    if agent.state == AgentState::Running {
                        agent.state = AgentState::Held(Held::Frozen);
                        if let Some(run) = &mut agent.run {
                            run.stand_still(result.paused_at);
                        }
                    }
                });
            }
            project.state = Arc::new(ProjectState::Paused(Box::new(Paused {
                operation: result.operation_id.clone(),
                checkpoint: checkpoint.id,
                since: result.paused_at,
                mode: result.mode,
                mechanism: result.mechanism,
                cause: result.cause,
                reason: checkpoint.pause_reason.clone(),
                restored: None,
                context: None,
                breaks: Default::default(),
            })));
        }
        Event::PauseFailed { .. } => {
            if let ProjectState::Pausing(run) = &*project.state {
                let before = run.before;
                rest(project, before);
                settle(project);
            }
        }
        Event::ResumeStarted { operation, over_budget } => {
            if *over_budget {
                waive_reached(project);
            }
            if let ProjectState::Paused(paused) = &*project.state {
                project.state = Arc::new(ProjectState::Resuming(Box::new(ResumeRun {
                    operation: operation.clone(),
                    started_at: at,
                    paused: (**paused).clone(),
                })));
            }
        }
        Event::ProjectResumed { result } => {
            project.total_paused_ms += result.paused_ms;
            for resumed in &result.agents {
                change(project, &resumed.agent, |agent| match (resumed.rung, &agent.state) {
                    (Rung::Thawed | Rung::ImageRestored, AgentState::Held(_)) => {
                        agent.state = AgentState::Running;
                        if let Some(run) = &mut agent.run {
                            run.go_on(at);
                        }
                    }
                    (Rung::Failed, AgentState::Held(_)) => {
                        agent.state = AgentState::Interrupted {
                            detail: resumed.detail.clone().unwrap_or_else(|| "it could not be brought back".into()),
                        };
                    }
                    _ => {}
                });
            }
            rest(project, Resting::Active);
            settle(project);
        }
        _ => {}
    }
}

fn apply_restore(project: &mut Project, event: &Event, at: UnixMillis) {
    match event {
        Event::RestoreStarted { operation, checkpoint, safety, paths } => {
            project.counters.checkpoint = project.counters.checkpoint.max(*safety);
            let before = match &*project.state {
                ProjectState::Paused(paused) => BeforeRestore::Paused((**paused).clone()),
                ProjectState::Broken(broken) => BeforeRestore::Broken(broken.clone()),
                ProjectState::Resting(_)
                | ProjectState::Pausing(_)
                | ProjectState::Resuming(_)
                | ProjectState::Restoring(_) => BeforeRestore::Resting(resting(project)),
            };
            project.state = Arc::new(ProjectState::Restoring(Box::new(RestoreRun {
                operation: operation.clone(),
                checkpoint: *checkpoint,
                safety: *safety,
                started_at: at,
                tally: project.counters.since.tally,
                stage: RestoreStage::Preparing,
                paths: paths.clone(),
                trouble: None,
                before,
            })));
        }
        Event::RestorePlanned { .. } => {
            if let ProjectState::Restoring(run) = Arc::make_mut(&mut project.state) {
                run.stage = RestoreStage::Applying;
            }
        }
        Event::RestoreRetried { tries, error, .. } => {
            if let ProjectState::Restoring(run) = Arc::make_mut(&mut project.state) {
                let since = run.trouble.as_ref().map_or(at, |trouble| trouble.since);
                run.trouble = Some(Box::new(Trouble { tries: *tries, since, error: error.clone() }));
            }
        }
        Event::ProjectRestored { checkpoint, phase, tasks, .. } => {
            let ProjectState::Restoring(run) = &*project.state else { return };
            let (whole, before) = (run.paths.is_empty(), run.before.clone());
            if whole {
                // The safety checkpoint holds what was given up.
                project.counters.context = *checkpoint;
                Arc::make_mut(&mut project.facts).phase = *phase;
                project.tasks = tasks.iter().map(|task| (task.id, Arc::new(task.clone()))).collect();
            }
            project.state = Arc::new(match before {
                // Some paths do not make the rest whole.
                BeforeRestore::Broken(broken) if !whole => ProjectState::Broken(broken),
                before => match before.whole() {
                    Whole::Resting(resting) => ProjectState::Resting(resting),
                    Whole::Paused(mut paused) => {
                        paused.restored = Some(*checkpoint);
                        paused.context = if whole { Some(*checkpoint) } else { paused.context };
                        ProjectState::Paused(Box::new(paused))
                    }
                },
            });
        }
        Event::RestoreFailed { .. } => {
            let ProjectState::Restoring(run) = &*project.state else { return };
            project.state = Arc::new(match run.before.clone() {
                BeforeRestore::Resting(resting) => ProjectState::Resting(resting),
                BeforeRestore::Paused(paused) => ProjectState::Paused(Box::new(paused)),
                BeforeRestore::Broken(broken) => ProjectState::Broken(broken),
            });
        }
        Event::RestoreGivenUp { operation, checkpoint, safety, error } => {
            let ProjectState::Restoring(run) = &*project.state else { return };
            project.state = Arc::new(ProjectState::Broken(Box::new(BrokenRestore {
                operation: operation.clone(),
                checkpoint: *checkpoint,
                safety: *safety,
                at,
                error: error.clone(),
                before: run.before.clone().whole(),
            })));
        }
        _ => {}
    }
}

fn resting(project: &Project) -> Resting {
    match &*project.state {
        ProjectState::Resting(resting) => *resting,
        ProjectState::Pausing(run) => run.before,
        ProjectState::Restoring(run) => match run.before.clone().whole() {
            Whole::Resting(resting) => resting,
            Whole::Paused(_) => Resting::Active,
        },
        ProjectState::Broken(broken) => match &broken.before {
            Whole::Resting(resting) => *resting,
            Whole::Paused(_) => Resting::Active,
        },
        ProjectState::Paused(_) | ProjectState::Resuming(_) => Resting::Active,
    }
}

fn rest(project: &mut Project, resting: Resting) {
    project.state = Arc::new(ProjectState::Resting(resting));
}

/// An active project whose agents have all ended gets the status that follows from how they ended.
fn settle(project: &mut Project) {
    if *project.state != ProjectState::Resting(Resting::Active) || !project.agents.values().all(|a| a.is_terminal()) {
        return;
    }
    let any = |wanted: fn(&AgentState) -> bool| project.agents.values().any(|agent| wanted(&agent.state));
    let failed =
        any(|state| matches!(state, AgentState::Failed { .. } | AgentState::TimedOut | AgentState::Interrupted { .. }));
    let stopped = any(|state| *state == AgentState::Ended(Ended::Stopped));
    rest(
        project,
        if failed {
            Resting::Failed
        } else if stopped {
            Resting::Stopped
        } else {
            Resting::Completed
        },
    );
}

/// Says whether the processes of a paused project are to be ended: mode `park`.
pub fn parks(mode: PauseMode) -> bool {
    match mode {
        PauseMode::Park | PauseMode::Image => true,
        PauseMode::Freeze => false,
    }
}
