//! Which checkpoints are removed: a pure function of the checkpoints, the policy, the time and what is in use.
//!
//! | made by | kept |
//! |---|---|
//! | manual | the newest 10 |
//! | pause | the newest 10 |
//! | timeout, shutdown | the newest 3 of each |
//! | safety | for a week |
//! | auto, phase_transition | like a clock: all of 10 minutes, then the newest of each 10 minutes for 6 hours, of each hour for 2 days, of each day for 30 days |
//!
//! Then the oldest are removed until the project's checkpoints take no more than the quota. Never removed, and not
//! counted above: pinned checkpoints. Never removed: checkpoints in use ([`in_use`]), and the newest of all.
//!
//! The intervals of the clock are parts of each other (ten minutes of an hour, an hour of a day) and
//! begin at fixed times, so that thinning in steps leaves what thinning at once would: the newest
//! of an interval is the newest of every shorter one that it lies in.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::retention::{RemovalReason, Retention};
use fermata_protocol::{CheckpointNumber, Code, Refusal, UnixMillis};
use serde::Deserialize;

use crate::project::{BeforeRestore, Paused, Project, ProjectState, StableState};

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;

/// What retention needs to know of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionCandidate {
    pub number: CheckpointNumber,
    pub trigger: Trigger,
    pub created_at: UnixMillis,
    /// Whether a person protects it from removal.
    pub pinned: bool,
    /// Bytes that it added to the disk.
    pub bytes: u64,
}

/// How many checkpoints are kept, and for how long: the section `[retention]` of the daemon's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionPolicy {
    /// The number of manual checkpoints; 0 for all.
    pub keep_manual: u64,
    /// The number of checkpoints of pauses; 0 for all.
    pub keep_pause: u64,
    /// The number of checkpoints before timeouts, and of those of shutdowns; 0 for all.
    pub keep_ends: u64,
    /// The age up to which safety checkpoints are kept; 0 for ever.
    pub keep_safety_ms: u64,
    /// The age up to which every automatic checkpoint is kept.
    pub auto_all_ms: u64,
    /// The age up to which one automatic checkpoint of every ten minutes is kept.
    pub auto_ten_minutes_ms: u64,
    /// The age up to which one automatic checkpoint of every hour is kept.
    pub auto_hourly_ms: u64,
    /// The age up to which one automatic checkpoint of every day is kept; 0 for ever.
    pub auto_daily_ms: u64,
    /// What all checkpoints of a project may take on disk; 0 for no bound.
    pub max_bytes: u64,
}

impl Default for RetentionPolicy {
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

impl RetentionPolicy {
    /// Overrides the daemon's policy with the settings of one project.
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

    pub fn quota(&self) -> Option<u64> {
        (self.max_bytes > 0).then_some(self.max_bytes)
    }
}

/// Which checkpoints are to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemovalRequest {
    /// These, which a person names; refused where one of them is protected.
    These(Vec<CheckpointNumber>),
    /// Those that the policy no longer keeps.
    Policy(RetentionPolicy),
    /// Those that all of these bounds allow, the oldest first.
    Bounds(RemovalBounds),
    /// The oldest, until so many bytes are freed for a checkpoint that there is no room for.
    Room {
        bytes: u64,
        /// The bound that leaves no room.
        reason: RemovalReason,
    },
}

/// Bounds that a person gives; each narrows what may be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemovalBounds {
    /// The number of newest checkpoints that stay.
    pub keep: Option<u64>,
    /// Younger checkpoints stay.
    pub older_than_ms: Option<u64>,
    /// No more are removed once the project's checkpoints take at most this.
    pub max_bytes: Option<u64>,
}

/// A checkpoint to remove, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removal {
    pub checkpoint: RetentionCandidate,
    pub reason: RemovalReason,
}

