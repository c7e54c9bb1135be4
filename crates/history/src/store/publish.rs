//! Makes a snapshot a checkpoint, or the known picture.
//!
//! ```text
//! the pack moves among the others ─► the ref is linked ─► everything is flushed, side by side ─► known, and relied on
//! ```
//! Whoever fails in between takes the ref back; what the pack of such a one left is swept. Takes the writer's lock, so
//! that nobody removes packs meanwhile. Decides nothing about what a snapshot holds: that is `snapshot`'s work.

use std::fs::{self, File};
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::scan::workspace_state::Node;
use crate::snapshot::{Snapshot, WHOLE_LOOK};
use crate::tree::confined_dir::sync_dir;
use crate::tree::names::RelPath;
use fermata_failpoint as failpoint;
use fermata_os::fsync::sync_together;

/// A snapshot that has its number. Unless it is completed, the number is taken back.
pub struct Publication<'a> {
    history: &'a History,
    snapshot: &'a Snapshot,
    is_complete: bool,
    _writer: MutexGuard<'a, ()>,
}

impl Publication<'_> {
    /// Makes the snapshot's ref and the place of its pack durable, side by side with what `beside` it makes a checkpoint:
    /// before that checkpoint's row is there, nobody relies on any of them.
    ///
    /// # Errors
    /// Fails when that cannot be done; then the checkpoint does not exist.
    pub fn complete(mut self, beside: &[&File]) -> Result<()> {
        let Publication { history, snapshot, .. } = self;
        let refs = history.refs.dir();
        let packs = history.objects.pack_dir();
        let dirs = [Some(refs), snapshot.pack.as_ref().map(|_| &*packs)].into_iter().flatten();
        let failed = HistoryError::io("flush", refs);
        let dirs = dirs.map(File::open).collect::<io::Result<Vec<File>>>();
        let flushed = dirs.and_then(|dirs| {
            let all: Vec<&File> = beside.iter().copied().chain(&snapshot.named).chain(&dirs).collect();
            sync_together(&all)
        });
        flushed.map_err(failed)?;
        failpoint::hit("history.ref.created");
        self.is_complete = true;
        history.has_published(snapshot);
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
    /// Makes a snapshot the checkpoint that it was taken for.
    ///
    /// # Errors
    /// As for [`History::begin_to_publish`] and [`Publication::complete`].
    pub fn publish(&self, snapshot: &Snapshot) -> Result<()> {
        self.begin_to_publish(snapshot)?.complete(&[])
    }

    /// Gives a snapshot its number; it is a checkpoint once the publication is complete.
    ///
    /// # Errors
    /// Fails when the number is taken, when the snapshot was discarded, or when the store cannot be written; then the
    /// checkpoint does not exist, and the snapshot may be published again or discarded.
    pub fn begin_to_publish<'a>(&'a self, snapshot: &'a Snapshot) -> Result<Publication<'a>> {
        let writer = self.lock_writer();
        let number = snapshot.number;
        if !self.live().contains(&snapshot.draft.name) {
            return Err(HistoryError::SnapshotGone { number });
        }
        if self.refs.find(number)?.is_some() {
            return Err(HistoryError::NumberTaken { number });
        }
        let from = self.pending().join(&snapshot.draft.name);
        self.move_pack(snapshot)?;
        failpoint::check("history.ref.before").map_err(HistoryError::io("publish from", &from))?;
        self.refs.create(number, &from)?;
        let publication = Publication { history: self, snapshot, is_complete: false, _writer: writer };
        failpoint::check("history.ref.linked").map_err(HistoryError::io("publish from", &from))?;
        Ok(publication)
    }

    /// Makes a snapshot the known picture without making it a checkpoint, so that the next one only costs what has
    /// changed since.
    ///
    /// # Errors
    /// Fails when the snapshot was discarded, or when the store cannot be written.
    pub(crate) fn publish_base(&self, snapshot: &Snapshot) -> Result<()> {
        let _writer = self.lock_writer();
        if !self.live().contains(&snapshot.draft.name) {
            return Err(HistoryError::SnapshotGone { number: snapshot.number });
        }
        self.move_pack(snapshot)?;
        let packs = self.objects.pack_dir();
        sync_dir(&packs).map_err(HistoryError::io("flush", &packs))?;
        self.refs.set_base(snapshot.commit, &self.pending().join(&snapshot.draft.name))?;
        failpoint::hit("history.prime.based");
        self.has_published(snapshot);
        Ok(())
    }

    /// Moves a snapshot's pack among the published ones; repeatable. The caller flushes their directory.
    fn move_pack(&self, snapshot: &Snapshot) -> Result<()> {
        let Some(pack) = &snapshot.pack else { return Ok(()) };
        let (from, to) = (self.pending().join(&snapshot.draft.name), self.objects.pack_dir());
        // The index comes last: a pack counts from the instant that it has one.
        for end in ["pack", "idx"] {
            let name = format!("{pack}.{end}");
            let (source, target) = (from.join(&name), to.join(&name));
            // A publication that failed half way has moved the first already.
            if source.exists() || !target.exists() {
                fs::rename(&source, &target).map_err(HistoryError::io("move a pack to", &target))?;
            }
            failpoint::check(if snapshot.number > 0 { "history.pack.moved" } else { "history.prime.moved" })
                .map_err(HistoryError::io("move a pack to", &target))?;
        }
        self.objects.refresh()
    }

    /// Takes note of a publication. What fails here only costs the next snapshot time, or the place its tidiness.
    fn has_published(&self, snapshot: &Snapshot) {
        self.adopt(snapshot);
        let from = self.pending().join(&snapshot.draft.name);
        if let Err(error) = fs::remove_dir_all(&from) {
            tracing::warn!(%error, dir = %from.display(), "a draft stays until the next sweep");
        }
        self.live().remove(&snapshot.draft.name);
    }

    /// Makes a snapshot's picture the known one, unless a later one is.
    pub(crate) fn adopt(&self, snapshot: &Snapshot) {
        let mut known = self.lock_known();
        if known.epoch > snapshot.epoch {
            return;
        }
        known.epoch = snapshot.epoch;
        known.picture = Some(Arc::clone(&snapshot.picture));
        known.trusted = true;
        if snapshot.whole {
            known.whole_at = Some(Instant::now());
        }
        known.unsaved += if snapshot.whole { WHOLE_LOOK } else { 1 };
        // Under the same lock: a later look's watches and events must not be taken for this one's.
        let picture = &snapshot.picture;
        let is_dir = |path: &RelPath| path.is_root() || matches!(picture.root.find(path), Some(Node::Dir(_)));
        if let (Some(watch), Some(epoch)) = (&self.watch, snapshot.epoch) {
            watch.settle(epoch);
            // The kernel gives up the watches of removed directories by itself; the others cost little meanwhile.
            if snapshot.whole {
                watch.retain(epoch, is_dir);
            }
        }
        if snapshot.whole {
            self.standings.retain(is_dir);
        }
    }
}
