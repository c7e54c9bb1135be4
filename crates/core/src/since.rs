//! What has come together since the newest checkpoint, and when the next one is due by itself.
//!
//! ```text
//!   units of progress ─┐
//!   time, while agents ├─► due ─► has anything changed? ── yes ─► a checkpoint like any other
//!   run                │               │ no
//!   a new phase ───────┘               └─► looked at: due again an interval later
//! ```
//! It follows from the state alone, as everything in [`crate::due`] does: no timer is kept, and a
//! crash forgets nothing. That somebody has looked and found nothing changed is kept in memory only;
//! a new daemon looks once more.

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::event::Event;
use fermata_protocol::project::AutomaticCheckpoints;
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{CheckpointNumber, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::agent::AgentState;
use crate::clock::Clock;
use crate::due::millis;
use crate::project::{Project, ProjectState};

/// So far is an automatic checkpoint at least from the one before, milliseconds: progress that is
/// reported in a burst makes one.
pub const APART_MS: i64 = 1_000;

/// The first wait after a failure where no interval is set, milliseconds.
const RETRY_MS: i64 = 120_000;

/// The longest wait after failures, milliseconds; an interval that is longer counts more.
const LONGEST_RETRY_MS: i64 = 30 * 60_000;

/// How much has happened in a project; it only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Units of progress that agents have reported.
    pub units: u64,
    /// Changes of what a checkpoint keeps beside the workspace: tasks, context, blobs, questions, settings.
    pub changes: u64,
    /// Changes of the phase of the work.
    pub phases: u64,
}

/// What has come together since the newest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Since {
    /// All that has happened.
    pub tally: Tally,
    /// What of it was there when the newest checkpoint was begun.
    pub saved: Tally,
    /// The newest checkpoint, whatever made it; 0 for none.
    pub checkpoint: CheckpointNumber,
    /// How long agents have run since.
    pub clock: Clock,
    /// How many automatic checkpoints have failed in a row.
    pub failures: u32,
    /// When the next try may be made, after a failure.
    pub retry_at: Option<UnixMillis>,
}

impl Since {
    /// Says whether anything beside the workspace is certain to differ from the newest checkpoint.
    pub fn has_changed(&self) -> bool {
        self.checkpoint == 0 || self.tally.changes != self.saved.changes
    }
}

/// The last look that found nothing changed; not persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Looked {
    checkpoint: CheckpointNumber,
    tally: Tally,
    ran_ms: i64,
}

impl Looked {
    /// Takes note that nothing has changed up to `now`.
    pub fn at(project: &Project, now: UnixMillis) -> Self {
        let Since { tally, checkpoint, clock, .. } = project.counters.since;
        Self { checkpoint, tally, ran_ms: clock.read(now) }
    }
}

/// Returns what makes an automatic checkpoint due, where one is.
pub fn due(project: &Project, looked: &Looked, now: UnixMillis) -> Option<Trigger> {
    deadlines(project, looked).into_iter().flatten().find(|(at, _)| *at <= now).map(|(_, trigger)| trigger)
}

/// Returns when one will be due next, should nothing change until then.
pub fn next(project: &Project, looked: &Looked, now: UnixMillis) -> Option<UnixMillis> {
    deadlines(project, looked).into_iter().flatten().map(|(at, _)| at).filter(|at| *at > now).min()
}

/// Says whether a checkpoint is due before the daemon ends.
pub fn due_before_shutdown(project: &Project) -> bool {
    at_work(project) && project.operation().is_none() && project.facts.config.automatic.before_shutdown
}

fn deadlines(project: &Project, looked: &Looked) -> [Option<(UnixMillis, Trigger)>; 3] {
    // What is under way comes first, and most of it makes a checkpoint of its own.
    if !at_work(project) || project.operation().is_some() {
        return [None; 3];
    }
    let since = &project.counters.since;
    let AutomaticCheckpoints { every_units, every_ms, on_phase_change, .. } = project.facts.config.automatic;
    let (base, ran_ms) = match *looked {
        Looked { checkpoint, tally, ran_ms } if checkpoint == since.checkpoint => (tally, ran_ms),
        Looked { .. } => (since.saved, 0),
    };
    let not_before = |at: UnixMillis| UnixMillis(since.retry_at.map_or(at.0, |retry| retry.0.max(at.0)));
    let after = |ms: i64| since.clock.reaches(ran_ms.saturating_add(ms)).map(not_before);
    let soon = |wanted: bool, trigger| after(APART_MS).filter(|_| wanted).map(|at| (at, trigger));
    let units = since.tally.units.saturating_sub(base.units);
    let every = millis(every_ms).max(APART_MS);
    [
        soon(on_phase_change && since.tally.phases > base.phases, Trigger::PhaseTransition),
        soon(every_units > 0 && units >= every_units, Trigger::Auto),
        after(every.saturating_add(spread(project, every))).filter(|_| every_ms > 0).map(|at| (at, Trigger::Auto)),
    ]
}

