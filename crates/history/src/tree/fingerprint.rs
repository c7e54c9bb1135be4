//! The metadata by which an unchanged file is recognised without reading it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::tree::confined_dir::{FileStat, Time};

/// Twice the longest tick of a kernel (100 Hz), in nanoseconds: file times may lag behind by one tick.
pub const TICK_NS: i128 = 20_000_000;

/// The metadata by which an unchanged file is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    /// Type and permission bits.
    pub mode: u32,
    pub mtime: Time,
    /// Set by the kernel on every change of content or attributes; no process can set it.
    pub ctime: Time,
}

impl From<&FileStat> for FileFingerprint {
    fn from(stat: &FileStat) -> Self {
        FileFingerprint {
            dev: stat.dev,
            ino: stat.ino,
            size: stat.size,
            mode: stat.mode,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }
}

impl FileFingerprint {
    /// The fingerprint of an existing file that equals no other one, so that the file is always read.
    pub const UNSURE: FileFingerprint = FileFingerprint {
        dev: u64::MAX,
        ino: u64::MAX,
        size: u64::MAX,
        mode: 0,
        mtime: Time { sec: 0, nsec: 0 },
        ctime: Time { sec: 0, nsec: 0 },
    };

    /// Returns the permission bits with set-id and sticky bits.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Says whether every later change must change the fingerprint: whether `ctime` is older than the start of
    /// the scan (`started_ns`, nanoseconds since 1970) by more than the granularity of the clock.
    pub fn is_settled(&self, started_ns: i128) -> bool {
        self.ctime.nanos() < started_ns - TICK_NS
    }

    /// Says whether both are of the same inode and type, whatever has happened to it.
    pub fn same_file(&self, other: &FileFingerprint) -> bool {
        (self.dev, self.ino, self.mode & libc::S_IFMT) == (other.dev, other.ino, other.mode & libc::S_IFMT)
    }
}

/// A file outside the covered tree that contributes to the rules, with its fingerprint when it was read.
pub type RuleSource = (PathBuf, Option<FileFingerprint>);

/// Adds the fingerprint of a file to its path.
pub(crate) fn with_fingerprint(path: PathBuf) -> RuleSource {
    let fingerprint = nix::sys::stat::lstat(&path).ok().map(|stat| FileFingerprint::from(&FileStat::from(stat)));
    (path, fingerprint)
}
