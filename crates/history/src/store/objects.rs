//! Finds and reads objects in the store's packs.
//!
//! The indexes are kept in memory, so that finding an object costs a binary search per pack and no system call.
//! Complete objects are streamed, so that a large file is never in memory at once; deltas (of consolidated
//! packs) are applied in memory. Objects that no pack has are read with libgit2 from the same directory,
//! without any git configuration, in case a user has run git in the store.

use std::collections::{HashSet, VecDeque};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use crate::errors::{HistoryError, Result};
use crate::store::damaged_objects::DamagedObjects;
use crate::store::oid::{ObjectKind, Oid};
use crate::store::pack_entry::Stored;
use crate::store::pack_index::PackIndex;
use crate::store::pack_reader::{ContentCache, ObjectContent, PackReader};

const OPEN_PACKS: usize = 16;
/// How often a reader retries after packs were replaced.
const PATIENCE: usize = 4;

pub struct ObjectStore {
    objects: PathBuf,
    /// The modification time of the directory of packs when it was last listed; locked while it is listed.
    listed: Mutex<Option<SystemTime>>,
    packs: RwLock<Vec<Arc<PackIndex>>>,
    open: Mutex<VecDeque<PackReader>>,
    cache: ContentCache,
    /// The largest object that is read into memory, in bytes.
    limit: u64,
    /// Locked after `packs` if both are.
    damaged: RwLock<DamagedObjects>,
}

/// An object whose content is read as a stream.
pub struct ObjectReader {
    pub kind: ObjectKind,
    pub size: u64,
    content: Box<dyn Read + Send>,
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.content.read(buffer)
    }
}

impl ObjectReader {
    fn of((kind, content): ObjectContent) -> ObjectReader {
        ObjectReader { kind, size: content.len() as u64, content: Box::new(io::Cursor::new(content)) }
    }
}

impl ObjectStore {
    /// # Errors
    /// Fails when the directory cannot be read. A damaged index only hides its own objects.
    pub fn open(objects: &Path) -> Result<ObjectStore> {
        let store = ObjectStore {
            objects: objects.to_owned(),
            listed: Mutex::default(),
            packs: RwLock::new(Vec::new()),
            open: Mutex::new(VecDeque::new()),
            cache: ContentCache::default(),
            limit: u64::MAX,
            damaged: RwLock::new(DamagedObjects::load(objects.parent().unwrap_or(objects))),
        };
        store.refresh()?;
        Ok(store)
    }

    /// Limits objects in memory to `limit` bytes and never uses libgit2: for packs from untrusted sources.
    #[must_use]
    pub(crate) fn limited(self, limit: u64) -> ObjectStore {
        ObjectStore { limit, ..self }
    }

    /// Returns the directory of the packs.
    pub fn pack_dir(&self) -> PathBuf {
        self.objects.join("pack")
    }

    /// Reads the list of packs again.
    pub fn refresh(&self) -> Result<()> {
        // Concurrent calls take turns: an older list must not replace a newer one.
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        *listed = None;
        let time = self.changed();
        self.list()?;
        *listed = time;
        Ok(())
    }

    /// Calls [`ObjectStore::refresh`] if the directory has changed; otherwise costs one system call.
    pub(crate) fn refresh_if_changed(&self) -> Result<()> {
        let listed = *self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if listed.is_some() && listed == self.changed() { Ok(()) } else { self.refresh() }
    }

    fn changed(&self) -> Option<SystemTime> {
        std::fs::metadata(self.pack_dir()).and_then(|meta| meta.modified()).ok()
    }

