//! The kernel: cgroups, processes, signals, limits, locks and durable files.
//!
//! With the plugin ABI the only home of `unsafe`. Nothing here knows an agent, a project or a
//! checkpoint: the crates above combine these tools, and this one imports none of them.

pub mod cgroup;
pub mod clock;
pub mod controllers;
#[cfg(feature = "tokio")]
pub mod death;
pub mod fsync;
pub mod limits;
pub mod lock;
pub mod mappings;
pub mod memory;
pub mod mounts;
pub mod peer;
pub mod prelude;
pub mod pressure;
pub mod priority;
pub mod process;
pub mod procfs;
pub mod pty;
pub mod signals;
pub mod socket_child;
pub mod spawn;
pub mod tree;
pub mod usage;
