//! Warm-up scans, and the saved workspace state.
//!
//! The first scan of a large workspace reads every file. It runs in the background after the start, and
//! again when the watcher has lost events, so that agents are not frozen meanwhile. A warm-up scan makes no
//! checkpoint.

use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::scan::state_file;
use crate::snapshot::FULL_SCAN_WEIGHT;
use crate::snapshot_request::SnapshotRequest;
use fermata_failpoint as failpoint;

/// Up to this number of changed names, a checkpoint needs no warm-up scan before it.
const FEW_NAMES: usize = 200;

/// How often a waiting warm-up scan checks whether the other one has ended or the caller has cancelled.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The result of a warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarmUp {
    /// The workspace state was recent enough.
    UpToDate,
    /// The workspace was scanned.
    Scanned {
        /// Files and symbolic links that were read.
        read: u64,
        /// All files and symbolic links.
        files: u64,
    },
}

impl History {
    /// Scans the workspace unless the watcher has reported every change since the last scan. Makes no checkpoint.
    ///
    /// # Errors
    /// As for [`History::snapshot`].
    pub fn warm_up(
        &self,
        request: &SnapshotRequest,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<WarmUp> {
        // Two concurrent warm-up scans would both read everything.
        let _guard = loop {
            match self.warming_up.try_lock() {
                Ok(guard) => break guard,
                Err(TryLockError::Poisoned(guard)) => break guard.into_inner(),
                Err(TryLockError::WouldBlock) if cancel.load(Ordering::Relaxed) => return Err(HistoryError::Cancelled),
                Err(TryLockError::WouldBlock) => std::thread::sleep(POLL_INTERVAL),
            }
        };
        if self.is_warm(request) {
            return Ok(WarmUp::UpToDate);
        }
        let scanned = self.scan(request, progress, cancel)?;
        let read = scanned.read;
        let mut snapshot = self.complete(scanned, now_ms, progress, cancel)?;
        match self.last_state() {
            // The store has an equal state under another commit, so this one need not be published.
            (Some(last), true) if snapshot.has_same_trees(&last) => {
                snapshot.take_commit_of(&last);
                self.adopt(&snapshot);
            }
            _ => self.publish_base(&snapshot)?,
        }
        if let Err(error) = self.save_state() {
            tracing::warn!(%error, "failed to save the workspace state; the next start reads all files again");
        }
        Ok(WarmUp::Scanned { read, files: snapshot.stats.files })
    }

    /// Says whether [`History::warm_up`] would do nothing.
    pub fn is_warm(&self, request: &SnapshotRequest) -> bool {
        let (last, trusted) = self.last_state();
        let Ok(real) = self.checked_workspace(&request.workspace) else { return false };
        let same_rules = last.is_some_and(|last| last.rules == request.rules && self.has_same_rules(&real, &last));
        // Without a watcher every scan compares all fingerprints: a warm-up scan would gain nothing.
        trusted
            && same_rules
            && !self.is_full_scan_due(request)
            && self.watch.as_ref().is_none_or(|watch| watch.is_complete(FEW_NAMES))
    }

    /// Says whether a full scan should be repeated, since some writes raise no event, for instance through a file that had
    /// no name when it was opened. Never true for a checkpoint, during which agents are frozen.
    pub(crate) fn is_full_scan_due(&self, request: &SnapshotRequest) -> bool {
        let past = |after| self.lock_last().full_scan_at.is_some_and(|at| at.elapsed() >= after);
        self.watch.is_some() && !request.is_checkpoint() && request.full_scan_after.is_some_and(past)
    }

    /// Saves the workspace state to the disk if it has taken in enough changes since the last time.
    ///
    /// # Errors
    /// Fails when the store cannot be written; the next daemon then reads more files than necessary.
    pub fn save_state(&self) -> Result<()> {
        if self.lock_last().unsaved < FULL_SCAN_WEIGHT {
            return Ok(());
        }
        // The pending directory comes first: while it is registered, no object that the state names is removed.
        let pending = self.start_pending(0)?;
        let (state, unsaved) = {
            let mut last = self.lock_last();
            let Some(state) = last.state.clone().filter(|_| last.trusted) else { return Ok(()) };
            (state, std::mem::take(&mut last.unsaved))
        };
        let write = || -> Result<()> {
            let file = pending.dir.join("workspace-state");
            state_file::save(&state, &file).map_err(HistoryError::io("write", &file))?;
            failpoint::check("history.state.written").map_err(HistoryError::io("write", &file))?;
            let _writer = self.lock_writer();
            // The base ref protects the objects of the state.
            self.refs.set_base(state.commit, &pending.dir)?;
            let path = self.state_path();
            failpoint::check("history.state.based").map_err(HistoryError::io("write", &path))?;
            std::fs::rename(&file, &path).map_err(HistoryError::io("write", &path))?;
            failpoint::hit("history.state.placed");
            Ok(())
        };
        write().inspect_err(|_| self.lock_last().unsaved += unsaved)
    }
}
