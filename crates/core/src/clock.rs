//! A clock that stands still while an agent is paused.

use fermata_protocol::UnixMillis;
use serde::{Deserialize, Serialize};

/// Counts the milliseconds that an agent runs, not those that it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Clock {
    /// What was counted until it last stood still, milliseconds.
    counted_ms: i64,
    /// Since when it goes; none while it stands still.
    since: Option<UnixMillis>,
}

impl Clock {
    /// Makes a clock that goes from `at` on and has counted `counted_ms` already.
    pub fn started(at: UnixMillis, counted_ms: i64) -> Self {
        Self { counted_ms, since: Some(at) }
    }

    /// Lets it go on; one that goes already is left alone.
    pub fn go_on(&mut self, at: UnixMillis) {
        self.since.get_or_insert(at);
    }

    /// Lets it stand still.
    pub fn stand_still(&mut self, at: UnixMillis) {
        self.counted_ms = self.read(at);
        self.since = None;
    }

    /// Returns what it has counted, milliseconds. A wall clock that was set back counts nothing.
    pub fn read(&self, now: UnixMillis) -> i64 {
        self.counted_ms + self.since.map_or(0, |since| now.since(since).max(0))
    }

    /// Returns when it will have counted so many milliseconds; none while it stands still.
    pub fn reaches(&self, ms: i64) -> Option<UnixMillis> {
        self.since.map(|since| UnixMillis(since.0.saturating_add(ms.saturating_sub(self.counted_ms))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_only_while_it_goes() {
        let mut clock = Clock::started(UnixMillis(1_000), 0);
        assert_eq!(clock.read(UnixMillis(1_400)), 400);
        clock.stand_still(UnixMillis(1_500));
        assert_eq!(clock.read(UnixMillis(9_000)), 500);
        assert_eq!(clock.reaches(600), None);
        clock.go_on(UnixMillis(10_000));
        clock.go_on(UnixMillis(10_050));
        assert_eq!(clock.read(UnixMillis(10_100)), 600);
        assert_eq!(clock.reaches(700), Some(UnixMillis(10_200)));
    }

    #[test]
    fn a_wall_clock_that_is_set_back_takes_nothing_away() {
        let clock = Clock::started(UnixMillis(1_000), 50);
        assert_eq!(clock.read(UnixMillis(10)), 50);
    }
}
