//! Waiting for a condition, with a deadline and a description for the message of a failure.
//!
//! Tests never sleep for a fixed time. They wait through the protocol where possible, and for everything else (files,
//! processes, logs) through these functions.

use std::time::{Duration, Instant};

/// The deadline for conditions that usually hold within milliseconds.
pub const SOON: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Calls `poll` until it returns a value; `None` when the deadline has passed.
pub fn poll_for<T>(deadline: Duration, mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let found = poll();
        if found.is_some() || start.elapsed() >= deadline {
            return found;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Calls `poll` until it returns a value.
///
/// # Panics
/// When the deadline has passed; the text contains `what`.
#[track_caller]
pub fn wait_for<T>(deadline: Duration, what: &str, poll: impl FnMut() -> Option<T>) -> T {
    match poll_for(deadline, poll) {
        Some(found) => found,
        None => panic!("waited {deadline:?} in vain for: {what}"),
    }
}

/// Waits until `condition` returns true.
///
/// # Panics
/// When the deadline has passed; the text contains `what`.
#[track_caller]
pub fn wait_until(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(deadline, what, || condition().then_some(()));
}
