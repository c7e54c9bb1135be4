//! The stat cache: what each file's content was, by the state in which it was read.
//!
//! It makes an unchanged tree cost no reading. It is only ever an acceleration: a cache that is missing, damaged, from
//! another version or from a checkpoint that is gone is ignored and rebuilt. Files whose times are so fresh that a
//! later write could leave them equal are never entered.
//!
//! The file: a line with the version, the checkpoint that it belongs to, then counted records of fixed fields in
//! little-endian order, then the SHA-1 of everything before.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sha1::{Digest, Sha1};

use super::beneath::{Stat, Time};
use super::names::RelPath;
use super::oid::Oid;

const HEADER: &[u8] = b"fermata stat cache 1\n";

/// Times may lag by one tick of a kernel with 100 Hz; twice that is on the safe side.
const TICK_NS: i128 = 20_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    dev: u64,
    ino: u64,
    size: u64,
    mode: u32,
    mtime: Time,
    ctime: Time,
}

impl From<&Stat> for Seen {
    fn from(stat: &Stat) -> Self {
        Seen { dev: stat.dev, ino: stat.ino, size: stat.size, mode: stat.mode, mtime: stat.mtime, ctime: stat.ctime }
    }
}

/// What was known after one checkpoint.
#[derive(Debug, Default)]
pub struct StatCache {
    /// The checkpoint and its commit; every object named here belongs to it.
    pub base: Option<(u64, Oid)>,
    files: HashMap<RelPath, (Seen, Oid)>,
    /// Trees and metadata that the checkpoint's commit reaches.
    known: HashSet<Oid>,
}

impl StatCache {
    /// Starts an empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the content of a file that is in the state in which it was read.
    pub fn lookup(&self, path: &RelPath, stat: &Stat) -> Option<Oid> {
        let (seen, oid) = self.files.get(path)?;
        (*seen == Seen::from(stat)).then_some(*oid)
    }

    /// Enters a file, unless its times are too close to `started_ns`, the instant at which the snapshot began.
    pub fn enter(&mut self, path: &RelPath, stat: &Stat, oid: Oid, started_ns: i128) {
        let ns = |time: Time| i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
        if ns(stat.mtime).max(ns(stat.ctime)) < started_ns - TICK_NS {
            self.files.insert(path.clone(), (Seen::from(stat), oid));
        }
    }

    /// Says whether the object belongs to the checkpoint of this cache.
    pub fn knows(&self, oid: &Oid) -> bool {
        self.known.contains(oid)
    }

    /// Notes a tree or a piece of metadata.
    pub fn note(&mut self, oid: Oid) {
        self.known.insert(oid);
    }

    /// Reads a cache; `None` when there is none that can be trusted.
    pub fn load(path: &Path) -> Option<StatCache> {
        let bytes = fs::read(path).ok()?;
        let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(20)?)?;
        if <[u8; 20]>::from(Sha1::digest(body)) != checksum {
            return None;
        }
        let mut reader = Reader(body.strip_prefix(HEADER)?);
        let base = (reader.u64()?, reader.oid()?);
        let mut cache = StatCache { base: Some(base), ..StatCache::default() };
        for _ in 0..reader.u64()? {
            let length = reader.u32()? as usize;
            let path = RelPath::new(reader.take(length)?).ok()?;
            let seen = Seen {
                dev: reader.u64()?,
                ino: reader.u64()?,
                size: reader.u64()?,
                mode: reader.u32()?,
                mtime: reader.time()?,
                ctime: reader.time()?,
            };
            cache.files.insert(path, (seen, reader.oid()?));
        }
        for _ in 0..reader.u64()? {
            cache.known.insert(reader.oid()?);
        }
        reader.0.is_empty().then_some(cache)
    }

    /// Writes the cache to a new file. It is not flushed: a torn one fails its checksum and is rebuilt.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let Some((number, commit)) = self.base else {
            return Ok(());
        };
        let mut out = Vec::with_capacity(HEADER.len() + self.files.len() * 128);
        out.extend_from_slice(HEADER);
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(commit.raw());
        out.extend_from_slice(&(self.files.len() as u64).to_le_bytes());
        for (path, (seen, oid)) in &self.files {
            out.extend_from_slice(&(path.bytes().len() as u32).to_le_bytes());
            out.extend_from_slice(path.bytes());
            [seen.dev, seen.ino, seen.size].iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
            out.extend_from_slice(&seen.mode.to_le_bytes());
            for time in [seen.mtime, seen.ctime] {
                out.extend_from_slice(&time.sec.to_le_bytes());
                out.extend_from_slice(&time.nsec.to_le_bytes());
            }
            out.extend_from_slice(oid.raw());
        }
        out.extend_from_slice(&(self.known.len() as u64).to_le_bytes());
        self.known.iter().for_each(|oid| out.extend_from_slice(oid.raw()));
        let checksum: [u8; 20] = Sha1::digest(&out).into();
        out.extend_from_slice(&checksum);
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(&out)
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn time(&mut self) -> Option<Time> {
        Some(Time { sec: self.u64()? as i64, nsec: self.u32()? })
    }

    fn oid(&mut self) -> Option<Oid> {
        Some(Oid::from_raw(self.take(20)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(sec: i64) -> Stat {
        let time = Time { sec, nsec: 7 };
        Stat { dev: 1, ino: 2, size: 3, mode: 0o100644, nlink: 1, uid: 0, gid: 0, mtime: time, ctime: time }
    }

    #[test]
    fn a_saved_cache_is_read_back_and_a_damaged_one_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let (file, oid) = (dir.path().join("cache"), Oid::from_raw([9; 20]));
        let path = RelPath::new(&b"a/\xff\n"[..]).unwrap();
        let mut cache = StatCache { base: Some((4, oid)), ..StatCache::default() };
        cache.enter(&path, &stat(100), oid, 200_000_000_000);
        cache.note(oid);
        cache.save(&file).unwrap();

        let read = StatCache::load(&file).unwrap();
        assert_eq!(read.lookup(&path, &stat(100)), Some(oid));
        assert_eq!(read.lookup(&path, &stat(101)), None);
        assert!(read.knows(&oid));

        let mut bytes = fs::read(&file).unwrap();
        bytes[HEADER.len() + 3] ^= 1;
        fs::write(dir.path().join("bad"), &bytes).unwrap();
        assert!(StatCache::load(&dir.path().join("bad")).is_none());
        fs::write(dir.path().join("short"), &bytes[..15]).unwrap();
        assert!(StatCache::load(&dir.path().join("short")).is_none());
    }

    #[test]
    fn a_file_as_young_as_the_snapshot_is_not_entered() {
        let mut cache = StatCache::new();
        let path = RelPath::new("a").unwrap();
        cache.enter(&path, &stat(100), Oid::from_raw([9; 20]), 100_000_000_010);
        assert_eq!(cache.lookup(&path, &stat(100)), None);
    }
}