/// Returns the checkpoints that the project needs, whether they have a row yet or not.
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
            if let StableState::Paused(paused) = run.before.clone().stable() {
                pause(&paused);
            }
            // A broken restore can only be completed or undone with the checkpoints that it was made of.
            if let BeforeRestore::Broken(broken) = &run.before {
                used.extend([broken.checkpoint, broken.safety]);
            }
            used.extend([run.checkpoint, run.safety]);
        }
        ProjectState::Broken(broken) => {
            if let StableState::Paused(paused) = &broken.before {
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

/// Chooses the checkpoints of a project to remove, the oldest first; see [`plan`].
///
/// # Errors
/// `checkpoint_not_found` or `checkpoint_protected` for [`RemovalRequest::These`].
pub fn choose(
    project: &Project,
    checkpoints: &[RetentionCandidate],
    request: &RemovalRequest,
    used_bytes: u64,
    now: UnixMillis,
) -> Result<Vec<Removal>, Refusal> {
    let in_use = in_use(project);
    if let RemovalRequest::These(numbers) = request {
        for number in numbers {
            let checkpoint = checkpoints.iter().find(|checkpoint| checkpoint.number == *number);
            refuse_removal(project, *number, checkpoint, in_use.contains(number))?;
        }
    }
    Ok(plan(checkpoints, request, used_bytes, &in_use, now))
}

fn refuse_removal(
    project: &Project,
    number: CheckpointNumber,
    checkpoint: Option<&RetentionCandidate>,
    in_use: bool,
) -> Result<(), Refusal> {
    let name = &project.name;
    let Some(checkpoint) = checkpoint else {
        return Err(Refusal::new(
            Code::CheckpointNotFound,
            format!("project '{name}' has no checkpoint {number}; nothing was removed"),
        )
        .hint(format!("fermatactl checkpoint ls {name}")));
    };
    let refused = |why: String, hint: String| {
        let message = format!("checkpoint {number} of project '{name}' {why}; nothing was removed");
        Err(Refusal::new(Code::CheckpointProtected, message).hint(hint))
    };
    if checkpoint.pinned {
        return refused("is pinned".into(), format!("fermatactl checkpoint unpin {name} {number}"));
    }
    if !in_use {
        return Ok(());
    }
    if let ProjectState::Paused(paused) = &*project.state
        && (paused.checkpoint == number || paused.restored == Some(number))
    {
        return refused("is the one that the project is paused with".into(), format!("fermatactl resume {name}"));
    }
    if let ProjectState::Broken(broken) = &*project.state
        && (broken.checkpoint == number || broken.safety == number)
    {
        return refused(
            "is needed to complete or undo a restore that was given up".into(),
            format!("fermatactl checkpoint restore {name} {}", broken.safety),
        );
    }
    if project.counters.context == number {
        return refused(
            "has the context that agents are given when they are started again".into(),
            format!("make a newer one first: fermatactl checkpoint create {name}"),
        );
    }
    let operation = project.operation().map(ToString::to_string).unwrap_or_default();
    refused(format!("is needed by operation {operation}"), format!("fermatactl op show {operation}"))
}

/// The checkpoints that are never removed, beside pinned ones.
struct Protected<'a> {
    in_use: &'a BTreeSet<CheckpointNumber>,
    newest: Option<CheckpointNumber>,
}

impl Protected<'_> {
    fn allows(&self, checkpoint: &RetentionCandidate) -> bool {
        !checkpoint.pinned && !self.in_use.contains(&checkpoint.number) && self.newest != Some(checkpoint.number)
    }
}

