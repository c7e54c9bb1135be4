//! A confined root: the workspace as a directory that no path can leave.
//!
//! Every file is opened with `openat2` and `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`. A symbolic link that an
//! agent plants at any instant makes an open fail instead of redirecting it. No function here follows a
//! symbolic link.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{self, Mode, fstat, fstatat};
use serde::{Deserialize, Serialize};

use crate::errors::{HistoryError, Result};
use crate::tree::names::RelPath;

/// A file time: seconds and nanoseconds, since the range of neither alone suffices.
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

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Regular,
    Symlink,
    Directory,
    /// A FIFO, socket or device, which is never opened.
    Special(&'static str),
}

/// The part of `stat` that the store uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of hard links.
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or attributes.
    pub ctime: Time,
}

impl FileStat {
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

    /// Returns the permission bits with set-id and sticky bits.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Says whether the two describe the same inode with the same content.
    pub fn same_content(&self, other: &FileStat) -> bool {
        (self.dev, self.ino, self.size, self.mode) == (other.dev, other.ino, other.size, other.mode)
            && (self.mtime, self.ctime) == (other.mtime, other.ctime)
    }
}

impl From<stat::FileStat> for FileStat {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: stat::FileStat) -> Self {
        FileStat {
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

/// An open workspace; all paths are relative to it.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens the workspace by its canonical path.
    ///
    /// # Errors
    /// Fails when the path is not a directory, or when the kernel does not support `openat2`.
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

    /// Says whether the file system reports every change by inotify and by the change time of a directory.
    /// Network file systems do not.
    pub fn reports_changes(&self) -> bool {
        reports_changes(&self.fd)
    }

    /// Returns the path of the workspace, for messages only.
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
                // The kernel asks for a retry after a rename that raced with the lookup.
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

    /// Opens the directory that holds `path` and returns it with the last name of `path`.
    pub fn open_parent<'p>(&self, path: &'p RelPath) -> nix::Result<(OwnedFd, &'p OsStr)> {
        let parent = path.parent().ok_or(Errno::EINVAL)?;
        let start = if parent.is_root() { 0 } else { parent.bytes().len() + 1 };
        let fd = self.open_at(&parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        Ok((fd, OsStr::from_bytes(&path.bytes()[start..])))
    }

    /// Opens a file for reading, without waiting for the other end of a FIFO.
    pub fn open_file(&self, path: &RelPath) -> nix::Result<File> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        self.open_at(path, flags).map(File::from)
    }

    /// Returns the metadata of a path without following it.
    pub fn stat(&self, path: &RelPath) -> nix::Result<FileStat> {
        if path.is_root() {
            return stat_fd(&self.fd);
        }
        let (dir, name) = self.open_parent(path)?;
        stat_at(&dir, name)
    }

    /// Returns the metadata of a path; `None` if the path, or a directory above it, does not exist.
    pub fn stat_if_there(&self, path: &RelPath) -> nix::Result<Option<FileStat>> {
        match self.stat(path) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Reads the target of a symbolic link.
    pub fn read_link(&self, path: &RelPath) -> nix::Result<OsString> {
        let (dir, name) = self.open_parent(path)?;
        readlinkat(&dir, name)
    }
}

/// Says whether the file system of an open file reports every change.
pub fn reports_changes<Fd: AsFd>(fd: Fd) -> bool {
    // The numbers that libc does not name are those of linux/magic.h.
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
    nix::sys::statfs::fstatfs(fd).is_ok_and(|stat| local.contains(&(stat.filesystem_type().0 as u64)))
}

/// Returns the metadata of an open file.
pub fn stat_fd<Fd: AsFd>(fd: Fd) -> nix::Result<FileStat> {
    fstat(fd).map(FileStat::from)
}

/// Returns the metadata of a name in an open directory, without following it.
pub fn stat_at<Fd: AsFd>(dir: Fd, name: &OsStr) -> nix::Result<FileStat> {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map(FileStat::from)
}

/// Says whether an error is a shortage of this process and says nothing about the file.
pub(crate) fn is_resource_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}

/// Flushes a directory, so that the names in it are durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
