//! Decides what a command leads to: facts and effects, or a refusal that changes nothing.

mod agents;
mod checkpoints;
mod lifecycle;
mod pause;
mod recover;
mod reports;
mod restore;
mod resume;

#[cfg(test)]
mod automatic_test;
#[cfg(test)]
mod budget_test;
#[cfg(test)]
mod lifecycle_test;
#[cfg(test)]
mod model;
#[cfg(test)]
mod model_test;

use fermata_protocol::event::Event;
use fermata_protocol::task::Phase;
use fermata_protocol::{AgentName, Code, Refusal, UnixMillis};

use crate::agent::Agent;
use crate::budget;
use crate::command::{Command, Decision, Effect};
use crate::project::{Project, ProjectState};

/// Decides what a command leads to.
///
/// # Errors
/// A refusal: the state does not allow the command, or it names something that is not there.
pub fn decide(project: &Project, command: Command, now: UnixMillis) -> Result<Decision, Refusal> {
    match command {
        Command::Set { description, phase, config } => Ok(set(project, description, phase, config)),
        Command::Remove { checkpoints, with_checkpoints } => remove(project, checkpoints, with_checkpoints),
        Command::Run { agent, spec, new } => agents::run(project, agent, spec, new),
        Command::Start { agent, start, asked } => lifecycle::start(project, agent, start, asked, now),
        Command::FallDue { due, operation } => lifecycle::fall_due(project, due, operation, now),
        Command::Ready { agent, run } => lifecycle::ready(project, agent, run),
        Command::Stop { agent, grace_ms } => agents::stop(project, agent, grace_ms),
        Command::Kill { agent } => agents::kill(project, agent),
        Command::Restart { agent, new } => agents::restart(project, agent, new),
        Command::RemoveAgent { agent } => agents::remove(project, agent),
        Command::Launched { agent, run, outcome } => Ok(agents::launched(project, agent, run, outcome, now)),
        Command::RunEnded { agent, run, exit, detail, ended_at, new, then } => {
            let end = agents::RunEnd { exit, detail, ended_at, then };
            Ok(agents::run_ended(project, agent, run, end, new, now))
        }
        Command::RunLost { agent, run, detail, then } => Ok(agents::run_lost(project, agent, run, detail, then, now)),
        Command::Parked { agent, run } => Ok(agents::parked(project, agent, run)),
        Command::Suspended { agent, run, held } => Ok(agents::suspended(project, agent, run, held)),
        Command::Typed { agent, run, by, bytes } => {
            Ok(Decision::events(vec![Event::AgentTyped { agent, run, by, bytes }]))
        }
        Command::Unreachable { agent, run, detail } => Ok(agents::unreachable(project, agent, run, detail)),
        Command::FreezeBroken { agent, run, times, detail } => {
            Ok(agents::freeze_broken(project, agent, run, times, detail))
        }
        Command::Progress { agent, progress, phase } => reports::progress(project, agent, progress, phase),
        Command::Use { agent, usage } => reports::usage(project, agent, usage),
        Command::SaveState { agent, bytes } => reports::save_state(project, agent, bytes),
        Command::PutTask { agent, id, title, status, percent } => {
            reports::put_task(project, reports::TaskChange { agent, id, title, status, percent }, now)
        }
        Command::Ask { agent, text, choices } => reports::ask(project, agent, text, choices, now),
        Command::Answer { id, answer } => reports::answer(project, id, answer, now),
        Command::AddContext { agent, items, tokens } => reports::add_context(project, agent, items, tokens),
        Command::FlashSave { results } => reports::flash_save(project, results),
        Command::PinContext { id, pinned } => Ok(Decision::events(vec![Event::ContextPinned { id, pinned }])),
        Command::RecallContext { ids } => Ok(Decision::events(vec![Event::ContextRecalled { ids }])),
        Command::Withhold { cause, reason, because } => {
            Ok(Decision::events(vec![Event::PauseWithheld { cause, reason, because }]))
        }
        Command::Pause { operation, cause, reason, mode, grace_ms } => {
            pause::begin(project, operation, pause::Wanted { cause, reason, mode, grace_ms })
        }
        Command::PauseStepped { operation, step, took_ms, outcome } => {
            Ok(pause::stepped(project, operation, step, took_ms, outcome, now))
        }
        Command::Undone { operation } => Ok(pause::undone(project, operation)),
        Command::Cancel { operation } => pause::cancel(project, operation),
        Command::Resume { operation, respawn, over_budget } => resume::begin(project, operation, respawn, over_budget),
        Command::Resumed { operation, agents, steps_ms, warnings } => {
            Ok(resume::done(project, operation, agents, steps_ms, warnings, now))
        }
        Command::Checkpoint { operation, trigger } => checkpoints::begin(project, operation, trigger),
        Command::Checkpointed { operation, outcome, imported } => {
            Ok(checkpoints::done(project, operation, outcome, imported))
        }
        Command::PinCheckpoint { checkpoint, pinned } => {
            Ok(Decision::events(vec![Event::CheckpointPinned { checkpoint, pinned }]))
        }
        Command::RemoveCheckpoints { removals } => Ok(checkpoints::remove(project, removals)),
        Command::Restore { operation, checkpoint, paths } => restore::begin(project, operation, checkpoint, paths),
        Command::RestorePlanned { operation, outcome } => Ok(restore::planned(project, operation, outcome)),
        Command::RestoreFailing { operation, error, patience_ms } => {
            Ok(restore::failing(project, operation, error, patience_ms, now))
        }
        Command::Restored { operation, rows, written, removed } => {
            Ok(restore::restored(project, operation, rows, written, removed))
        }
        Command::RestoreChecked { operation, checkpoint, paths, differing, examples } => {
            Ok(Decision::events(vec![Event::RestoreChecked { operation, checkpoint, paths, differing, examples }]))
        }
        Command::Recover { agents, respawn, last_seen } => {
            Ok(recover::recover(project, &agents, respawn, &last_seen, now))
        }
    }
}

