//! Agents: run, stop, kill, restart, remove, and what their shims report.

use std::sync::Arc;

use fermata_protocol::agent::{AgentSpec, ExitStatus, RunProcesses, StartCause, StopCause};
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, Code, Refusal, RunId, UnixMillis};

use super::checks::{agent, refuse_unless_startable};
use super::lifecycle::{after_end, after_exit};
use super::{pause, start};
use crate::agent::{AfterStop, Agent, AgentState};
use crate::command::{AfterEnd, Decision, NewRun};
use crate::effect::Effect;
use crate::project::{Direction, Project, ProjectState};
use crate::restart::RunOutcome;

pub(super) fn run(project: &Project, name: AgentName, spec: AgentSpec, new: NewRun) -> Result<Decision, Refusal> {
    refuse_unless_startable(project)?;
    if let Some(existing) = project.agents.get(&name).filter(|agent| !agent.is_terminal()) {
        return Err(Refusal::new(
            Code::AgentRunning,
            format!("agent '{name}' of project '{}' is running already", project.name),
        )
        .hint(format!("give the new one another --name, or: fermatactl stop {}/{}", project.name, existing.name)));
    }
    start::check(project, &name, &spec)?;
    let mut decision = start::start_or_wait(project, name.clone(), &spec, new, StartCause::Run);
    decision.events.insert(0, Event::AgentCreated { agent: name, spec });
    Ok(decision)
}

/// Returns the agents that a stop or kill concerns: the named one, or all that are not terminal.
fn selected<'a>(project: &'a Project, name: Option<&AgentName>) -> Result<Vec<&'a Agent>, Refusal> {
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

/// Ends agents, each with the grace that `grace` gives it, or without any.
fn end(project: &Project, name: Option<AgentName>, grace: impl Fn(&Agent) -> Option<u64>) -> Result<Decision, Refusal> {
    let mut thawed = None;
    let mut decision = Decision::default();
    for agent in selected(project, name.as_ref())? {
        let name = agent.name.clone();
        match &agent.state {
            AgentState::Waiting { .. }
            | AgentState::Backoff { .. }
            | AgentState::Ended { .. }
            | AgentState::Failed { .. }
            | AgentState::TimedOut { .. }
            | AgentState::Interrupted { .. } => {
                decision.events.push(Event::AgentGivenUp { agent: name, reason: None });
            }
            // Its processes have ended already.
            AgentState::Parked(run) => {
                decision.events.push(stopping(name.clone(), false));
                decision.events.push(Event::AgentInterrupted {
                    agent: name,
                    run: run.id.clone(),
                    detail: "it was parked, and stopped before it was resumed".into(),
                    last_seen: None,
                });
            }
            // There is no process to signal yet; `launched` stops it.
            AgentState::Starting(_) => decision.events.push(stopping(name, false)),
            AgentState::Running(run) | AgentState::Frozen(run) | AgentState::Stopping { run, .. } => {
                decision.events.push(stopping(name.clone(), false));
                let effect = match grace(agent) {
                    Some(grace_ms) => stop_effect(project, name.clone(), run.id.clone(), grace_ms),
                    None => Effect::Kill { agent: name.clone(), run: run.id.clone() },
                };
                if matches!(effect, Effect::Stop { .. }) {
                    thawed.get_or_insert(name);
                }
                decision.effects.push(effect);
            }
        }
    }
    if let Some(name) = thawed
        && let ProjectState::Pausing(pausing) = &*project.state
        && pausing.direction == Direction::Forward
    {
        // The agent is thawed to receive its SIGTERM, and so it runs while the workspace is read.
        let error = Refusal::new(
            Code::PauseFailed,
            format!("agent '{name}' was stopped while project '{}' was being paused", project.name),
        )
        .hint(format!("fermatactl pause {}", project.name));
        decision.append(pause::undo(project, pausing, error.into()));
    }
    Ok(decision)
}

