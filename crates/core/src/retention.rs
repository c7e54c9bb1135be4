//! Which checkpoints go: a pure function of what there is, the policy, the time and what is in use.
//!
//! | made by | kept |
//! |---|---|
//! | manual | the newest 10 |
//! | pause | the newest 10 |
//! | timeout, shutdown | the newest 3 of each |
//! | safety | for a week |
//! | auto, phase_transition | like a clock: all of 10 minutes, then the newest of each 10 minutes for 6 hours, of each hour for 2 days, of each day for 30 days |
//!
//! Then the oldest go until the project takes no more than its quota. Never removed, and not counted
//! among those above: what is pinned. Never removed: what is in use ([`in_use`]), and the newest of all.
//!
//! The intervals of the clock are parts of each other (ten minutes of an hour, an hour of a day) and
//! begin at fixed times, so that thinning in steps leaves what thinning at once would: the newest
//! of an interval is the newest of every shorter one that it lies in.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::retention::{RemovalReason, Retention};
use fermata_protocol::{CheckpointNumber, Code, Refusal, UnixMillis};
use serde::Deserialize;

use crate::project::{BeforeRestore, Paused, Project, ProjectState, Whole};

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;

/// What the policy needs to know of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Its number.
    pub number: CheckpointNumber,
    /// What made it.
    pub trigger: Trigger,
    /// When.
    pub created_at: UnixMillis,
    /// Whether a person wants it kept.
    pub pinned: bool,
    /// Bytes that it added to the disk.
    pub bytes: u64,
}

/// How many are kept, and for how long: the section `[retention]` of the daemon's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// So many manual ones are kept; 0 for all.
    pub keep_manual: u64,
    /// So many of pauses are kept; 0 for all.
    pub keep_pause: u64,
    /// So many before timeouts, and so many of shutdowns, are kept; 0 for all.
    pub keep_ends: u64,
    /// For so long safety checkpoints are kept, milliseconds; 0 for ever.
    pub keep_safety_ms: u64,
    /// For so long every automatic one is kept, milliseconds.
    pub auto_all_ms: u64,
    /// For so long one automatic one of every ten minutes is kept, milliseconds.
    pub auto_ten_minutes_ms: u64,
    /// For so long one automatic one of every hour is kept, milliseconds.
    pub auto_hourly_ms: u64,
    /// For so long one automatic one of every day is kept, milliseconds; 0 for ever.
    pub auto_daily_ms: u64,
    /// So many bytes all checkpoints of a project may take on disk; 0 for no bound.
    pub max_bytes: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            keep_manual: 10,
            keep_pause: 10,
            keep_ends: 3,
            keep_safety_ms: 7 * DAY_MS,
            auto_all_ms: 10 * MINUTE_MS,
            auto_ten_minutes_ms: 6 * HOUR_MS,
            auto_hourly_ms: 2 * DAY_MS,
            auto_daily_ms: 30 * DAY_MS,
            max_bytes: 0,
        }
    }
}

impl Policy {
    /// Lays the settings of one project over those of the daemon.
    #[must_use]
    pub fn with(self, project: &Retention) -> Self {
        Self {
            keep_manual: project.keep_manual.unwrap_or(self.keep_manual),
            keep_pause: project.keep_pause.unwrap_or(self.keep_pause),
            keep_ends: project.keep_ends.unwrap_or(self.keep_ends),
            keep_safety_ms: project.keep_safety_ms.unwrap_or(self.keep_safety_ms),
            auto_all_ms: project.auto_all_ms.unwrap_or(self.auto_all_ms),
            auto_ten_minutes_ms: project.auto_ten_minutes_ms.unwrap_or(self.auto_ten_minutes_ms),
            auto_hourly_ms: project.auto_hourly_ms.unwrap_or(self.auto_hourly_ms),
            auto_daily_ms: project.auto_daily_ms.unwrap_or(self.auto_daily_ms),
            max_bytes: project.max_bytes.unwrap_or(self.max_bytes),
        }
    }

