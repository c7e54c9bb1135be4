//! The control socket: listener, connections, lines, and the handlers of every method.
//!
//! ```text
//!   listener ─► connection: bytes -> line -> Request -> Call -> Authorised
//!                  │ at most 64 under way, each a task                 │
//!                  ▼                                                   ▼
//!               writer ◄──────── replies, events, progress ◄──── handlers
//! ```
//! A peer that does not read, sends garbage or goes away in the middle disturbs nobody else.

mod agent_detail;
mod agents;
mod attach;
mod checkpoints;
mod connection;
mod context;
mod dispatch;
mod events;
pub mod listener;
mod loads;
mod logs;
mod operations;
mod plugins;
mod projects;
mod reports;
mod retention;
mod transfers;
mod verify;

use std::sync::Arc;

use fermata_protocol::UnixMillis;

pub use attach::Terminals;
pub use operations::resume_quietly;

use crate::project::Projects;

/// What every connection knows of the daemon.
pub struct Daemon {
    /// The projects, and through them all that rooms share.
    pub projects: Arc<Projects>,
    /// When the daemon started.
    pub started_at: UnixMillis,
    /// Changes with every start.
    pub boot_epoch: String,
    /// Who writes to agents' terminals.
    pub terminals: Terminals,
    /// What recovery did.
    pub recovery: Vec<String>,
    /// How agents are frozen.
    pub freezer: String,
    /// Reads the configuration again.
    pub reload: Box<dyn Fn() -> Result<Vec<String>, String> + Send + Sync>,
}
