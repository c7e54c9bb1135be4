//! Views of the state for the wire.

use fermata_protocol::agent::AgentView;
use fermata_protocol::operation::{OperationKind, OperationState, OperationView};
use fermata_protocol::project::{BrokenView, PauseView, ProjectView};
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{AgentName, UnixMillis};

use crate::agent::{Agent, AgentState, Run};
use crate::budget::spent;
use crate::clock::millis;
use crate::dependency;
use crate::project::{Direction, Paused, Project, ProjectState, RestoreStage};

/// Shows an agent of a project.
pub fn agent(project: &Project, agent: &Agent, now: UnixMillis) -> AgentView {
    let run = agent.run();
    let end = run.and_then(|run| run.ended);
    let processes = run.and_then(|run| run.processes.as_ref());
    let alive = run.filter(|_| agent.is_alive());
    let ran_ms = run.map(|run| run.clock.read(now));
    let starts_later = matches!(agent.state, AgentState::Waiting { .. } | AgentState::Backoff { .. });
    let waits_for =
        if starts_later { dependency::waits_for(project, &agent.spec.supervision.depends_on) } else { Vec::new() };
    let detail = detail(agent, &waits_for);
    AgentView {
        project: project.name.clone(),
        name: agent.name.clone(),
        status: agent.status(project.asks(&agent.name)),
        argv: run.map_or_else(|| agent.spec.argv.clone(), |run| run.argv.clone()),
        cwd: agent.spec.cwd.clone(),
        profile: agent.spec.profile.clone(),
        run: run.map(|run| run.id.clone()),
        runs: agent.runs,
        pid: processes.map(|p| p.pid),
        started_at: run.map(|run| run.started_at),
        suspended_at: run.filter(|run| run.ended.is_none()).and_then(|run| run.suspended_at),
        ended_at: end.map(|end| end.at),
        exit: end.and_then(|end| end.exit),
        detail,
        mechanism: processes.map(|p| p.mechanism),
        ready: agent.is_running() && run.is_some_and(|run| run.ready_at.is_some()),
        next_start_at: if let AgentState::Backoff { until, .. } = agent.state { Some(until) } else { None },
        waits_for,
        starts_in_row: agent.streak.starts,
        ran_ms,
        time_left_ms: alive
            .and(agent.spec.supervision.timeout_ms)
            .map(|limit| (millis(limit) - ran_ms.unwrap_or(0)).max(0)),
        remaining_ms: alive.and_then(|run| remaining(agent, run, ran_ms?)),
        stale_at: alive.and_then(|run| run.stale_at),
        progress: agent.progress.clone(),
        session: agent.session.clone(),
        usage: agent.usage,
        load: None,
    }
}

/// Returns what there is to say of the agent beyond its status.
fn detail(agent: &Agent, waits_for: &[AgentName]) -> Option<String> {
    match &agent.state {
        AgentState::Failed { detail, .. } => detail.clone(),
        AgentState::Interrupted { detail, .. } | AgentState::Backoff { detail, .. } => Some(detail.clone()),
        AgentState::Waiting { .. } => {
            let names: Vec<String> = waits_for.iter().map(AgentName::to_string).collect();
            Some(format!("waits for {}", names.join(", "))).filter(|_| !names.is_empty())
        }
        AgentState::Starting(run)
        | AgentState::Running(run)
        | AgentState::Frozen(run)
        | AgentState::Parked(run)
        | AgentState::Stopping { run, .. } => run.unreachable.clone(),
        AgentState::Ended { .. } | AgentState::TimedOut { .. } => None,
    }
}

/// Estimates the milliseconds that a run will still take at its pace so far. A report from before this run says
/// nothing about its pace.
fn remaining(agent: &Agent, run: &Run, ran_ms: i64) -> Option<i64> {
    let percent = agent.progress.as_ref()?.percent.filter(|percent| *percent > 0.0)?;
    let at_report = run.reported_ms?;
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of one run are far below 2^52")]
    let estimate = at_report as f64 / percent * 100.0;
    #[expect(clippy::cast_possible_truncation, reason = "a float saturates when it is cast")]
    Some((estimate as i64).saturating_sub(ran_ms).max(0))
}

