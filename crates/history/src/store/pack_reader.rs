//! Reads one pack: complete objects as streams, deltas by applying their chain to the complete base.
//!
//! Objects made from deltas are cached, since a walk over versions of a directory needs the neighbour next. All
//! reads are positional, so that threads can share a pack.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::bufread::ZlibDecoder;
use sha1::{Digest, Sha1};

use crate::store::oid::ObjectKind;
use crate::store::pack_entry::{EntryHeader, MAX_HEADER, Stored, bad, decode_header};
use crate::store::pack_index::PackIndex;
use crate::store::{deflate, delta};

/// Packs of other programs may have longer chains than ours; a chain longer than this is damaged.
const MAX_CHAIN: usize = 4096;
/// Larger objects are not cached.
const MAX_CACHED: usize = 1 << 20;
/// The size of each of the two generations of the cache in bytes.
const GENERATION: usize = 6 << 20;

/// The kind and content of an object in memory.
pub(crate) type ObjectContent = (ObjectKind, Arc<[u8]>);

type EntryId = (u64, u64);

/// A cache of objects made from deltas. Objects that are not used during a generation are dropped.
#[derive(Default)]
pub(crate) struct ContentCache(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<EntryId, ObjectContent>,
    old: HashMap<EntryId, ObjectContent>,
    bytes: usize,
}

impl Generations {
    fn put(&mut self, id: EntryId, content: ObjectContent) {
        if self.bytes >= GENERATION {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
        self.bytes += content.1.len();
        self.young.insert(id, content);
    }
}

impl ContentCache {
    fn get(&self, id: EntryId) -> Option<ObjectContent> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.young.get(&id) {
            return Some(found.clone());
        }
        let found = all.old.remove(&id)?;
        all.put(id, found.clone());
        Some(found)
    }

    fn put(&self, id: EntryId, content: &ObjectContent) {
        if content.1.len() <= MAX_CACHED {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).put(id, content.clone());
        }
    }

    /// Empties the cache.
    pub fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Generations::default();
    }
}

#[derive(Clone)]
pub(crate) struct PackReader {
    pub index: Arc<PackIndex>,
    file: Arc<File>,
    /// The largest object that is read into memory, in bytes.
    limit: u64,
}

impl PackReader {
    /// # Errors
    /// Fails when the pack cannot be opened.
    pub fn open(dir: &Path, index: Arc<PackIndex>) -> io::Result<PackReader> {
        let file = Arc::new(File::open(dir.join(format!("{}.pack", index.name)))?);
        Ok(PackReader { index, file, limit: u64::MAX })
    }

    /// Sets the largest size of an object that is read into memory, in bytes.
    #[must_use]
    pub fn limited(self, limit: u64) -> PackReader {
        PackReader { limit, ..self }
    }

    fn check_limit(&self, size: u64) -> io::Result<()> {
        let limit = self.limit;
        if size <= limit { Ok(()) } else { Err(bad(format!("its {size} bytes exceed the limit of {limit}"))) }
    }

    /// Returns the size of the pack in bytes.
    ///
    /// # Errors
    /// Fails when the metadata of the file cannot be read.
    pub fn length(&self) -> io::Result<u64> {
        self.file.metadata().map(|meta| meta.len())
    }

    /// Reads the header of the entry at an offset.
    ///
    /// # Errors
    /// Fails when it cannot be read or is invalid.
    pub fn header(&self, at: u64) -> io::Result<EntryHeader> {
        let mut buffer = [0; MAX_HEADER];
        let n = read_some_at(&self.file, &mut buffer, at)?;
        decode_header(&buffer[..n])
    }

