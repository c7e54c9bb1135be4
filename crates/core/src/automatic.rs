//! Automatic checkpoints: when one is due.
//!
//! ```text
//!   units of progress ─┐
//!   time in which ─────├─► due ─► has anything changed? ── yes ─► a checkpoint like any other
//!   agents run         │               │ no
//!   a new phase ───────┘               └─► scanned: due again an interval later
//! ```
//! When one is due follows from the state alone, as every deadline ([`crate::deadlines`]) does: there is no timer, and
//! a crash loses nothing. That a scan has found nothing changed ([`UnchangedScan`]) is kept in memory only; a new
//! daemon scans once more.

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::project::AutomaticCheckpoints;
use fermata_protocol::{CheckpointNumber, UnixMillis};

use crate::activity::{Activity, ActivityCounters};
use crate::clock::millis;
use crate::hash::fnv1a;
use crate::project::{Project, ProjectState};

/// The shortest time between an automatic checkpoint and the one before it: a burst of progress makes one.
pub const MIN_INTERVAL_MS: i64 = 1_000;

/// The wait after a first failure where no interval is set.
const RETRY_MS: i64 = 120_000;

/// The longest wait after failures, unless the interval itself is longer.
const MAX_RETRY_MS: i64 = 30 * 60_000;

/// The last scan that found nothing changed; not persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UnchangedScan {
    checkpoint: CheckpointNumber,
    counters: ActivityCounters,
    ran_ms: i64,
}

impl UnchangedScan {
    /// Records that a scan has found nothing changed up to `now`.
    pub fn at(project: &Project, now: UnixMillis) -> Self {
        let Activity { counters, checkpoint, clock, .. } = project.counters.activity;
        Self { checkpoint, counters, ran_ms: clock.read(now) }
    }
}

/// Returns the trigger of the automatic checkpoint that is due.
pub fn due_trigger(project: &Project, scan: &UnchangedScan, now: UnixMillis) -> Option<Trigger> {
    deadlines(project, scan).into_iter().flatten().find(|(at, _)| *at <= now).map(|(_, trigger)| trigger)
}

/// Returns when one will be due next if the state does not change until then.
pub fn next(project: &Project, scan: &UnchangedScan, now: UnixMillis) -> Option<UnixMillis> {
    deadlines(project, scan).into_iter().flatten().map(|(at, _)| at).filter(|at| *at > now).min()
}

/// Says whether a checkpoint is due before the daemon exits.
pub fn due_before_shutdown(project: &Project) -> bool {
    at_work(project) && project.operation().is_none() && project.facts.config.automatic.before_shutdown
}

fn deadlines(project: &Project, scan: &UnchangedScan) -> [Option<(UnixMillis, Trigger)>; 3] {
    // An operation comes first, and most operations make a checkpoint of their own.
    if !at_work(project) || project.operation().is_some() {
        return [None; 3];
    }
    let activity = &project.counters.activity;
    let AutomaticCheckpoints { every_units, every_ms, on_phase_change, .. } = project.facts.config.automatic;
    let (base, ran_ms) =
        if scan.checkpoint == activity.checkpoint { (scan.counters, scan.ran_ms) } else { (activity.saved, 0) };
    let not_before = |at: UnixMillis| UnixMillis(activity.retry_at.map_or(at.0, |retry| retry.0.max(at.0)));
    let after = |ms: i64| activity.clock.reaches(ran_ms.saturating_add(ms)).map(not_before);
    let soon = |wanted: bool, trigger| after(MIN_INTERVAL_MS).filter(|_| wanted).map(|at| (at, trigger));
    let units = activity.counters.units.saturating_sub(base.units);
    let every = millis(every_ms).max(MIN_INTERVAL_MS);
    [
        soon(on_phase_change && activity.counters.phases > base.phases, Trigger::PhaseTransition),
        soon(every_units > 0 && units >= every_units, Trigger::Auto),
        after(every.saturating_add(spread(project, every))).filter(|_| every_ms > 0).map(|at| (at, Trigger::Auto)),
    ]
}

/// Adds up to a sixteenth of the interval, so that projects whose agents were started by one command do not all scan
/// at the same instant.
fn spread(project: &Project, every: i64) -> i64 {
    let sixteenth = every.unsigned_abs() / 16;
    if sixteenth == 0 { 0 } else { millis(fnv1a(project.name.as_str()) % sixteenth) }
}

/// Says whether an agent runs in the project and no operation changes its status.
pub(crate) fn at_work(project: &Project) -> bool {
    matches!(&*project.state, ProjectState::Resting(_)) && project.agents.values().any(|agent| agent.is_running())
}

/// Returns the wait after `failures` failures in a row: it doubles with each.
pub(crate) fn wait_after(failures: u32, every_ms: u64) -> i64 {
    let first = if every_ms == 0 { RETRY_MS } else { millis(every_ms).max(MIN_INTERVAL_MS) };
    first.saturating_mul(1_i64 << failures.min(20)).min(MAX_RETRY_MS.max(first))
}