fn stopping(agent: AgentName, restart: bool) -> Event {
    Event::AgentStopping { agent, restart, cause: StopCause::Asked }
}

/// Ends the processes of a run with a grace where that is allowed: a grace thaws the agent, whose memory must not meet
/// files that were restored.
pub(super) fn stop_effect(project: &Project, agent: AgentName, run: RunId, grace_ms: u64) -> Effect {
    if files_are_restored(project) { Effect::Kill { agent, run } } else { Effect::Stop { agent, run, grace_ms } }
}

/// Says whether files were, or are being, restored beneath frozen processes.
fn files_are_restored(project: &Project) -> bool {
    match &*project.state {
        ProjectState::Restoring(_) | ProjectState::Broken(_) => true,
        ProjectState::Paused(paused) => paused.restored.is_some(),
        ProjectState::Resuming(resume) => resume.paused.restored.is_some(),
        ProjectState::Resting(_) | ProjectState::Pausing(_) => false,
    }
}

pub(super) fn restart(project: &Project, name: AgentName, new: NewRun) -> Result<Decision, Refusal> {
    refuse_unless_startable(project)?;
    let found = agent(project, &name)?;
    match &found.state {
        // There is no process to signal yet; `launched` stops it.
        AgentState::Starting(_) => Ok(Decision::events(vec![stopping(name, true)])),
        AgentState::Running(run) | AgentState::Frozen(run) | AgentState::Stopping { run, .. } => {
            let (run, grace_ms) = (run.id.clone(), found.spec.stop_grace_ms);
            Ok(Decision::events(vec![stopping(name.clone(), true)]).then(Effect::Stop { agent: name, run, grace_ms }))
        }
        AgentState::Waiting { .. }
        | AgentState::Backoff { .. }
        | AgentState::Parked(_)
        | AgentState::Ended { .. }
        | AgentState::Failed { .. }
        | AgentState::TimedOut { .. }
        | AgentState::Interrupted { .. } => {
            Ok(start::start_or_wait(project, name, &found.spec, new, StartCause::Restart))
        }
    }
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
    Ok(Decision::events(vec![Event::AgentRemoved { agent: name.clone() }]).then(Effect::ForgetAgent { agent: name }))
}

/// Finds the agent whose current run a report is about; a late report of an older run is ignored.
fn reporting<'a>(project: &'a Project, name: &AgentName, run: &RunId) -> Option<&'a Agent> {
    project.agents.get(name).map(|agent| &**agent).filter(|agent| agent.current_run_id() == Some(run))
}

pub(super) fn launched(
    project: &Project,
    name: AgentName,
    run: RunId,
    outcome: Result<RunProcesses, String>,
    now: UnixMillis,
) -> Decision {
    let Some(found) = reporting(project, &name, &run) else { return Decision::default() };
    match outcome {
        Ok(processes) => {
            let started = Event::AgentStarted { agent: name.clone(), run: run.clone(), processes };
            let decision = Decision::events(vec![started]);
            // A stop was requested while it was being started.
            if matches!(found.state, AgentState::Stopping { .. }) {
                decision.then(Effect::Stop { agent: name, run, grace_ms: found.spec.stop_grace_ms })
            } else {
                decision
            }
        }
        Err(reason) => {
            let again = match found.run().map(|run| run.cause) {
                Some(StartCause::Policy | StartCause::Recovery) => after_end(found, RunOutcome::Badly, &reason, now),
                // A person has requested the start and sees the error.
                Some(StartCause::Run | StartCause::Restart | StartCause::Resume) | None => None,
            };
            let mut events = vec![Event::AgentLaunchFailed { agent: name, run, reason }];
            events.extend(again);
            Decision::events(events)
        }
    }
}

/// How a run has ended.
pub(super) struct ReportedEnd {
    pub(super) exit: ExitStatus,
    pub(super) detail: Option<String>,
    pub(super) ended_at: UnixMillis,
    pub(super) then: AfterEnd,
}

