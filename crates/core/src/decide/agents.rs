//! Starting, stopping and ending agents.

use std::sync::Arc;

use fermata_protocol::agent::{AgentSpec, ExitStatus, RunProcesses};
use fermata_protocol::agent::{StartCause, StopCause};
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, Code, Refusal, RunId, UnixMillis};

use super::{agent, lifecycle, refuse_while_moving};
use crate::agent::{AfterStop, Agent, AgentState, Held};
use crate::apply::parks;
use crate::command::{AfterEnd, Decision, Effect, NewRun};
use crate::project::{Course, Project, ProjectState};
use crate::restart::End;

pub(super) fn refuse_unless_runnable(project: &Project) -> Result<(), Refusal> {
    match &*project.state {
        // A checkpoint beside it does not keep an agent from starting.
        ProjectState::Resting(_) => Ok(()),
        ProjectState::Paused(_) => {
            Err(Refusal::new(Code::ProjectPaused, format!("project '{}' is paused", project.name))
                .hint(format!("fermatactl resume {}", project.name)))
        }
        ProjectState::Broken(broken) => Err(super::restore::broken(project, broken)),
        ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
            refuse_while_moving(project)
        }
    }
}

pub(super) fn starting(agent: AgentName, argv: Vec<String>, new: NewRun, cause: StartCause) -> Decision {
    let event =
        Event::AgentStarting { agent: agent.clone(), run: new.id.clone(), argv, cause, token_sha256: new.token_sha256 };
    Decision::events(vec![event]).then(Effect::Launch { agent, run: new.id, comes_back: None })
}

pub(super) fn run(project: &Project, name: AgentName, spec: AgentSpec, new: NewRun) -> Result<Decision, Refusal> {
    refuse_unless_runnable(project)?;
    if let Some(existing) = project.agents.get(&name).filter(|agent| !agent.is_terminal()) {
        return Err(Refusal::new(
            Code::AgentRunning,
            format!("agent '{name}' of project '{}' is running already", project.name),
        )
        .hint(format!("give the new one another --name, or: fermatactl stop {}/{}", project.name, existing.name)));
    }
    lifecycle::check(project, &name, &spec)?;
    let mut decision = lifecycle::start_or_wait(project, name.clone(), &spec, new, StartCause::Run);
    decision.events.insert(0, Event::AgentCreated { agent: name, spec });
    Ok(decision)
}

/// The agents that a command aims at: the named one, or all that are not terminal.
fn aimed<'a>(project: &'a Project, name: Option<&AgentName>) -> Result<Vec<&'a Agent>, Refusal> {
    match name {
        None => Ok(project.agents.values().map(Arc::as_ref).filter(|a| !a.is_terminal()).collect()),
        Some(name) => {
            let found = agent(project, name)?;
            if found.is_terminal() {
                return Err(Refusal::new(
                    Code::AgentNotRunning,
                    format!("agent '{name}' of project '{}' is not running", project.name),
                ));
            }
            Ok(vec![found])
        }
    }
}

pub(super) fn stop(project: &Project, name: Option<AgentName>, grace_ms: Option<u64>) -> Result<Decision, Refusal> {
    end(project, name, |agent| Some(grace_ms.unwrap_or(agent.spec.stop_grace_ms)))
}

pub(super) fn kill(project: &Project, name: Option<AgentName>) -> Result<Decision, Refusal> {
    end(project, name, |_| None)
}

/// Ends agents, with the grace that each is given, or without any.
fn end(project: &Project, name: Option<AgentName>, grace: impl Fn(&Agent) -> Option<u64>) -> Result<Decision, Refusal> {
    let mut let_go = None;
    let mut decision = Decision::default();
    for agent in aimed(project, name.as_ref())? {
        if !agent.is_alive() && agent.state != AgentState::Held(Held::Parked) {
            decision.events.push(Event::AgentGivenUp { agent: agent.name.clone(), reason: None });
            continue;
        }
        decision.events.push(stopping(&agent.name, false));
        let (name, run) = (agent.name.clone(), run_id(agent));
        match (&agent.state, grace(agent)) {
            // Its processes are gone already: there is nothing to wait for.
            (AgentState::Held(Held::Parked), _) => decision.events.push(parked_end(agent)),
            // There is nothing to signal yet; `launched` stops it.
            (AgentState::Starting, _) => {}
            // A grace thaws, and old memory must not run over restored files.
            (_, Some(grace_ms)) if !files_are_older(project) => {
                let_go.get_or_insert(name.clone());
                decision.effects.push(Effect::Stop { agent: name, run, grace_ms });
            }
            _ => decision.effects.push(Effect::Kill { agent: name, run }),
        }
    }
    if let Some(name) = let_go
        && let ProjectState::Pausing(run) = &*project.state
        && run.course == Course::Forward
    {
        // It is thawed to hear its SIGTERM, and so it runs while the workspace is read.
        let error = Refusal::new(
            Code::PauseFailed,
            format!("agent '{name}' was stopped while project '{}' was being paused", project.name),
        )
        .hint(format!("fermatactl pause {}", project.name));
        let undo = super::pause::undo(project, run, error.into());
        decision.events.extend(undo.events);
        decision.effects.extend(undo.effects);
    }
    Ok(decision)
}