    fn list(&self) -> Result<()> {
        let dir = self.pack_dir();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(HistoryError::io("list", &dir))? {
            let name = entry.map_err(HistoryError::io("list", &dir))?.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".idx")) {
                names.push(name.to_owned());
            }
        }
        let loaded = self.indexes();
        let mut packs = Vec::with_capacity(names.len());
        for name in names {
            match loaded.iter().find(|pack| pack.name == name) {
                Some(pack) => packs.push(Arc::clone(pack)),
                None => match PackIndex::load(&dir, &name) {
                    Ok(pack) => packs.push(Arc::new(pack)),
                    Err(error) => {
                        tracing::warn!(%name, %error, "a pack of the checkpoint store is unreadable")
                    }
                },
            }
        }
        *self.packs.write().unwrap_or_else(PoisonError::into_inner) = packs;
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Empties the cache of objects.
    pub fn free_cache(&self) {
        self.cache.clear();
    }

    pub(crate) fn indexes(&self) -> Vec<Arc<PackIndex>> {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn damaged_objects(&self) -> RwLockReadGuard<'_, DamagedObjects> {
        self.damaged.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds an object, preferring copies that are not known to be damaged.
    fn find(&self, oid: &Oid) -> Option<(Arc<PackIndex>, u64)> {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let damaged = self.damaged_objects();
        let mut copies = packs.iter().filter_map(|pack| pack.find(oid).map(|offset| (pack, offset)));
        let first = copies.next()?;
        let good = |(pack, _): &(&Arc<PackIndex>, u64)| !damaged.is_bad(oid, &pack.name);
        let (pack, offset) = if good(&first) { first } else { copies.find(good).unwrap_or(first) };
        Some((Arc::clone(pack), offset))
    }

    /// Says whether a published pack has a copy of the object that is not known to be damaged.
    pub fn contains(&self, oid: &Oid) -> bool {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let damaged = self.damaged_objects();
        packs.iter().any(|pack| pack.position(oid).is_some() && !damaged.is_bad(oid, &pack.name))
    }

    /// Says whether a published pack has a copy of the object, damaged or not.
    pub(crate) fn has(&self, oid: &Oid) -> bool {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).iter().any(|pack| pack.position(oid).is_some())
    }

    /// Marks the copies in which these objects are found now as damaged.
    pub(crate) fn mark_damaged(&self, ids: &[Oid]) {
        let found: Vec<_> = ids.iter().filter_map(|oid| Some((*oid, self.pack_of(oid)?))).collect();
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let mut damaged = self.damaged.write().unwrap_or_else(PoisonError::into_inner);
        damaged.retain(|name| packs.iter().any(|pack| pack.name == name));
        found.into_iter().for_each(|(oid, pack)| damaged.add(oid, pack));
        if let Err(error) = damaged.save() {
            tracing::warn!(%error, "failed to save the list of damaged objects; it is lost when the daemon ends");
        }
    }

    /// Says whether every existing object has a copy that is not known to be damaged.
    pub(crate) fn is_sound(&self) -> bool {
        let bad: Vec<Oid> = self.damaged_objects().all().map(|(oid, _)| *oid).collect();
        bad.iter().all(|oid| self.contains(oid) || !self.has(oid))
    }

    /// Says whether the copy of an object in a pack is damaged and another copy is not.
    pub(crate) fn is_replaced(&self, pack: &str, oid: &Oid) -> bool {
        // A separate statement, so that the lock is released before the lookup.
        let bad = self.damaged_objects().is_bad(oid, pack);
        bad && self.contains(oid)
    }

    /// Lists the packs with damaged copies, except those that have the only copy of a `needed` object.
    pub(crate) fn packs_to_repair(&self, needed: impl Fn(&Oid) -> bool) -> HashSet<String> {
        if self.damaged_objects().is_empty() {
            return HashSet::new();
        }
        let bad: Vec<(Oid, String)> = self.damaged_objects().all().map(|(oid, pack)| (*oid, pack.to_owned())).collect();
        let (good, lost): (Vec<_>, Vec<_>) = bad.into_iter().partition(|(oid, _)| self.contains(oid) || !needed(oid));
        let mut packs: HashSet<String> = good.into_iter().map(|(_, pack)| pack).collect();
        packs.retain(|name| self.has_pack(name));
        packs.retain(|name| lost.iter().all(|(_, pack)| pack != name));
        packs
    }

    /// Returns the name of the pack in which an object is found.
    pub(crate) fn pack_of(&self, oid: &Oid) -> Option<String> {
        self.find(oid).map(|(pack, _)| pack.name.clone())
    }

    pub(crate) fn has_pack(&self, name: &str) -> bool {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).iter().any(|pack| pack.name == name)
    }

    /// Says whether a pack other than `without` has a copy of the object that is not known to be damaged.
    pub(crate) fn contains_outside(&self, oid: &Oid, without: &HashSet<String>) -> bool {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let damaged = self.damaged_objects();
        packs.iter().any(|pack| {
            !without.contains(&pack.name) && pack.position(oid).is_some() && !damaged.is_bad(oid, &pack.name)
        })
    }

    /// Opens the pack of an index, or returns it if it is already open.
    pub(crate) fn reader(&self, index: &Arc<PackIndex>) -> io::Result<PackReader> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = open.iter().find(|reader| reader.index.serial == index.serial) {
            return Ok(reader.clone());
        }
        let reader = PackReader::open(&self.pack_dir(), Arc::clone(index))?.limited(self.limit);
        if open.len() >= OPEN_PACKS {
            open.pop_front();
        }
        open.push_back(reader.clone());
        Ok(reader)
    }

    /// Finds and opens the pack of an object; `None` if no pack has it.
    fn locate(&self, oid: &Oid) -> Result<Option<(PackReader, u64)>> {
        for _ in 0..PATIENCE {
            let Some((pack, offset)) = self.find(oid) else {
                return Ok(None);
            };
            match self.reader(&pack) {
                Ok(reader) => return Ok(Some((reader, offset))),
                // A consolidation has moved the object to another pack.
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.refresh()?,
                Err(error) => {
                    let problem = format!("its pack is unreadable: {error}");
                    return Err(HistoryError::DamagedObject { oid: *oid, problem });
                }
            }
        }
        Ok(None)
    }

    /// # Errors
    /// Fails when the object is missing or its pack cannot be read.
    pub fn open_object(&self, oid: &Oid) -> Result<ObjectReader> {
        let damaged = |error: io::Error| HistoryError::DamagedObject { oid: *oid, problem: error.to_string() };
        let Some((reader, at)) = self.locate(oid)? else {
            return self.read_with_libgit2(oid);
        };
        let header = reader.header(at).map_err(damaged)?;
        match header.stored {
            Stored::Complete(kind) => {
                Ok(ObjectReader { kind, size: header.size, content: Box::new(reader.inflate(at, &header)) })
            }
            Stored::DeltaAt(_) | Stored::DeltaTo(_) => {
                reader.resolve(at, &self.cache).map(ObjectReader::of).map_err(damaged)
            }
        }
    }

    fn read_with_libgit2(&self, oid: &Oid) -> Result<ObjectReader> {
        let missing = HistoryError::MissingObject { oid: *oid };
        let Some(path) = self.objects.to_str().filter(|_| self.limit == u64::MAX) else {
            return Err(missing);
        };
        let read = || -> std::result::Result<Option<(git2::ObjectType, Vec<u8>)>, git2::Error> {
            let odb = git2::Odb::new()?;
            odb.add_disk_alternate(path)?;
            let id = git2::Oid::from_bytes(oid.raw())?;
            if !odb.exists(id) {
                return Ok(None);
            }
            let object = odb.read(id)?;
            Ok(Some((object.kind(), object.data().to_vec())))
        };
        let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
        let (kind, content) = read().map_err(|error| damaged(error.to_string()))?.ok_or(missing)?;
        let kind = match kind {
            git2::ObjectType::Commit => ObjectKind::Commit,
            git2::ObjectType::Tree => ObjectKind::Tree,
            git2::ObjectType::Blob => ObjectKind::Blob,
            other @ (git2::ObjectType::Any | git2::ObjectType::Tag) => {
                return Err(damaged(format!("it has the unexpected kind {other}")));
            }
        };
        Ok(ObjectReader::of((kind, content.into())))
    }

    /// Reads an object of known kind into memory: a tree, a commit or metadata.
    pub fn read(&self, oid: &Oid, kind: ObjectKind) -> Result<Vec<u8>> {
        self.read_shared(oid, kind).map(|content| content.to_vec())
    }

    /// As [`ObjectStore::read`], but shares the content with the cache.
    pub(crate) fn read_shared(&self, oid: &Oid, kind: ObjectKind) -> Result<Arc<[u8]>> {
        let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
        let (found, content) = match self.locate(oid)? {
            Some((reader, at)) => reader.resolve(at, &self.cache).map_err(|error| damaged(error.to_string()))?,
            None => {
                let mut object = self.read_with_libgit2(oid)?;
                let mut content = Vec::new();
                object.read_to_end(&mut content).map_err(|error| damaged(error.to_string()))?;
                (object.kind, content.into())
            }
        };
        if found != kind {
            return Err(damaged(format!("expected a {}, found a {}", kind.word(), found.word())));
        }
        Ok(content)
    }
}
