//! Writes files and links of a plan: under a temporary name, flushed, then renamed into place.
//!
//! Never writes into a file that is there: what is replaced keeps its bytes under its other names, if it has any. Must
//! not decide what a path is to be.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, fstatat, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, geteuid, linkat, symlinkat, unlinkat};

use super::attributes::time_spec;
use super::beneath::{Stat, Time, stat_at, stat_fd};
use super::errors::{HistoryError, Result};
use super::meta::Xattrs;
use super::names::RelPath;
use super::oid::{ObjectHasher, ObjectKind, Oid};
use super::plan::{Held, HeldKind};
use super::recheck::{Standing, standing};
use super::restore::Applying;
use super::xattrs::{self, Outcome};
use crate::failpoint;

/// Holes are made of whole blocks of this size, in bytes.
const BLOCK: usize = 4096;

/// What a file is to be.
pub(super) struct FileWish<'a> {
    /// The content.
    pub oid: Oid,
    /// Permission bits.
    pub mode: u32,
    /// Last change.
    pub mtime: Time,
    /// Extended attributes.
    pub xattrs: &'a Xattrs,
    /// Whether it is written with holes.
    pub sparse: bool,
    /// The file that it becomes another name of.
    pub linked_to: Option<&'a RelPath>,
}

/// Where something is to be written.
struct Place<'p> {
    dir: OwnedFd,
    name: &'p OsStr,
    /// Whether the wanted content stands there already.
    right: bool,
}

