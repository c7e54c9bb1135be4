//! The index of a pack (git's version 2): which objects it holds, where, and with which checksums.
//!
//! Loaded as one piece of memory, so that asking for an object is a binary search and no system call. An index that is
//! damaged answers wrongly at worst; it never makes anybody panic.

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

/// The index of one pack.
pub(crate) struct PackIndex {
    /// The pack's name without extension.
    pub name: String,
    /// Names the pack in this process, for caches.
    pub serial: u64,
    bytes: Vec<u8>,
    count: usize,
    /// Whether the pack is as a snapshot wrote it; found out when somebody asks.
    pub(crate) fresh: OnceLock<bool>,
}

impl PackIndex {
    /// Reads the index of a pack.
    ///
    /// # Errors
    /// Fails when it cannot be read or is too short for what it claims to hold.
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

    /// Compares the index with its own checksum.
    ///
    /// # Errors
    /// Fails when they differ.
    pub fn check(&self) -> io::Result<()> {
        let (content, checksum) = self.bytes.split_at(self.bytes.len() - 20);
        let sum: [u8; 20] = Sha1::digest(content).into();
        if sum == *checksum { Ok(()) } else { Err(bad("the pack index has another checksum than it says".to_owned())) }
    }

    /// Returns the checksum of the pack that the index was made for.
    pub fn pack_checksum(&self) -> &[u8] {
        &self.bytes[self.bytes.len() - TRAILER..self.bytes.len() - 20]
    }

    /// Returns the size of the index itself.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns how many objects the pack holds.
    pub fn count(&self) -> usize {
        self.count
    }

    fn id(&self, n: usize) -> &[u8] {
        &self.bytes[IDS + n * 20..IDS + n * 20 + 20]
    }

    /// Returns the name of the object at a position.
    pub fn oid(&self, n: usize) -> Option<Oid> {
        self.id(n).try_into().ok().map(Oid::from_raw)
    }

    /// Lists the objects, ascending.
    pub fn ids(&self) -> impl Iterator<Item = Oid> + '_ {
        (0..self.count).filter_map(|n| self.oid(n))
    }

    /// Returns the position of an object.
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

    /// Returns where an object's entry begins.
    pub fn find(&self, oid: &Oid) -> Option<u64> {
        self.offset(self.position(oid)?)
    }

    /// Returns where the entry at a position begins.
    pub fn offset(&self, n: usize) -> Option<u64> {
        let short = u32_at(&self.bytes, IDS + self.count * 24 + n * 4);
        if short & 0x8000_0000 == 0 {
            return Some(u64::from(short));
        }
        let at = IDS + self.count * 28 + (short & 0x7fff_ffff) as usize * 8;
        Some(u64::from_be_bytes(self.bytes.get(at..at + 8)?.try_into().ok()?))
    }

    /// Returns the checksum of the entry at a position, head included.
    pub fn crc(&self, n: usize) -> u32 {
        u32_at(&self.bytes, IDS + self.count * 20 + n * 4)
    }

    /// Lists where the entries begin, with their positions, in the order in which they lie in the pack.
    ///
    /// # Errors
    /// Fails when an offset is missing or two entries begin at the same place.
    pub fn layout(&self) -> io::Result<Vec<(u64, u32)>> {
        let one = |n: usize| self.offset(n).map(|offset| (offset, n as u32));
        let mut layout: Vec<_> = (0..self.count).filter_map(one).collect();
        layout.sort_unstable();
        let apart = layout.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if layout.len() == self.count && apart {
            Ok(layout)
        } else {
            Err(bad("the pack index puts objects where none can be".to_owned()))
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What an index says about one object.
pub(crate) struct Line {
    /// The object.
    pub oid: Oid,
    /// The checksum of its entry.
    pub crc: u32,
    /// Where its entry begins.
    pub offset: u64,
}

/// Encodes an index; the lines are put in the order of their ids.
pub(crate) fn encode(lines: &mut [Line], pack_checksum: &[u8; 20]) -> Vec<u8> {
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
        // Offsets of 2 GiB and more go to a table of their own, marked by the highest bit.
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
