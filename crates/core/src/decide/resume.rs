//! The resume: frozen agents are thawed, the others are started again.

use std::collections::BTreeMap;

use fermata_protocol::agent::StartCause;
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, ResumeResult, Rung};
use fermata_protocol::{AgentName, Code, OperationId, Refusal, UnixMillis};

use super::refuse_while_moving;
use crate::agent::{Agent, AgentState, Held};
use crate::apply::parks;
use crate::budget::refuse_over_budget;
use crate::command::{AgentRun, Decision, Effect, Respawn};
use crate::project::{Paused, Project, ProjectState, ResumeRun};

pub(super) fn begin(
    project: &Project,
    operation: OperationId,
    respawn: BTreeMap<AgentName, Respawn>,
    over_budget: bool,
) -> Result<Decision, Refusal> {
    let ProjectState::Paused(paused) = &*project.state else {
        refuse_while_moving(project)?;
        if let ProjectState::Broken(broken) = &*project.state {
            return Err(super::restore::broken(project, broken));
        }
        return Err(Refusal::new(
            Code::NotPaused,
            format!("project '{}' is {}, not paused", project.name, project.state.status()),
        ));
    };
    // A checkpoint beside it reads the workspace, which the agents are about to change.
    refuse_while_moving(project)?;
    if !over_budget {
        refuse_over_budget(project)?;
    }
    // Prepared from an earlier look at the project: an agent may have been parked since.
    let unprepared = |agent: &Agent| match agent.state {
        AgentState::Held(held) => !respawn.contains_key(&agent.name) && (held == Held::Parked || parks(paused.mode)),
        _ => false,
    };
    if let Some(agent) = project.agents.values().find(|agent| unprepared(agent)) {
        return Err(Refusal::new(
            Code::OperationInProgress,
            format!("agent '{}' of project '{}' has just been parked", agent.name, project.name),
        )
        .hint("try again"));
    }
    let mut events = vec![Event::ResumeStarted { operation: operation.clone(), over_budget }];
    let effect = bring_back(project, &operation, paused, Prepared { respawn, unstarted: &[] }, &mut events);
    Ok(Decision::events(events).then(effect))
}

/// What a resume has at hand.
pub(super) struct Prepared<'a> {
    /// A new run for each agent, should it be needed.
    pub(super) respawn: BTreeMap<AgentName, Respawn>,
    /// Agents that an interrupted resume announced and did not start.
    pub(super) unstarted: &'a [AgentName],
}

/// Chooses the rung of each held agent and announces the new runs.
pub(super) fn bring_back(
    project: &Project,
    operation: &OperationId,
    paused: &Paused,
    mut prepared: Prepared<'_>,
    events: &mut Vec<Event>,
) -> Effect {
    let mut thaw = Vec::new();
    let mut start: Vec<AgentRun> = Vec::new();
    for agent in project.agents.values() {
        let held = match agent.state {
            AgentState::Held(held) => held,
            _ if prepared.unstarted.contains(&agent.name) => Held::Parked,
            _ => continue,
        };
        match prepared.respawn.remove(&agent.name) {
            Some(again) if must_respawn(agent, held, paused, &again) => {
                if let Some(session) = again.session.filter(|s| agent.session.as_ref() != Some(s)) {
                    events.push(Event::AgentSessionFound { agent: agent.name.clone(), session });
                }
                events.push(Event::AgentStarting {
                    agent: agent.name.clone(),
                    run: again.new.id.clone(),
                    argv: again.argv,
                    cause: StartCause::Resume,
                    token_sha256: again.new.token_sha256,
                });
                start.push((agent.name.clone(), again.new.id));
            }
            _ => thaw.extend(project.runs([agent])),
        }
    }
    Effect::Resume {
        operation: operation.clone(),
        thaw,
        respawn: start,
        checkpoint: paused.context.unwrap_or(paused.checkpoint),
    }
}

fn must_respawn(agent: &Agent, held: Held, paused: &Paused, again: &Respawn) -> bool {
    let gone = agent.run.as_ref().is_none_or(|run| run.processes.is_none());
    // Parking may still be under way: its processes are about to end.
    held == Held::Parked || parks(paused.mode) || paused.restored.is_some() || again.instead_of_thaw.is_some() || gone
}

fn run<'a>(project: &'a Project, operation: &OperationId) -> Option<&'a ResumeRun> {
    match &*project.state {
        ProjectState::Resuming(run) if run.operation == *operation => Some(run),
        _ => None,
    }
}

pub(super) fn done(
    project: &Project,
    operation: OperationId,
    agents: Vec<AgentResumed>,
    steps_ms: BTreeMap<String, f64>,
    warnings: Vec<String>,
    now: UnixMillis,
) -> Decision {
    let Some(run) = run(project, &operation) else { return Decision::default() };
    let result = ResumeResult {
        success: agents.iter().all(|agent| agent.rung != Rung::Failed),
        operation_id: operation,
        agents,
        restored: run.paused.restored,
        paused_ms: now.since(run.paused.since),
        steps_ms,
        warnings,
    };
    Decision::events(vec![Event::ProjectResumed { result }])
}
