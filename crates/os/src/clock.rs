//! The clocks: wall time for records, monotonic time for deadlines.
//!
//! The core takes `now` as a parameter; its callers read the clock here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Returns the wall clock in nanoseconds since the Unix epoch (0 before 1970).
pub fn unix_ns() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}

/// Returns the wall clock in milliseconds since the Unix epoch.
pub fn unix_ms() -> i64 {
    unix_ns() / 1_000_000
}

/// Returns `CLOCK_MONOTONIC` in milliseconds. This clock does not advance while the machine is suspended.
pub fn monotonic_ms() -> u64 {
    read_ms(ClockId::CLOCK_MONOTONIC)
}

/// Returns `CLOCK_BOOTTIME` in milliseconds. This clock includes the time for which the machine was suspended.
pub fn boottime_ms() -> u64 {
    read_ms(ClockId::CLOCK_BOOTTIME)
}

fn read_ms(clock: ClockId) -> u64 {
    // Every supported kernel has both clocks. A 0 would only make a deadline expire early.
    clock_gettime(clock).map_or(0, |t| {
        let seconds = u64::try_from(t.tv_sec()).unwrap_or(0);
        seconds * 1_000 + u64::try_from(t.tv_nsec()).unwrap_or(0) / 1_000_000
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