/// Shows the current pause of a project.
fn pause(paused: &Paused) -> PauseView {
    PauseView {
        operation_id: paused.operation.clone(),
        checkpoint_id: paused.checkpoint,
        paused_at: paused.since,
        mode: paused.mode,
        mechanism: paused.mechanism,
        cause: paused.cause,
        reason: paused.reason.clone(),
        restored: paused.restored,
        warnings: paused.breaks.iter().map(|(agent, times)| ran(agent, *times)).collect(),
    }
}

fn ran(agent: &AgentName, times: u64) -> String {
    let often = if times == 1 { "for a moment".to_owned() } else { format!("{times} times for a moment") };
    format!("agent '{agent}' ran {often} although it is paused; it was frozen again")
}

/// Shows a project.
pub fn project(project: &Project, now: UnixMillis) -> ProjectView {
    let facts = &project.facts;
    let current = match &*project.state {
        ProjectState::Paused(paused) => Some(&**paused),
        ProjectState::Resuming(run) => Some(&run.paused),
        ProjectState::Resting(_) | ProjectState::Pausing(_) | ProjectState::Restoring(_) | ProjectState::Broken(_) => {
            None
        }
    };
    let broken = match &*project.state {
        ProjectState::Broken(broken) => Some(BrokenView {
            operation_id: broken.operation.clone(),
            checkpoint_id: broken.checkpoint,
            safety_checkpoint_id: broken.safety,
            at: broken.at,
            error: broken.error.clone(),
        }),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Paused(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_) => None,
    };
    let elapsed = current.map_or(0, |paused| now.since(paused.since));
    ProjectView {
        name: project.name.clone(),
        description: facts.description.clone(),
        source: facts.source.clone(),
        workspace: facts.workspace.clone(),
        status: project.state.status(),
        phase: facts.phase,
        created_at: facts.created_at,
        total_paused_ms: project.paused_ms(now) - elapsed,
        pause: current.map(pause),
        broken,
        agents: project.agents.len() as u64,
        agents_running: project.alive_agents().count() as u64,
        tasks_total: project.tasks.len() as u64,
        tasks_completed: project.tasks.values().filter(|t| t.status == TaskStatus::Completed).count() as u64,
        open_questions: project.questions.values().filter(|q| q.answer.is_none()).count() as u64,
        usage: spent(project),
        // Filled in by the daemon.
        disk_bytes: None,
        look: None,
    }
}

/// Shows the operation in progress.
pub fn operation(project: &Project) -> Option<OperationView> {
    let running = |id: &fermata_protocol::OperationId, kind, started_at| OperationView {
        id: id.clone(),
        project: project.name.clone(),
        kind,
        state: OperationState::Running,
        step: None,
        steps_ms: Default::default(),
        started_at,
        ended_at: None,
        result: None,
        error: None,
    };
    match &*project.state {
        ProjectState::Pausing(run) => {
            let mut view = running(&run.operation, OperationKind::Pause, run.started_at);
            view.step = Some(run.step.as_str().to_owned());
            view.steps_ms.clone_from(&run.steps_ms);
            undoing(&mut view, &run.direction);
            Some(view)
        }
        ProjectState::Resuming(run) => Some(running(&run.operation, OperationKind::Resume, run.started_at)),
        ProjectState::Restoring(run) => {
            let mut view = running(&run.operation, OperationKind::Restore, run.started_at);
            view.step = Some(
                match run.stage {
                    RestoreStage::Preparing => "prepare",
                    RestoreStage::Applying => "apply",
                }
                .to_owned(),
            );
            view.error = run.trouble.as_ref().map(|trouble| trouble.error.clone());
            Some(view)
        }
        ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => {
            let making = project.checkpointing.as_ref()?;
            let mut view = running(&making.operation, OperationKind::Checkpoint, making.started_at);
            undoing(&mut view, &making.direction);
            Some(view)
        }
    }
}

fn undoing(view: &mut OperationView, direction: &Direction) {
    if let Direction::Undoing(error) = direction {
        view.state = OperationState::Undoing;
        view.error = Some(error.clone());
    }
}
