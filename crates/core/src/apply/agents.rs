//! What events do to agents.

use std::sync::Arc;

use fermata_protocol::agent::{AgentSpec, ExitStatus, Progress, RunProcesses, StartCause, StopCause};
use fermata_protocol::budget::Usage;
use fermata_protocol::{AgentName, RunId, UnixMillis};

use super::settle::{change_agent, rest, settle};
use crate::agent::{AfterStop, Agent, AgentState, EndedBy, PlannedEnd, Run, RunEnd};
use crate::clock::{Clock, millis};
use crate::project::{Project, ProjectState, Resting};
use crate::restart::{RestartKind, StartStreak};

pub(super) fn created(project: &mut Project, name: &AgentName, spec: &AgentSpec, at: UnixMillis) {
    match project.agents.get_mut(name) {
        Some(agent) => Arc::make_mut(agent).spec = spec.clone(),
        None => {
            let agent = Agent {
                name: name.clone(),
                spec: spec.clone(),
                state: AgentState::Ended { by: EndedBy::Itself, last: None },
                runs: 0,
                streak: StartStreak::default(),
                created_at: at,
                progress: None,
                session: None,
                usage: Default::default(),
            };
            project.agents.insert(name.clone(), Arc::new(agent));
        }
    }
}

/// The run that `agent.starting` announces.
pub(super) struct BegunRun<'a> {
    pub(super) id: &'a RunId,
    pub(super) argv: &'a [String],
    pub(super) cause: StartCause,
    pub(super) token_sha256: &'a str,
}

pub(super) fn starting(project: &mut Project, name: &AgentName, begun: BegunRun<'_>, at: UnixMillis) {
    change_agent(project, name, |agent| {
        let ever_reported = agent.progress.is_some() || agent.run().is_some_and(|run| run.silence.is_some());
        let timed_out = matches!(agent.state, AgentState::TimedOut { .. });
        // A run that continues an earlier one continues its time as well.
        let continues = match begun.cause {
            StartCause::Recovery => true,
            StartCause::Resume => !timed_out,
            StartCause::Run | StartCause::Restart | StartCause::Policy => false,
        };
        let ran_ms = agent.run().filter(|_| continues).map_or(0, |run| run.clock.read(at));
        // An agent that is started again although its timeout is reached gets its whole time anew.
        let over = agent.spec.supervision.timeout_ms.is_some_and(|timeout| ran_ms >= millis(timeout));
        let ran_ms = if over { 0 } else { ran_ms };
        match begun.cause {
            StartCause::Policy | StartCause::Recovery => {}
            StartCause::Run | StartCause::Restart | StartCause::Resume => agent.streak = StartStreak::default(),
        }
        agent.runs += 1;
        agent.state = AgentState::Starting(Run {
            id: begun.id.clone(),
            argv: begun.argv.to_vec(),
            token_sha256: begun.token_sha256.to_owned(),
            started_at: at,
            processes: None,
            suspended_at: None,
            ended: None,
            cause: begun.cause,
            clock: Clock::running_from(at, ran_ms),
            carried_ms: ran_ms,
            silence: ever_reported.then(|| Clock::running_from(at, 0)),
            reported_ms: None,
            ready_at: None,
            stale_at: None,
            planned_end: None,
            unreachable: None,
        });
    });
    begin_work(project);
}

pub(super) fn started(project: &mut Project, name: &AgentName, processes: &RunProcesses, at: UnixMillis) {
    change_agent(project, name, |agent| {
        if matches!(agent.state, AgentState::Starting(_)) {
            agent.state.change(AgentState::Running);
        }
        let is_ready = agent.spec.supervision.ready.is_none();
        if let Some(run) = agent.state.run_mut() {
            run.processes = Some(processes.clone());
            if is_ready {
                run.ready_at.get_or_insert(at);
            }
        }
    });
}

pub(super) fn launch_failed(project: &mut Project, name: &AgentName, reason: &str, at: UnixMillis) {
    let end = RunEnd { exit: None, at };
    end_run(project, name, end, |last| AgentState::Failed { detail: Some(reason.to_owned()), last });
}

