//! Makes samples of what agents use from readings of counters.

use fermata_protocol::UnixMillis;
use fermata_protocol::load::{Load, MemoryKind};

/// The shortest time over which processor time is averaged: the kernel counts a part of it in ticks of ten
/// milliseconds.
const MIN_WINDOW_MS: i64 = 500;

/// The counters of one process tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadReading {
    pub at: UnixMillis,
    /// Processor time since the run began, microseconds.
    pub cpu_us: u64,
    pub memory_bytes: u64,
    /// The kernel's own peak; none where it does not count one.
    pub memory_peak_bytes: Option<u64>,
    pub memory_kind: MemoryKind,
    pub io_read_bytes: Option<u64>,
    pub io_written_bytes: Option<u64>,
    pub processes: u64,
}

/// Makes a sample of a reading and the previous sample of the same run.
///
/// A counter never decreases: the usage of a process is lost to readings once it is gone and its parent has not waited
/// for it.
pub fn sample(before: Option<&Load>, reading: &LoadReading, started_at: UnixMillis) -> Load {
    let cpu_us = before.map_or(reading.cpu_us, |before| before.cpu_us.max(reading.cpu_us));
    let (from, used) = match before {
        Some(before) => (before.sampled_at, cpu_us - before.cpu_us),
        None => (started_at, cpu_us),
    };
    let window = reading.at.since(from);
    let (cpu_percent, cpu_window_ms) = match before {
        Some(before) if window < MIN_WINDOW_MS => (before.cpu_percent, before.cpu_window_ms),
        _ if window == 0 => (None, 0),
        _ => (Some(used as f64 / (window as f64 * 10.0)), window),
    };
    let largest = before.map_or(0, |before| before.memory_peak_bytes).max(reading.memory_bytes);
    Load {
        sampled_at: reading.at,
        cpu_us,
        cpu_percent,
        cpu_window_ms,
        memory_bytes: reading.memory_bytes,
        memory_peak_bytes: reading.memory_peak_bytes.unwrap_or(largest).max(reading.memory_bytes),
        memory_kind: reading.memory_kind,
        io_read_bytes: forward(before.and_then(|before| before.io_read_bytes), reading.io_read_bytes),
        io_written_bytes: forward(before.and_then(|before| before.io_written_bytes), reading.io_written_bytes),
        processes: reading.processes,
    }
}

fn forward(before: Option<u64>, now: Option<u64>) -> Option<u64> {
    now.max(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at: i64, cpu_us: u64) -> LoadReading {
        LoadReading {
            at: UnixMillis(at),
            cpu_us,
            memory_bytes: 100,
            memory_peak_bytes: None,
            memory_kind: MemoryKind::Resident,
            io_read_bytes: Some(10),
            io_written_bytes: None,
            processes: 1,
        }
    }

    #[test]
    fn the_first_sample_is_the_average_since_the_start() {
        let first = sample(None, &reading(3_000, 500_000), UnixMillis(1_000));
        assert_eq!((first.cpu_percent, first.cpu_window_ms), (Some(25.0), 2_000));
        let at_once = sample(None, &reading(1_000, 0), UnixMillis(1_000));
        assert_eq!((at_once.cpu_percent, at_once.cpu_window_ms), (None, 0));
    }

    #[test]
    fn the_next_one_is_the_average_since_the_first() {
        let first = sample(None, &reading(3_000, 500_000), UnixMillis(1_000));
        let next = sample(Some(&first), &reading(5_000, 4_500_000), UnixMillis(1_000));
        assert_eq!((next.cpu_percent, next.cpu_window_ms), (Some(200.0), 2_000));
        // Too close to say anything new: the average stays.
        let close = sample(Some(&next), &reading(5_100, 4_500_000), UnixMillis(1_000));
        assert_eq!((close.cpu_percent, close.cpu_window_ms), (Some(200.0), 2_000));
    }

    #[test]
    fn counters_never_go_back_and_clocks_that_do_are_no_harm() {
        let first = sample(None, &reading(3_000, 500_000), UnixMillis(1_000));
        let mut less = reading(2_000, 300_000);
        less.io_read_bytes = Some(4);
        let next = sample(Some(&first), &less, UnixMillis(1_000));
        assert_eq!((next.cpu_us, next.io_read_bytes, next.io_written_bytes), (500_000, Some(10), None));
        less.io_read_bytes = None;
        assert_eq!(sample(Some(&first), &less, UnixMillis(1_000)).io_read_bytes, Some(10));
    }

    #[test]
    fn the_peak_is_the_kernels_or_the_largest_sample() {
        let mut now = reading(1_000, 0);
        now.memory_bytes = 300;
        let first = sample(None, &now, UnixMillis(0));
        now.memory_bytes = 200;
        assert_eq!(sample(Some(&first), &now, UnixMillis(0)).memory_peak_bytes, 300);
        now.memory_peak_bytes = Some(900);
        assert_eq!(sample(Some(&first), &now, UnixMillis(0)).memory_peak_bytes, 900);
    }
}
