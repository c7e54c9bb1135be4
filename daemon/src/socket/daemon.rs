//! The daemon as the handlers of requests see it.

use std::sync::Arc;

use fermata_protocol::UnixMillis;

use super::terminals::Terminals;
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
