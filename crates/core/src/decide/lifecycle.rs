//! What becomes of agents without a request: ends because of timeouts, readiness, staleness, restarts by policy.

use fermata_protocol::agent::{AgentSpec, ExitStatus, StartCause, StopCause};
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::event::Event;
use fermata_protocol::supervision::OnStale;
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId, UnixMillis};

use super::checkpoints;
use super::checks::agent;
use crate::agent::{AfterStop, Agent, AgentState, PlannedEnd, Run};
use crate::clock::millis;
use crate::command::Decision;
use crate::deadlines::{DueAction, due_actions};
use crate::effect::Effect;
use crate::project::Project;
use crate::restart::{self, RestartDecision, RunOutcome};

/// Decides about a deadline other than a start; an action that is no longer due changes nothing.
pub(super) fn at_deadline(
    project: &Project,
    action: DueAction,
    operation: OperationId,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    if !due_actions(project, now).contains(&action) {
        return Ok(Decision::default());
    }
    match action {
        // A start takes a new run: `Command::Start`.
        DueAction::Start(_) => Ok(Decision::default()),
        DueAction::PlanEnds(agents) => plan_ends(project, &agents, operation, now),
        DueAction::End(name) => Ok(end(project, &name)),
        DueAction::Stale(name) => {
            Ok(Decision::events(current(project, &name).and_then(|run| stale(run, now)).into_iter().collect()))
        }
        DueAction::NotReady(name) => Ok(stop(project, &name, StopCause::NotReady)),
    }
}

/// An agent with its current run.
#[derive(Clone, Copy)]
struct CurrentRun<'a> {
    agent: &'a AgentName,
    spec: &'a AgentSpec,
    run: &'a Run,
}

fn current<'a>(project: &'a Project, name: &AgentName) -> Option<CurrentRun<'a>> {
    let agent = project.agents.get(name)?;
    Some(CurrentRun { agent: &agent.name, spec: &agent.spec, run: agent.state.current_run()? })
}

/// Announces the ends and takes the checkpoint from which the agents can be brought back.
fn plan_ends(
    project: &Project,
    agents: &[(AgentName, PlannedEnd)],
    operation: OperationId,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    let mut trigger = Trigger::Auto;
    let mut decision = Decision::default();
    for (name, end) in agents {
        let Some(current) = current(project, name) else { continue };
        match end {
            PlannedEnd::TimeUp => {
                trigger = Trigger::Timeout;
                let (run, ran_ms) = (current.run.id.clone(), current.run.clock.read(now));
                decision.events.push(Event::AgentTimeUp { agent: name.clone(), run, ran_ms });
            }
            PlannedEnd::Stale => decision.events.extend(stale(current, now)),
        }
    }
    decision.append(checkpoints::begin(project, operation, trigger)?);
    Ok(decision)
}

fn stale(current: CurrentRun<'_>, now: UnixMillis) -> Option<Event> {
    let silent_ms = current.run.silence?.read(now);
    let restart = current.spec.supervision.on_stale == OnStale::Restart;
    Some(Event::AgentStale { agent: current.agent.clone(), run: current.run.id.clone(), silent_ms, restart })
}

fn end(project: &Project, name: &AgentName) -> Decision {
    match current(project, name).and_then(|current| current.run.planned_end) {
        Some(PlannedEnd::TimeUp) => stop(project, name, StopCause::TimeUp),
        Some(PlannedEnd::Stale) => stop(project, name, StopCause::Stale),
        None => Decision::default(),
    }
}

fn stop(project: &Project, name: &AgentName, cause: StopCause) -> Decision {
    let Some(CurrentRun { agent, spec, run }) = current(project, name) else { return Decision::default() };
    let stop = Effect::Stop { agent: agent.clone(), run: run.id.clone(), grace_ms: spec.stop_grace_ms };
    Decision::events(vec![Event::AgentStopping { agent: agent.clone(), restart: false, cause }]).then(stop)
}

/// A report that names no run is the agent's own, and is refused unless its processes are there. One that names a run
/// is an observation of the daemon, which may be late: it is ignored where that run is no longer current.
pub(super) fn ready(project: &Project, name: AgentName, run: Option<RunId>) -> Result<Decision, Refusal> {
    let alive = project.agents.get(&name).filter(|agent| agent.is_alive());
    let Some(current) = alive.and_then(|agent| agent.state.current_run()) else {
        if run.is_some() {
            return Ok(Decision::default());
        }
        agent(project, &name)?;
        return Err(Refusal::new(
            Code::AgentNotRunning,
            format!("agent '{name}' of project '{}' is not running", project.name),
        ));
    };
    let is_late = run.is_some_and(|run| run != current.id);
    if is_late || current.ready_at.is_some() {
        return Ok(Decision::default());
    }
    Ok(Decision::events(vec![Event::AgentReady { agent: name, run: current.id.clone() }]))
}

/// Returns what follows from an exit that the shim has recorded; `agent` is in its state before the exit.
pub(super) fn after_exit(agent: &Agent, exit: ExitStatus, detail: Option<String>, now: UnixMillis) -> Option<Event> {
    let was_not_ready = matches!(agent.state, AgentState::Stopping { then: AfterStop::NotReady, .. });
    let outcome = if exit.is_success() && !was_not_ready { RunOutcome::Well } else { RunOutcome::Badly };
    after_end(agent, outcome, &detail.unwrap_or_else(|| exit.to_string()), now)
}

/// Returns what follows from the end of a run; `agent` is in its state before the end.
pub(super) fn after_end(agent: &Agent, outcome: RunOutcome, detail: &str, now: UnixMillis) -> Option<Event> {
    let policy = &agent.spec.supervision.restart;
    let decision = match &agent.state {
        AgentState::Stopping { then: AfterStop::Stay | AfterStop::Restart | AfterStop::TimedOut, .. } => {
            RestartDecision::Stay
        }
        AgentState::Stopping { then: AfterStop::GoesOn, .. } => restart::after_stale(policy, agent.streak, now),
        AgentState::Stopping { then: AfterStop::NotReady, .. }
        | AgentState::Waiting { .. }
        | AgentState::Backoff { .. }
        | AgentState::Starting(_)
        | AgentState::Running(_)
        | AgentState::Frozen(_)
        | AgentState::Parked(_)
        | AgentState::Ended { .. }
        | AgentState::Failed { .. }
        | AgentState::TimedOut { .. }
        | AgentState::Interrupted { .. } => {
            let seed = agent.run().map_or(agent.name.as_str(), |run| run.id.as_str());
            restart::after_end(&agent.spec, outcome, agent.streak, now, seed)
        }
    };
    let cause = if outcome == RunOutcome::Interrupted { StartCause::Recovery } else { StartCause::Policy };
    let agent = agent.name.clone();
    match decision {
        RestartDecision::Stay => None,
        RestartDecision::Start { until, start, .. } => {
            Some(Event::AgentBackoff { agent, until, start, cause, detail: detail.to_owned() })
        }
        RestartDecision::TooOften { starts } => {
            let within = millis(policy.within_ms) / 1_000;
            let reason = format!("{detail}; started again {starts} times within {within} s, and given up");
            Some(Event::AgentGivenUp { agent, reason: Some(reason) })
        }
    }
}
