//! Failpoints: named instants at which a test makes the program die, fail or stop.
//!
//! A name denotes the instant between two durable steps, for instance `pause.frozen`. Failpoints are for tests only:
//! without the feature `enabled`, as in every release, [`hit`] and [`check`] are empty and the environment is not read.
//!
//! With the feature, the environment variable [`VARIABLE`] arms failpoints. Its value is a comma-separated list of
//! `name=effect`, or `name@n=effect` for the n-th passage. The effects are:
//!
//! - `abort`: the process kills itself with SIGKILL, so that no destructor runs and no buffer is flushed;
//! - `error`: [`check`] returns an error; [`hit`] ignores it;
//! - `stop`: the process stops itself with SIGSTOP and continues after SIGCONT;
//! - `tell`: every passage appends the name, in a line of its own, to the file that `FERMATA_FAILPOINT_EVENTS` names,
//!   and the process continues.
//!
//! An entry that cannot be parsed is ignored.
#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![warn(clippy::too_many_lines)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

#[cfg(feature = "enabled")]
mod armed;

use std::io;

/// The environment variable that arms failpoints.
pub const VARIABLE: &str = "FERMATA_FAILPOINT";

/// Passes a failpoint in code that cannot return an error: an armed `error` has no effect.
#[inline]
pub fn hit(name: &str) {
    #[cfg(feature = "enabled")]
    armed::hit(VARIABLE, name);
    #[cfg(not(feature = "enabled"))]
    let _ = name;
}

/// Passes a failpoint in code that can return an error.
///
/// # Errors
/// If the failpoint is armed with `error`.
#[inline]
pub fn check(name: &str) -> io::Result<()> {
    #[cfg(feature = "enabled")]
    return armed::check(VARIABLE, name);
    #[cfg(not(feature = "enabled"))]
    {
        let _ = name;
        Ok(())
    }
}
