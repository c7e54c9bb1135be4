//! Reads one pack: whole objects as streams, and deltas by applying the chain of them to its whole base.
//!
//! What chains have been resolved to is remembered for a while, since whoever walks versions of a directory wants the
//! neighbour of the last one next. Reads by position only, so that several threads may share a pack.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::bufread::ZlibDecoder;
use sha1::{Digest, Sha1};

use crate::store::oid::ObjectKind;
use crate::store::pack_entry::{Head, MAX_HEAD, Stored, bad, decode_head};
use crate::store::pack_index::PackIndex;
use crate::store::{deflate, delta};

/// Chains of foreign packs may be longer than ours; a longer one than this is damage.
const MAX_CHAIN: usize = 4096;
/// Larger objects are not remembered.
const MAX_REMEMBERED: usize = 1 << 20;
/// What is remembered at most, in bytes, in each of two generations.
const GENERATION: usize = 6 << 20;

/// An object in memory.
pub(crate) type Content = (ObjectKind, Arc<[u8]>);

type Place = (u64, u64);

/// Objects that were put together from deltas not long ago. What was not asked for during a generation goes.
#[derive(Default)]
pub(crate) struct Remembered(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<Place, Content>,
    old: HashMap<Place, Content>,
    bytes: usize,
}

impl Generations {
    fn put(&mut self, place: Place, content: Content) {
        if self.bytes >= GENERATION {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
        self.bytes += content.1.len();
        self.young.insert(place, content);
    }
}

impl Remembered {
    fn get(&self, place: Place) -> Option<Content> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.young.get(&place) {
            return Some(found.clone());
        }
        let found = all.old.remove(&place)?;
        all.put(place, found.clone());
        Some(found)
    }

    fn put(&self, place: Place, content: &Content) {
        if content.1.len() <= MAX_REMEMBERED {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).put(place, content.clone());
        }
    }

    /// Gives the memory back.
    pub fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Generations::default();
    }
}

/// One pack, opened.
#[derive(Clone)]
pub(crate) struct PackReader {
    /// Its index.
    pub index: Arc<PackIndex>,
    file: Arc<File>,
    /// The most that an object may come to in memory, bytes.
    limit: u64,
}

impl PackReader {
    /// Opens the pack that an index belongs to.
    ///
    /// # Errors
    /// Fails when it cannot be opened.
    pub fn open(dir: &Path, index: Arc<PackIndex>) -> io::Result<PackReader> {
        let file = Arc::new(File::open(dir.join(format!("{}.pack", index.name)))?);
        Ok(PackReader { index, file, limit: u64::MAX })
    }

    /// Puts no object together in memory that comes to more bytes.
    #[must_use]
    pub fn limited(self, limit: u64) -> PackReader {
        PackReader { limit, ..self }
    }

    fn fits(&self, size: u64) -> io::Result<()> {
        let limit = self.limit;
        if size <= limit { Ok(()) } else { Err(bad(format!("{size} bytes are more than the {limit} that are read"))) }
    }

    /// Returns the size of the pack.
    ///
    /// # Errors
    /// Fails when the file cannot be looked at.
    pub fn length(&self) -> io::Result<u64> {
        self.file.metadata().map(|meta| meta.len())
    }

    /// Reads the head of the entry at an offset.
    ///
    /// # Errors
    /// Fails when it cannot be read or makes no sense.
    pub fn head(&self, at: u64) -> io::Result<Head> {
        let mut buffer = [0; MAX_HEAD];
        let n = read_some_at(&self.file, &mut buffer, at)?;
        decode_head(&buffer[..n])
    }

