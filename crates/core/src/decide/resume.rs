//! The resume: frozen agents are thawed, the others are started again.

use std::collections::BTreeMap;

use fermata_protocol::agent::StartCause;
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, ResumeMethod, ResumeResult};
use fermata_protocol::{AgentName, Code, OperationId, Refusal, UnixMillis};

use super::checks::{half_restored, refuse_during_operation};
use crate::agent::{Agent, AgentState, RunKey};
use crate::budget::refuse_over_budget;
use crate::command::{Decision, Respawn};
use crate::effect::Effect;
use crate::project::{Paused, Project, ProjectState, ResumeOperation};

pub(super) fn begin(
    project: &Project,
    operation: OperationId,
    respawn: BTreeMap<AgentName, Respawn>,
    over_budget: bool,
) -> Result<Decision, Refusal> {
    let ProjectState::Paused(paused) = &*project.state else {
        refuse_during_operation(project)?;
        if let ProjectState::Broken(broken) = &*project.state {
            return Err(half_restored(project, broken));
        }
        return Err(Refusal::new(
            Code::NotPaused,
            format!("project '{}' is {}, not paused", project.name, project.state.status()),
        ));
    };
    // A checkpoint in progress reads the workspace, which the agents would change.
    refuse_during_operation(project)?;
    if !over_budget {
        refuse_over_budget(project)?;
    }
    // The caller has prepared the respawns from an earlier state: an agent may have been parked since.
    let unprepared = |agent: &Agent| !respawn.contains_key(&agent.name) && !may_thaw(agent, paused);
    if let Some(agent) = project.agents.values().find(|agent| agent.is_paused() && unprepared(agent)) {
        return Err(Refusal::new(
            Code::OperationInProgress,
            format!("agent '{}' of project '{}' has just been parked", agent.name, project.name),
        )
        .hint("try again"));
    }
    let mut events = vec![Event::ResumeStarted { operation: operation.clone(), over_budget }];
    let effect = bring_back(project, &operation, paused, Respawns { respawn, unstarted: &[] }, &mut events);
    Ok(Decision::events(events).then(effect))
}

/// A frozen agent whose project is being parked is about to lose its processes.
fn may_thaw(agent: &Agent, paused: &Paused) -> bool {
    agent.is_frozen() && !paused.mode.ends_processes()
}

/// The new runs that a resume may use.
pub(super) struct Respawns<'a> {
    /// For each agent that may have to be started again.
    pub(super) respawn: BTreeMap<AgentName, Respawn>,
    /// Agents whose start an interrupted resume announced and did not carry out.
    pub(super) unstarted: &'a [AgentName],
}

/// Chooses the resume method of each paused agent and announces the new runs.
pub(super) fn bring_back(
    project: &Project,
    operation: &OperationId,
    paused: &Paused,
    mut respawns: Respawns<'_>,
    events: &mut Vec<Event>,
) -> Effect {
    let mut thaw = Vec::new();
    let mut start: Vec<RunKey> = Vec::new();
    for agent in project.agents.values() {
        if !agent.is_paused() && !respawns.unstarted.contains(&agent.name) {
            continue;
        }
        match respawns.respawn.remove(&agent.name) {
            Some(again) if must_respawn(agent, paused, &again) => {
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

fn must_respawn(agent: &Agent, paused: &Paused, again: &Respawn) -> bool {
    let AgentState::Frozen(run) = &agent.state else { return true };
    !may_thaw(agent, paused) || paused.restored.is_some() || again.instead_of_thaw.is_some() || run.processes.is_none()
}

fn in_progress<'a>(project: &'a Project, operation: &OperationId) -> Option<&'a ResumeOperation> {
    match &*project.state {
        ProjectState::Resuming(resume) if resume.operation == *operation => Some(resume),
        ProjectState::Resuming(_)
        | ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Paused(_)
        | ProjectState::Restoring(_)
        | ProjectState::Broken(_) => None,
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
    let Some(resume) = in_progress(project, &operation) else { return Decision::default() };
    let result = ResumeResult {
        success: agents.iter().all(|agent| agent.method != ResumeMethod::Failed),
        operation_id: operation,
        agents,
        restored: resume.paused.restored,
        paused_ms: now.since(resume.paused.since),
        steps_ms,
        warnings,
    };
    Decision::events(vec![Event::ProjectResumed { result }])
}
