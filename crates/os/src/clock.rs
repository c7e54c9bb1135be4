//! The clocks: wall time for records, monotonic time for deadlines.
//!
//! The pure parts get `now` as a parameter; this is where the edge reads it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Reads the wall clock as nanoseconds since the Unix epoch (0 before 1970).
pub fn unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Reads the wall clock as milliseconds since the Unix epoch.
pub fn unix_ms() -> i64 {
    unix_ns() / 1_000_000
}

/// Reads `CLOCK_MONOTONIC` in milliseconds; it stands still while the machine is suspended.
pub fn monotonic_ms() -> u64 {
    read_ms(ClockId::CLOCK_MONOTONIC)
}

/// Reads `CLOCK_BOOTTIME` in milliseconds; it counts time spent suspended.
pub fn boottime_ms() -> u64 {
    read_ms(ClockId::CLOCK_BOOTTIME)
}

fn read_ms(clock: ClockId) -> u64 {
    // Both clocks exist on every kernel that runs this program; 0 only makes a deadline early.
    clock_gettime(clock).map_or(0, |t| {
        let whole = u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000;
        whole + u64::try_from(t.tv_nsec()).unwrap_or(0) / 1_000_000
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_time_never_goes_back() {
        let first = monotonic_ms();
        assert!(monotonic_ms() >= first);
        assert!(boottime_ms() >= first);
    }

    #[test]
    fn wall_time_is_after_2020() {
        assert!(unix_ms() > 1_577_836_800_000);
    }
}
