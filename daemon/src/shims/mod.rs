//! The daemon's side of the shims.
//!
//! ```text
//! launch     runs the launcher, which starts a shim and prints one line
//! link       one connection to a shim: requests, replies and events
//! viewing    the connection of one viewer of a terminal, read as fast as the viewer reads
//! reconnect  finds a run after a restart of the daemon: its record, its shim, or the rest of its process tree
//! lost       ends the processes of a run whose shim is dead
//! ```
//!
//! The crate `fermata_shim` has the shim itself, its protocol and its records.

pub mod launch;
pub mod link;
pub mod lost;
pub mod reconnect;
pub mod viewing;