    /// Returns the quota, where there is one.
    pub fn quota(&self) -> Option<u64> {
        (self.max_bytes > 0).then_some(self.max_bytes)
    }
}

/// What is asked of the retention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// These, because a person says so; refused where one of them may not go.
    These(Vec<CheckpointNumber>),
    /// What the policy no longer keeps.
    Policy(Policy),
    /// What all of these bounds let go, the oldest first.
    Bounds(Bounds),
    /// The oldest, until so many bytes are free that were not: a checkpoint is to be made, and there is no room.
    Room {
        /// How many bytes.
        bytes: u64,
        /// What there is no room in.
        reason: RemovalReason,
    },
}

/// Bounds that a person gives; each narrows what may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The newest so many stay.
    pub keep: Option<u64>,
    /// Those younger than this stay, milliseconds.
    pub older_than_ms: Option<u64>,
    /// No more go once the project takes at most so many bytes.
    pub max_bytes: Option<u64>,
}

/// A checkpoint that goes, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removal {
    /// The checkpoint.
    pub point: Point,
    /// Why.
    pub reason: RemovalReason,
}

/// Names the checkpoints that the project relies on, whether they have a row yet or not.
pub fn in_use(project: &Project) -> BTreeSet<CheckpointNumber> {
    let mut used = BTreeSet::new();
    let mut pause = |paused: &Paused| {
        used.insert(paused.checkpoint);
        used.extend(paused.restored);
    };
    match &*project.state {
        ProjectState::Resting(_) => {}
        ProjectState::Paused(paused) => pause(paused),
        ProjectState::Resuming(run) => pause(&run.paused),
        ProjectState::Pausing(run) => {
            used.insert(run.checkpoint);
        }
        ProjectState::Restoring(run) => {
            if let Whole::Paused(paused) = run.before.clone().whole() {
                pause(&paused);
            }
            // What an earlier restore left half done can only be mended from what it was made of.
            if let BeforeRestore::Broken(broken) = &run.before {
                used.extend([broken.checkpoint, broken.safety]);
            }
            used.extend([run.checkpoint, run.safety]);
        }
        ProjectState::Broken(broken) => {
            if let Whole::Paused(paused) = &broken.before {
                pause(paused);
            }
            used.extend([broken.checkpoint, broken.safety]);
        }
    }
    used.extend(project.checkpointing.as_ref().map(|run| run.checkpoint));
    // 0 stands for none.
    used.extend(Some(project.counters.context).filter(|number| *number > 0));
    used
}

/// Says which checkpoints of a project go, the oldest first; see [`plan`].
///
/// # Errors
/// `checkpoint_not_found` or `checkpoint_protected`, where checkpoints are asked for by number.
pub fn choose(
    project: &Project,
    points: &[Point],
    ask: &Ask,
    used_bytes: u64,
    now: UnixMillis,
) -> Result<Vec<Removal>, Refusal> {
    let in_use = in_use(project);
    if let Ask::These(numbers) = ask {
        for number in numbers {
            let point = points.iter().find(|point| point.number == *number);
            refuse_removal(project, *number, point, in_use.contains(number))?;
        }
    }
    Ok(plan(points, ask, used_bytes, &in_use, now))
}

fn refuse_removal(
    project: &Project,
    number: CheckpointNumber,
    point: Option<&Point>,
    in_use: bool,
) -> Result<(), Refusal> {
    let name = &project.name;
    let Some(point) = point else {
        return Err(Refusal::new(
            Code::CheckpointNotFound,
            format!("project '{name}' has no checkpoint {number}; nothing was removed"),
        )
        .hint(format!("fermatactl checkpoint ls {name}")));
    };
    let protected = |why: String, hint: String| {
        let message = format!("checkpoint {number} of project '{name}' {why}; nothing was removed");
        Err(Refusal::new(Code::CheckpointProtected, message).hint(hint))
    };
    if point.pinned {
        return protected("is pinned".into(), format!("fermatactl checkpoint unpin {name} {number}"));
    }
    if !in_use {
        return Ok(());
    }
    match &*project.state {
        ProjectState::Paused(paused) if paused.checkpoint == number || paused.restored == Some(number) => {
            protected("is what the project is paused with".into(), format!("fermatactl resume {name}"))
        }
        ProjectState::Broken(broken) if broken.checkpoint == number || broken.safety == number => protected(
            "is needed to mend a restore that was given up".into(),
            format!("fermatactl checkpoint restore {name} {}", broken.safety),
        ),
        _ if project.counters.context == number => protected(
            "is the one whose context agents go on with when they are started again".into(),
            format!("make a newer one first: fermatactl checkpoint create {name}"),
        ),
        _ => {
            let operation = project.operation().map(ToString::to_string).unwrap_or_default();
            protected(format!("is needed by operation {operation}"), format!("fermatactl op show {operation}"))
        }
    }
}

