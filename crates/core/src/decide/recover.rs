//! Recovery: a new daemon compares the stored state with what it has found of the runs.
//!
//! A pause or checkpoint in progress is undone; a resume and a planned restore are rolled forward; the freeze of a
//! committed pause is committed again.

use std::collections::BTreeMap;

use fermata_protocol::agent::StartCause;
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, Code, Refusal, RunId, UnixMillis};

use super::{agents, checkpoints, lifecycle, pause, restore, resume, start};
use crate::agent::{AfterStop, Agent, AgentState};
use crate::apply::apply;
use crate::command::{Decision, RecoveredRun, Respawn};
use crate::effect::Effect;
use crate::project::{Direction, Project, ProjectState, RestoreStage};
use crate::restart::RunOutcome;

pub(super) fn recover(
    project: &Project,
    recovered: &BTreeMap<AgentName, RecoveredRun>,
    mut respawn: BTreeMap<AgentName, Respawn>,
    last_seen: &BTreeMap<AgentName, UnixMillis>,
    now: UnixMillis,
) -> Decision {
    let mut decision = Decision::default();
    let resuming = matches!(&*project.state, ProjectState::Resuming(_));
    let mut unstarted = Vec::new();
    for agent in project.alive_agents() {
        let found = recovered.get(&agent.name);
        let has_run = matches!(found, Some(RecoveredRun::Alive(_) | RecoveredRun::Ended { .. }));
        if resuming && matches!(agent.state, AgentState::Starting(_)) && !has_run {
            // The resume announced its start and is rolled forward: the start is announced again, with a new run.
            unstarted.push(agent.name.clone());
            continue;
        }
        decision.events.extend(agent_events(project, agent, found, last_seen.get(&agent.name).copied(), now));
        let AgentState::Stopping { run, then } = &agent.state else { continue };
        match (found, then) {
            (Some(RecoveredRun::Alive(_)), _) => {
                let (name, run) = (agent.name.clone(), run.id.clone());
                decision.effects.push(agents::stop_effect(project, name, run, agent.spec.stop_grace_ms));
            }
            (_, AfterStop::Restart) => {
                if let Some(prepared) = respawn.remove(&agent.name) {
                    let name = agent.name.clone();
                    decision.append(start::start_or_wait(
                        project,
                        name,
                        &agent.spec,
                        prepared.new,
                        StartCause::Restart,
                    ));
                }
            }
            // The events above follow the restart policy.
            (_, AfterStop::Stay | AfterStop::GoesOn | AfterStop::TimedOut | AfterStop::NotReady) => {}
        }
    }
    if let ProjectState::Restoring(restoring) = &*project.state
        && restoring.stage == RestoreStage::Preparing
    {
        let operation = restoring.operation.clone();
        let error =
            Refusal::new(Code::RestoreFailed, "the daemon exited before the restore changed anything".to_owned())
                .hint("try again");
        decision.events.push(Event::RestoreFailed { operation: operation.clone(), error: error.into() });
        decision.effects.push(Effect::ForgetPlan { operation });
    }
    // The rest is decided on the state that these events lead to.
    let mut next = project.clone();
    for event in &decision.events {
        apply(&mut next, event, now);
    }
    operation(&next, respawn, &unstarted, &mut decision);
    decision
}

fn agent_events(
    project: &Project,
    agent: &Agent,
    found: Option<&RecoveredRun>,
    last_seen: Option<UnixMillis>,
    now: UnixMillis,
) -> Vec<Event> {
    let Some(run) = agent.state.current_run() else { return Vec::new() };
    let (agent_name, run_id) = (agent.name.clone(), run.id.clone());
    let parking = agents::ends_by_parking(project, agent);
    match found {
        Some(RecoveredRun::Alive(processes)) => {
            let mut events = Vec::new();
            if run.processes.as_ref() != Some(processes) {
                events.push(Event::AgentStarted {
                    agent: agent_name.clone(),
                    run: run_id.clone(),
                    processes: processes.clone(),
                });
            }
            events.push(Event::AgentAdopted { agent: agent_name, run: run_id });
            events
        }
        Some(RecoveredRun::Ended { .. } | RecoveredRun::Lost { .. }) if parking => {
            vec![Event::AgentParked { agent: agent_name, run: run_id }]
        }
        Some(RecoveredRun::Ended { exit, detail, at }) => {
            let (exit, detail) = (*exit, detail.clone());
            let mut events = vec![Event::AgentExited {
                agent: agent_name,
                run: run_id,
                exit,
                detail: detail.clone(),
                ended_at: *at,
            }];
            events.extend(lifecycle::after_exit(agent, exit, detail, now));
            events
        }
        // A frozen agent that went down with the machine is brought back by the resume, as a parked one.
        Some(RecoveredRun::Lost { .. }) if agent.is_frozen() => {
            vec![Event::AgentParked { agent: agent_name, run: run_id }]
        }
        Some(RecoveredRun::Lost { detail }) => interrupted(agent, run_id, detail.clone(), last_seen, now),
        None => interrupted(agent, run_id, "nothing is left of its run".into(), last_seen, now),
    }
}

fn interrupted(
    agent: &Agent,
    run: RunId,
    detail: String,
    last_seen: Option<UnixMillis>,
    now: UnixMillis,
) -> Vec<Event> {
    let again = lifecycle::after_end(agent, RunOutcome::Interrupted, &detail, now);
    let mut events = vec![Event::AgentInterrupted { agent: agent.name.clone(), run, detail, last_seen }];
    events.extend(again);
    events
}

fn operation(next: &Project, respawn: BTreeMap<AgentName, Respawn>, unstarted: &[AgentName], decision: &mut Decision) {
    let alive = || next.runs(next.alive_agents());
    match &*next.state {
        ProjectState::Pausing(pausing) => {
            if pausing.direction == Direction::Forward {
                let error = Refusal::new(
                    Code::PauseFailed,
                    format!("the daemon exited during the step '{}' of the pause", pausing.step.as_str()),
                );
                decision.events.push(Event::OperationUndoing {
                    operation: pausing.operation.clone(),
                    step: pausing.step.as_str().into(),
                    error: error.into(),
                });
            }
            decision.effects.push(pause::undo_effect(next, pausing));
        }
        ProjectState::Paused(paused) => {
            let frozen = next.frozen_runs();
            if !frozen.is_empty() {
                decision.effects.push(Effect::CommitFreeze { runs: frozen.clone() });
                if paused.mode.ends_processes() {
                    decision.effects.push(Effect::Park { runs: frozen });
                }
            }
        }
        ProjectState::Resuming(resuming) => {
            let respawns = resume::Respawns { respawn, unstarted };
            let effect =
                resume::bring_back(next, &resuming.operation, &resuming.paused, respawns, &mut decision.events);
            decision.effects.push(effect);
        }
        // A restore without a plan has failed above.
        ProjectState::Restoring(restoring) => decision.effects.push(restore::apply_effect(restoring, 0)),
        ProjectState::Broken(_) => {
            let frozen = next.frozen_runs();
            if !frozen.is_empty() {
                decision.effects.push(Effect::Park { runs: frozen });
            }
        }
        ProjectState::Resting(_) => {}
    }
    if let Some(making) = &next.checkpointing {
        decision.effects.push(checkpoints::undo_effect(next, making));
    } else if let ProjectState::Resting(_) = &*next.state {
        // The freeze of a checkpoint beside running agents must not outlive the daemon that made it.
        let runs = alive();
        if !runs.is_empty() {
            decision.effects.push(Effect::Thaw { runs });
        }
    }
}
