//! The history of one project, shared by all its operations, and the measurements of its size.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fermata_history::{History, HistoryError};
use fermata_protocol::project::ScanProgress;

use crate::operations::maintenance::consolidation_queue::ConsolidationQueue;
use crate::operations::progress::step_and_unit;

/// The sizes in bytes of files that do not change under their name.
pub(super) type Sizes = HashMap<PathBuf, u64>;

/// A scan of the workspace whose progress `status` shows until this is dropped.
pub(super) struct ScanInProgress(Arc<Mutex<Option<fermata_history::StoreProgress>>>);

impl ScanInProgress {
    pub(super) fn report(&self, progress: fermata_history::StoreProgress) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }
}

impl Drop for ScanInProgress {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The history of a project, opened at its first use. Clones share it.
#[derive(Clone, Default)]
pub struct HistoryCell {
    opened: Arc<Mutex<Option<Arc<History>>>>,
    pub(super) used_bytes: Arc<AtomicU64>,
    pub(super) sizes: Arc<Mutex<Sizes>>,
    scan: Arc<Mutex<Option<fermata_history::StoreProgress>>>,
    /// The part of `used_bytes` that only removed checkpoints needed and that is expected to be freed, bytes.
    unreclaimed: Arc<AtomicU64>,
    pub(super) consolidations: ConsolidationQueue,
}

impl HistoryCell {
    /// Returns the history; the first call opens it. Blocks.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(
        &self,
        dir: &std::path::Path,
        watcher: Option<&Arc<fermata_history::FileWatcher>>,
    ) -> Result<Arc<History>, HistoryError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(history) = &*opened {
            return Ok(Arc::clone(history));
        }
        let history = Arc::new(History::open_watched(dir, watcher)?);
        *opened = Some(Arc::clone(&history));
        Ok(history)
    }

    pub(super) fn begin_scan(&self) -> ScanInProgress {
        ScanInProgress(Arc::clone(&self.scan))
    }

    /// Returns the progress of the warm-up scan that is running.
    pub fn scan_under_way(&self) -> Option<ScanProgress> {
        let progress = *self.scan.lock().unwrap_or_else(PoisonError::into_inner);
        progress.map(|fermata_history::StoreProgress { phase, done, total }| {
            let (step, unit) = step_and_unit(phase);
            ScanProgress { step: step.to_owned(), done, total, unit: unit.to_owned() }
        })
    }

    /// Returns the disk usage of the project's checkpoints at the last measurement, bytes.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Returns the disk usage without the part that is expected to be freed, bytes.
    pub fn needed_bytes(&self) -> u64 {
        self.used_bytes().saturating_sub(self.unreclaimed_bytes())
    }

    pub(super) fn unreclaimed_bytes(&self) -> u64 {
        self.unreclaimed.load(Ordering::Relaxed)
    }

    /// Adds the size of checkpoints that are being removed to the bytes that are expected to be freed.
    pub fn unreclaimed(&self, bytes: u64) {
        self.unreclaimed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Takes bytes off those that are expected to be freed: they were freed, or turned out to be needed.
    pub fn reclaimed(&self, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(bytes));
    }

    /// Replaces the estimate `before` of the bytes to be freed by the counted `bytes`.
    pub(super) fn counted(&self, before: u64, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(before).saturating_add(bytes));
    }

    fn change_unreclaimed(&self, change: impl Fn(u64) -> u64) {
        let changed = self.unreclaimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(change(now)));
        debug_assert!(changed.is_ok(), "the closure always returns a value");
    }
}