/// What may not go.
struct Kept<'a> {
    in_use: &'a BTreeSet<CheckpointNumber>,
    newest: Option<CheckpointNumber>,
}

impl Kept<'_> {
    fn may_go(&self, point: &Point) -> bool {
        !point.pinned && !self.in_use.contains(&point.number) && self.newest != Some(point.number)
    }
}

/// Says which checkpoints go, the oldest first.
///
/// `used_bytes` is what all checkpoints of the project take on disk now. What one frees is estimated by
/// what it had added, which is the most that it can be.
pub fn plan(
    points: &[Point],
    ask: &Ask,
    used_bytes: u64,
    in_use: &BTreeSet<CheckpointNumber>,
    now: UnixMillis,
) -> Vec<Removal> {
    let mut points: Vec<Point> = points.to_vec();
    points.sort_by_key(|point| point.number);
    let kept = Kept { in_use, newest: points.last().map(|point| point.number) };
    match ask {
        Ask::These(numbers) => points
            .into_iter()
            .filter(|point| numbers.contains(&point.number))
            .map(|point| Removal { point, reason: RemovalReason::Asked })
            .collect(),
        Ask::Policy(policy) => by_policy(&points, policy, used_bytes, &kept, now),
        Ask::Bounds(bounds) => by_bounds(&points, bounds, used_bytes, &kept, now),
        Ask::Room { bytes, reason } => {
            let candidates: Vec<&Point> = points.iter().filter(|point| kept.may_go(point)).collect();
            // A disk that others have filled is no reason to lose checkpoints in vain.
            let most: u64 = candidates.iter().map(|point| point.bytes).sum();
            if *reason == RemovalReason::DiskFloor && most < *bytes {
                return Vec::new();
            }
            oldest_until(candidates.into_iter(), *bytes, *reason)
        }
    }
}

/// Takes the oldest until they had added so many bytes.
fn oldest_until<'a>(points: impl Iterator<Item = &'a Point>, bytes: u64, reason: RemovalReason) -> Vec<Removal> {
    let mut left = bytes;
    let mut going = Vec::new();
    for point in points {
        if left == 0 {
            break;
        }
        left = left.saturating_sub(point.bytes);
        going.push(Removal { point: *point, reason });
    }
    going
}

fn by_policy(points: &[Point], policy: &Policy, used: u64, kept: &Kept<'_>, now: UnixMillis) -> Vec<Removal> {
    let mut going: BTreeMap<CheckpointNumber, Removal> = expired(points, policy, now)
        .filter(|removal| kept.may_go(&removal.point))
        .map(|removal| (removal.point.number, removal))
        .collect();
    if let Some(quota) = policy.quota() {
        let freed: u64 = going.values().map(|removal| removal.point.bytes).sum();
        let excess = used.saturating_sub(freed).saturating_sub(quota);
        let rest = points.iter().filter(|point| kept.may_go(point) && !going.contains_key(&point.number));
        let more = oldest_until(rest, excess, RemovalReason::Quota);
        going.extend(more.into_iter().map(|removal| (removal.point.number, removal)));
    }
    going.into_values().collect()
}

