//! The work of killing a tree as the loop sees it: how often to look again, and what to tell of it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::freeze::failed_to;
use fermata_os::process::ProcessId;
use fermata_os::tree::{KillWork, Progress};

/// How often to look again while killed processes vanish.
const FIRST_TICK: Duration = Duration::from_millis(2);
/// The same once they have not for long: who waits for a dead disk may do so for days.
const LAST_TICK: Duration = Duration::from_millis(500);
/// How long that takes to be likely.
const SOON: Duration = Duration::from_secs(2);
/// How many different errors are told; a tree can have a thousand that nobody may signal.
const MOST_ERRORS: usize = 16;

/// Kills a tree, and tells each error once.
#[derive(Debug)]
pub(super) struct Killing {
    work: KillWork,
    since: Instant,
    told: HashSet<String>,
}

impl Killing {
    pub(super) fn new(work: KillWork, now: Instant) -> Self {
        Self { work, since: now, told: HashSet::new() }
    }

    /// See [`KillWork::step`]; `None` after an error.
    pub(super) fn step(&mut self) -> Option<Progress> {
        match self.work.step() {
            Ok(progress) => Some(progress),
            Err(error) => {
                let text = failed_to(&error);
                if self.told.len() < MOST_ERRORS && !self.told.contains(&text) {
                    eprintln!("fermata-shim: {text}");
                    self.told.insert(text);
                }
                None
            }
        }
    }

    /// When to look again.
    pub(super) fn tick(&self, now: Instant) -> Duration {
        let late = now.saturating_duration_since(self.since).saturating_sub(SOON);
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
    fn the_looks_become_rarer_and_never_stop() {
        let now = Instant::now();
        let killing = Killing::new(KillWork::new(1), now);
        let tick = |ms| killing.tick(now + Duration::from_millis(ms));
        assert_eq!((tick(0), tick(2000)), (FIRST_TICK, FIRST_TICK));
        assert!(tick(3000) > FIRST_TICK && tick(3000) < tick(6000));
        assert_eq!(tick(3_600_000), LAST_TICK);
    }
}
