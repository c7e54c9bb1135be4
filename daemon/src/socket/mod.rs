//! The control socket: listener, connections, lines, and one handler per method.
//!
//! ```text
//!   listener ─► connection: bytes -> line -> Request -> Call -> Authorised
//!                  │ at most 64 under way, each a task                 │
//!                  ▼                                                   ▼
//!               writer ◄──────── replies, events, progress ◄──── handlers
//! ```
//! A peer that does not read, sends invalid data or disconnects at any time has no effect on other connections.

mod agent_detail;
mod agents;
mod attach;
mod checkpoints;
mod connection;
mod context;
mod daemon;
mod dispatch;
mod events;
pub mod listener;
mod loads;
mod logs;
mod operations;
mod plugins;
mod projects;
mod reply;
mod reports;
mod retention;
mod serve;
mod terminals;
mod transfer_files;
mod transfers;
mod verify;

pub use daemon::Daemon;
pub use operations::resume_quietly;
pub use terminals::Terminals;
