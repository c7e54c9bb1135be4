//! The directories of snapshots that are not published, below `pending/`.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The names of the pending snapshots that this process holds.
pub(crate) type LiveSnapshots = Arc<Mutex<HashSet<String>>>;

/// The directory of a snapshot that is not published. Dropping it removes the directory.
#[derive(Debug)]
pub(crate) struct PendingSnapshot {
    pub dir: PathBuf,
    /// The name of the directory below `pending/`.
    pub(crate) name: String,
    /// Where the name is registered.
    pub(crate) live: LiveSnapshots,
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            let dir = self.dir.display();
            tracing::warn!(%error, %dir, "failed to remove the directory of a snapshot; the next sweep does so");
        }
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}
