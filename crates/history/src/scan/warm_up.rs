//! Gets to know a workspace before a checkpoint needs it, and keeps what is known over a restart.
//!
//! The first look at a large workspace reads every file. It is taken in the background when a project starts, and again
//! where the watcher has lost track, always before agents are made to stand still. Nothing here makes a checkpoint.

use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::scan::state_file;
use crate::snapshot::{SnapshotRequest, WHOLE_LOOK};
use fermata_failpoint as failpoint;

/// Up to so many changed names, agents stand still no longer than they would for one.
const FEW_NAMES: usize = 200;

/// How often whoever waits for another's look asks whether it is over, or whether to give up.
const TURN: Duration = Duration::from_millis(2);

/// What priming did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Primed {
    /// The workspace was known well enough.
    Already,
    /// It was looked at.
    Looked {
        /// Files and links that were read.
        read: u64,
        /// Files and links in all.
        files: u64,
    },
}

impl History {
    /// Looks at the workspace, unless the watcher knows of every change since the last look. Not a checkpoint.
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
        // Two at once would both read everything.
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
            // The store has all of it under another commit: this one would only be in the way.
            (Some(known), true) if snapshot.shows_the_same(&known) => {
                snapshot.stands_for(&known);
                self.adopt(&snapshot);
            }
            _ => self.publish_base(&snapshot)?,
        }
        if let Err(error) = self.keep() {
            tracing::warn!(%error, "what is known of the workspace could not be kept");
        }
        Ok(Primed::Looked { read, files: snapshot.stats.files })
    }

    /// Says whether [`History::warm_up`] would have nothing to do.
    pub fn is_primed(&self, request: &SnapshotRequest) -> bool {
        let (picture, trusted) = self.known();
        let Ok(real) = self.checked_workspace(&request.workspace) else { return false };
        let same = picture.is_some_and(|known| known.rules == request.rules && self.is_as_before(&real, &known));
        // Without a watcher, every look compares all states: there is nothing more to know beforehand.
        trusted
            && same
            && !self.is_overdue(request)
            && self.watch.as_ref().is_none_or(|watch| watch.is_complete(FEW_NAMES))
    }

    /// Says whether it is time to look at everything again: some writes raise no event, for instance through a file that
    /// had no name when it was opened. Never while agents stand still.
    pub(crate) fn is_overdue(&self, request: &SnapshotRequest) -> bool {
        let past = |after| self.lock_known().whole_at.is_some_and(|at| at.elapsed() >= after);
        self.watch.is_some() && !request.is_checkpoint() && request.whole_after.is_some_and(past)
    }

    /// Writes the known picture to the disk, where enough has been learnt since the last time.
    ///
    /// # Errors
    /// Fails when the store cannot be written; then the next daemon reads more files than it needs.
    pub fn keep(&self) -> Result<()> {
        if self.lock_known().unsaved < WHOLE_LOOK {
            return Ok(());
        }
        // The draft first: while it lasts, nothing goes that the picture relies on.
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
            // The picture's objects stay for as long as the base names its commit.
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
