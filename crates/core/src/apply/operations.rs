//! What the events of pauses, resumes, checkpoints and restores do to a project.

use std::sync::Arc;

use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::pause::{PauseResult, ResumeMethod, ResumeResult};
use fermata_protocol::task::{Phase, TaskView};
use fermata_protocol::{AgentName, CheckpointNumber, ErrorObject, OperationId, UnixMillis};

use super::settle::{change_agent, rest, resting, settle};
use crate::agent::AgentState;
use crate::budget::waive_reached;
use crate::project::{
    BeforeRestore, BrokenRestore, CheckpointOperation, Direction, PauseOperation, PauseStep, Paused, Project,
    ProjectState, Resting, RestoreOperation, RestoreStage, RestoreTrouble, ResumeOperation, StableState,
};

/// Begins the pause; `begun` has the members that the event gives.
pub(super) fn pause_started(project: &mut Project, begun: PauseOperation) {
    project.counters.checkpoint = project.counters.checkpoint.max(begun.checkpoint);
    project.state = Arc::new(ProjectState::Pausing(Box::new(begun)));
}

pub(super) fn stepped(project: &mut Project, step: &str, concluded: Option<&(String, f64)>) {
    if let ProjectState::Pausing(pause) = Arc::make_mut(&mut project.state) {
        if let Some((name, took_ms)) = concluded {
            pause.steps_ms.insert(name.clone(), *took_ms);
        }
        if let Some(step) = PauseStep::ALL.into_iter().find(|known| known.as_str() == step) {
            pause.step = step;
        }
    }
}

pub(super) fn undoing(project: &mut Project, operation: &OperationId, error: &ErrorObject) {
    if let ProjectState::Pausing(pause) = Arc::make_mut(&mut project.state) {
        pause.direction = Direction::Undoing(error.clone());
    }
    if let Some(making) = project.checkpointing.as_mut().filter(|making| making.operation == *operation) {
        Arc::make_mut(making).direction = Direction::Undoing(error.clone());
    }
}

