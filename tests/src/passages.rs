//! The failpoint events of a sandbox's daemons: each passage of a failpoint that is armed with `tell`.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the file in the sandbox's directory that the daemons write failpoint events to.
pub fn file_in(sandbox: &Path) -> PathBuf {
    sandbox.join("passages")
}

/// Counts how often the daemons of the sandbox in this directory have passed a failpoint.
pub fn passages(sandbox: &Path, failpoint: &str) -> usize {
    let passages = fs::read_to_string(file_in(sandbox)).unwrap_or_default();
    passages.lines().filter(|name| *name == failpoint).count()
}