fn set(
    project: &Project,
    description: Option<String>,
    phase: Option<Phase>,
    config: Option<fermata_protocol::project::ProjectConfig>,
) -> Decision {
    let asked = config.is_some();
    let mut events = Vec::new();
    if description.is_some() || config.is_some() {
        events.push(Event::ProjectChanged { description, config });
    }
    let mut after = project.clone();
    for event in &events {
        // The time of a change is in no rule.
        crate::apply(&mut after, event, UnixMillis(0));
    }
    // A budget below what is spent already need not wait for the next report of usage.
    let due = asked && budget::asks_for_pause(project, &after);
    events.extend(phase_change(project, phase));
    let decision = Decision::events(events);
    if due { decision.then(Effect::PauseForBudget {}) } else { decision }
}

fn phase_change(project: &Project, phase: Option<Phase>) -> Option<Event> {
    let from = project.facts.phase;
    phase.filter(|to| *to != from).map(|to| Event::PhaseChanged { from, to })
}

fn remove(project: &Project, checkpoints: u64, with_checkpoints: bool) -> Result<Decision, Refusal> {
    refuse_while_moving(project)?;
    if let Some(agent) = project.unfinished_agents().next() {
        return Err(Refusal::new(
            Code::AgentsRunning,
            format!("project '{}' has running agents, '{}' among them", project.name, agent.name),
        )
        .hint(format!("fermatactl stop {}", project.name)));
    }
    if checkpoints > 0 && !with_checkpoints {
        return Err(Refusal::new(
            Code::CheckpointProtected,
            format!("project '{}' has {checkpoints} checkpoints, which would be lost", project.name),
        )
        .hint(format!("fermatactl project rm {} --with-checkpoints", project.name)));
    }
    Ok(Decision::events(vec![Event::ProjectRemoved {}]))
}

/// Finds an agent or refuses.
fn agent<'a>(project: &'a Project, name: &AgentName) -> Result<&'a Agent, Refusal> {
    project.agents.get(name).map(|agent| &**agent).ok_or_else(|| {
        Refusal::new(Code::AgentNotFound, format!("project '{}' has no agent '{name}'", project.name))
            .hint(format!("fermatactl ps {}", project.name))
    })
}

/// Refuses while any operation moves the project, with the code that names the operation's kind.
fn refuse_while_moving(project: &Project) -> Result<(), Refusal> {
    let (code, what, operation) = match &*project.state {
        ProjectState::Pausing(run) => (Code::PauseInProgress, "a pause", &run.operation),
        ProjectState::Resuming(run) => (Code::ResumeInProgress, "a resume", &run.operation),
        ProjectState::Restoring(run) => (Code::RestoreInProgress, "a restore", &run.operation),
        ProjectState::Resting(_) | ProjectState::Paused(_) | ProjectState::Broken(_) => match &project.checkpointing {
            Some(run) => (Code::OperationInProgress, "a checkpoint", &run.operation),
            None => return Ok(()),
        },
    };
    Err(Refusal::new(code, format!("{what} of project '{}' is under way", project.name))
        .hint(format!("fermatactl op show {operation}"))
        .details(serde_json::json!({ "operation_id": operation })))
}
