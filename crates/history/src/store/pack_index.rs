//! The index of a pack (git's version 2): the objects in it, with their offsets and checksums.
//!
//! The index is loaded into memory, so that finding an object is a binary search without a system call. A
//! damaged index may return wrong results but never causes a panic.

use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use sha1::{Digest, Sha1};

use crate::store::oid::Oid;
use crate::store::pack_entry::bad;

const MAGIC: &[u8; 8] = b"\xfftOc\0\0\0\x02";
const FANOUT: usize = 8;
const IDS: usize = FANOUT + 256 * 4;
const TRAILER: usize = 40;

static COUNT: AtomicU64 = AtomicU64::new(0);

pub(crate) struct PackIndex {
    /// The name of the pack without extension.
    pub name: String,
    /// A number that identifies this index in the process, for caches.
    pub serial: u64,
    bytes: Vec<u8>,
    count: usize,
    /// Whether a snapshot wrote the pack; determined on first use.
    pub(crate) fresh: OnceLock<bool>,
}

impl PackIndex {
    /// # Errors
    /// Fails when the file cannot be read or is shorter than its header says.
    pub fn load(dir: &Path, name: &str) -> io::Result<PackIndex> {
        let bytes = std::fs::read(dir.join(format!("{name}.idx")))?;
        let damaged = || bad("the pack index is damaged".to_owned());
        if bytes.len() < IDS + TRAILER || !bytes.starts_with(MAGIC) {
            return Err(damaged());
        }
        let count = u32_at(&bytes, FANOUT + 255 * 4) as usize;
        if bytes.len() < IDS + count * 28 + TRAILER {
            return Err(damaged());
        }
        let serial = COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(PackIndex { name: name.to_owned(), serial, bytes, count, fresh: OnceLock::new() })
    }

    /// Verifies the checksum of the index.
    ///
    /// # Errors
    /// Fails when it does not match.
    pub fn check(&self) -> io::Result<()> {
        let (content, checksum) = self.bytes.split_at(self.bytes.len() - 20);
        let sum: [u8; 20] = Sha1::digest(content).into();
        if sum == *checksum { Ok(()) } else { Err(bad("the checksum of the pack index does not match".to_owned())) }
    }

    /// Returns the checksum of the pack as recorded in the index.
    pub fn pack_checksum(&self) -> &[u8] {
        &self.bytes[self.bytes.len() - TRAILER..self.bytes.len() - 20]
    }

    /// Returns the size of the index in bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns the number of objects.
    pub fn count(&self) -> usize {
        self.count
    }

    fn id(&self, n: usize) -> &[u8] {
        &self.bytes[IDS + n * 20..IDS + n * 20 + 20]
    }

    /// Returns the id at a position.
    pub fn oid(&self, n: usize) -> Option<Oid> {
        self.id(n).try_into().ok().map(Oid::from_raw)
    }

    /// Iterates over the ids in ascending order.
    pub fn ids(&self) -> impl Iterator<Item = Oid> + '_ {
        (0..self.count).filter_map(|n| self.oid(n))
    }

    pub fn position(&self, oid: &Oid) -> Option<usize> {
        let first = oid.raw()[0] as usize;
        let mut low = if first == 0 { 0 } else { u32_at(&self.bytes, FANOUT + (first - 1) * 4) as usize };
        let mut high = (u32_at(&self.bytes, FANOUT + first * 4) as usize).min(self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.id(middle).cmp(&oid.raw()[..]) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Some(middle),
            }
        }
        None
    }

    /// Returns the offset of an object's entry.
    pub fn find(&self, oid: &Oid) -> Option<u64> {
        self.offset(self.position(oid)?)
    }

    /// Returns the offset of the entry at a position.
    pub fn offset(&self, n: usize) -> Option<u64> {
        let short = u32_at(&self.bytes, IDS + self.count * 24 + n * 4);
        if short & 0x8000_0000 == 0 {
            return Some(u64::from(short));
        }
        let at = IDS + self.count * 28 + (short & 0x7fff_ffff) as usize * 8;
        Some(u64::from_be_bytes(self.bytes.get(at..at + 8)?.try_into().ok()?))
    }

    /// Returns the CRC-32 of the entry at a position, including its header.
    pub fn crc(&self, n: usize) -> u32 {
        u32_at(&self.bytes, IDS + self.count * 20 + n * 4)
    }

    /// Lists the offsets of all entries, ascending, each with its position in the index.
    ///
    /// # Errors
    /// Fails when an offset is missing or two entries have the same one.
    pub fn layout(&self) -> io::Result<Vec<(u64, u32)>> {
        let one = |n: usize| self.offset(n).map(|offset| (offset, n as u32));
        let mut layout: Vec<_> = (0..self.count).filter_map(one).collect();
        layout.sort_unstable();
        let apart = layout.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if layout.len() == self.count && apart {
            Ok(layout)
        } else {
            Err(bad("the pack index contains invalid offsets".to_owned()))
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The information about one object in an index.
pub(crate) struct IndexLine {
    pub oid: Oid,
    /// The CRC-32 of its entry.
    pub crc: u32,
    /// The offset of its entry.
    pub offset: u64,
}

/// Encodes an index and sorts the lines by id.
pub(crate) fn encode(lines: &mut [IndexLine], pack_checksum: &[u8; 20]) -> Vec<u8> {
    lines.sort_unstable_by_key(|line| line.oid);
    let mut index = Vec::with_capacity(IDS + lines.len() * 28 + TRAILER);
    index.extend_from_slice(MAGIC);
    let mut below = 0;
    for first in 0..=255u8 {
        below += lines[below..].iter().take_while(|line| line.oid.raw()[0] == first).count();
        index.extend_from_slice(&(below as u32).to_be_bytes());
    }
    lines.iter().for_each(|line| index.extend_from_slice(line.oid.raw()));
    lines.iter().for_each(|line| index.extend_from_slice(&line.crc.to_be_bytes()));
    let mut large = Vec::new();
    for line in lines.iter() {
        // Offsets of 2 GiB and more are in a separate table, marked by the highest bit.
        let short = match u32::try_from(line.offset) {
            Ok(offset) if offset < 0x8000_0000 => offset,
            _ => {
                large.push(line.offset);
                0x8000_0000 | (large.len() - 1) as u32
            }
        };
        index.extend_from_slice(&short.to_be_bytes());
    }
    large.iter().for_each(|offset| index.extend_from_slice(&offset.to_be_bytes()));
    index.extend_from_slice(pack_checksum);
    let checksum: [u8; 20] = Sha1::digest(&index).into();
    index.extend_from_slice(&checksum);
    index
}
