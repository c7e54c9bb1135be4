//! `--timeout`: the end of a command whose time is over.
//!
//! The client blocks in reads, and long work keeps it busy with notifications, so the time is kept
//! by a thread of its own that ends the process.

use std::time::Duration;

use crate::errors::Failure;

/// Ends the process with exit code 6 after `time`.
///
/// # Errors
/// When the thread cannot be started.
pub fn arm(time: Duration, json: bool) -> Result<(), Failure> {
    std::thread::Builder::new()
        .name("deadline".into())
        .spawn(move || {
            std::thread::sleep(time);
            let failure =
                Failure::timed_out(format!("not done after {}", crate::units::duration(time.as_secs_f64() * 1_000.0)))
                    .hint("what was begun goes on in the daemon; fermatactl op ls shows it");
            failure.print(json);
            std::process::exit(i32::from(failure.exit_number()));
        })
        .map(drop)
        .map_err(|e| Failure::io("start the clock of --timeout", &e))
}
