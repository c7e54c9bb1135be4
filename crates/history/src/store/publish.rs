//! Publishes a snapshot as a checkpoint, or as the base of the workspace state.
//!
//! ```text
//! move the pack to the others ─► link the ref ─► flush everything in parallel ─► take over the workspace state
//! ```
//!
//! If a step fails, the ref is removed again; the sweep removes a pack that is then unneeded. The writer lock
//! is held, so that no pack is removed meanwhile. What a snapshot contains is decided in `snapshot`.

use std::fs::{self, File};
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::scan::workspace_state::Node;
use crate::snapshot::{FULL_SCAN_WEIGHT, Snapshot};
use crate::tree::confined_dir::sync_dir;
use crate::tree::names::RelPath;
use fermata_failpoint as failpoint;
use fermata_os::fsync::sync_together;

/// A snapshot whose ref exists but is not durable yet. Dropping it without [`Publication::complete`] removes
/// the ref.
pub struct Publication<'a> {
    history: &'a History,
    snapshot: &'a Snapshot,
    is_complete: bool,
    _writer: MutexGuard<'a, ()>,
}

impl Publication<'_> {
    /// Makes the ref and the moved pack durable, in parallel with the files `beside`. Until the row of the
    /// checkpoint exists, nothing relies on any of them.
    ///
    /// # Errors
    /// Fails when a flush does; the checkpoint then does not exist.
    pub fn complete(mut self, beside: &[&File]) -> Result<()> {
        let Publication { history, snapshot, .. } = self;
        let refs = history.refs.dir();
        let packs = history.objects.pack_dir();
        let dirs = [Some(refs), snapshot.pack.as_ref().map(|_| &*packs)].into_iter().flatten();
        let failed = HistoryError::io("flush", refs);
        let dirs = dirs.map(File::open).collect::<io::Result<Vec<File>>>();
        let flushed = dirs.and_then(|dirs| {
            let all: Vec<&File> = beside.iter().copied().chain(&snapshot.staged_ref).chain(&dirs).collect();
            sync_together(&all)
        });
        flushed.map_err(failed)?;
        failpoint::hit("history.ref.created");
        self.is_complete = true;
        history.after_publication(snapshot);
        Ok(())
    }
}

impl Drop for Publication<'_> {
    fn drop(&mut self) {
        if !self.is_complete {
            self.history.refs.take_back(self.snapshot.number);
        }
    }
}

impl History {
    /// Publishes a snapshot as the checkpoint that it was taken for.
    ///
    /// # Errors
    /// As for [`History::begin_to_publish`] and [`Publication::complete`].
    pub fn publish(&self, snapshot: &Snapshot) -> Result<()> {
        self.begin_to_publish(snapshot)?.complete(&[])
    }

    /// Moves the pack of a snapshot and creates its ref. The checkpoint exists once the publication is
    /// complete.
    ///
    /// # Errors
    /// Fails when the number is taken, when the snapshot was discarded, or when the store cannot be written.
    /// The checkpoint then does not exist, and the snapshot may be published again or discarded.
    pub fn begin_to_publish<'a>(&'a self, snapshot: &'a Snapshot) -> Result<Publication<'a>> {
        let writer = self.lock_writer();
        let number = snapshot.number;
        if !self.live().contains(&snapshot.pending.name) {
            return Err(HistoryError::SnapshotGone { number });
        }
        if self.refs.find(number)?.is_some() {
            return Err(HistoryError::NumberTaken { number });
        }
        let from = self.pending().join(&snapshot.pending.name);
        self.move_pack(snapshot)?;
        failpoint::check("history.ref.before").map_err(HistoryError::io("publish from", &from))?;
        self.refs.create(number, &from)?;
        let publication = Publication { history: self, snapshot, is_complete: false, _writer: writer };
        failpoint::check("history.ref.linked").map_err(HistoryError::io("publish from", &from))?;
        Ok(publication)
    }

    /// Publishes a warm-up scan: the next snapshot builds on its workspace state, but it becomes no checkpoint.
    ///
    /// # Errors
    /// Fails when the snapshot was discarded, or when the store cannot be written.
    pub(crate) fn publish_base(&self, snapshot: &Snapshot) -> Result<()> {
        let _writer = self.lock_writer();
        if !self.live().contains(&snapshot.pending.name) {
            return Err(HistoryError::SnapshotGone { number: snapshot.number });
        }
        self.move_pack(snapshot)?;
        let packs = self.objects.pack_dir();
        sync_dir(&packs).map_err(HistoryError::io("flush", &packs))?;
        self.refs.set_base(snapshot.commit, &self.pending().join(&snapshot.pending.name))?;
        failpoint::hit("history.warm_up.based");
        self.after_publication(snapshot);
        Ok(())
    }

    /// Moves a snapshot's pack to the published ones; may be repeated. The caller flushes their directory.
    fn move_pack(&self, snapshot: &Snapshot) -> Result<()> {
        let Some(pack) = &snapshot.pack else { return Ok(()) };
        let (from, to) = (self.pending().join(&snapshot.pending.name), self.objects.pack_dir());
        // The index is moved last, since a pack is visible once it has an index.
        for end in ["pack", "idx"] {
            let name = format!("{pack}.{end}");
            let (source, target) = (from.join(&name), to.join(&name));
            // A failed publication may have moved the first file already.
            if source.exists() || !target.exists() {
                fs::rename(&source, &target).map_err(HistoryError::io("move a pack to", &target))?;
            }
            failpoint::check(if snapshot.number > 0 { "history.pack.moved" } else { "history.warm_up.moved" })
                .map_err(HistoryError::io("move a pack to", &target))?;
        }
        self.objects.refresh()
    }

    /// Takes over the state of a published snapshot and removes its directory. A failure here is logged only,
    /// since the sweep removes the directory.
    fn after_publication(&self, snapshot: &Snapshot) {
        self.adopt(snapshot);
        let from = self.pending().join(&snapshot.pending.name);
        if let Err(error) = fs::remove_dir_all(&from) {
            let dir = from.display();
            tracing::warn!(%error, %dir, "failed to remove the directory of a snapshot; the next sweep does so");
        }
        self.live().remove(&snapshot.pending.name);
    }

    /// Replaces the workspace state by that of a snapshot, unless it is older.
    pub(crate) fn adopt(&self, snapshot: &Snapshot) {
        let mut last = self.lock_last();
        if last.epoch > snapshot.epoch {
            return;
        }
        last.epoch = snapshot.epoch;
        last.state = Some(Arc::clone(&snapshot.state));
        last.trusted = true;
        if snapshot.full {
            last.full_scan_at = Some(Instant::now());
        }
        last.unsaved += if snapshot.full { FULL_SCAN_WEIGHT } else { 1 };
        // Under the same lock, so that watches and events of a later scan are not dropped.
        let state = &snapshot.state;
        let is_dir = |path: &RelPath| path.is_root() || matches!(state.root.find(path), Some(Node::Dir(_)));
        if let (Some(watch), Some(epoch)) = (&self.watch, snapshot.epoch) {
            watch.settle(epoch);
            // The kernel ends the watches of removed directories itself; other unneeded ones wait for a full
            // scan.
            if snapshot.full {
                watch.retain(epoch, is_dir);
            }
        }
        if snapshot.full {
            self.rule_cache.retain(is_dir);
        }
    }
}
