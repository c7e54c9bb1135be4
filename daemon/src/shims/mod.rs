//! The daemon's side of the shims: starting one, speaking to it, finding it again, and ending what one has left behind.
//!
//! ```text
//! launch   runs the launcher, which leaves a shim behind and prints one line
//! link     one connection: requests, answers and events
//! viewing  one viewer's connection to a terminal, read as fast as the viewer takes it
//! reach    after a restart of the daemon: the record of a run, then its shim, then what is left of it
//! lost     ends the processes of a run whose shim is gone
//! ```
//!
//! The shim itself, its protocol and its records are the crate `fermata_shim`.

pub mod launch;
pub mod link;
pub mod lost;
pub mod reconnect;
pub mod viewing;
