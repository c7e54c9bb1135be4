//! Decides what a command leads to: facts and effects, or a refusal that changes nothing.

mod agents;
mod checkpoints;
mod checks;
mod lifecycle;
mod pause;
mod project;
mod recover;
mod reports;
mod restore;
mod resume;
mod start;

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
use fermata_protocol::{Refusal, UnixMillis};

use crate::command::{Command, Decision};
use crate::project::Project;

/// Decides what a command leads to.
///
/// # Errors
/// A refusal: the state does not allow the command, or the command names an object that does not exist.
pub fn decide(project: &Project, command: Command, now: UnixMillis) -> Result<Decision, Refusal> {
    match command {
        Command::Set { description, phase, config } => Ok(project::set(project, description, phase, config)),
        Command::Remove { checkpoints, with_checkpoints } => project::remove(project, checkpoints, with_checkpoints),
        Command::Run { agent, spec, new } => agents::run(project, agent, spec, new),
        Command::Start { agent, start, requested } => start::start(project, agent, start, requested, now),
        Command::Due { action, operation } => lifecycle::at_deadline(project, action, operation, now),
        Command::Ready { agent, run } => lifecycle::ready(project, agent, run),
        Command::Stop { agent, grace_ms } => agents::stop(project, agent, grace_ms),
        Command::Kill { agent } => agents::kill(project, agent),
        Command::Restart { agent, new } => agents::restart(project, agent, new),
        Command::RemoveAgent { agent } => agents::remove(project, agent),
        Command::Launched { agent, run, outcome } => Ok(agents::launched(project, agent, run, outcome, now)),
        Command::RunEnded { agent, run, exit, detail, ended_at, new, then } => {
            let end = agents::ReportedEnd { exit, detail, ended_at, then };
            Ok(agents::run_ended(project, agent, run, end, new, now))
        }
        Command::RunLost { agent, run, detail, then } => Ok(agents::run_lost(project, agent, run, detail, then, now)),
        Command::Parked { agent, run } => Ok(agents::parked(project, agent, run)),
        Command::Suspended { agent, run, suspended } => Ok(agents::suspended(project, agent, run, suspended)),
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
            pause::begin(project, operation, pause::PauseRequest { cause, reason, mode, grace_ms })
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
