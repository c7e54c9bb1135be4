//! Kills a tree from the event loop: how often to continue, and which errors to report.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::freeze::failed_to;
use fermata_os::process::ProcessId;
use fermata_os::tree::{KillWork, TreeProgress};

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
    pub(super) fn new(work: KillWork, now: Instant) -> Self {
        Self { work, started: now, reported: HashSet::new() }
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
        let killing = Killing::new(KillWork::new(1), now);
        let tick = |ms| killing.tick(now + Duration::from_millis(ms));
        assert_eq!((tick(0), tick(2000)), (FIRST_TICK, FIRST_TICK));
        assert!(tick(3000) > FIRST_TICK && tick(3000) < tick(6000));
        assert_eq!(tick(3_600_000), LAST_TICK);
    }
}