/// Projects whose agents were started by one command do not all look in the same instant: each adds
/// a part of its own, up to a sixteenth of the interval.
fn spread(project: &Project, every: i64) -> i64 {
    // FNV-1a: the same in every daemon.
    let hash = project
        .name
        .as_str()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let sixteenth = every.unsigned_abs() / 16;
    if sixteenth == 0 { 0 } else { millis(hash % sixteenth) }
}

/// Says whether somebody runs in the project and nobody moves it.
fn at_work(project: &Project) -> bool {
    matches!(&*project.state, ProjectState::Resting(_))
        && project.agents.values().any(|agent| agent.state == AgentState::Running)
}

/// What an event means for the next checkpoint, seen before it is folded in.
pub(crate) struct Noticed {
    tally: Tally,
    saved: Option<(CheckpointNumber, Tally)>,
    failed: bool,
}

/// Looks at an event before it is folded in.
pub(crate) fn notice(project: &Project, event: &Event) -> Noticed {
    let mut noticed = Noticed { tally: Tally::default(), saved: None, failed: false };
    let count = &mut noticed.tally;
    match event {
        Event::AgentProgressed { agent, progress } => {
            let before = project.agents.get(agent).and_then(|agent| agent.progress.as_ref()?.units_done);
            count.units = match (before.unwrap_or(0), progress.units_done) {
                (_, None) => 0,
                (before, Some(now)) if now >= before => now - before,
                // It counts anew, as after a restart.
                (_, Some(now)) => now,
            };
        }
        Event::TaskChanged { task } => {
            let done = |status| status == TaskStatus::Completed;
            let before = project.tasks.get(&task.id).is_some_and(|task| done(task.status));
            count.units = u64::from(done(task.status) && !before);
            count.changes = 1;
        }
        Event::PhaseChanged { .. } => {
            count.phases = 1;
            count.changes = 1;
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
        | Event::ProjectRestored { .. } => count.changes = 1,
        // An imported one saves nothing of what was done here.
        Event::CheckpointCreated { imported: true, .. } => {}
        Event::CheckpointCreated { checkpoint, .. } => {
            noticed.saved = project.checkpointing.as_ref().map(|run| (checkpoint.id, run.tally));
        }
        Event::ProjectPaused { checkpoint, .. } => {
            if let ProjectState::Pausing(run) = &*project.state {
                noticed.saved = Some((checkpoint.id, run.tally));
            }
        }
        Event::RestorePlanned { safety, .. } => {
            if let ProjectState::Restoring(run) = &*project.state {
                noticed.saved = Some((safety.id, run.tally));
            }
        }
        Event::CheckpointFailed { .. } => {
            noticed.failed = project.checkpointing.as_ref().is_some_and(|run| match run.trigger {
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
    noticed
}

/// Takes what was noticed into the state that the event has led to.
pub(crate) fn settle(project: &mut Project, noticed: Noticed, at: UnixMillis) {
    let Noticed { tally, saved, failed } = noticed;
    let works = at_work(project);
    let every_ms = project.facts.config.automatic.every_ms;
    let since = &mut project.counters.since;
    since.tally.units = since.tally.units.saturating_add(tally.units);
    since.tally.changes = since.tally.changes.saturating_add(tally.changes);
    since.tally.phases = since.tally.phases.saturating_add(tally.phases);
    if let Some((checkpoint, saved)) = saved {
        let clock = Clock::started(at, 0);
        *since = Since { tally: since.tally, saved, checkpoint, clock, failures: 0, retry_at: None };
    }
    if failed {
        since.failures = since.failures.saturating_add(1);
        since.retry_at = Some(UnixMillis(at.0.saturating_add(wait_after(since.failures, every_ms))));
    }
    if works {
        since.clock.go_on(at);
    } else {
        since.clock.stand_still(at);
    }
}

/// How long to wait after so many failures in a row, milliseconds; it doubles.
fn wait_after(failures: u32, every_ms: u64) -> i64 {
    let first = if every_ms == 0 { RETRY_MS } else { millis(every_ms).max(APART_MS) };
    first.saturating_mul(1_i64 << failures.min(20)).min(LONGEST_RETRY_MS.max(first))
}
