//! Reads objects from the store's packs.
//!
//! The indexes are kept in memory, so that asking for an object costs a binary search per pack and no system call.
//! Whole objects stream out of their pack, so that a large file never stands in memory. What was stored as a delta
//! (consolidated packs) or loose is read through the git library, from the same directory and without any
//! configuration of anybody's.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use flate2::bufread::ZlibDecoder;

use super::errors::{HistoryError, Result};
use super::oid::{ObjectKind, Oid};

const OPEN_PACKS: usize = 16;
const FANOUT: usize = 8;
const IDS: usize = FANOUT + 256 * 4;

struct PackIndex {
    name: String,
    bytes: Vec<u8>,
    count: usize,
}

impl PackIndex {
    fn load(dir: &Path, name: &str) -> io::Result<PackIndex> {
        let bytes = std::fs::read(dir.join(format!("{name}.idx")))?;
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the pack index is damaged");
        if bytes.len() < IDS + 40 || !bytes.starts_with(b"\xfftOc\0\0\0\x02") {
            return Err(damaged());
        }
        let count = u32_at(&bytes, FANOUT + 255 * 4) as usize;
        if bytes.len() < IDS + count * 28 + 40 {
            return Err(damaged());
        }
        Ok(PackIndex { name: name.to_owned(), bytes, count })
    }

    fn id(&self, n: usize) -> &[u8] {
        &self.bytes[IDS + n * 20..IDS + n * 20 + 20]
    }

    fn ids(&self) -> impl Iterator<Item = Oid> + '_ {
        (0..self.count).filter_map(|n| self.id(n).try_into().ok().map(Oid::from_raw))
    }

    fn find(&self, oid: &Oid) -> Option<u64> {
        let first = oid.raw()[0] as usize;
        let mut low = if first == 0 { 0 } else { u32_at(&self.bytes, FANOUT + (first - 1) * 4) as usize };
        let mut high = (u32_at(&self.bytes, FANOUT + first * 4) as usize).min(self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.id(middle).cmp(&oid.raw()[..]) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return self.offset(middle),
            }
        }
        None
    }

    fn offset(&self, n: usize) -> Option<u64> {
        let short = u32_at(&self.bytes, IDS + self.count * 24 + n * 4);
        if short & 0x8000_0000 == 0 {
            return Some(u64::from(short));
        }
        let at = IDS + self.count * 28 + (short & 0x7fff_ffff) as usize * 8;
        Some(u64::from_be_bytes(self.bytes.get(at..at + 8)?.try_into().ok()?))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The packs of one store.
pub struct ObjectStore {
    objects: PathBuf,
    packs: RwLock<Vec<Arc<PackIndex>>>,
    files: Mutex<VecDeque<(String, Arc<File>)>>,
}

/// An object whose content is read as a stream.
pub struct ObjectReader {
    /// What it is.
    pub kind: ObjectKind,
    /// How many bytes it has.
    pub size: u64,
    content: Box<dyn Read + Send>,
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.content.read(buffer)
    }
}

impl ObjectStore {
    /// Loads the indexes of all packs in the `objects` directory.
    ///
    /// # Errors
    /// Fails when the directory cannot be read; a damaged index only hides its own objects.
    pub fn open(objects: &Path) -> Result<ObjectStore> {
        let store = ObjectStore {
            objects: objects.to_owned(),
            packs: RwLock::new(Vec::new()),
            files: Mutex::new(VecDeque::new()),
        };
        store.refresh()?;
        Ok(store)
    }

    /// Returns where the packs lie.
    pub fn pack_dir(&self) -> PathBuf {
        self.objects.join("pack")
    }

