//! What becomes of agents by themselves: starts that were held back, restarts by policy, ends
//! because time is up, readiness and staleness.

use fermata_protocol::agent::AgentSpec;
use fermata_protocol::agent::{StartCause, StopCause};
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::event::Event;
use fermata_protocol::supervision::OnStale;
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId, UnixMillis};

use super::{agent, agents, checkpoints};
use crate::agent::{AfterStop, Agent, AgentState, Ending};
use crate::command::{Decision, Effect, NewRun, Start};
use crate::dependency::{circle, waits_for};
use crate::due::{self, Due, millis};
use crate::project::Project;
use crate::restart::{self, End, Verdict};

/// Refuses settings that can never work.
pub(super) fn check(project: &Project, name: &AgentName, spec: &AgentSpec) -> Result<(), Refusal> {
    let invalid = |message: String| Refusal::new(Code::InvalidParams, message);
    let depends_on = &spec.supervision.depends_on;
    if let Some(missing) = depends_on.iter().find(|d| d.agent != *name && !project.agents.contains_key(&d.agent)) {
        return Err(invalid(format!(
            "'depends_on': project '{}' has no agent '{}' that '{name}' could wait for",
            project.name, missing.agent
        ))
        .hint("start that one first"));
    }
    if let Some(circle) = circle(project, name, depends_on) {
        let names: Vec<&str> = circle.iter().map(AgentName::as_str).collect();
        return Err(invalid(format!("'depends_on' goes round in a circle: {}", names.join(" -> "))));
    }
    let restart = &spec.supervision.restart;
    if restart.max_delay_ms < restart.delay_ms {
        return Err(invalid(format!(
            "'restart': the longest wait ({} ms) is shorter than the first ({} ms)",
            restart.max_delay_ms, restart.delay_ms
        )));
    }
    if spec.supervision.timeout_ms == Some(0) {
        return Err(invalid("'timeout_ms' is 0; leave it out for no limit".into()));
    }
    Ok(())
}

/// Starts an agent, or lets it wait for those that it depends on.
pub(super) fn start_or_wait(
    project: &Project,
    name: AgentName,
    spec: &AgentSpec,
    new: NewRun,
    cause: StartCause,
) -> Decision {
    let for_agents = waits_for(project, &spec.supervision.depends_on);
    if for_agents.is_empty() {
        agents::starting(name, spec.argv.clone(), new, cause)
    } else {
        Decision::events(vec![Event::AgentWaiting { agent: name, for_agents }])
    }
}

/// Starts an agent whose time has come, or one that a person brings back.
pub(super) fn start(
    project: &Project,
    name: AgentName,
    start: Start,
    asked: bool,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    let found = if asked {
        agents::refuse_unless_runnable(project)?;
        let found = agent(project, &name)?;
        if found.is_alive() {
            return Err(Refusal::new(
                Code::AgentRunning,
                format!(
                    "agent '{name}' of project '{}' is {}: there is nothing to bring back",
                    project.name,
                    found.status(false)
                ),
            ));
        }
        found
    } else {
        match project.agents.get(&name) {
            Some(found) if due::due(project, now).contains(&Due::Start(name.clone())) => found,
            _ => return Ok(Decision::default()),
        }
    };
    let cause = match &found.state {
        _ if asked => StartCause::Resume,
        AgentState::Waiting(cause) => *cause,
        AgentState::Backoff { cause, .. } => *cause,
        _ => StartCause::Policy,
    };
    let Start { new, argv, session, checkpoint } = start;
    let mut events = Vec::new();
    if let Some(session) = session.filter(|session| found.session.as_ref() != Some(session)) {
        events.push(Event::AgentSessionFound { agent: name.clone(), session });
    }
    events.push(Event::AgentStarting {
        agent: name.clone(),
        run: new.id.clone(),
        argv,
        cause,
        token_sha256: new.token_sha256,
    });
    Ok(Decision::events(events).then(Effect::Launch { agent: name, run: new.id, comes_back: checkpoint }))
}

/// Decides about something else that is due; what no longer is, is left.
pub(super) fn fall_due(
    project: &Project,
    what: Due,
    operation: OperationId,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    if !due::due(project, now).contains(&what) {
        return Ok(Decision::default());
    }
    match what {
        // A start takes a new run: `start`.
        Due::Start(_) => Ok(Decision::default()),
        Due::Ending(agents) => ending(project, &agents, operation, now),
        Due::End(name) => Ok(end(project, &name)),
        Due::Stale(name) => {
            let event = |(agent, run)| stale(project, agent, run, now);
            Ok(Decision::events(current(project, &name).into_iter().filter_map(event).collect()))
        }
        Due::NotReady(name) => Ok(stop(project, &name, StopCause::NotReady)),
    }
}