impl Applying<'_> {
    /// Writes a file, or makes the path another name of one.
    pub(super) fn write_file(&mut self, path: &RelPath, wish: &FileWish<'_>, replaces: Option<&Held>) -> Result<()> {
        let wanted = Held { kind: HeldKind::File, oid: wish.oid };
        let Some(place) = self.place(path, wanted, replaces)? else {
            return Ok(());
        };
        if place.right && self.is_its_own(&place, wish) {
            self.report.already_right += 1;
            return match wish.linked_to {
                // It has the attributes of the file that it is a name of.
                Some(_) => Ok(()),
                None => self.set_attributes(path, Some(wish.mode), wish.mtime, Some(wish.xattrs), 1),
            };
        }
        let linked = match wish.linked_to {
            Some(leader) => self.draft_name(&place, path, leader, wanted)?,
            None => false,
        };
        if !linked {
            if wish.linked_to.is_some() {
                self.unlinked.insert(path.clone());
            }
            self.draft_file(&place, path, wish)?;
        }
        self.put_in_place(&place, path)
    }

    /// Makes a symbolic link.
    pub(super) fn write_link(&mut self, path: &RelPath, oid: Oid, mtime: Time, replaces: Option<&Held>) -> Result<()> {
        let Some(place) = self.place(path, Held { kind: HeldKind::Symlink, oid }, replaces)? else {
            return Ok(());
        };
        if place.right {
            self.report.already_right += 1;
            return self.set_attributes(path, None, mtime, None, 1);
        }
        self.draft_link(&place, path, oid, mtime)?;
        self.put_in_place(&place, path)
    }

    /// Opens the directory of a path that may be written; `None`, with a report, when something else stands there.
    fn place<'p>(&mut self, path: &'p RelPath, wanted: Held, replaces: Option<&Held>) -> Result<Option<Place<'p>>> {
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(None);
        };
        unlink_if_there(&dir, &self.temporary).map_err(self.failed("clear the draft of", path))?;
        let right = match standing(&dir, name).map_err(self.failed("look at", path))? {
            Standing::Content(held) if held == wanted => true,
            Standing::Content(held) if Some(&held) == replaces => false,
            Standing::Nothing => false,
            Standing::Content(_) => {
                self.mismatch(path, "it has changed since the plan was made, and is kept");
                return Ok(None);
            }
            Standing::Directory | Standing::Other => {
                self.mismatch(path, "something else stands where a file must go");
                return Ok(None);
            }
        };
        Ok(Some(Place { dir, name, right }))
    }

    /// Says whether a file with the right content has the right names and holes, so that it can stay.
    fn is_its_own(&self, place: &Place<'_>, wish: &FileWish<'_>) -> bool {
        let Ok(stat) = stat_at(&place.dir, place.name) else {
            return false;
        };
        match wish.linked_to {
            Some(leader) => self.root.stat(leader).is_ok_and(|other| (other.dev, other.ino) == (stat.dev, stat.ino)),
            None => {
                let raw = fstatat(&place.dir, place.name, AtFlags::AT_SYMLINK_NOFOLLOW);
                let has_holes = || raw.is_ok_and(|raw| raw.st_blocks * 512 < raw.st_size);
                stat.nlink == 1 && (!wish.sparse || has_holes())
            }
        }
    }

    fn put_in_place(&mut self, place: &Place<'_>, path: &RelPath) -> Result<()> {
        failpoint::check("history.restore.drafted").map_err(self.failed("write", path))?;
        renameat(&place.dir, &*self.temporary, &place.dir, place.name).map_err(self.failed("put in place", path))?;
        self.report.written += 1;
        self.touch(path);
        Ok(())
    }

    /// The owner stays who it was; a new file belongs to the owner of its directory, not to the daemon's user.
    fn owner_of(&self, place: &Place<'_>, path: &RelPath) -> Result<Stat> {
        let owner = stat_at(&place.dir, place.name).or_else(|_| stat_fd(&place.dir));
        owner.map_err(self.failed("look at the directory of", path))
    }

    fn draft_file(&mut self, place: &Place<'_>, path: &RelPath, wish: &FileWish<'_>) -> Result<()> {
        let owner = self.owner_of(place, path)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&place.dir, &*self.temporary, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = File::from(fd.map_err(self.failed("draft", path))?);
        let mut object = self.history.objects.open_object(&wish.oid)?;
        let mut hasher = ObjectHasher::new(ObjectKind::Blob, object.size);
        let mut buffer = vec![0; 16 * BLOCK];
        let mut at = 0;
        loop {
            let n = fill(&mut object, &mut buffer).map_err(self.failed("read the content of", path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            write_at(&file, &buffer[..n], at, wish.sparse).map_err(self.failed("write", path))?;
            at += n as u64;
        }
        if hasher.finish() != wish.oid {
            return Err(HistoryError::DamagedObject {
                oid: wish.oid,
                problem: "its content has another hash".to_owned(),
            });
        }
        // A hole at the end is made by the length alone.
        file.set_len(at).map_err(self.failed("write", path))?;
        if xattrs::set(&file, wish.xattrs).map_err(self.failed("set the attributes of", path))? == Outcome::NotKept {
            self.without_xattrs.insert(path.clone());
        }
        if geteuid().is_root() {
            fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(self.failed("give away", path))?;
        }
        // After the change of owner, which takes set-id bits away.
        fchmod(&file, Mode::from_bits_truncate(wish.mode)).map_err(self.failed("set the mode of", path))?;
        futimens(&file, &TimeSpec::UTIME_OMIT, &time_spec(wish.mtime)).map_err(self.failed("set the time of", path))?;
        file.sync_all().map_err(self.failed("flush", path))
    }

    /// Drafts another name of a file; `false` when that cannot be, or when the file is not what it should be.
    fn draft_name(&self, place: &Place<'_>, path: &RelPath, leader: &RelPath, wanted: Held) -> Result<bool> {
        let Ok((dir, name)) = self.root.open_parent(leader) else {
            return Ok(false);
        };
        match linkat(&dir, name, &place.dir, &*self.temporary, AtFlags::empty()) {
            Ok(()) => {}
            // Another file system, too many names, not allowed, or not there.
            Err(Errno::EXDEV | Errno::EMLINK | Errno::EPERM | Errno::ENOENT | Errno::ENOTDIR | Errno::EOPNOTSUPP) => {
                return Ok(false);
            }
            Err(errno) => return Err(self.failed("link", path)(errno)),
        }
        // What was linked is looked at, since the name could have become another file's.
        let linked = standing(&place.dir, &self.temporary).map_err(self.failed("look at the draft of", path))?;
        let right = linked == Standing::Content(wanted);
        if !right {
            unlink_if_there(&place.dir, &self.temporary).map_err(self.failed("clear the draft of", path))?;
        }
        Ok(right)
    }

    fn draft_link(&self, place: &Place<'_>, path: &RelPath, oid: Oid, mtime: Time) -> Result<()> {
        let owner = self.owner_of(place, path)?;
        let target = self.history.objects.read(&oid, ObjectKind::Blob)?;
        symlinkat(OsStr::from_bytes(&target), &place.dir, &*self.temporary).map_err(self.failed("make link", path))?;
        self.give_name(&place.dir, &self.temporary, &owner).map_err(self.failed("give away", path))?;
        let time = time_spec(mtime);
        utimensat(&place.dir, &*self.temporary, &TimeSpec::UTIME_OMIT, &time, UtimensatFlags::NoFollowSymlink)
            .map_err(self.failed("set the time of", path))
    }

    /// Gives a name to an owner, where that can be done.
    pub(super) fn give_name(&self, dir: &OwnedFd, name: &OsStr, owner: &Stat) -> nix::Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchownat(dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }
}

/// Reads until the buffer is full or the source has ended.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes bytes; of a file with holes, no block that is all zeroes.
fn write_at(file: &File, bytes: &[u8], at: u64, sparse: bool) -> io::Result<()> {
    if !sparse {
        return file.write_all_at(bytes, at);
    }
    for (n, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at + (n * BLOCK) as u64)?;
        }
    }
    Ok(())
}

/// Removes a name, where nothing being there is fine.
pub(super) fn unlink_if_there(dir: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}
