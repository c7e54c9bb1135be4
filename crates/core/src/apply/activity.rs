//! Counts what an event means for the next automatic checkpoint.

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::event::Event;
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{CheckpointNumber, UnixMillis};

use crate::activity::{Activity, ActivityCounters};
use crate::automatic::{at_work, wait_after};
use crate::clock::Clock;
use crate::project::{Project, ProjectState};

/// The effect of one event on the activity of its project.
#[derive(Default)]
pub(super) struct ActivityChange {
    added: ActivityCounters,
    /// A new checkpoint, and the counters when it began.
    saved: Option<(CheckpointNumber, ActivityCounters)>,
    /// Whether an automatic checkpoint has failed.
    failed: bool,
}

/// Computes the change from the state before the event.
#[expect(clippy::too_many_lines, reason = "a table of all events")]
pub(super) fn change(project: &Project, event: &Event) -> ActivityChange {
    let mut change = ActivityChange::default();
    let added = &mut change.added;
    match event {
        Event::AgentProgressed { agent, progress } => {
            let before = project.agents.get(agent).and_then(|agent| agent.progress.as_ref()?.units_done);
            added.units = match (before.unwrap_or(0), progress.units_done) {
                (_, None) => 0,
                (before, Some(now)) if now >= before => now - before,
                // The agent counts anew, as after a restart.
                (_, Some(now)) => now,
            };
        }
        Event::TaskChanged { task } => {
            let done = |status| status == TaskStatus::Completed;
            let before = project.tasks.get(&task.id).is_some_and(|task| done(task.status));
            added.units = u64::from(done(task.status) && !before);
            added.changes = 1;
        }
        Event::PhaseChanged { .. } => {
            added.phases = 1;
            added.changes = 1;
        }
        Event::AgentStateSaved { .. }
        | Event::AgentRemoved { .. }
        | Event::QuestionAsked { .. }
        | Event::QuestionAnswered { .. }
        | Event::ContextAdded { .. }
        | Event::ContextPinned { .. }
        | Event::ContextRecalled { .. }
        | Event::FlashSaved { .. }
        | Event::ProjectChanged { .. }
        | Event::ProjectRestored { .. } => added.changes = 1,
        // An imported checkpoint saves nothing of what was done here.
        Event::CheckpointCreated { imported: true, .. } => {}
        Event::CheckpointCreated { checkpoint, .. } => {
            change.saved = project.checkpointing.as_ref().map(|making| (checkpoint.id, making.activity));
        }
        Event::ProjectPaused { checkpoint, .. } => {
            if let ProjectState::Pausing(pause) = &*project.state {
                change.saved = Some((checkpoint.id, pause.activity));
            }
        }
        Event::RestorePlanned { safety, .. } => {
            if let ProjectState::Restoring(restore) = &*project.state {
                change.saved = Some((safety.id, restore.activity));
            }
        }
        Event::CheckpointFailed { .. } => {
            change.failed = project.checkpointing.as_ref().is_some_and(|making| match making.trigger {
                Trigger::Auto | Trigger::PhaseTransition => true,
                Trigger::Manual | Trigger::Pause | Trigger::Timeout | Trigger::Shutdown | Trigger::Safety => false,
            });
        }
        Event::ProjectCreated { .. }
        | Event::CheckpointRemoved { .. }
        | Event::ProjectRemoved {}
        | Event::AgentCreated { .. }
        | Event::AgentStarting { .. }
        | Event::AgentStarted { .. }
        | Event::AgentLaunchFailed { .. }
        | Event::AgentAdopted { .. }
        | Event::AgentUnreachable { .. }
        | Event::AgentFreezeBroken { .. }
        | Event::AgentStopping { .. }
        | Event::AgentWaiting { .. }
        | Event::AgentReady { .. }
        | Event::AgentTimeUp { .. }
        | Event::AgentStale { .. }
        | Event::AgentBackoff { .. }
        | Event::AgentGivenUp { .. }
        | Event::AgentExited { .. }
        | Event::AgentInterrupted { .. }
        | Event::AgentParked { .. }
        | Event::AgentSuspended { .. }
        | Event::AgentContinued { .. }
        | Event::AgentTyped { .. }
        | Event::AgentSessionFound { .. }
        | Event::AgentUsed { .. }
        | Event::OperationStepped { .. }
        | Event::OperationUndoing { .. }
        | Event::PauseStarted { .. }
        | Event::PauseFailed { .. }
        | Event::PauseWithheld { .. }
        | Event::ResumeStarted { .. }
        | Event::ProjectResumed { .. }
        | Event::CheckpointStarted { .. }
        | Event::RestoreRetried { .. }
        | Event::RestoreGivenUp { .. }
        | Event::RestoreChecked { .. }
        | Event::CheckpointPinned { .. }
        | Event::RestoreStarted { .. }
        | Event::RestoreFailed { .. } => {}
    }
    change
}

/// Counts the change in the state after the event.
pub(super) fn count(project: &mut Project, change: ActivityChange, at: UnixMillis) {
    let ActivityChange { added, saved, failed } = change;
    let works = at_work(project);
    let every_ms = project.facts.config.automatic.every_ms;
    let activity = &mut project.counters.activity;
    let counters = &mut activity.counters;
    counters.units = counters.units.saturating_add(added.units);
    counters.changes = counters.changes.saturating_add(added.changes);
    counters.phases = counters.phases.saturating_add(added.phases);
    if let Some((checkpoint, saved)) = saved {
        let (counters, clock) = (activity.counters, Clock::running_from(at, 0));
        *activity = Activity { counters, saved, checkpoint, clock, failures: 0, retry_at: None };
    }
    if failed {
        activity.failures = activity.failures.saturating_add(1);
        activity.retry_at = Some(UnixMillis(at.0.saturating_add(wait_after(activity.failures, every_ms))));
    }
    if works {
        activity.clock.start(at);
    } else {
        activity.clock.stop(at);
    }
}