pub(super) fn waiting(project: &mut Project, name: &AgentName) {
    change_agent(project, name, |agent| {
        let last = agent.state.take_run();
        let cause = if last.is_some() { StartCause::Restart } else { StartCause::Run };
        agent.state = AgentState::Waiting { cause, last };
    });
    begin_work(project);
}

pub(super) fn ready(project: &mut Project, name: &AgentName, at: UnixMillis) {
    change_run(project, name, |run| run.ready_at = Some(at));
}

pub(super) fn time_up(project: &mut Project, name: &AgentName) {
    change_run(project, name, |run| run.planned_end = Some(PlannedEnd::TimeUp));
}

pub(super) fn stale(project: &mut Project, name: &AgentName, restart: bool, at: UnixMillis) {
    change_run(project, name, |run| {
        run.stale_at = Some(at);
        if restart {
            run.planned_end.get_or_insert(PlannedEnd::Stale);
        }
    });
}

/// What `agent.backoff` announces.
pub(super) struct BegunBackoff<'a> {
    pub(super) until: UnixMillis,
    /// Which start of the streak it will be.
    pub(super) start: u32,
    pub(super) cause: StartCause,
    pub(super) detail: &'a str,
}

pub(super) fn backoff(project: &mut Project, name: &AgentName, backoff: BegunBackoff<'_>, at: UnixMillis) {
    let BegunBackoff { until, start, cause, detail } = backoff;
    change_agent(project, name, |agent| {
        let completed = matches!(agent.state, AgentState::Ended { by: EndedBy::Itself, .. });
        let restart = if completed || cause == StartCause::Restart { RestartKind::Anew } else { RestartKind::GoesOn };
        let since = if start > 1 { agent.streak.since } else { at };
        agent.streak = StartStreak { starts: start, since };
        let last = agent.state.take_run();
        agent.state = AgentState::Backoff { until, restart, cause, detail: detail.to_owned(), last };
    });
    begin_work(project);
}

pub(super) fn given_up(project: &mut Project, name: &AgentName, reason: Option<&str>) {
    change_agent(project, name, |agent| {
        let last = agent.state.take_run();
        agent.state = match reason {
            Some(reason) => AgentState::Failed { detail: Some(reason.to_owned()), last },
            None => AgentState::Ended { by: EndedBy::Person, last },
        };
    });
    settle(project);
}

pub(super) fn unreachable(project: &mut Project, name: &AgentName, why: Option<&String>) {
    change_run(project, name, |run| run.unreachable = why.cloned());
}

pub(super) fn stopping(project: &mut Project, name: &AgentName, restart: bool, cause: StopCause) {
    change_agent(project, name, |agent| {
        if !agent.is_alive() {
            return;
        }
        let times_out = matches!(agent.state, AgentState::Stopping { then: AfterStop::TimedOut, .. });
        let then = match cause {
            StopCause::Asked if restart => AfterStop::Restart,
            // A kill of an agent that does not end within its grace does not change why it ends.
            StopCause::Asked if times_out => AfterStop::TimedOut,
            StopCause::Asked => AfterStop::Stay,
            StopCause::TimeUp => AfterStop::TimedOut,
            StopCause::Stale => AfterStop::GoesOn,
            StopCause::NotReady => AfterStop::NotReady,
        };
        agent.state.change(|run| AgentState::Stopping { run, then });
    });
}

pub(super) fn exited(
    project: &mut Project,
    name: &AgentName,
    exit: ExitStatus,
    detail: Option<&str>,
    ended_at: UnixMillis,
) {
    let then = project.agents.get(name).and_then(|agent| stops(&agent.state));
    end_run(project, name, RunEnd { exit: Some(exit), at: ended_at }, |last| match then {
        Some(AfterStop::TimedOut) => AgentState::TimedOut { last },
        Some(AfterStop::NotReady) => AgentState::Failed { detail: Some("it was not ready in time".into()), last },
        Some(AfterStop::Stay | AfterStop::Restart | AfterStop::GoesOn) => {
            AgentState::Ended { by: EndedBy::Person, last }
        }
        None if exit.is_success() => AgentState::Ended { by: EndedBy::Itself, last },
        None => AgentState::Failed { detail: detail.map(str::to_owned), last },
    });
}

