//! What events do to agents.

use std::sync::Arc;

use fermata_protocol::agent::{StartCause, StopCause};
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, RunId, UnixMillis};

use super::{rest, settle};
use crate::agent::{AfterStop, Agent, AgentState, Ended, Ending, Held, Run, RunEnd};
use crate::clock::Clock;
use crate::due::millis;
use crate::project::{Project, ProjectState, Resting};
use crate::restart::{Again, Row};

pub(super) fn apply(project: &mut Project, event: &Event, at: UnixMillis) {
    let Some(name) = event.agent().cloned() else { return };
    match event {
        Event::AgentCreated { spec, .. } => match project.agents.get_mut(&name) {
            Some(agent) => Arc::make_mut(agent).spec = spec.clone(),
            None => {
                let agent = Agent {
                    name: name.clone(),
                    spec: spec.clone(),
                    state: AgentState::Ended(Ended::ByItself),
                    runs: 0,
                    row: Row::default(),
                    run: None,
                    created_at: at,
                    progress: None,
                    session: None,
                    usage: Default::default(),
                };
                project.agents.insert(name.clone(), Arc::new(agent));
            }
        },
        Event::AgentStarting { run, argv, token_sha256, cause, .. } => {
            change(project, &name, |agent| {
                let ever_reported =
                    agent.progress.is_some() || agent.run.as_ref().is_some_and(|run| run.silence.is_some());
                // What goes on where it was goes on with its time as well.
                let ran_ms = match (cause, &agent.run) {
                    (StartCause::Recovery, Some(run)) => run.clock.read(at),
                    (StartCause::Resume, Some(run)) if agent.state != AgentState::TimedOut => run.clock.read(at),
                    _ => 0,
                };
                // Whoever starts it again although its time is over gives it new time.
                let over = agent.spec.supervision.timeout_ms.is_some_and(|timeout| ran_ms >= millis(timeout));
                let ran_ms = if over { 0 } else { ran_ms };
                if !matches!(cause, StartCause::Policy | StartCause::Recovery) {
                    agent.row = Row::default();
                }
                agent.state = AgentState::Starting;
                agent.runs += 1;
                agent.run = Some(Run {
                    id: run.clone(),
                    argv: argv.clone(),
                    token_sha256: token_sha256.clone(),
                    started_at: at,
                    processes: None,
                    suspended_at: None,
                    ended: None,
                    cause: *cause,
                    clock: Clock::started(at, ran_ms),
                    carried_ms: ran_ms,
                    silence: ever_reported.then(|| Clock::started(at, 0)),
                    reported_ms: None,
                    ready_at: None,
                    stale_at: None,
                    ending: None,
                    unreachable: None,
                });
            });
            begin_work(project);
        }
        Event::AgentStarted { processes, .. } => change(project, &name, |agent| {
            if agent.state == AgentState::Starting {
                agent.state = AgentState::Running;
            }
            if let Some(run) = &mut agent.run {
                run.processes = Some(processes.clone());
                if agent.spec.supervision.ready.is_none() {
                    run.ready_at.get_or_insert(at);
                }
            }
        }),
        Event::AgentWaiting { .. } => {
            change(project, &name, |agent| {
                let again = agent.run.is_some();
                agent.state = AgentState::Waiting(if again { StartCause::Restart } else { StartCause::Run });
            });
            begin_work(project);
        }
        Event::AgentSuspended { run, .. } => suspend(project, &name, run, Some(at)),
        Event::AgentContinued { run, .. } => suspend(project, &name, run, None),
        Event::AgentReady { .. } => change(project, &name, |agent| {
            if let Some(run) = &mut agent.run {
                run.ready_at = Some(at);
            }
        }),
        Event::AgentTimeUp { .. } => change(project, &name, |agent| {
            if let Some(run) = &mut agent.run {
                run.ending = Some(Ending::TimeUp);
            }
        }),
        Event::AgentStale { restart, .. } => change(project, &name, |agent| {
            if let Some(run) = &mut agent.run {
                run.stale_at = Some(at);
                if *restart {
                    run.ending.get_or_insert(Ending::Stale);
                }
            }
        }),
        Event::AgentBackoff { until, start, cause, detail, .. } => {
            change(project, &name, |agent| {
                let again = match agent.state {
                    _ if *cause == StartCause::Restart => Again::Anew,
                    AgentState::Ended(Ended::ByItself) => Again::Anew,
                    _ => Again::GoesOn,
                };
                let since = if *start > 1 { agent.row.since } else { at };
                agent.row = Row { starts: *start, since };
                agent.state = AgentState::Backoff { until: *until, again, cause: *cause, detail: detail.clone() };
            });
            begin_work(project);
        }
        Event::AgentGivenUp { reason, .. } => {
            change(project, &name, |agent| {
                agent.state = match reason {
                    Some(reason) => AgentState::Failed { detail: Some(reason.clone()) },
                    None => AgentState::Ended(Ended::Stopped),
                };
            });
            settle(project);
        }
        Event::AgentAdopted { .. } => change(project, &name, |agent| set_unreachable(agent, None)),
        Event::AgentUnreachable { detail, .. } => {
            change(project, &name, |agent| set_unreachable(agent, Some(detail.clone())));
        }
        Event::AgentLaunchFailed { reason, .. } => {
            end(project, &name, RunEnd { exit: None, at }, AgentState::Failed { detail: Some(reason.clone()) });
        }
        Event::AgentStopping { restart, cause, .. } => change(project, &name, |agent| {
            if agent.is_alive() {
                agent.state = AgentState::Stopping(match cause {
                    StopCause::Asked if *restart => AfterStop::Restart,
                    // A kill of what does not end in its grace changes nothing about why it ends.
                    StopCause::Asked if agent.state == AgentState::Stopping(AfterStop::TimedOut) => AfterStop::TimedOut,
                    StopCause::Asked => AfterStop::Stay,
                    StopCause::TimeUp => AfterStop::TimedOut,
                    StopCause::Stale => AfterStop::GoesOn,
                    StopCause::NotReady => AfterStop::NotReady,
                });
            }
        }),
        Event::AgentExited { exit, detail, ended_at, .. } => {
            let state = match project.agents.get(&name).map(|agent| &agent.state) {
                Some(AgentState::Stopping(AfterStop::TimedOut)) => AgentState::TimedOut,
                Some(AgentState::Stopping(AfterStop::NotReady)) => {
                    AgentState::Failed { detail: Some("it was not ready in time".into()) }
                }
                Some(AgentState::Stopping(_)) => AgentState::Ended(Ended::Stopped),
                _ if exit.is_success() => AgentState::Ended(Ended::ByItself),
                _ => AgentState::Failed { detail: detail.clone() },
            };
            end(project, &name, RunEnd { exit: Some(*exit), at: *ended_at }, state);
        }
        Event::AgentInterrupted { detail, last_seen, .. } => {
            let timed_out = matches!(
                project.agents.get(&name).map(|agent| &agent.state),
                Some(AgentState::Stopping(AfterStop::TimedOut))
            );
            // Its time was over, whatever has ended it in the end.
            let state =
                if timed_out { AgentState::TimedOut } else { AgentState::Interrupted { detail: detail.clone() } };
            end(project, &name, RunEnd { exit: None, at: last_seen.map_or(at, |seen| seen.min(at)) }, state);
        }
        Event::AgentParked { .. } => change(project, &name, |agent| {
            agent.state = AgentState::Held(Held::Parked);
            if let Some(run) = &mut agent.run {
                run.processes = None;
                run.clock.stand_still(at);
                run.ended = Some(RunEnd { exit: None, at });
            }
        }),
        Event::AgentRemoved { .. } => {
            if let Some(gone) = project.agents.remove(&name) {
                project.counters.removed_usage = project.counters.removed_usage.plus(&gone.usage);
            }
        }
        Event::AgentSessionFound { session, .. } => {
            change(project, &name, |agent| agent.session = Some(session.clone()));
        }
        Event::AgentProgressed { progress, .. } => {
            change(project, &name, |agent| {
                agent.progress = Some(progress.clone());
                if let Some(run) = &mut agent.run {
                    run.reported_ms = Some(run.clock.read(at));
                }
            });
            reported(project, &name, at);
        }
        Event::AgentUsed { usage, .. } => {
            change(project, &name, |agent| agent.usage = agent.usage.plus(usage));
            reported(project, &name, at);
        }
        _ => {}
    }
}

