//! A measure of time for tests that assert that something does not happen: the writes of an unrelated running process.

use std::fs;
use std::process::{Child, Command};

use crate::waiting::{SOON, wait_until};

/// Waits until a process has written `count` times, once every 20 ms if it is given a processor. A stopped process
/// would have made progress in the same time if it could run: load slows both down.
///
/// # Panics
/// When the process cannot be started or does not write.
#[track_caller]
pub fn wait_for_beats(count: u64) {
    let dir = tempfile::Builder::new().prefix("metronome").tempdir().expect("create a temporary directory");
    let beats = dir.path().join("beats");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "while :; do printf . >> \"$0\"; sleep 0.02; done"]).arg(&beats);
    let _writer = Writer(command.spawn().expect("start /bin/sh"));
    wait_until(SOON, "the writes of the reference process", || {
        fs::metadata(&beats).is_ok_and(|meta| meta.len() >= count)
    });
}

struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("end the metronome");
    }
}
