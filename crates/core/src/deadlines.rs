//! The deadlines that follow from the state of a project, so that no timer has to be remembered.
//!
//! After every change the actor asks what is due now, and when to ask again. A deadline that passed while no daemon
//! ran is due when the next daemon asks.

use fermata_protocol::supervision::{OnStale, Supervision};
use fermata_protocol::{AgentName, UnixMillis};

use crate::agent::{Agent, AgentState, PlannedEnd, Run};
use crate::clock::millis;
use crate::dependency::waits_for;
use crate::project::{Project, ProjectState};

/// An agent that has ever reported is stale after this time without a report, where its settings do not say.
pub const STALE_AFTER_MS: u64 = 3_600_000;

/// How long an agent may take to be ready, where its settings do not say.
pub const READY_WITHIN_MS: u64 = 60_000;

/// What has to be decided now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DueAction {
    /// The start of an agent: its backoff is over, and the agents that it depends on are far enough.
    Start(AgentName),
    /// The end of these agents, after one checkpoint for all of them.
    PlanEnds(Vec<(AgentName, PlannedEnd)>),
    /// The end of an agent for which [`DueAction::PlanEnds`] has taken a checkpoint, or has failed to.
    End(AgentName),
    /// An agent has become stale.
    Stale(AgentName),
    /// An agent was not ready in time.
    NotReady(AgentName),
}

/// What becomes due of one agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deadline {
    Start,
    PlanEnd(PlannedEnd),
    End,
    Stale,
    NotReady,
}

/// Returns what is due.
pub fn due_actions(project: &Project, now: UnixMillis) -> Vec<DueAction> {
    let mut actions = Vec::new();
    let mut ends = Vec::new();
    for agent in project.agents.values() {
        for (_, deadline) in deadlines(project, agent).into_iter().filter(|(at, _)| *at <= now) {
            let name = agent.name.clone();
            match deadline {
                Deadline::Start => actions.push(DueAction::Start(name)),
                // A timeout comes first, and ends the agent for good.
                Deadline::PlanEnd(end) => {
                    if !ends.iter().any(|(other, _)| *other == name) {
                        ends.push((name, end));
                    }
                }
                Deadline::End => actions.push(DueAction::End(name)),
                Deadline::Stale => actions.push(DueAction::Stale(name)),
                Deadline::NotReady => actions.push(DueAction::NotReady(name)),
            }
        }
    }
    if !ends.is_empty() {
        actions.push(DueAction::PlanEnds(ends));
    }
    actions
}

/// Returns when something will be due next if the state does not change until then.
pub fn next(project: &Project, now: UnixMillis) -> Option<UnixMillis> {
    let all = project.agents.values().flat_map(|agent| deadlines(project, agent));
    all.map(|(at, _)| at).filter(|at| *at > now).min()
}

fn deadlines(project: &Project, agent: &Agent) -> Vec<(UnixMillis, Deadline)> {
    // While a project is paused or an operation changes its status, no deadline applies.
    if !matches!(&*project.state, ProjectState::Resting(_)) {
        return Vec::new();
    }
    let supervision = &agent.spec.supervision;
    if let Some(start) = agent.state.pending_start() {
        let may_start = waits_for(project, &supervision.depends_on).is_empty();
        return if may_start { vec![(start.at, Deadline::Start)] } else { Vec::new() };
    }
    let AgentState::Running(run) = &agent.state else { return Vec::new() };
    of_running(project, agent, run, supervision)
}

fn of_running(project: &Project, agent: &Agent, run: &Run, supervision: &Supervision) -> Vec<(UnixMillis, Deadline)> {
    // A project makes one checkpoint at a time.
    let may_checkpoint = project.checkpointing.is_none();
    if run.planned_end.is_some() {
        return if may_checkpoint { vec![(UnixMillis(0), Deadline::End)] } else { Vec::new() };
    }
    let mut found = Vec::new();
    let mut add = |at: Option<UnixMillis>, deadline| found.extend(at.map(|at| (at, deadline)));
    if let Some(timeout) = supervision.timeout_ms.filter(|_| may_checkpoint) {
        add(run.clock.reaches(millis(timeout)), Deadline::PlanEnd(PlannedEnd::TimeUp));
    }
    if let Some(ready) = supervision.ready.as_ref().filter(|_| run.ready_at.is_none()) {
        let within = millis(ready.timeout_ms.unwrap_or(READY_WITHIN_MS));
        add(run.clock.reaches(run.carried_ms.saturating_add(within)), Deadline::NotReady);
    }
    let stale_after = supervision.stale_after_ms.unwrap_or(STALE_AFTER_MS);
    // An agent that waits for a person's answer is not stale.
    if let Some(silence) = run.silence
        && run.stale_at.is_none()
        && stale_after > 0
        && !project.asks(&agent.name)
    {
        let at = silence.reaches(millis(stale_after));
        match supervision.on_stale {
            OnStale::Tell => add(at, Deadline::Stale),
            OnStale::Restart if may_checkpoint => add(at, Deadline::PlanEnd(PlannedEnd::Stale)),
            OnStale::Restart => {}
        }
    }
    found
}
