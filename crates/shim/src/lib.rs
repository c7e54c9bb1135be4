//! The shim: parent and subreaper of one agent. It outlives the daemon.
//!
//! ```text
//! fermatad ── runs ──> launcher ── forks ──> shim (own session, subreaper) ── forks ──> agent
//!    │                  prints one line,       │  socket: wire.rs                (own group,
//!    │                  exits                  │  logs:   log.rs                  same session)
//!    └── daemon/src/shims/ ────────────────────┘  run.json, exit.json: record.rs
//! ```
//!
//! The daemon is never the parent of the shim. A fresh start and an adoption after a daemon restart therefore take the
//! same path: read `run.json`, connect to the socket.
//!
//! The shim is synchronous and has one thread. It must not die before its agent, never waits for a peer, and decides
//! nothing about projects: it carries out the daemon's requests, and lets the agent run if the daemon falls silent (see
//! `freeze` for the lease).
#![warn(clippy::too_many_lines)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

pub mod connection;
pub mod freeze;
pub mod guard;
pub mod intake;
pub mod launch_report;
pub mod launcher;
pub mod log;
pub mod log_entry;
pub mod log_line;
pub mod log_reader;
pub mod log_recovery;
pub mod log_sink;
pub mod log_writer_process;
mod pipes;
pub mod raw;
pub mod record;
pub mod reply;
mod socket;
pub mod spec;
pub mod supervise;
pub mod terminal;
pub mod wire;
