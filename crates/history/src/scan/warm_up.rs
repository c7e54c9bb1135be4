//! Warm-up scans, and the saved workspace state.
//!
//! The first scan of a large workspace reads every file. It runs in the background when a project starts, and
//! again when the watcher has lost events, so that agents are not frozen meanwhile. A warm-up scan makes no
//! checkpoint.

use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::scan::state_file;
use crate::snapshot::{SnapshotRequest, WHOLE_LOOK};
use fermata_failpoint as failpoint;

/// Up to this number of changed names, a checkpoint needs no warm-up scan before it.
const FEW_NAMES: usize = 200;

/// How often a waiting warm-up scan checks whether the other one has ended or the caller has cancelled.
const TURN: Duration = Duration::from_millis(2);

/// The result of a warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Primed {
    /// The workspace state was recent enough.
    Already,
    /// The workspace was scanned.
    Looked {
        /// Files and symbolic links that were read.
        read: u64,
        /// All files and symbolic links.
        files: u64,
    },
}

impl History {
    /// Scans the workspace unless the watcher has reported every change since the last scan. Makes no
    /// checkpoint.
    ///
    /// # Errors
    /// As for [`History::snapshot`].
    pub fn warm_up(
        &self,
        request: &SnapshotRequest,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Primed> {
        // Two concurrent warm-up scans would both read everything.
        let _one = loop {
            match self.priming.try_lock() {
                Ok(one) => break one,
                Err(TryLockError::Poisoned(one)) => break one.into_inner(),
                Err(TryLockError::WouldBlock) if cancel.load(Ordering::Relaxed) => return Err(HistoryError::Cancelled),
                Err(TryLockError::WouldBlock) => std::thread::sleep(TURN),
            }
        };
        if self.is_primed(request) {
            return Ok(Primed::Already);
        }
        let observed = self.observe(request, progress, cancel)?;
        let read = observed.read;
        let mut snapshot = self.complete(observed, now_ms, progress, cancel)?;
        match self.known() {
            // The store has an equal state under another commit, so this one need not be published.
            (Some(known), true) if snapshot.shows_the_same(&known) => {
                snapshot.stands_for(&known);
                self.adopt(&snapshot);
            }
            _ => self.publish_base(&snapshot)?,
        }
        if let Err(error) = self.keep() {
            tracing::warn!(%error, "failed to save the workspace state; the next start reads all files again");
        }
        Ok(Primed::Looked { read, files: snapshot.stats.files })
    }

    /// Says whether [`History::warm_up`] would do nothing.
    pub fn is_primed(&self, request: &SnapshotRequest) -> bool {
        let (picture, trusted) = self.known();
        let Ok(real) = self.checked_workspace(&request.workspace) else { return false };
        let same = picture.is_some_and(|known| known.rules == request.rules && self.is_as_before(&real, &known));
        // Without a watcher every scan compares all fingerprints: a warm-up scan would gain nothing.
        trusted
            && same
            && !self.is_overdue(request)
            && self.watch.as_ref().is_none_or(|watch| watch.is_complete(FEW_NAMES))
    }

    /// Says whether a full scan should be repeated, since some writes raise no event, for instance through a
    /// file that had no name when it was opened. Never true for a checkpoint, during which agents are frozen.
    pub(crate) fn is_overdue(&self, request: &SnapshotRequest) -> bool {
        let past = |after| self.lock_known().whole_at.is_some_and(|at| at.elapsed() >= after);
        self.watch.is_some() && !request.is_checkpoint() && request.whole_after.is_some_and(past)
    }

    /// Saves the workspace state to the disk if it has taken in enough changes since the last time.
    ///
    /// # Errors
    /// Fails when the store cannot be written; the next daemon then reads more files than necessary.
    pub fn keep(&self) -> Result<()> {
        if self.lock_known().unsaved < WHOLE_LOOK {
            return Ok(());
        }
        // The pending directory comes first: while it is registered, no object that the state names is removed.
        let draft = self.start_draft(0)?;
        let (picture, unsaved) = {
            let mut known = self.lock_known();
            let Some(picture) = known.picture.clone().filter(|_| known.trusted) else { return Ok(()) };
            (picture, std::mem::take(&mut known.unsaved))
        };
        let write = || -> Result<()> {
            let file = draft.dir.join("picture");
            state_file::save(&picture, &file).map_err(HistoryError::io("write", &file))?;
            failpoint::check("history.picture.written").map_err(HistoryError::io("write", &file))?;
            let _writer = self.lock_writer();
            // The base ref protects the objects of the state.
            self.refs.set_base(picture.commit, &draft.dir)?;
            let place = self.cache_path();
            failpoint::check("history.picture.based").map_err(HistoryError::io("write", &place))?;
            std::fs::rename(&file, &place).map_err(HistoryError::io("write", &place))?;
            failpoint::hit("history.picture.placed");
            Ok(())
        };
        write().inspect_err(|_| self.lock_known().unsaved += unsaved)
    }
}