/// Takes note that an agent has reported something: it is not stale.
pub(super) fn reported(project: &mut Project, name: &AgentName, at: UnixMillis) {
    change(project, name, |agent| {
        let held = matches!(agent.state, AgentState::Held(_));
        let alive = agent.is_alive();
        if let Some(run) = agent.run.as_mut().filter(|_| alive) {
            let mut silence = Clock::started(at, 0);
            if held {
                // Somebody answered its question: it begins to be silent when it goes on.
                silence.stand_still(at);
            }
            run.silence = Some(silence);
            run.stale_at = None;
        }
    });
}

/// A project in which something is to be started is at work.
fn suspend(project: &mut Project, name: &AgentName, run: &RunId, since: Option<UnixMillis>) {
    change(project, name, |agent| {
        if let Some(current) = agent.run.as_mut().filter(|current| current.id == *run) {
            current.suspended_at = since;
        }
    });
}

fn begin_work(project: &mut Project) {
    if let ProjectState::Resting(_) = *project.state {
        rest(project, Resting::Active);
    }
}

pub(super) fn change(project: &mut Project, name: &AgentName, with: impl FnOnce(&mut Agent)) {
    if let Some(agent) = project.agents.get_mut(name) {
        with(Arc::make_mut(agent));
    }
}

fn set_unreachable(agent: &mut Agent, why: Option<String>) {
    if let Some(run) = &mut agent.run {
        run.unreachable = why;
    }
}

fn end(project: &mut Project, name: &AgentName, end: RunEnd, state: AgentState) {
    change(project, name, |agent| {
        agent.state = state;
        if let Some(run) = &mut agent.run {
            run.processes = None;
            run.stand_still(end.at);
            run.unreachable = None;
            run.ended = Some(end);
        }
    });
    settle(project);
}