    /// Reads bytes of the pack as they are.
    ///
    /// # Errors
    /// Fails when there are not so many.
    pub fn bytes_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }

    /// Opens what follows a head as a stream; it ends one byte after the promised size at the latest, which is enough to
    /// notice that it is too long.
    pub fn inflate(&self, at: u64, head: &Head) -> impl Read + Send + 'static + use<> {
        let cursor = Cursor { file: Arc::clone(&self.file), at: at + head.length as u64 };
        let capacity = if head.size < 32 * 1024 { 4096 } else { 64 * 1024 };
        ZlibDecoder::new(BufReader::with_capacity(capacity, cursor)).take(head.size.saturating_add(1))
    }

    fn inflate_all(&self, at: u64, head: &Head) -> io::Result<Vec<u8>> {
        self.fits(head.size)?;
        let start = at + head.length as u64;
        deflate::inflate(head.size, |buffer, at| read_some_at(&self.file, buffer, start + at))
    }

    /// Returns where the base of an entry begins, `None` when it needs none.
    ///
    /// # Errors
    /// Fails when the base cannot be in this pack.
    pub fn base_of(&self, at: u64, head: &Head) -> io::Result<Option<u64>> {
        match head.stored {
            Stored::Whole(_) => Ok(None),
            Stored::Behind(distance) => match at.checked_sub(distance).filter(|base| distance > 0 && *base >= 12) {
                Some(base) => Ok(Some(base)),
                None => Err(bad("its base is out of reach".to_owned())),
            },
            Stored::Named(oid) => match self.index.find(&oid) {
                Some(base) => Ok(Some(base)),
                None => Err(bad(format!("its base {oid} is not in its pack"))),
            },
        }
    }

    /// Puts an object together, in memory.
    ///
    /// # Errors
    /// Fails when it, or an object that it is a delta to, cannot be read.
    pub fn resolve(&self, at: u64, remembered: &Remembered) -> io::Result<Content> {
        let mut deltas = Vec::new();
        let mut at = at;
        let (kind, mut content) = loop {
            if let Some(found) = remembered.get((self.index.serial, at)) {
                break found;
            }
            let head = self.head(at)?;
            match head.stored {
                Stored::Whole(kind) => {
                    let content: Content = (kind, self.inflate_all(at, &head)?.into());
                    if !deltas.is_empty() {
                        remembered.put((self.index.serial, at), &content);
                    }
                    break content;
                }
                Stored::Behind(_) | Stored::Named(_) => {
                    if deltas.len() >= MAX_CHAIN {
                        return Err(bad("its chain of deltas has no end".to_owned()));
                    }
                    deltas.push((at, head));
                    // It is a delta, so that there is a base.
                    at = self.base_of(at, &head)?.unwrap_or(at);
                }
            }
        };
        for (at, head) in deltas.into_iter().rev() {
            let steps = self.inflate_all(at, &head)?;
            self.fits(delta::target_size(&steps).map_err(|error| bad(error.to_string()))?)?;
            content = delta::apply(&content, &steps).map_err(|error| bad(error.to_string()))?.into();
            remembered.put((self.index.serial, at), &(kind, Arc::clone(&content)));
        }
        Ok((kind, content))
    }

    /// Compares the pack with its trailer and with what its index, which must belong to it, says of it.
    ///
    /// # Errors
    /// Fails when it cannot be read, or names what differs.
    pub fn check(&self, cancelled: impl Fn() -> bool) -> io::Result<()> {
        self.index.check()?;
        let length = self.length()?;
        let mut head = [0; 12];
        self.bytes_at(&mut head, 0)?;
        let count = u32::from_be_bytes([head[8], head[9], head[10], head[11]]);
        if !head.starts_with(b"PACK\0\0\0\x02") || count as usize != self.index.count() || length < 32 {
            return Err(bad("the pack's header and its index do not fit together".to_owned()));
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
            Err(bad("the pack has another checksum than it says".to_owned()))
        }
    }

    /// Compares every entry with the checksum that the index has of it; stops early, without an error, when cancelled.
    ///
    /// # Errors
    /// Fails when the pack cannot be read, or names what differs.
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
                return Err(bad(format!("the pack index says something else of the entry at {start}")));
            }
        }
        Ok(())
    }

    /// Says whether the pack is as a snapshot wrote it: compressed in haste, without deltas.
    pub fn is_fresh(&self) -> bool {
        *self.index.fresh.get_or_init(|| {
            let level = || -> io::Result<u8> {
                let head = self.head(12)?;
                let mut zlib = [0; 2];
                self.bytes_at(&mut zlib, 12 + head.length as u64)?;
                // How hard the compressor tried (RFC 1950, FLEVEL).
                Ok(zlib[1] >> 6)
            };
            // A pack that cannot be read is nobody's to rewrite.
            level().is_ok_and(|level| level == 0)
        })
    }
}

struct Cursor {
    file: Arc<File>,
    at: u64,
}

impl Read for Cursor {
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