    /// Reads raw bytes of the pack.
    ///
    /// # Errors
    /// Fails when the pack ends before the buffer is full.
    pub fn bytes_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }

    /// Opens the content of an entry as a stream. It ends at most one byte after the expected size, which
    /// suffices to detect that the content is too long.
    pub fn inflate(&self, at: u64, header: &EntryHeader) -> impl Read + Send + 'static + use<> {
        let cursor = PackCursor { file: Arc::clone(&self.file), at: at + header.length as u64 };
        let capacity = if header.size < 32 * 1024 { 4096 } else { 64 * 1024 };
        ZlibDecoder::new(BufReader::with_capacity(capacity, cursor)).take(header.size.saturating_add(1))
    }

    fn inflate_all(&self, at: u64, header: &EntryHeader) -> io::Result<Vec<u8>> {
        self.check_limit(header.size)?;
        let start = at + header.length as u64;
        deflate::inflate(header.size, |buffer, at| read_some_at(&self.file, buffer, start + at))
    }

    /// Returns the offset of an entry's delta base; `None` if it is no delta.
    ///
    /// # Errors
    /// Fails when the base is not in this pack.
    pub fn base_of(&self, at: u64, header: &EntryHeader) -> io::Result<Option<u64>> {
        match header.stored {
            Stored::Complete(_) => Ok(None),
            Stored::DeltaAt(distance) => match at.checked_sub(distance).filter(|base| distance > 0 && *base >= 12) {
                Some(base) => Ok(Some(base)),
                None => Err(bad("its delta base is outside of the pack".to_owned())),
            },
            Stored::DeltaTo(oid) => match self.index.find(&oid) {
                Some(base) => Ok(Some(base)),
                None => Err(bad(format!("its delta base {oid} is not in the pack"))),
            },
        }
    }

    /// Reads an object into memory and applies its deltas.
    ///
    /// # Errors
    /// Fails when the object, or one of its bases, cannot be read.
    pub fn resolve(&self, at: u64, cache: &ContentCache) -> io::Result<ObjectContent> {
        let mut deltas = Vec::new();
        let mut at = at;
        let (kind, mut content) = loop {
            if let Some(found) = cache.get((self.index.serial, at)) {
                break found;
            }
            let header = self.header(at)?;
            match header.stored {
                Stored::Complete(kind) => {
                    let content: ObjectContent = (kind, self.inflate_all(at, &header)?.into());
                    if !deltas.is_empty() {
                        cache.put((self.index.serial, at), &content);
                    }
                    break content;
                }
                Stored::DeltaAt(_) | Stored::DeltaTo(_) => {
                    if deltas.len() >= MAX_CHAIN {
                        return Err(bad("its chain of deltas is too long".to_owned()));
                    }
                    deltas.push((at, header));
                    // A delta always has a base.
                    at = self.base_of(at, &header)?.unwrap_or(at);
                }
            }
        };
        for (at, header) in deltas.into_iter().rev() {
            let steps = self.inflate_all(at, &header)?;
            self.check_limit(delta::target_size(&steps).map_err(|error| bad(error.to_string()))?)?;
            content = delta::apply(&content, &steps).map_err(|error| bad(error.to_string()))?.into();
            cache.put((self.index.serial, at), &(kind, Arc::clone(&content)));
        }
        Ok((kind, content))
    }

    /// Verifies the header and checksum of the pack, and that its index belongs to it.
    ///
    /// # Errors
    /// Fails when the pack cannot be read, or with the difference.
    pub fn check(&self, cancelled: impl Fn() -> bool) -> io::Result<()> {
        self.index.check()?;
        let length = self.length()?;
        let mut header = [0; 12];
        self.bytes_at(&mut header, 0)?;
        let count = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        if !header.starts_with(b"PACK\0\0\0\x02") || count as usize != self.index.count() || length < 32 {
            return Err(bad("the header of the pack does not match its index".to_owned()));
        }
        let mut hasher = Sha1::new();
        let mut buffer = vec![0; 256 * 1024];
        let mut at = 0;
        while at < length - 20 && !cancelled() {
            let n = buffer.len().min((length - 20 - at) as usize);
            self.bytes_at(&mut buffer[..n], at)?;
            hasher.update(&buffer[..n]);
            at += n as u64;
        }
        let mut trailer = [0; 20];
        self.bytes_at(&mut trailer, length - 20)?;
        let sum: [u8; 20] = hasher.finalize().into();
        if cancelled() || (sum == trailer && trailer == *self.index.pack_checksum()) {
            Ok(())
        } else {
            Err(bad("the checksum of the pack does not match".to_owned()))
        }
    }

    /// Verifies the checksum of every entry. Stops early, without an error, when cancelled.
    ///
    /// # Errors
    /// Fails when the pack cannot be read, or with the difference.
    pub fn check_entries(&self, cancelled: impl Fn() -> bool) -> io::Result<()> {
        let length = self.length()?.saturating_sub(20);
        let layout = self.index.layout()?;
        let ends = layout.iter().skip(1).map(|(at, _)| *at).chain([length]);
        let mut buffer = vec![0; 64 * 1024];
        for ((start, n), end) in layout.iter().zip(ends) {
            if cancelled() {
                break;
            }
            let (mut at, mut crc) = (*start, flate2::Crc::new());
            while at < end {
                let n = buffer.len().min((end - at) as usize);
                self.bytes_at(&mut buffer[..n], at)?;
                crc.update(&buffer[..n]);
                at += n as u64;
            }
            if *start < 12 || *start >= end || crc.sum() != self.index.crc(*n as usize) {
                return Err(bad(format!("the entry at {start} does not match the pack index")));
            }
        }
        Ok(())
    }

    /// Says whether a snapshot wrote the pack: compressed at the fastest level and without deltas.
    pub fn is_fresh(&self) -> bool {
        *self.index.fresh.get_or_init(|| {
            let level = || -> io::Result<u8> {
                let header = self.header(12)?;
                let mut zlib = [0; 2];
                self.bytes_at(&mut zlib, 12 + header.length as u64)?;
                // The compression level (RFC 1950, FLEVEL).
                Ok(zlib[1] >> 6)
            };
            // An unreadable pack is not fresh, so that consolidation does not select it.
            level().is_ok_and(|level| level == 0)
        })
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

fn read_some_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
