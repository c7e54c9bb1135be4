//! The workspace as a directory that nothing can lead out of.
//!
//! Every file is opened through `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, so that a link planted by an
//! agent, at whatever instant, makes an open fail instead of leading elsewhere. Nothing here follows a symlink.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use serde::{Deserialize, Serialize};

use crate::errors::{HistoryError, Result};
use crate::tree::names::RelPath;

/// A point in time of a file system: seconds and nanoseconds, since neither fits into the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub sec: i64,
    /// Nanoseconds within the second.
    pub nsec: u32,
}

impl Time {
    /// Returns the nanoseconds since 1970.
    pub fn nanos(self) -> i128 {
        i128::from(self.sec) * 1_000_000_000 + i128::from(self.nsec)
    }
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// A FIFO, socket or device, which is never opened.
    Special(&'static str),
}

/// The part of `stat` that tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space that it takes, in units of 512 bytes.
    pub blocks: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of hard links.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or attributes.
    pub ctime: Time,
}

impl Stat {
    /// Returns the type.
    pub fn kind(&self) -> FileKind {
        match self.mode & libc::S_IFMT {
            libc::S_IFREG => FileKind::Regular,
            libc::S_IFLNK => FileKind::Symlink,
            libc::S_IFDIR => FileKind::Directory,
            libc::S_IFIFO => FileKind::Special("fifo"),
            libc::S_IFSOCK => FileKind::Special("socket"),
            libc::S_IFCHR => FileKind::Special("character_device"),
            libc::S_IFBLK => FileKind::Special("block_device"),
            _ => FileKind::Special("unknown"),
        }
    }

    /// Returns the permission bits, with set-id and sticky.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Says whether the content can be taken as unchanged between the two.
    pub fn same_content(&self, other: &Stat) -> bool {
        (self.dev, self.ino, self.size, self.mode) == (other.dev, other.ino, other.size, other.mode)
            && (self.mtime, self.ctime) == (other.mtime, other.ctime)
    }
}

impl From<FileStat> for Stat {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: FileStat) -> Self {
        Stat {
            dev: stat.st_dev as u64,
            ino: stat.st_ino as u64,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            mode: stat.st_mode as u32,
            nlink: stat.st_nlink as u64,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Time { sec: stat.st_mtime as i64, nsec: stat.st_mtime_nsec as u32 },
            ctime: Time { sec: stat.st_ctime as i64, nsec: stat.st_ctime_nsec as u32 },
        }
    }
}

/// An open workspace.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens the workspace by its canonical path.
    ///
    /// # Errors
    /// Fails when it is not a directory, or when the kernel has no `openat2`.
    pub fn open(path: &Path) -> Result<Root> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty()).map_err(HistoryError::io("open workspace", path))?;
        let root = Root { fd, path: path.to_owned() };
        match root.open_dir(&RelPath::root()) {
            Ok(_) => Ok(root),
            Err(Errno::ENOSYS | Errno::EPERM) => Err(HistoryError::KernelTooOld { path: root.path }),
            Err(errno) => Err(HistoryError::io("open workspace", path)(errno)),
        }
    }

    /// Says whether the file system tells of every change: by inotify, and by the change time of a directory. One that
    /// others write to over a network does not.
    pub fn tells_of_changes(&self) -> bool {
        tells_of_changes(&self.fd)
    }

    /// Returns where the workspace is, for messages only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the full path of a file, for messages only.
    pub fn show(&self, path: &RelPath) -> PathBuf {
        self.path.join(path.as_path())
    }

    fn open_at(&self, path: &RelPath, flags: OFlag) -> nix::Result<OwnedFd> {
        let name: &Path = if path.is_root() { Path::new(".") } else { path.as_path() };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        for _ in 0..64 {
            match openat2(&self.fd, name, how) {
                // The kernel asks for another try after a rename that raced with the look-up.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return result,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Opens a directory for reading.
    pub fn open_dir(&self, path: &RelPath) -> nix::Result<OwnedFd> {
        self.open_at(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW)
    }

    /// Opens the directory that holds `path` and returns it with the last name.
    pub fn open_parent<'p>(&self, path: &'p RelPath) -> nix::Result<(OwnedFd, &'p OsStr)> {
        let parent = path.parent().ok_or(Errno::EINVAL)?;
        let start = if parent.is_root() { 0 } else { parent.bytes().len() + 1 };
        let fd = self.open_at(&parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        Ok((fd, OsStr::from_bytes(&path.bytes()[start..])))
    }

    /// Opens a file for reading, without ever waiting for the other end of a FIFO.
    pub fn open_file(&self, path: &RelPath) -> nix::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        self.open_at(path, flags).map(File::from)
    }

    /// Describes a path without following it.
    pub fn stat(&self, path: &RelPath) -> nix::Result<Stat> {
        if path.is_root() {
            return stat_fd(&self.fd);
        }
        let (dir, name) = self.open_parent(path)?;
        stat_at(&dir, name)
    }

    /// Describes a path, where nothing being there (or above it no directory) is an answer.
    pub fn stat_if_there(&self, path: &RelPath) -> nix::Result<Option<Stat>> {
        match self.stat(path) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Reads where a symbolic link points.
    pub fn read_link(&self, path: &RelPath) -> nix::Result<OsString> {
        let (dir, name) = self.open_parent(path)?;
        readlinkat(&dir, name)
    }
}

/// Says whether the file system of an open file tells of every change.
pub fn tells_of_changes<Fd: AsFd>(fd: Fd) -> bool {
    // Not all of these have a name in libc; the numbers are those of linux/magic.h.
    const BCACHEFS: u64 = 0xca45_1a4e;
    const F2FS: u64 = 0xf2f5_2010;
    const ZFS: u64 = 0x2fc1_2fc1;
    let local = [
        nix::sys::statfs::EXT4_SUPER_MAGIC.0 as u64,
        nix::sys::statfs::XFS_SUPER_MAGIC.0 as u64,
        nix::sys::statfs::BTRFS_SUPER_MAGIC.0 as u64,
        nix::sys::statfs::TMPFS_MAGIC.0 as u64,
        nix::sys::statfs::OVERLAYFS_SUPER_MAGIC.0 as u64,
        BCACHEFS,
        F2FS,
        ZFS,
    ];
    nix::sys::statfs::fstatfs(fd).is_ok_and(|found| local.contains(&(found.filesystem_type().0 as u64)))
}

/// Describes an open file.
pub fn stat_fd<Fd: AsFd>(fd: Fd) -> nix::Result<Stat> {
    fstat(fd).map(Stat::from)
}

/// Describes a name in an open directory without following it.
pub fn stat_at<Fd: AsFd>(dir: Fd, name: &OsStr) -> nix::Result<Stat> {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map(Stat::from)
}

/// Flushes a directory, so that the names in it are durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