/// Chooses the checkpoints to remove, the oldest first.
///
/// `used_bytes` is what all checkpoints of the project take on disk now. A removal is assumed to free the bytes that
/// the checkpoint added, which is the most that it can free.
pub fn plan(
    checkpoints: &[RetentionCandidate],
    request: &RemovalRequest,
    used_bytes: u64,
    in_use: &BTreeSet<CheckpointNumber>,
    now: UnixMillis,
) -> Vec<Removal> {
    let mut checkpoints: Vec<RetentionCandidate> = checkpoints.to_vec();
    checkpoints.sort_by_key(|checkpoint| checkpoint.number);
    let protected = Protected { in_use, newest: checkpoints.last().map(|checkpoint| checkpoint.number) };
    match request {
        RemovalRequest::These(numbers) => checkpoints
            .into_iter()
            .filter(|checkpoint| numbers.contains(&checkpoint.number))
            .map(|checkpoint| Removal { checkpoint, reason: RemovalReason::Asked })
            .collect(),
        RemovalRequest::Policy(policy) => by_policy(&checkpoints, policy, used_bytes, &protected, now),
        RemovalRequest::Bounds(bounds) => by_bounds(&checkpoints, bounds, used_bytes, &protected, now),
        RemovalRequest::Room { bytes, reason } => {
            let candidates: Vec<&RetentionCandidate> =
                checkpoints.iter().filter(|checkpoint| protected.allows(checkpoint)).collect();
            // If the removal of all of them would not suffice, something else has filled the disk.
            let most: u64 = candidates.iter().map(|checkpoint| checkpoint.bytes).sum();
            if *reason == RemovalReason::DiskFloor && most < *bytes {
                return Vec::new();
            }
            oldest_until(candidates.into_iter(), *bytes, *reason)
        }
    }
}

/// Takes the oldest until together they had added `bytes`.
fn oldest_until<'a>(
    checkpoints: impl Iterator<Item = &'a RetentionCandidate>,
    bytes: u64,
    reason: RemovalReason,
) -> Vec<Removal> {
    let mut left = bytes;
    let mut removals = Vec::new();
    for checkpoint in checkpoints {
        if left == 0 {
            break;
        }
        left = left.saturating_sub(checkpoint.bytes);
        removals.push(Removal { checkpoint: *checkpoint, reason });
    }
    removals
}

fn by_policy(
    checkpoints: &[RetentionCandidate],
    policy: &RetentionPolicy,
    used: u64,
    protected: &Protected<'_>,
    now: UnixMillis,
) -> Vec<Removal> {
    let mut removals: BTreeMap<CheckpointNumber, Removal> = expired(checkpoints, policy, now)
        .filter(|removal| protected.allows(&removal.checkpoint))
        .map(|removal| (removal.checkpoint.number, removal))
        .collect();
    if let Some(quota) = policy.quota() {
        let freed: u64 = removals.values().map(|removal| removal.checkpoint.bytes).sum();
        let excess = used.saturating_sub(freed).saturating_sub(quota);
        let rest = checkpoints
            .iter()
            .filter(|checkpoint| protected.allows(checkpoint) && !removals.contains_key(&checkpoint.number));
        let more = oldest_until(rest, excess, RemovalReason::Quota);
        removals.extend(more.into_iter().map(|removal| (removal.checkpoint.number, removal)));
    }
    removals.into_values().collect()
}