fn current(project: &Project, name: &AgentName) -> Option<(AgentName, RunId)> {
    let run = project.agents.get(name)?.current_run()?;
    Some((name.clone(), run.clone()))
}

/// Announces the ends and takes the checkpoint from which the agents can be brought back.
fn ending(
    project: &Project,
    agents: &[(AgentName, Ending)],
    operation: OperationId,
    now: UnixMillis,
) -> Result<Decision, Refusal> {
    let mut trigger = Trigger::Auto;
    let mut events = Vec::new();
    for (name, ending) in agents {
        let Some((agent, run)) = current(project, name) else { continue };
        match ending {
            Ending::TimeUp => {
                trigger = Trigger::Timeout;
                let ran_ms = project.agents[name].run.as_ref().map_or(0, |run| run.clock.read(now));
                events.push(Event::AgentTimeUp { agent, run, ran_ms });
            }
            Ending::Stale => events.extend(stale(project, agent, run, now)),
        }
    }
    let mut decision = checkpoints::begin(project, operation, trigger)?;
    events.append(&mut decision.events);
    decision.events = events;
    Ok(decision)
}

fn stale(project: &Project, agent: AgentName, run: RunId, now: UnixMillis) -> Option<Event> {
    let found = project.agents.get(&agent)?;
    let silent_ms = found.run.as_ref()?.silence?.read(now);
    let restart = found.spec.supervision.on_stale == OnStale::Restart;
    Some(Event::AgentStale { agent, run, silent_ms, restart })
}

fn end(project: &Project, name: &AgentName) -> Decision {
    let ending = project.agents.get(name).and_then(|agent| agent.run.as_ref()?.ending);
    match ending {
        Some(Ending::TimeUp) => stop(project, name, StopCause::TimeUp),
        Some(Ending::Stale) => stop(project, name, StopCause::Stale),
        None => Decision::default(),
    }
}

fn stop(project: &Project, name: &AgentName, cause: StopCause) -> Decision {
    let (Some((agent, run)), Some(found)) = (current(project, name), project.agents.get(name)) else {
        return Decision::default();
    };
    Decision::events(vec![Event::AgentStopping { agent: agent.clone(), restart: false, cause }]).then(Effect::Stop {
        agent,
        run,
        grace_ms: found.spec.stop_grace_ms,
    })
}

/// A report that names no run is the agent's own, and is refused unless its processes are there. One that names a run is
/// an observation of the daemon, which may be late: it is left where that run is no longer current.
pub(super) fn ready(project: &Project, name: AgentName, run: Option<RunId>) -> Result<Decision, Refusal> {
    let alive = project.agents.get(&name).filter(|agent| agent.is_alive());
    let Some(current) = alive.and_then(|agent| agent.run.as_ref()) else {
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

/// Returns what follows from the end of a run; `found` is the agent before that end.
pub(super) fn after_end(found: &Agent, end: End, detail: &str, now: UnixMillis) -> Option<Event> {
    let agent = found.name.clone();
    let seed = found.run.as_ref().map_or_else(|| agent.as_str().to_owned(), |run| run.id.to_string());
    let verdict = match &found.state {
        AgentState::Stopping(AfterStop::Stay | AfterStop::Restart | AfterStop::TimedOut) => Verdict::Stay,
        AgentState::Stopping(AfterStop::GoesOn) => {
            restart::after_stale(&found.spec.supervision.restart, found.row, now)
        }
        AgentState::Stopping(AfterStop::NotReady)
        | AgentState::Waiting(_)
        | AgentState::Backoff { .. }
        | AgentState::Starting
        | AgentState::Running
        | AgentState::Held(_)
        | AgentState::Ended(_)
        | AgentState::Failed { .. }
        | AgentState::TimedOut
        | AgentState::Interrupted { .. } => restart::verdict(&found.spec, end, found.row, now, &seed),
    };
    let cause = if end == End::Interrupted { StartCause::Recovery } else { StartCause::Policy };
    match verdict {
        Verdict::Stay => None,
        Verdict::Start { until, start, .. } => {
            Some(Event::AgentBackoff { agent, until, start, cause, detail: detail.to_owned() })
        }
        Verdict::TooOften { starts } => {
            let within = millis(found.spec.supervision.restart.within_ms) / 1_000;
            let reason = format!("{detail}; started again {starts} times within {within} s, and given up");
            Some(Event::AgentGivenUp { agent, reason: Some(reason) })
        }
    }
}