fn stopping(agent: &AgentName, restart: bool) -> Event {
    Event::AgentStopping { agent: agent.clone(), restart, cause: StopCause::Asked }
}

/// Says whether files were, or are being, restored under processes that are frozen.
fn files_are_older(project: &Project) -> bool {
    match &*project.state {
        ProjectState::Restoring(_) | ProjectState::Broken(_) => true,
        ProjectState::Paused(paused) => paused.restored.is_some(),
        ProjectState::Resuming(run) => run.paused.restored.is_some(),
        ProjectState::Resting(_) | ProjectState::Pausing(_) => false,
    }
}

/// A parked agent that is given up: there is no exit status to report.
fn parked_end(agent: &Agent) -> Event {
    Event::AgentInterrupted {
        agent: agent.name.clone(),
        run: run_id(agent),
        detail: "it was parked, and stopped before it was resumed".into(),
        last_seen: None,
    }
}

pub(super) fn run_id(agent: &Agent) -> RunId {
    match &agent.run {
        Some(run) => run.id.clone(),
        // An agent is created together with its first run, in one transaction.
        None => RunId::new("run-0").unwrap_or_else(|_| unreachable!("a constant that is a valid id")),
    }
}

pub(super) fn restart(project: &Project, name: AgentName, new: NewRun) -> Result<Decision, Refusal> {
    refuse_unless_runnable(project)?;
    let found = agent(project, &name)?;
    if !found.is_alive() {
        return Ok(lifecycle::start_or_wait(project, name, &found.spec, new, StartCause::Restart));
    }
    let decision = Decision::events(vec![stopping(&name, true)]);
    if found.state == AgentState::Starting {
        return Ok(decision);
    }
    Ok(decision.then(Effect::Stop { agent: name, run: run_id(found), grace_ms: found.spec.stop_grace_ms }))
}

pub(super) fn remove(project: &Project, name: AgentName) -> Result<Decision, Refusal> {
    let found = agent(project, &name)?;
    if !found.is_terminal() {
        return Err(Refusal::new(
            Code::AgentRunning,
            format!("agent '{name}' of project '{}' has not ended", project.name),
        )
        .hint(format!("fermatactl stop {}/{name}", project.name)));
    }
    Ok(Decision::events(vec![Event::AgentRemoved { agent: name.clone() }]).then(Effect::Forget { agent: name }))
}

pub(super) fn launched(
    project: &Project,
    name: AgentName,
    run: RunId,
    outcome: Result<RunProcesses, String>,
    now: UnixMillis,
) -> Decision {
    let Some(found) = project.agents.get(&name).filter(|_| is_current(project, &name, &run)) else {
        return Decision::default();
    };
    match outcome {
        Ok(processes) => {
            let stop = match found.state {
                AgentState::Stopping(_) => {
                    Some(Effect::Stop { agent: name.clone(), run: run.clone(), grace_ms: found.spec.stop_grace_ms })
                }
                _ => None,
            };
            let decision = Decision::events(vec![Event::AgentStarted { agent: name, run, processes }]);
            stop.into_iter().fold(decision, Decision::then)
        }
        Err(reason) => {
            let cause = found.run.as_ref().map(|run| run.cause);
            // Where a person is there to see it, they want to know, not to wait.
            let again = match cause {
                Some(StartCause::Policy | StartCause::Recovery) => {
                    lifecycle::after_end(found, End::Badly, &reason, now)
                }
                Some(StartCause::Run | StartCause::Restart | StartCause::Resume) | None => None,
            };
            let mut events = vec![Event::AgentLaunchFailed { agent: name, run, reason }];
            events.extend(again);
            Decision::events(events)
        }
    }
}

/// How a run has ended.
pub(super) struct RunEnd {
    pub(super) exit: ExitStatus,
    pub(super) detail: Option<String>,
    pub(super) ended_at: UnixMillis,
    pub(super) then: AfterEnd,
}