/// Says what the policy no longer keeps, whether or not it may go.
fn expired(points: &[Point], policy: &Policy, now: UnixMillis) -> impl Iterator<Item = Removal> {
    let unpinned = || points.iter().filter(|point| !point.pinned);
    let beyond = |trigger: Trigger, keep: u64| {
        let keep = if keep == 0 { usize::MAX } else { usize::try_from(keep).unwrap_or(usize::MAX) };
        let newest_first = unpinned().rev().filter(move |point| point.trigger == trigger);
        newest_first.skip(keep).map(|point| Removal { point: *point, reason: RemovalReason::Count })
    };
    let counted = beyond(Trigger::Manual, policy.keep_manual)
        .chain(beyond(Trigger::Pause, policy.keep_pause))
        .chain(beyond(Trigger::Timeout, policy.keep_ends))
        .chain(beyond(Trigger::Shutdown, policy.keep_ends));
    let aged = unpinned()
        .filter(|point| point.trigger == Trigger::Safety && policy.keep_safety_ms > 0)
        .filter(|point| age(point, now) > policy.keep_safety_ms)
        .map(|point| Removal { point: *point, reason: RemovalReason::Age });
    let mut automatic: Vec<Point> =
        unpinned().filter(|point| matches!(point.trigger, Trigger::Auto | Trigger::PhaseTransition)).copied().collect();
    // By time: where the clock was set back, what was made later may count as older, but never outlives.
    automatic.sort_by_key(|point| (point.created_at, point.number));
    let all: Vec<Removal> = counted.chain(aged).chain(thinned(&automatic, policy, now)).collect();
    all.into_iter()
}

fn thinned(automatic: &[Point], policy: &Policy, now: UnixMillis) -> Vec<Removal> {
    let mut going = Vec::new();
    for (place, point) in automatic.iter().enumerate() {
        let interval = match rung(policy, age(point, now)) {
            Rung::All => continue,
            Rung::Each(interval) => interval,
            Rung::Gone => {
                going.push(Removal { point: *point, reason: RemovalReason::Age });
                continue;
            }
        };
        let same = |other: &Point| slot(other, interval) == slot(point, interval);
        if automatic.iter().skip(place + 1).any(same) {
            going.push(Removal { point: *point, reason: RemovalReason::Thinned });
        }
    }
    going
}

/// What the clock keeps at an age.
enum Rung {
    /// Every checkpoint.
    All,
    /// The newest of each interval of so many milliseconds.
    Each(u64),
    /// None.
    Gone,
}

fn rung(policy: &Policy, age: u64) -> Rung {
    if age <= policy.auto_all_ms {
        Rung::All
    } else if age <= policy.auto_ten_minutes_ms {
        Rung::Each(10 * MINUTE_MS)
    } else if age <= policy.auto_hourly_ms {
        Rung::Each(HOUR_MS)
    } else if age <= policy.auto_daily_ms || policy.auto_daily_ms == 0 {
        Rung::Each(DAY_MS)
    } else {
        Rung::Gone
    }
}

fn age(point: &Point, now: UnixMillis) -> u64 {
    u64::try_from(now.since(point.created_at)).unwrap_or(0)
}

fn slot(point: &Point, interval: u64) -> i64 {
    point.created_at.0.div_euclid(i64::try_from(interval).unwrap_or(i64::MAX))
}

fn by_bounds(points: &[Point], bounds: &Bounds, used: u64, kept: &Kept<'_>, now: UnixMillis) -> Vec<Removal> {
    let newest = bounds.keep.map_or(0, |keep| usize::try_from(keep).unwrap_or(usize::MAX));
    let older = &points[..points.len().saturating_sub(newest)];
    let old_enough = |point: &&Point| bounds.older_than_ms.is_none_or(|least| age(point, now) > least);
    let candidates = older.iter().filter(|point| kept.may_go(point)).filter(old_enough);
    // Without a bound of its own everything that the others let go goes.
    let excess = bounds.max_bytes.map_or(u64::MAX, |most| used.saturating_sub(most));
    oldest_until(candidates, excess, RemovalReason::Asked)
}

#[cfg(test)]
#[path = "retention_test.rs"]
mod tests;