/// Returns what the policy no longer keeps, protected checkpoints included.
fn expired(
    checkpoints: &[RetentionCandidate],
    policy: &RetentionPolicy,
    now: UnixMillis,
) -> impl Iterator<Item = Removal> {
    let unpinned = || checkpoints.iter().filter(|checkpoint| !checkpoint.pinned);
    let beyond = |trigger: Trigger, keep: u64| {
        let keep = if keep == 0 { usize::MAX } else { usize::try_from(keep).unwrap_or(usize::MAX) };
        let newest_first = unpinned().rev().filter(move |checkpoint| checkpoint.trigger == trigger);
        newest_first.skip(keep).map(|checkpoint| Removal { checkpoint: *checkpoint, reason: RemovalReason::Count })
    };
    let counted = beyond(Trigger::Manual, policy.keep_manual)
        .chain(beyond(Trigger::Pause, policy.keep_pause))
        .chain(beyond(Trigger::Timeout, policy.keep_ends))
        .chain(beyond(Trigger::Shutdown, policy.keep_ends));
    let aged = unpinned()
        .filter(|checkpoint| checkpoint.trigger == Trigger::Safety && policy.keep_safety_ms > 0)
        .filter(|checkpoint| age(checkpoint, now) > policy.keep_safety_ms)
        .map(|checkpoint| Removal { checkpoint: *checkpoint, reason: RemovalReason::Age });
    let mut automatic: Vec<RetentionCandidate> = unpinned()
        .filter(|checkpoint| matches!(checkpoint.trigger, Trigger::Auto | Trigger::PhaseTransition))
        .copied()
        .collect();
    // By time: where the clock was set back, a later checkpoint may count as older.
    automatic.sort_by_key(|checkpoint| (checkpoint.created_at, checkpoint.number));
    let all: Vec<Removal> = counted.chain(aged).chain(thinned(&automatic, policy, now)).collect();
    all.into_iter()
}

fn thinned(automatic: &[RetentionCandidate], policy: &RetentionPolicy, now: UnixMillis) -> Vec<Removal> {
    let mut removals = Vec::new();
    for (place, checkpoint) in automatic.iter().enumerate() {
        let interval = match spacing(policy, age(checkpoint, now)) {
            Spacing::All => continue,
            Spacing::Each(interval) => interval,
            Spacing::Nothing => {
                removals.push(Removal { checkpoint: *checkpoint, reason: RemovalReason::Age });
                continue;
            }
        };
        let same = |other: &RetentionCandidate| slot(other, interval) == slot(checkpoint, interval);
        if automatic.iter().skip(place + 1).any(same) {
            removals.push(Removal { checkpoint: *checkpoint, reason: RemovalReason::Thinned });
        }
    }
    removals
}

/// Which automatic checkpoints of an age are kept.
enum Spacing {
    All,
    /// The newest of each interval of so many milliseconds.
    Each(u64),
    Nothing,
}

fn spacing(policy: &RetentionPolicy, age: u64) -> Spacing {
    if age <= policy.auto_all_ms {
        Spacing::All
    } else if age <= policy.auto_ten_minutes_ms {
        Spacing::Each(10 * MINUTE_MS)
    } else if age <= policy.auto_hourly_ms {
        Spacing::Each(HOUR_MS)
    } else if age <= policy.auto_daily_ms || policy.auto_daily_ms == 0 {
        Spacing::Each(DAY_MS)
    } else {
        Spacing::Nothing
    }
}

fn age(checkpoint: &RetentionCandidate, now: UnixMillis) -> u64 {
    u64::try_from(now.since(checkpoint.created_at)).unwrap_or(0)
}

fn slot(checkpoint: &RetentionCandidate, interval: u64) -> i64 {
    checkpoint.created_at.0.div_euclid(i64::try_from(interval).unwrap_or(i64::MAX))
}

fn by_bounds(
    checkpoints: &[RetentionCandidate],
    bounds: &RemovalBounds,
    used: u64,
    protected: &Protected<'_>,
    now: UnixMillis,
) -> Vec<Removal> {
    let newest = bounds.keep.map_or(0, |keep| usize::try_from(keep).unwrap_or(usize::MAX));
    let older = &checkpoints[..checkpoints.len().saturating_sub(newest)];
    let old_enough =
        |checkpoint: &&RetentionCandidate| bounds.older_than_ms.is_none_or(|least| age(checkpoint, now) > least);
    let candidates = older.iter().filter(|checkpoint| protected.allows(checkpoint)).filter(old_enough);
    // Without `max_bytes` everything that the other bounds allow is removed.
    let excess = bounds.max_bytes.map_or(u64::MAX, |most| used.saturating_sub(most));
    oldest_until(candidates, excess, RemovalReason::Asked)
}

#[cfg(test)]
#[path = "retention_test.rs"]
mod tests;