    /// Looks again which packs there are.
    pub fn refresh(&self) -> Result<()> {
        let dir = self.pack_dir();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(HistoryError::io("list", &dir))? {
            let name = entry.map_err(HistoryError::io("list", &dir))?.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".idx")) {
                names.push(name.to_owned());
            }
        }
        let known = self.snapshot();
        let mut packs = Vec::with_capacity(names.len());
        for name in names {
            match known.iter().find(|pack| pack.name == name) {
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
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    fn snapshot(&self) -> Vec<Arc<PackIndex>> {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn find(&self, oid: &Oid) -> Option<(Arc<PackIndex>, u64)> {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        packs.iter().find_map(|pack| pack.find(oid).map(|offset| (Arc::clone(pack), offset)))
    }

    /// Says whether a published pack holds the object.
    pub fn contains(&self, oid: &Oid) -> bool {
        self.find(oid).is_some()
    }

    /// Returns the names of all packs, each with the ids that it holds.
    pub fn contents(&self) -> Vec<(String, Vec<Oid>)> {
        self.snapshot().iter().map(|pack| (pack.name.clone(), pack.ids().collect())).collect()
    }

    fn file(&self, pack: &PackIndex) -> io::Result<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = files.iter().find(|(name, _)| *name == pack.name) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(File::open(self.pack_dir().join(format!("{}.pack", pack.name)))?);
        if files.len() >= OPEN_PACKS {
            files.pop_front();
        }
        files.push_back((pack.name.clone(), Arc::clone(&file)));
        Ok(file)
    }

    /// Opens an object as a stream.
    ///
    /// # Errors
    /// Fails when the object is missing or its pack cannot be read.
    pub fn open_object(&self, oid: &Oid) -> Result<ObjectReader> {
        let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
        let Some((pack, offset)) = self.find(oid) else {
            return self.through_library(oid);
        };
        let file = match self.file(&pack) {
            Ok(file) => file,
            // Repacked by somebody else since the indexes were read: now it lies in another pack.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.refresh()?;
                return self.through_library(oid);
            }
            Err(error) => return Err(damaged(format!("its pack is unreadable: {error}"))),
        };
        let mut cursor = PackCursor { file, at: offset };
        let (kind, size) = read_header(&mut cursor).map_err(|error| damaged(error.to_string()))?;
        let kind = match kind {
            1 => ObjectKind::Commit,
            2 => ObjectKind::Tree,
            3 => ObjectKind::Blob,
            6 | 7 => return self.through_library(oid),
            other => {
                return Err(damaged(format!("its pack entry has the unknown type {other}")));
            }
        };
        let capacity = if size < 32 * 1024 { 4096 } else { 64 * 1024 };
        let content = ZlibDecoder::new(BufReader::with_capacity(capacity, cursor));
        // One byte more than promised is enough to notice an object that is too long.
        Ok(ObjectReader { kind, size, content: Box::new(content.take(size + 1)) })
    }

    fn through_library(&self, oid: &Oid) -> Result<ObjectReader> {
        let missing = HistoryError::MissingObject { oid: *oid };
        let Some(path) = self.objects.to_str() else {
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
            other => return Err(damaged(format!("it is a {other}"))),
        };
        Ok(ObjectReader { kind, size: content.len() as u64, content: Box::new(io::Cursor::new(content)) })
    }

    /// Reads an object of a known kind that is small enough for memory: a tree, a commit or metadata.
    pub fn read(&self, oid: &Oid, kind: ObjectKind) -> Result<Vec<u8>> {
        let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
        let mut object = self.open_object(oid)?;
        if object.kind != kind {
            return Err(damaged(format!("a {} was expected, it is a {}", kind.word(), object.kind.word())));
        }
        let mut content = Vec::with_capacity(object.size.min(64 * 1024 * 1024) as usize);
        object.read_to_end(&mut content).map_err(|error| damaged(error.to_string()))?;
        if content.len() as u64 != object.size {
            return Err(damaged(format!("{} bytes were promised, {} came out", object.size, content.len())));
        }
        Ok(content)
    }
}

struct PackCursor {
    file: Arc<File>,
    at: u64,
}

impl Read for PackCursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

fn read_header(cursor: &mut PackCursor) -> io::Result<(u8, u64)> {
    let mut buffer = [0; 12];
    let n = cursor.file.read_at(&mut buffer, cursor.at)?;
    let mut bytes = buffer[..n].iter();
    let mut next = || bytes.next().copied().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof));
    let mut byte = next()?;
    let kind = (byte >> 4) & 7;
    let mut size = u64::from(byte & 0x0f);
    let (mut shift, mut used) = (4, 1);
    while byte & 0x80 != 0 {
        byte = next()?;
        used += 1;
        size |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        shift += 7;
    }
    cursor.at += used;
    Ok((kind, size))
}