pub(super) fn interrupted(project: &mut Project, name: &AgentName, detail: &str, at: UnixMillis) {
    // An agent whose timeout was reached has timed out, whatever ended it.
    let timed_out = project.agents.get(name).and_then(|agent| stops(&agent.state)) == Some(AfterStop::TimedOut);
    end_run(project, name, RunEnd { exit: None, at }, |last| {
        if timed_out {
            AgentState::TimedOut { last }
        } else {
            AgentState::Interrupted { detail: detail.to_owned(), last }
        }
    });
}

/// Returns what follows from the stop in progress.
fn stops(state: &AgentState) -> Option<AfterStop> {
    if let AgentState::Stopping { then, .. } = state { Some(*then) } else { None }
}

pub(super) fn parked(project: &mut Project, name: &AgentName, at: UnixMillis) {
    change_agent(project, name, |agent| {
        agent.state.change(|mut run| {
            run.processes = None;
            run.clock.stop(at);
            run.ended = Some(RunEnd { exit: None, at });
            AgentState::Parked(run)
        });
    });
}

pub(super) fn removed(project: &mut Project, name: &AgentName) {
    if let Some(gone) = project.agents.remove(name) {
        project.counters.removed_usage = project.counters.removed_usage.plus(&gone.usage);
    }
}

pub(super) fn suspended(project: &mut Project, name: &AgentName, run: &RunId, at: Option<UnixMillis>) {
    change_run(project, name, |current| {
        if current.id == *run {
            current.suspended_at = at;
        }
    });
}

pub(super) fn session_found(project: &mut Project, name: &AgentName, session: &str) {
    change_agent(project, name, |agent| agent.session = Some(session.to_owned()));
}

pub(super) fn progressed(project: &mut Project, name: &AgentName, progress: &Progress, at: UnixMillis) {
    change_agent(project, name, |agent| {
        agent.progress = Some(progress.clone());
        if let Some(run) = agent.state.run_mut() {
            run.reported_ms = Some(run.clock.read(at));
        }
    });
    reported(project, name, at);
}

pub(super) fn used(project: &mut Project, name: &AgentName, usage: &Usage, at: UnixMillis) {
    change_agent(project, name, |agent| agent.usage = agent.usage.plus(usage));
    reported(project, name, at);
}

/// Records that an agent has reported something: it is not stale.
pub(super) fn reported(project: &mut Project, name: &AgentName, at: UnixMillis) {
    change_agent(project, name, |agent| {
        if !agent.is_alive() {
            return;
        }
        let mut silence = Clock::running_from(at, 0);
        if agent.is_paused() {
            // A person has answered its question: its silence begins when the agent goes on.
            silence.stop(at);
        }
        if let Some(run) = agent.state.run_mut() {
            run.silence = Some(silence);
            run.stale_at = None;
        }
    });
}

/// A project in which an agent is started, or will be, is active.
fn begin_work(project: &mut Project) {
    if let ProjectState::Resting(_) = *project.state {
        rest(project, Resting::Active);
    }
}

fn change_run(project: &mut Project, name: &AgentName, change: impl FnOnce(&mut Run)) {
    change_agent(project, name, |agent| {
        if let Some(run) = agent.state.run_mut() {
            change(run);
        }
    });
}

/// Ends the run of an agent; `state` makes the agent's state of it.
fn end_run(project: &mut Project, name: &AgentName, end: RunEnd, state: impl FnOnce(Option<Run>) -> AgentState) {
    change_agent(project, name, |agent| {
        let mut last = agent.state.take_run();
        if let Some(run) = &mut last {
            run.processes = None;
            run.stop_clocks(end.at);
            run.unreachable = None;
            run.ended = Some(end);
        }
        agent.state = state(last);
    });
    settle(project);
}
