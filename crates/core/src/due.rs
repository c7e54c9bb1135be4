//! What is due: the deadlines that follow from the state, so that no timer has to be remembered.
//!
//! The actor asks after every change what is due now and when to look again. What was due while
//! nobody looked, because the daemon was down, is due when the next one looks.

use fermata_protocol::supervision::{OnStale, Supervision};
use fermata_protocol::{AgentName, UnixMillis};

use crate::agent::{Agent, AgentState, Ending};
use crate::dependency::waits_for;
use crate::project::{Project, ProjectState};

/// An agent that has ever reported is stale after so long without a report, milliseconds.
pub const STALE_AFTER_MS: u64 = 3_600_000;

/// How long an agent may take to be ready, milliseconds.
pub const READY_WITHIN_MS: u64 = 60_000;

/// Something that has to be decided now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// The start of an agent: its wait is over, and those that it depends on have come far enough.
    Start(AgentName),
    /// The end of these agents, after one checkpoint for all.
    Ending(Vec<(AgentName, Ending)>),
    /// The end of an agent whose checkpoint was taken, or could not be.
    End(AgentName),
    /// An agent that is stale.
    Stale(AgentName),
    /// An agent that was not ready in time.
    NotReady(AgentName),
}

/// What may become due of one agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Start,
    Ending(Ending),
    End,
    Stale,
    NotReady,
}

/// Returns what is due.
pub fn due(project: &Project, now: UnixMillis) -> Vec<Due> {
    let mut found = Vec::new();
    let mut endings = Vec::new();
    for agent in project.agents.values() {
        for (_, what) in deadlines(project, agent).into_iter().filter(|(at, _)| *at <= now) {
            let name = agent.name.clone();
            match what {
                What::Start => found.push(Due::Start(name)),
                // Time that is up comes first, and ends it for good.
                What::Ending(ending) => {
                    if !endings.iter().any(|(known, _)| *known == name) {
                        endings.push((name, ending));
                    }
                }
                What::End => found.push(Due::End(name)),
                What::Stale => found.push(Due::Stale(name)),
                What::NotReady => found.push(Due::NotReady(name)),
            }
        }
    }
    if !endings.is_empty() {
        found.push(Due::Ending(endings));
    }
    found
}

/// Returns when something will be due next, should nothing change until then.
pub fn next(project: &Project, now: UnixMillis) -> Option<UnixMillis> {
    let all = project.agents.values().flat_map(|agent| deadlines(project, agent));
    all.map(|(at, _)| at).filter(|at| *at > now).min()
}

fn deadlines(project: &Project, agent: &Agent) -> Vec<(UnixMillis, What)> {
    // What is held, or on its way there or back, waits.
    if !matches!(&*project.state, ProjectState::Resting(_)) {
        return Vec::new();
    }
    let supervision = &agent.spec.supervision;
    let starts = || waits_for(project, &supervision.depends_on).is_empty();
    match &agent.state {
        AgentState::Waiting(_) if starts() => vec![(UnixMillis(0), What::Start)],
        AgentState::Backoff { until, .. } if starts() => vec![(*until, What::Start)],
        AgentState::Running => running(project, agent, supervision),
        AgentState::Waiting(_)
        | AgentState::Backoff { .. }
        | AgentState::Starting
        | AgentState::Held(_)
        | AgentState::Stopping(_)
        | AgentState::Ended(_)
        | AgentState::Failed { .. }
        | AgentState::TimedOut
        | AgentState::Interrupted { .. } => Vec::new(),
    }
}

fn running(project: &Project, agent: &Agent, supervision: &Supervision) -> Vec<(UnixMillis, What)> {
    let Some(run) = &agent.run else { return Vec::new() };
    // One checkpoint after the other.
    let free = project.checkpointing.is_none();
    if run.ending.is_some() {
        return if free { vec![(UnixMillis(0), What::End)] } else { Vec::new() };
    }
    let mut found = Vec::new();
    let mut add = |at: Option<UnixMillis>, what| found.extend(at.map(|at| (at, what)));
    if let Some(timeout) = supervision.timeout_ms.filter(|_| free) {
        add(run.clock.reaches(millis(timeout)), What::Ending(Ending::TimeUp));
    }
    if let Some(ready) = supervision.ready.as_ref().filter(|_| run.ready_at.is_none()) {
        let within = millis(ready.timeout_ms.unwrap_or(READY_WITHIN_MS));
        add(run.clock.reaches(run.carried_ms.saturating_add(within)), What::NotReady);
    }
    let after = supervision.stale_after_ms.unwrap_or(STALE_AFTER_MS);
    // Whoever waits for a person is not stale.
    if let Some(silence) = run.silence
        && run.stale_at.is_none()
        && after > 0
        && !project.asks(&agent.name)
    {
        match supervision.on_stale {
            OnStale::Tell => add(silence.reaches(millis(after)), What::Stale),
            OnStale::Restart if free => add(silence.reaches(millis(after)), What::Ending(Ending::Stale)),
            OnStale::Restart => {}
        }
    }
    found
}

/// Returns milliseconds as the clock counts them.
pub fn millis(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}