pub(super) fn paused(project: &mut Project, checkpoint: &CheckpointView, result: &PauseResult, agents: &[AgentName]) {
    project.counters.context = checkpoint.id;
    for name in agents {
        change_agent(project, name, |agent| {
            if agent.is_running() {
                agent.state.change(|mut run| {
                    run.stop_clocks(result.paused_at);
                    AgentState::Frozen(run)
                });
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

pub(super) fn pause_failed(project: &mut Project) {
    if let ProjectState::Pausing(pause) = &*project.state {
        let before = pause.before;
        rest(project, before);
        settle(project);
    }
}

pub(super) fn freeze_broken(project: &mut Project, agent: &AgentName, times: u64) {
    if let ProjectState::Paused(paused) = Arc::make_mut(&mut project.state) {
        *paused.breaks.entry(agent.clone()).or_default() += times;
    }
}

pub(super) fn resume_started(project: &mut Project, operation: &OperationId, over_budget: bool, at: UnixMillis) {
    if over_budget {
        waive_reached(project);
    }
    if let ProjectState::Paused(paused) = &*project.state {
        project.state = Arc::new(ProjectState::Resuming(Box::new(ResumeOperation {
            operation: operation.clone(),
            started_at: at,
            paused: (**paused).clone(),
        })));
    }
}

pub(super) fn resumed(project: &mut Project, result: &ResumeResult, at: UnixMillis) {
    project.total_paused_ms += result.paused_ms;
    for resumed in &result.agents {
        change_agent(project, &resumed.agent, |agent| {
            // An agent that was stopped meanwhile stays stopped.
            if !agent.is_paused() {
                return;
            }
            match resumed.method {
                ResumeMethod::Thawed | ResumeMethod::ImageRestored => agent.state.change(|mut run| {
                    run.start_clocks(at);
                    AgentState::Running(run)
                }),
                ResumeMethod::Failed => {
                    let detail = resumed.detail.clone().unwrap_or_else(|| "it could not be brought back".into());
                    agent.state.change(|run| AgentState::Interrupted { detail, last: Some(run) });
                }
                // The start of the new run has events of its own.
                ResumeMethod::Respawned => {}
            }
        });
    }
    rest(project, Resting::Active);
    settle(project);
}

pub(super) fn checkpoint_started(
    project: &mut Project,
    operation: &OperationId,
    checkpoint: CheckpointNumber,
    trigger: Trigger,
    at: UnixMillis,
) {
    project.counters.checkpoint = project.counters.checkpoint.max(checkpoint);
    project.checkpointing = Some(Arc::new(CheckpointOperation {
        operation: operation.clone(),
        checkpoint,
        trigger,
        started_at: at,
        activity: project.counters.activity.counters,
        direction: Direction::Forward,
    }));
}

pub(super) fn checkpoint_created(project: &mut Project, checkpoint: CheckpointNumber, imported: bool) {
    if !imported {
        project.counters.context = checkpoint;
    }
    project.checkpointing = None;
}

pub(super) fn restore_started(
    project: &mut Project,
    operation: &OperationId,
    checkpoint: CheckpointNumber,
    safety: CheckpointNumber,
    paths: &[String],
    at: UnixMillis,
) {
    project.counters.checkpoint = project.counters.checkpoint.max(safety);
    let before = match &*project.state {
        ProjectState::Paused(paused) => BeforeRestore::Paused((**paused).clone()),
        ProjectState::Broken(broken) => BeforeRestore::Broken(broken.clone()),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_) => BeforeRestore::Resting(resting(project)),
    };
    project.state = Arc::new(ProjectState::Restoring(Box::new(RestoreOperation {
        operation: operation.clone(),
        checkpoint,
        safety,
        started_at: at,
        activity: project.counters.activity.counters,
        stage: RestoreStage::Preparing,
        paths: paths.to_vec(),
        trouble: None,
        before,
    })));
}

pub(super) fn restore_planned(project: &mut Project) {
    if let ProjectState::Restoring(restore) = Arc::make_mut(&mut project.state) {
        restore.stage = RestoreStage::Applying;
    }
}

pub(super) fn restore_retried(project: &mut Project, tries: u32, error: &ErrorObject, at: UnixMillis) {
    if let ProjectState::Restoring(restore) = Arc::make_mut(&mut project.state) {
        let since = restore.trouble.as_ref().map_or(at, |trouble| trouble.since);
        restore.trouble = Some(Box::new(RestoreTrouble { tries, since, error: error.clone() }));
    }
}

pub(super) fn restored(project: &mut Project, checkpoint: CheckpointNumber, phase: Phase, tasks: &[TaskView]) {
    let ProjectState::Restoring(restore) = &*project.state else { return };
    let (everything, before) = (restore.paths.is_empty(), restore.before.clone());
    if everything {
        // The safety checkpoint holds what is replaced here.
        project.counters.context = checkpoint;
        Arc::make_mut(&mut project.facts).phase = phase;
        project.tasks = tasks.iter().map(|task| (task.id, Arc::new(task.clone()))).collect();
    }
    project.state = Arc::new(match before {
        // A restore of some paths leaves the others as the broken restore left them.
        BeforeRestore::Broken(ref broken) if !everything => ProjectState::Broken(broken.clone()),
        BeforeRestore::Broken(_) | BeforeRestore::Paused(_) | BeforeRestore::Resting(_) => match before.stable() {
            StableState::Resting(resting) => ProjectState::Resting(resting),
            StableState::Paused(mut paused) => {
                paused.restored = Some(checkpoint);
                paused.context = if everything { Some(checkpoint) } else { paused.context };
                ProjectState::Paused(Box::new(paused))
            }
        },
    });
}

pub(super) fn restore_failed(project: &mut Project) {
    let ProjectState::Restoring(restore) = &*project.state else { return };
    project.state = Arc::new(match restore.before.clone() {
        BeforeRestore::Resting(resting) => ProjectState::Resting(resting),
        BeforeRestore::Paused(paused) => ProjectState::Paused(Box::new(paused)),
        BeforeRestore::Broken(broken) => ProjectState::Broken(broken),
    });
}

pub(super) fn restore_given_up(
    project: &mut Project,
    operation: &OperationId,
    checkpoint: CheckpointNumber,
    safety: CheckpointNumber,
    error: &ErrorObject,
    at: UnixMillis,
) {
    let ProjectState::Restoring(restore) = &*project.state else { return };
    project.state = Arc::new(ProjectState::Broken(Box::new(BrokenRestore {
        operation: operation.clone(),
        checkpoint,
        safety,
        at,
        error: error.clone(),
        before: restore.before.clone().stable(),
    })));
}
