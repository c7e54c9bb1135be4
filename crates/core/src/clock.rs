//! A stopwatch that does not count while an agent is paused.

use fermata_protocol::UnixMillis;
use serde::{Deserialize, Serialize};

/// Counts the milliseconds during which an agent runs; paused time is not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Clock {
    /// Counted until it was last stopped.
    counted_ms: i64,
    /// When it was last started; none while it is stopped.
    since: Option<UnixMillis>,
}

impl Clock {
    /// Makes a clock that runs from `at` on and has counted `counted_ms` already.
    pub fn running_from(at: UnixMillis, counted_ms: i64) -> Self {
        Self { counted_ms, since: Some(at) }
    }

    /// Starts it; a running clock is unchanged.
    pub fn start(&mut self, at: UnixMillis) {
        self.since.get_or_insert(at);
    }

    /// Stops it; a stopped clock is unchanged.
    pub fn stop(&mut self, at: UnixMillis) {
        self.counted_ms = self.read(at);
        self.since = None;
    }

    /// Returns the milliseconds counted so far. A wall clock that was set back adds nothing.
    pub fn read(&self, now: UnixMillis) -> i64 {
        self.counted_ms + self.since.map_or(0, |since| now.since(since).max(0))
    }

    /// Returns when it will have counted `ms` milliseconds; none while it is stopped.
    pub fn reaches(&self, ms: i64) -> Option<UnixMillis> {
        self.since.map(|since| UnixMillis(since.0.saturating_add(ms.saturating_sub(self.counted_ms))))
    }
}

/// Converts a setting in milliseconds to the signed milliseconds of [`UnixMillis`] and [`Clock`]; saturates.
pub fn millis(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_only_while_it_runs() {
        let mut clock = Clock::running_from(UnixMillis(1_000), 0);
        assert_eq!(clock.read(UnixMillis(1_400)), 400);
        clock.stop(UnixMillis(1_500));
        assert_eq!(clock.read(UnixMillis(9_000)), 500);
        assert_eq!(clock.reaches(600), None);
        clock.start(UnixMillis(10_000));
        clock.start(UnixMillis(10_050));
        assert_eq!(clock.read(UnixMillis(10_100)), 600);
        assert_eq!(clock.reaches(700), Some(UnixMillis(10_200)));
    }

    #[test]
    fn a_wall_clock_that_is_set_back_takes_nothing_away() {
        let clock = Clock::running_from(UnixMillis(1_000), 50);
        assert_eq!(clock.read(UnixMillis(10)), 50);
    }
}
