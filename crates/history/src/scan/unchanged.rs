//! Compares a workspace with the newest checkpoint without storing anything.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::History;
use crate::errors::Result;
use crate::progress::OnProgress;
use crate::rules::coverage::Rules;
use crate::snapshot_request::{Mapped, SnapshotRequest};

impl History {
    /// Says whether the workspace equals a checkpoint in contents, modes and times.
    ///
    /// Returns `false` if the checkpoint is not the newest one, or if a file changed at every attempt to read
    /// it.
    ///
    /// # Errors
    /// As for [`History::snapshot`].
    pub fn is_unchanged(
        &self,
        workspace: &Path,
        rules: &Rules,
        mapped: Mapped,
        number: u64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<bool> {
        if self.list()?.last() != Some(&number) {
            return Ok(false);
        }
        let (files, meta) = self.trees_of(number)?;
        let request = SnapshotRequest {
            workspace: workspace.to_owned(),
            number: number + 1,
            message: "Comparison\n".into(),
            parent: Some(number),
            rules: rules.clone(),
            mapped,
            full_scan_after: None,
        };
        // Dropping the snapshot removes all that it has written.
        let now = self.snapshot(&request, 0, progress, cancel)?;
        Ok(now.torn.is_empty() && (now.files, now.meta) == (files, meta))
    }
}
