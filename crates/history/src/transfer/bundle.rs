//! Exports the objects of one checkpoint as a self-contained pack, and imports such a pack.
//!
//! An imported pack is not trusted: the checksums of pack and index are verified, every object is hashed, and
//! all objects that the commit needs must exist and describe a workspace with safe names. Only then is it
//! published like any other checkpoint.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::store::objects::ObjectStore;
use crate::store::oid::Oid;
use crate::store::pack_entry::bad;
use crate::store::pack_index::PackIndex;
use crate::store::pack_reader::PackReader;
use crate::store::pending::PendingSnapshot;
use crate::store::reachability::Reachability;
use crate::store::repack::{Repack, RepackEffort, verify_object_at};
use crate::transfer::import_validation::{MAX_IN_MEMORY, validate_import};
use crate::tree::confined_dir::sync_dir;
use crate::verify::{CheckedObjects, check_described};
use fermata_failpoint as failpoint;

/// The objects of a checkpoint as one pack. Dropping this removes the files.
#[derive(Debug)]
pub struct Exported {
    pub commit: Oid,
    pub pack: PathBuf,
    pub index: PathBuf,
    _pending: PendingSnapshot,
}

/// An imported pack that is not published. Dropping this removes it.
#[derive(Debug)]
pub struct IncomingPack {
    number: u64,
    pending: PendingSnapshot,
}

impl IncomingPack {
    /// Returns the path to which the caller writes the pack.
    pub fn pack(&self) -> PathBuf {
        self.pending.dir.join("objects/pack/incoming.pack")
    }

    /// Returns the path to which the caller writes the index.
    pub fn index(&self) -> PathBuf {
        self.pending.dir.join("objects/pack/incoming.idx")
    }
}

