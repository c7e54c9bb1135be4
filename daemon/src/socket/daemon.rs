//! The state of the daemon that the handlers use.

use std::sync::Arc;

use fermata_protocol::UnixMillis;

use super::terminals::Terminals;
use crate::project::Projects;

/// Shared by all connections.
pub struct Daemon {
    /// The projects, and through them the services.
    pub projects: Arc<Projects>,
    pub started_at: UnixMillis,
    /// Differs for every start of the daemon.
    pub boot_epoch: String,
    pub terminals: Terminals,
    /// The report of the recovery, in lines for the user.
    pub recovery: Vec<String>,
    /// The mechanism that freezes agents, described for the user.
    pub freezer: String,
    /// Reads the configuration again; returns the sections that changed, or why it cannot be used.
    pub reload: Box<dyn Fn() -> Result<Vec<String>, String> + Send + Sync>,
}
