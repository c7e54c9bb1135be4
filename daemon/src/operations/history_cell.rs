//! The history of one project, shared by all its operations, and what is measured of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fermata_history::{History, HistoryError};
use fermata_protocol::project::ScanProgress;

use crate::operations::maintenance::consolidation_queue::ConsolidationQueue;
use crate::operations::progress::words;

/// The sizes of files that do not change under their name, bytes.
pub(super) type Sizes = HashMap<PathBuf, u64>;

/// A look at a workspace that is told of, until it ends.
pub(super) struct ScanInProgress(Arc<Mutex<Option<fermata_history::Progress>>>);

impl ScanInProgress {
    pub(super) fn tell(&self, progress: fermata_history::Progress) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }
}

impl Drop for ScanInProgress {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The history of a project, opened when it is first needed.
#[derive(Clone, Default)]
pub struct HistoryCell {
    opened: Arc<Mutex<Option<Arc<History>>>>,
    pub(super) used_bytes: Arc<AtomicU64>,
    pub(super) sizes: Arc<Mutex<Sizes>>,
    looking: Arc<Mutex<Option<fermata_history::Progress>>>,
    /// How much of these is taken to come back: checkpoints were removed, and nobody needs it any more.
    unreclaimed: Arc<AtomicU64>,
    pub(super) consolidations: ConsolidationQueue,
}

impl HistoryCell {
    /// Returns the history, opened.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(
        &self,
        dir: &std::path::Path,
        watcher: Option<&Arc<fermata_history::Watcher>>,
    ) -> Result<Arc<History>, HistoryError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(history) = &*opened {
            return Ok(Arc::clone(history));
        }
        let history = Arc::new(History::open_watched(dir, watcher)?);
        *opened = Some(Arc::clone(&history));
        Ok(history)
    }

    /// Begins to tell of a look at the workspace.
    pub(super) fn begin_scan(&self) -> ScanInProgress {
        ScanInProgress(Arc::clone(&self.looking))
    }

    /// Returns how far a look at the workspace has come that is under way while agents run.
    pub fn scan_under_way(&self) -> Option<ScanProgress> {
        let progress = *self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        progress.map(|fermata_history::Progress { phase, done, total }| {
            let (step, unit) = words(phase);
            ScanProgress { step: step.to_owned(), done, total, unit: unit.to_owned() }
        })
    }

    /// Returns what the project's checkpoints took on disk when they were measured last, bytes.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Returns what they take without what is to be given back, bytes.
    pub fn needed_bytes(&self) -> u64 {
        self.used_bytes().saturating_sub(self.unreclaimed_bytes())
    }

    pub(super) fn unreclaimed_bytes(&self) -> u64 {
        self.unreclaimed.load(Ordering::Relaxed)
    }

    /// Notes that checkpoints go which had added so many bytes.
    pub fn unreclaimed(&self, bytes: u64) {
        self.unreclaimed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes that so many bytes of these are given back, or stay after all.
    pub fn reclaimed(&self, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(bytes));
    }

    /// Notes what nobody needs as it was counted, in the place of what was taken for it before.
    pub(super) fn counted(&self, before: u64, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(before).saturating_add(bytes));
    }

    fn change_unreclaimed(&self, change: impl Fn(u64) -> u64) {
        let changed = self.unreclaimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(change(now)));
        debug_assert!(changed.is_ok(), "there is always a value");
    }
}