pub(super) fn run_ended(
    project: &Project,
    name: AgentName,
    run: RunId,
    end: ReportedEnd,
    new: NewRun,
    now: UnixMillis,
) -> Decision {
    let Some(found) = reporting(project, &name, &run).filter(|agent| agent.is_alive()) else {
        return Decision::default();
    };
    if ends_by_parking(project, found) {
        return Decision::events(vec![Event::AgentParked { agent: name, run }]);
    }
    let ReportedEnd { exit, detail, ended_at, then } = end;
    let exited = Event::AgentExited { agent: name.clone(), run, exit, detail: detail.clone(), ended_at };
    let mut decision = Decision::events(vec![exited]);
    if restarts(found) {
        decision.append(start::start_or_wait(project, name, &found.spec, new, StartCause::Restart));
    } else if then == AfterEnd::ByPolicy {
        decision.events.extend(after_exit(found, exit, detail, now));
    }
    decision
}

/// Says whether the agent is being stopped because a person restarts it.
fn restarts(agent: &Agent) -> bool {
    matches!(agent.state, AgentState::Stopping { then: AfterStop::Restart, .. })
}

/// Says whether Fermata itself ends the processes of a frozen agent: its project is paused by parking, or a restore
/// was given up.
pub(super) fn ends_by_parking(project: &Project, agent: &Agent) -> bool {
    match &*project.state {
        ProjectState::Paused(paused) => agent.is_frozen() && paused.mode.ends_processes(),
        ProjectState::Broken(_) => agent.is_frozen(),
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
    let Some(found) = reporting(project, &name, &run) else { return Decision::default() };
    if ends_by_parking(project, found) {
        return Decision::events(vec![Event::AgentParked { agent: name, run }]);
    }
    if !found.is_alive() {
        return Decision::default();
    }
    let again = if restarts(found) {
        Some(Event::AgentBackoff {
            agent: name.clone(),
            until: now,
            start: 1,
            cause: StartCause::Restart,
            detail: detail.clone(),
        })
    } else {
        match then {
            AfterEnd::ByPolicy => after_end(found, RunOutcome::Interrupted, &detail, now),
            AfterEnd::Stay => None,
        }
    };
    let mut events = vec![Event::AgentInterrupted { agent: name, run, detail, last_seen: None }];
    events.extend(again);
    Decision::events(events)
}

pub(super) fn unreachable(project: &Project, name: AgentName, run: RunId, detail: String) -> Decision {
    let Some(found) = reporting(project, &name, &run) else { return Decision::default() };
    if found.run().is_some_and(|run| run.unreachable.as_ref() == Some(&detail)) {
        return Decision::default();
    }
    Decision::events(vec![Event::AgentUnreachable { agent: name, run, detail }])
}

pub(super) fn freeze_broken(project: &Project, name: AgentName, run: RunId, times: u64, detail: String) -> Decision {
    if reporting(project, &name, &run).is_none() {
        return Decision::default();
    }
    Decision::events(vec![Event::AgentFreezeBroken { agent: name, run, times, detail }])
}

/// The shim repeats the report after each new connection: a repeated one changes nothing.
pub(super) fn suspended(project: &Project, name: AgentName, run: RunId, suspended: bool) -> Decision {
    let Some(found) = reporting(project, &name, &run) else { return Decision::default() };
    if found.run().is_some_and(|run| run.suspended_at.is_some()) == suspended {
        return Decision::default();
    }
    Decision::events(vec![if suspended {
        Event::AgentSuspended { agent: name, run }
    } else {
        Event::AgentContinued { agent: name, run }
    }])
}

pub(super) fn parked(project: &Project, name: AgentName, run: RunId) -> Decision {
    if reporting(project, &name, &run).is_some_and(Agent::is_frozen) {
        Decision::events(vec![Event::AgentParked { agent: name, run }])
    } else {
        Decision::default()
    }
}
