//! Recovery: the daemon has started and compares what the store says with what the kernel shows.
//!
//! A pause or checkpoint that was under way is undone; a resume and a planned restore are rolled
//! forward; a committed pause is made true again.

use std::collections::BTreeMap;

use fermata_protocol::agent::StartCause;
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, Code, Refusal, RunId, UnixMillis};

use super::{agents, lifecycle, pause, restore, resume};
use crate::agent::{AfterStop, Agent, AgentState, Held};
use crate::apply::parks;
use crate::command::{Decision, Effect, Observed, Respawn};
use crate::project::{Course, Project, ProjectState, RestoreStage};
use crate::restart::End;

pub(super) fn recover(
    project: &Project,
    observed: &BTreeMap<AgentName, Observed>,
    mut respawn: BTreeMap<AgentName, Respawn>,
    last_seen: &BTreeMap<AgentName, UnixMillis>,
    now: UnixMillis,
) -> Decision {
    let mut decision = Decision::default();
    let resuming = matches!(&*project.state, ProjectState::Resuming(_));
    let mut unstarted = Vec::new();
    for agent in project.alive_agents() {
        let seen = observed.get(&agent.name);
        let found = matches!(seen, Some(Observed::Alive(_) | Observed::Ended { .. }));
        if resuming && agent.state == AgentState::Starting && !found {
            // Announced by the resume, which goes on: it is announced again, with a new run.
            unstarted.push(agent.name.clone());
            continue;
        }
        decision.events.extend(agent_events(project, agent, seen, last_seen.get(&agent.name).copied(), now));
        let AgentState::Stopping(after) = agent.state else { continue };
        match (seen, after) {
            (Some(Observed::Alive(_)), _) => decision.effects.push(Effect::Stop {
                agent: agent.name.clone(),
                run: agents::run_id(agent),
                grace_ms: agent.spec.stop_grace_ms,
            }),
            (_, AfterStop::Restart) => {
                if let Some(prepared) = respawn.remove(&agent.name) {
                    let name = agent.name.clone();
                    let again = lifecycle::start_or_wait(project, name, &agent.spec, prepared.new, StartCause::Restart);
                    decision.events.extend(again.events);
                    decision.effects.extend(again.effects);
                }
            }
            // By policy, from the events above.
            (_, AfterStop::Stay | AfterStop::GoesOn | AfterStop::TimedOut | AfterStop::NotReady) => {}
        }
    }
    // What follows is decided on the state that these events lead to.
    let mut next = project.clone();
    for event in &decision.events {
        crate::apply(&mut next, event, now);
    }
    operation(&next, respawn, &unstarted, &mut decision);
    decision
}

fn agent_events(
    project: &Project,
    agent: &Agent,
    observed: Option<&Observed>,
    last_seen: Option<UnixMillis>,
    now: UnixMillis,
) -> Vec<Event> {
    let Some(run) = agent.run.as_ref() else { return Vec::new() };
    let (agent_name, run_id) = (agent.name.clone(), run.id.clone());
    let parking = agents::ends_by_parking(project, agent);
    match observed {
        Some(Observed::Alive(processes)) => {
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
        Some(Observed::Ended { .. } | Observed::Lost { .. }) if parking => {
            vec![Event::AgentParked { agent: agent_name, run: run_id }]
        }
        Some(Observed::Ended { exit, detail, at }) => {
            let (exit, detail) = (*exit, detail.clone());
            let mut events = vec![Event::AgentExited {
                agent: agent_name,
                run: run_id,
                exit,
                detail: detail.clone(),
                ended_at: *at,
            }];
            events.extend(agents::after_exit(agent, exit, detail, now));
            events
        }
        // A held agent whose processes are gone with the machine is brought back by the resume,
        // as a parked one.
        Some(Observed::Lost { .. }) if agent.state == AgentState::Held(Held::Frozen) => {
            vec![Event::AgentParked { agent: agent_name, run: run_id }]
        }
        Some(Observed::Lost { detail }) => interrupted(agent, run_id, detail.clone(), last_seen, now),
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
    let again = lifecycle::after_end(agent, End::Interrupted, &detail, now);
    let mut events = vec![Event::AgentInterrupted { agent: agent.name.clone(), run, detail, last_seen }];
    events.extend(again);
    events
}

fn operation(next: &Project, respawn: BTreeMap<AgentName, Respawn>, unstarted: &[AgentName], decision: &mut Decision) {
    let alive = || next.runs(next.alive_agents());
    match &*next.state {
        ProjectState::Pausing(run) => {
            if run.course == Course::Forward {
                let error = Refusal::new(
                    Code::PauseFailed,
                    format!("the daemon ended during the step '{}' of the pause", run.step.as_str()),
                );
                decision.events.push(Event::OperationUndoing {
                    operation: run.operation.clone(),
                    step: run.step.as_str().into(),
                    error: error.into(),
                });
            }
            decision.effects.push(pause::undo_effect(next, run));
        }
        ProjectState::Paused(paused) => {
            let frozen = next.frozen_runs();
            if !frozen.is_empty() {
                decision.effects.push(Effect::Hold { runs: frozen.clone() });
                if parks(paused.mode) {
                    decision.effects.push(Effect::Park { runs: frozen });
                }
            }
        }
        ProjectState::Resuming(run) => {
            let again = resume::Prepared { respawn, unstarted };
            let effect = resume::bring_back(next, &run.operation, &run.paused, again, &mut decision.events);
            decision.effects.push(effect);
        }
        ProjectState::Restoring(run) => match run.stage {
            RestoreStage::Preparing => {
                let error = Refusal::new(
                    Code::RestoreFailed,
                    "the daemon ended before the restore changed anything".to_owned(),
                )
                .hint("try again");
                decision.events.push(Event::RestoreFailed { operation: run.operation.clone(), error: error.into() });
                decision.effects.push(Effect::ForgetPlan { operation: run.operation.clone() });
            }
            RestoreStage::Applying => decision.effects.push(restore::apply_effect(run, 0)),
        },
        ProjectState::Broken(_) => {
            let frozen = next.frozen_runs();
            if !frozen.is_empty() {
                decision.effects.push(Effect::Park { runs: frozen });
            }
        }
        ProjectState::Resting(_) => {}
    }
    if let Some(run) = &next.checkpointing {
        decision.effects.push(Effect::Undo {
            operation: run.operation.clone(),
            checkpoint: run.checkpoint,
            runs: if next.is_held() { Vec::new() } else { alive() },
        });
    } else if let ProjectState::Resting(_) = &*next.state {
        // A blip that nobody concluded must not outlive the daemon that made it.
        let runs = alive();
        if !runs.is_empty() {
            decision.effects.push(Effect::Thaw { runs });
        }
    }
}
