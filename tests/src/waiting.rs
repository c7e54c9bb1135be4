//! Waiting for something that will come, with a deadline and a name for what did not.
//!
//! Tests never sleep for luck; what they can wait for through the protocol they wait for there,
//! and for all the rest (files, processes, logs) through these functions.

use std::time::{Duration, Instant};

/// When something that usually takes milliseconds is taken never to come.
pub const SOON: Duration = Duration::from_secs(60);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `look` finds something, `None` when the deadline has passed.
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

/// Waits until `look` finds something.
///
/// # Panics
/// When the deadline has passed; the text says what was waited for.
#[track_caller]
pub fn wait_for<T>(deadline: Duration, what: &str, poll: impl FnMut() -> Option<T>) -> T {
    match poll_for(deadline, poll) {
        Some(found) => found,
        None => panic!("waited {deadline:?} in vain for: {what}"),
    }
}

/// Waits until `holds` says yes.
///
/// # Panics
/// When the deadline has passed; the text says what was waited for.
#[track_caller]
pub fn wait_until(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(deadline, what, || condition().then_some(()));
}
