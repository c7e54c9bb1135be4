//! Kernel interfaces: cgroups, processes, signals, limits, locks and durable files.
//!
//! Apart from the plugin ABI this is the only crate with `unsafe` code. It knows nothing of agents, projects or
//! checkpoints and imports no other crate of Fermata.
#![warn(clippy::too_many_lines)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

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
pub mod spawn_error;
pub mod tree;
pub mod usage;