impl History {
    /// Writes all objects of a checkpoint as one pack, without compressing them again.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint, when an object is damaged, when the disk is full, or when
    /// cancelled.
    pub fn export(&self, number: u64, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Exported> {
        let pending = self.start_pending(number)?;
        let commit = self.refs.get(number)?;
        let needed = Reachability::of(&self.objects, &[commit], &[], cancel)?;
        let indexes = self.objects.indexes();
        let open = |index| self.objects.reader(index);
        let packs = indexes.iter().filter(|index| index.ids().any(|oid| needed.contains(&oid)));
        let packs: io::Result<Vec<PackReader>> = packs.map(open).collect();
        let packs = packs.map_err(HistoryError::io("open the packs of", &self.repository))?;
        let plan = Repack::plan(&needed, packs, RepackEffort::Fast, |pack, oid| self.objects.is_replaced(pack, oid))?;
        // Git may have been run in the store and have left objects outside of packs.
        if plan.objects() != needed.nodes().len() {
            let packed = |oid: &Oid| self.objects.has(oid);
            let missing = needed.nodes().iter().find(|node| !packed(&node.oid));
            return Err(HistoryError::MissingObject { oid: missing.map_or(commit, |node| node.oid) });
        }
        let (finished, _) = plan.write(&pending.dir, progress, cancel)?;
        let file = |end: &str| pending.dir.join(format!("{}.{end}", finished.name));
        Ok(Exported { commit, pack: file("pack"), index: file("idx"), _pending: pending })
    }

    /// Begins an import. The caller writes pack and index to [`IncomingPack::pack`] and
    /// [`IncomingPack::index`].
    ///
    /// # Errors
    /// Fails when the store cannot be written.
    pub fn receive(&self, number: u64) -> Result<IncomingPack> {
        let pending = self.start_pending(number)?;
        let dir = pending.dir.join("objects/pack");
        fs::create_dir_all(&dir).map_err(HistoryError::io("create", &dir))?;
        Ok(IncomingPack { number, pending })
    }

    /// Verifies an imported pack completely.
    ///
    /// # Errors
    /// Fails when anything is damaged, missing or unsafe, or when cancelled. Nothing is published.
    pub fn check_received(
        &self,
        incoming: &IncomingPack,
        commit: Oid,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let objects = incoming.pending.dir.join("objects");
        let dir = objects.join("pack");
        let name = settle(incoming).map_err(HistoryError::io("read the pack in", &dir))?;
        let failed = |error: io::Error| HistoryError::io("check the pack in", &dir)(error);
        let index = PackIndex::load(&dir, &name).map_err(failed)?;
        let pack = PackReader::open(&dir, Arc::new(index)).map_err(failed)?.limited(MAX_IN_MEMORY);
        pack.check(|| cancel.load(Ordering::Relaxed)).map_err(failed)?;
        let store = ObjectStore::open(&objects)?.limited(MAX_IN_MEMORY);
        let needed = Reachability::of(&store, &[commit], &[], cancel)?;
        // The index must not name other objects: they would not be hashed, and the store would trust them.
        if pack.index.count() != needed.nodes().len() {
            return Err(failed(bad("it contains objects that the checkpoint does not need".to_owned())));
        }
        pack.check_entries(|| cancel.load(Ordering::Relaxed)).map_err(failed)?;
        let cache = crate::store::pack_reader::ContentCache::default();
        let total = needed.nodes().len() as u64;
        for (done, node) in needed.nodes().iter().enumerate() {
            if cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            let at = pack.index.find(&node.oid).ok_or(HistoryError::MissingObject { oid: node.oid })?;
            verify_object_at(&pack, at, node.kind, &node.oid, &cache).map_err(failed)?;
            if done % 256 == 0 {
                progress(StoreProgress { phase: StorePhase::Verify, done: done as u64, total });
            }
        }
        validate_import(&store, &commit, cancel)?;
        check_described(&store, &commit, &mut CheckedObjects::default(), cancel)
    }

    /// Publishes a verified import as the checkpoint that it was received for.
    ///
    /// # Errors
    /// Fails when the number is taken or when the store cannot be written. The checkpoint then does not exist.
    pub fn publish_received(&self, incoming: &IncomingPack, commit: Oid) -> Result<()> {
        let _writer = self.lock_writer();
        let number = incoming.number;
        if self.refs.find(number)?.is_some() {
            return Err(HistoryError::NumberTaken { number });
        }
        let from = incoming.pending.dir.join("objects/pack");
        let name = settle(incoming).map_err(HistoryError::io("read the pack in", &from))?;
        self.install(&from, &name, || failpoint::check("history.import.moved"))?;
        let staged_ref = self.refs.stage(commit, &incoming.pending.dir)?;
        staged_ref.sync_all().map_err(HistoryError::io("flush a ref in", &incoming.pending.dir))?;
        self.refs.create(number, &incoming.pending.dir)?;
        let refs = self.refs.dir();
        sync_dir(refs).map_err(HistoryError::io("flush", refs)).inspect_err(|_| self.refs.take_back(number))?;
        failpoint::hit("history.import.published");
        Ok(())
    }

    /// Moves a complete and flushed pack to the published ones; `moved` is called after each of the two files.
    pub(crate) fn install(&self, from: &Path, name: &str, moved: impl Fn() -> io::Result<()>) -> Result<()> {
        let to = self.objects.pack_dir();
        // Packs with equal names are equal. A valid index stays, since it was made here.
        let stays = PackIndex::load(&to, name).is_ok_and(|index| index.check().is_ok());
        // The index is moved last, since a pack is visible once it has an index.
        for end in ["pack", "idx"] {
            let target = to.join(format!("{name}.{end}"));
            if !(stays && end == "idx") {
                fs::rename(from.join(format!("{name}.{end}")), &target)
                    .map_err(HistoryError::io("move a pack to", &target))?;
            }
            moved().map_err(HistoryError::io("move a pack to", &target))?;
        }
        sync_dir(&to).map_err(HistoryError::io("flush", &to))?;
        self.objects.refresh()
    }
}

/// Renames pack and index after the checksum of the pack, flushes them, and returns the name.
fn settle(incoming: &IncomingPack) -> io::Result<String> {
    let dir = incoming.pending.dir.join("objects/pack");
    for entry in fs::read_dir(&dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".pack").filter(|name| name.starts_with("pack-")) {
            return Ok(name.to_owned());
        }
    }
    let mut pack = File::open(incoming.pack())?;
    if pack.metadata()?.len() < 32 {
        return Err(bad("the pack is too short".to_owned()));
    }
    let mut checksum = [0; 20];
    pack.seek(SeekFrom::End(-20))?;
    pack.read_exact(&mut checksum)?;
    pack.sync_all()?;
    File::open(incoming.index())?.sync_all()?;
    let name = format!("pack-{}", Oid::from_raw(checksum));
    fs::rename(incoming.index(), dir.join(format!("{name}.idx")))?;
    fs::rename(incoming.pack(), dir.join(format!("{name}.pack")))?;
    sync_dir(&dir)?;
    Ok(name)
}