pub(super) fn run_ended(
    project: &Project,
    name: AgentName,
    run: RunId,
    end: RunEnd,
    new: NewRun,
    now: UnixMillis,
) -> Decision {
    if !is_current(project, &name, &run) {
        return Decision::default();
    }
    let Some(found) = project.agents.get(&name).filter(|agent| agent.is_alive()) else { return Decision::default() };
    if ends_by_parking(project, found) {
        return Decision::events(vec![Event::AgentParked { agent: name, run }]);
    }
    let RunEnd { exit, detail, ended_at, then } = end;
    let exited = Event::AgentExited { agent: name.clone(), run, exit, detail: detail.clone(), ended_at };
    let mut decision = Decision::events(vec![exited]);
    if found.state == AgentState::Stopping(AfterStop::Restart) {
        let next = lifecycle::start_or_wait(project, name, &found.spec, new, StartCause::Restart);
        decision.events.extend(next.events);
        decision.effects.extend(next.effects);
    } else if then == AfterEnd::ByPolicy {
        decision.events.extend(after_exit(found, exit, detail, now));
    }
    decision
}

/// Returns what follows from an exit by itself, or by the end of its time.
pub(super) fn after_exit(found: &Agent, exit: ExitStatus, detail: Option<String>, now: UnixMillis) -> Option<Event> {
    let end = if exit.is_success() && found.state != AgentState::Stopping(AfterStop::NotReady) {
        End::Well
    } else {
        End::Badly
    };
    lifecycle::after_end(found, end, &detail.unwrap_or_else(|| exit.to_string()), now)
}

/// Frozen in a project that is paused to be parked, or whose restore was given up: the end is our own work.
pub(super) fn ends_by_parking(project: &Project, agent: &Agent) -> bool {
    match &*project.state {
        ProjectState::Paused(paused) => agent.state == AgentState::Held(Held::Frozen) && parks(paused.mode),
        ProjectState::Broken(_) => agent.state == AgentState::Held(Held::Frozen),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_) => false,
    }
}

pub(super) fn run_lost(
    project: &Project,
    name: AgentName,
    run: RunId,
    detail: String,
    then: AfterEnd,
    now: UnixMillis,
) -> Decision {
    match project.agents.get(&name) {
        Some(found) if is_current(project, &name, &run) && ends_by_parking(project, found) => {
            Decision::events(vec![Event::AgentParked { agent: name, run }])
        }
        Some(found) if is_current(project, &name, &run) && found.is_alive() => {
            let again = match then {
                // The restart that a person asked for still comes.
                _ if found.state == AgentState::Stopping(AfterStop::Restart) => Some(Event::AgentBackoff {
                    agent: name.clone(),
                    until: now,
                    start: 1,
                    cause: StartCause::Restart,
                    detail: detail.clone(),
                }),
                AfterEnd::ByPolicy => lifecycle::after_end(found, End::Interrupted, &detail, now),
                AfterEnd::Stay => None,
            };
            let mut events = vec![Event::AgentInterrupted { agent: name, run, detail, last_seen: None }];
            events.extend(again);
            Decision::events(events)
        }
        _ => Decision::default(),
    }
}

pub(super) fn unreachable(project: &Project, name: AgentName, run: RunId, detail: String) -> Decision {
    let known = |agent: &Arc<Agent>| agent.run.as_ref().is_some_and(|run| run.unreachable.as_ref() == Some(&detail));
    if is_current(project, &name, &run) && !project.agents.get(&name).is_some_and(known) {
        Decision::events(vec![Event::AgentUnreachable { agent: name, run, detail }])
    } else {
        Decision::default()
    }
}

pub(super) fn freeze_broken(project: &Project, name: AgentName, run: RunId, times: u64, detail: String) -> Decision {
    if is_current(project, &name, &run) {
        Decision::events(vec![Event::AgentFreezeBroken { agent: name, run, times, detail }])
    } else {
        Decision::default()
    }
}

/// The shim tells it again after each new link, so that nothing is missed: twice is once.
pub(super) fn suspended(project: &Project, name: AgentName, run: RunId, held: bool) -> Decision {
    let known = project.agents.get(&name).and_then(|agent| agent.run.as_ref()).and_then(|run| run.suspended_at);
    if !is_current(project, &name, &run) || known.is_some() == held {
        return Decision::default();
    }
    let event =
        if held { Event::AgentSuspended { agent: name, run } } else { Event::AgentContinued { agent: name, run } };
    Decision::events(vec![event])
}

pub(super) fn parked(project: &Project, name: AgentName, run: RunId) -> Decision {
    let frozen = project.agents.get(&name).is_some_and(|a| a.state == AgentState::Held(Held::Frozen));
    if frozen && is_current(project, &name, &run) {
        Decision::events(vec![Event::AgentParked { agent: name, run }])
    } else {
        Decision::default()
    }
}

/// Says whether the run is the agent's current one; late news of older runs is ignored.
fn is_current(project: &Project, name: &AgentName, run: &RunId) -> bool {
    project.agents.get(name).and_then(|agent| agent.current_run()) == Some(run)
}
