//! Kills a tree from the event loop: how often to continue, and which errors to report.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::reply::failed_to;
use fermata_os::cgroup::Group;
use fermata_os::process::{self, ProcessId};
use fermata_os::tree::{KillWork, TreeProgress};

/// How long freezing a group before it is killed may take.
const FREEZE_PATIENCE: Duration = Duration::from_millis(200);
/// The interval of steps at first.
const FIRST_TICK: Duration = Duration::from_millis(2);
/// The longest interval: a process that waits for a failed disk may do so for days.
const LAST_TICK: Duration = Duration::from_millis(500);
/// The interval grows after this time.
const SOON: Duration = Duration::from_secs(2);
/// How many different errors are reported; a tree may have a thousand processes that cannot be signalled.
const MOST_ERRORS: usize = 16;

/// Kills a tree and reports each error once.
#[derive(Debug)]
pub(super) struct Killing {
    work: KillWork,
    started: Instant,
    reported: HashSet<String>,
}

impl Killing {
    /// Starts to kill the tree below `root`, of which `group` contains all or most processes. A frozen group stays
    /// frozen until all its members carry a SIGKILL.
    pub(super) fn begin(root: i32, group: Option<&Group>, now: Instant) -> Self {
        let mut work = KillWork::new(root);
        if let Some(group) = group {
            for pid in group.procs().unwrap_or_default() {
                if let Ok(Some(id)) = process::identify(pid) {
                    work.note(id);
                }
            }
            // Freezing ensures that no process observes the death of another and executes the next line of its script.
            // It fails if a process waits for a failed disk, which must not keep the others alive.
            group.freeze(FREEZE_PATIENCE).ok();
            if let Err(error) = group.kill() {
                eprintln!("fermata-shim: {}", failed_to(&error));
                // The members are killed by signals instead. They must not be frozen, in order to die.
                group.thaw().ok();
            }
        }
        Self { work, started: now, reported: HashSet::new() }
    }

    /// Does a step; returns whether no process of the tree is left.
    pub(super) fn finishes(&mut self, group: Option<&Group>) -> bool {
        matches!(self.step(), Some(TreeProgress::Done)) && group.is_none_or(|group| !group.populated().unwrap_or(false))
    }

    /// See [`KillWork::step`]; `None` after an error.
    pub(super) fn step(&mut self) -> Option<TreeProgress> {
        match self.work.step() {
            Ok(progress) => Some(progress),
            Err(error) => {
                let text = failed_to(&error);
                if self.reported.len() < MOST_ERRORS && !self.reported.contains(&text) {
                    eprintln!("fermata-shim: {text}");
                    self.reported.insert(text);
                }
                None
            }
        }
    }

    /// The time until the next step.
    pub(super) fn tick(&self, now: Instant) -> Duration {
        let late = now.saturating_duration_since(self.started).saturating_sub(SOON);
        (FIRST_TICK + late / 16).min(LAST_TICK)
    }

    /// See [`KillWork::killed`].
    pub(super) fn killed(&self) -> &HashSet<ProcessId> {
        self.work.killed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_become_rarer_and_never_stop() {
        let now = Instant::now();
        let killing = Killing { work: KillWork::new(1), started: now, reported: HashSet::new() };
        let tick = |ms| killing.tick(now + Duration::from_millis(ms));
        assert_eq!((tick(0), tick(2000)), (FIRST_TICK, FIRST_TICK));
        assert!(tick(3000) > FIRST_TICK && tick(3000) < tick(6000));
        assert_eq!(tick(3_600_000), LAST_TICK);
    }
}
