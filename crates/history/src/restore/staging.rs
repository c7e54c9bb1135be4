//! Writes the files and links of a plan under temporary names, flushes them, and renames them.
//!
//! ```text
//! stage, stage, stage …   ─►   flush, in parallel   ─►   rename, rename, rename …
//! ```
//!
//! A flush waits for the disk, so several run at once. Every file is complete on the disk before it gets its
//! name. An existing file is never written to: a replaced file keeps its content under its other names. All
//! decisions are in the plan.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, fstatat, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, geteuid, linkat, symlinkat, unlinkat};

use crate::errors::{HistoryError, Result};
use crate::restore::apply::Applying;
use crate::restore::attributes::time_spec;
use crate::restore::plan::{ContentKind, StoredContent};
use crate::restore::recheck::{PathState, TRIES, path_state, same};
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::tree::confined_dir::{FileStat, Time, stat_at, stat_fd};
use crate::tree::names::RelPath;
use crate::tree::xattrs::{self, Xattrs, XattrsRead};
use fermata_failpoint as failpoint;

/// Holes consist of whole blocks of this size in bytes.
const BLOCK: usize = 4096;

/// The largest number of staged files.
pub(crate) const MAX_STAGED: usize = 32;
/// From this number of bytes on, staged files are renamed. Their size is the additional space that a restore
/// needs.
const STAGED_BYTES: u64 = 32 << 20;
/// The largest number of concurrent flushes.
const FLUSHES: usize = 8;

/// The file that a step writes.
pub(crate) struct PlannedFile<'a> {
    pub oid: Oid,
    pub mode: u32,
    /// Last change of the content.
    pub mtime: Time,
    pub xattrs: &'a Xattrs,
    pub sparse: bool,
    /// The file that it becomes another name of.
    pub linked_to: Option<&'a RelPath>,
}

/// The destination of a file or link.
struct Destination {
    dir: OwnedFd,
    name: OsString,
    /// The temporary name.
    temporary: OsString,
    wanted: StoredContent,
    replaces: Option<StoredContent>,
    /// The metadata of the existing entry; `None` if there is none.
    before: Option<FileStat>,
    /// Whether the existing entry has the wanted content.
    right: bool,
}

impl Destination {
    fn stat(&self) -> Option<FileStat> {
        stat_at(&self.dir, &self.name).ok()
    }
}

/// Staged files: written, but neither flushed nor renamed.
#[derive(Default)]
pub(crate) struct Staged {
    files: Vec<StagedEntry>,
    bytes: u64,
}

struct StagedEntry {
    path: RelPath,
    destination: Destination,
    /// The file to flush; `None` for a link, which is flushed with its directory.
    file: Option<File>,
}

impl Staged {
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Says whether the staged files must be renamed now.
    pub fn is_full(&self) -> bool {
        self.bytes >= STAGED_BYTES
    }
}

impl Applying<'_> {
    /// Stages a file, or a hard link to one.
    pub(crate) fn write_file(
        &mut self,
        path: &RelPath,
        file_plan: &PlannedFile<'_>,
        replaces: Option<&StoredContent>,
        temporary: &OsStr,
    ) -> Result<()> {
        let wanted = StoredContent { kind: ContentKind::File, oid: file_plan.oid };
        let Some(destination) = self.destination(path, wanted, replaces, temporary)? else {
            return Ok(());
        };
        if destination.right && self.has_right_links_and_holes(&destination, file_plan) {
            self.report.already_right += 1;
            return match file_plan.linked_to {
                // It shares the attributes of the file that it links to.
                Some(_) => Ok(()),
                None => self.set_attributes(path, Some(file_plan.mode), file_plan.mtime, Some(file_plan.xattrs), 1),
            };
        }
        let linked = match file_plan.linked_to {
            Some(leader) => self.stage_hard_link(&destination, path, leader, wanted)?,
            None => false,
        };
        let mut file = None;
        if !linked {
            if file_plan.linked_to.is_some() {
                self.unlinked.insert(path.clone());
            }
            file = Some(self.stage_file(&destination, path, file_plan)?);
        }
        self.staged.files.push(StagedEntry { path: path.clone(), destination, file });
        Ok(())
    }

    /// Stages a symbolic link.
    pub(crate) fn write_link(
        &mut self,
        path: &RelPath,
        oid: Oid,
        mtime: Time,
        replaces: Option<&StoredContent>,
        temporary: &OsStr,
    ) -> Result<()> {
        let Some(destination) =
            self.destination(path, StoredContent { kind: ContentKind::Symlink, oid }, replaces, temporary)?
        else {
            return Ok(());
        };
        if destination.right {
            self.report.already_right += 1;
            return self.set_attributes(path, None, mtime, None, 1);
        }
        self.stage_link(&destination, path, oid, mtime)?;
        self.staged.files.push(StagedEntry { path: path.clone(), destination, file: None });
        Ok(())
    }

    /// Opens the directory of a path that may be written. Returns `None` and reports a mismatch if another
    /// entry is there.
    fn destination(
        &mut self,
        path: &RelPath,
        wanted: StoredContent,
        replaces: Option<&StoredContent>,
        temporary: &OsStr,
    ) -> Result<Option<Destination>> {
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(None);
        };
        unlink_if_there(&dir, temporary).map_err(self.failed("remove the temporary file of", path))?;
        let (name, temporary, replaces) = (name.to_owned(), temporary.to_owned(), replaces.copied());
        let mut destination = Destination { dir, name, temporary, wanted, replaces, before: None, right: false };
        // Read before the content is, so that a later change of the entry changes this, too.
        destination.before = destination.stat();
        let Some(right) = self.may_write(&destination, path)? else {
            return Ok(None);
        };
        destination.right = right;
        Ok(Some(destination))
    }

    /// Says whether the wanted content exists already. Returns `None` and reports a mismatch if another entry
    /// is there.
    fn may_write(&mut self, destination: &Destination, path: &RelPath) -> Result<Option<bool>> {
        match path_state(&destination.dir, &destination.name).map_err(self.failed("determine the state of", path))? {
            PathState::Content(content) if content == destination.wanted => Ok(Some(true)),
            PathState::Content(content) if Some(content) == destination.replaces => Ok(Some(false)),
            PathState::Nothing => Ok(Some(false)),
            PathState::Content(_) => {
                self.mismatch(path, "it has changed since the plan was made and was left unchanged");
                Ok(None)
            }
            PathState::Directory | PathState::Other => {
                self.mismatch(path, "another entry is where a file must be");
                Ok(None)
            }
        }
    }

    /// Says whether a file with the right content has the right names and holes, so that it can stay.
    fn has_right_links_and_holes(&self, destination: &Destination, file_plan: &PlannedFile<'_>) -> bool {
        let Some(stat) = destination.stat() else {
            return false;
        };
        match file_plan.linked_to {
            Some(leader) => self.root.stat(leader).is_ok_and(|other| (other.dev, other.ino) == (stat.dev, stat.ino)),
            None => {
                let raw = fstatat(&destination.dir, &*destination.name, AtFlags::AT_SYMLINK_NOFOLLOW);
                let has_holes = || raw.is_ok_and(|raw| raw.st_blocks * 512 < raw.st_size);
                stat.nlink == 1 && (!file_plan.sparse || has_holes())
            }
        }
    }

    /// Flushes all staged files and renames them.
    pub(crate) fn put_all_in_place(&mut self) -> Result<()> {
        let Staged { files, .. } = std::mem::take(&mut self.staged);
        in_parallel(&files, |staged| match &staged.file {
            Some(file) => file.sync_all().map_err(self.failed("flush", &staged.path)),
            None => Ok(()),
        })?;
        files.into_iter().try_for_each(|staged| self.put_in_place(&staged.destination, &staged.path))
    }

    fn put_in_place(&mut self, destination: &Destination, path: &RelPath) -> Result<()> {
        failpoint::check("history.restore.staged").map_err(self.failed("write", path))?;
        let mut before = destination.before;
        for _ in 0..TRIES {
            let now = destination.stat();
            if same(before, now) {
                match rename_over(destination, now.is_none()) {
                    Ok(()) => {
                        self.report.written += 1;
                        self.touch(path);
                        return Ok(());
                    }
                    // The entry was created in this instant.
                    Err(Errno::EEXIST) if now.is_none() => continue,
                    Err(errno) => return Err(self.failed("put in place", path)(errno)),
                }
            }
            // The entry changed while other files were staged, and may change again while this reads it.
            if self.may_write(destination, path)?.is_none() {
                return unlink_if_there(&destination.dir, &destination.temporary)
                    .map_err(self.failed("remove the temporary file of", path));
            }
            before = now;
        }
        self.mismatch(path, "it kept changing and was left unchanged");
        unlink_if_there(&destination.dir, &destination.temporary)
            .map_err(self.failed("remove the temporary file of", path))
    }

    /// Returns the metadata of the existing entry or else of the directory: a replaced file keeps its owner,
    /// and a new file gets the owner of its directory instead of the daemon's user.
    fn owner_of(&self, destination: &Destination, path: &RelPath) -> Result<FileStat> {
        let owner = stat_at(&destination.dir, &destination.name).or_else(|_| stat_fd(&destination.dir));
        owner.map_err(self.failed("read the metadata of the directory of", path))
    }

    fn stage_file(&mut self, destination: &Destination, path: &RelPath, file_plan: &PlannedFile<'_>) -> Result<File> {
        let owner = self.owner_of(destination, path)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&destination.dir, &*destination.temporary, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = File::from(fd.map_err(self.failed("create a temporary file for", path))?);
        let mut object = self.history.objects.open_object(&file_plan.oid)?;
        let mut hasher = ObjectHasher::new(ObjectKind::Blob, object.size);
        let mut buffer = vec![0; 16 * BLOCK];
        let mut at = 0;
        loop {
            let n = fill(&mut object, &mut buffer).map_err(self.failed("read the content of", path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            write_at(&file, &buffer[..n], at, file_plan.sparse).map_err(self.failed("write", path))?;
            at += n as u64;
        }
        if hasher.finish() != file_plan.oid {
            return Err(HistoryError::DamagedObject {
                oid: file_plan.oid,
                problem: "its content does not match its id".to_owned(),
            });
        }
        // A hole at the end of the file is made by its length alone.
        file.set_len(at).map_err(self.failed("write", path))?;
        if xattrs::set(&file, file_plan.xattrs).map_err(self.failed("set the attributes of", path))?
            == XattrsRead::NotKept
        {
            self.without_xattrs.insert(path.clone());
        }
        if geteuid().is_root() {
            fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(self.failed("set the owner of", path))?;
        }
        // The mode follows the owner, since a change of the owner clears the set-id bits.
        fchmod(&file, Mode::from_bits_truncate(file_plan.mode)).map_err(self.failed("set the mode of", path))?;
        futimens(&file, &TimeSpec::UTIME_OMIT, &time_spec(file_plan.mtime))
            .map_err(self.failed("set the time of", path))?;
        self.staged.bytes += at;
        Ok(file)
    }

    /// Stages a hard link. Returns `false` if it cannot be created or the linked file has another content.
    fn stage_hard_link(
        &self,
        destination: &Destination,
        path: &RelPath,
        leader: &RelPath,
        wanted: StoredContent,
    ) -> Result<bool> {
        let Ok((dir, name)) = self.root.open_parent(leader) else {
            return Ok(false);
        };
        match linkat(&dir, name, &destination.dir, &*destination.temporary, AtFlags::empty()) {
            Ok(()) => {}
            // Another file system, too many links, not permitted, or the file does not exist.
            Err(Errno::EXDEV | Errno::EMLINK | Errno::EPERM | Errno::ENOENT | Errno::ENOTDIR | Errno::EOPNOTSUPP) => {
                return Ok(false);
            }
            Err(errno) => return Err(self.failed("link", path)(errno)),
        }
        // The new link is checked, since `leader` may have been replaced by another file.
        let linked = path_state(&destination.dir, &destination.temporary)
            .map_err(self.failed("determine the state of the temporary file of", path))?;
        let right = linked == PathState::Content(wanted);
        if !right {
            unlink_if_there(&destination.dir, &destination.temporary)
                .map_err(self.failed("remove the temporary file of", path))?;
        }
        Ok(right)
    }

    fn stage_link(&self, destination: &Destination, path: &RelPath, oid: Oid, mtime: Time) -> Result<()> {
        let owner = self.owner_of(destination, path)?;
        let target = self.history.objects.read(&oid, ObjectKind::Blob)?;
        symlinkat(OsStr::from_bytes(&target), &destination.dir, &*destination.temporary)
            .map_err(self.failed("create the link", path))?;
        self.set_owner(&destination.dir, &destination.temporary, &owner)
            .map_err(self.failed("set the owner of", path))?;
        let time = time_spec(mtime);
        utimensat(
            &destination.dir,
            &*destination.temporary,
            &TimeSpec::UTIME_OMIT,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(self.failed("set the time of", path))
    }

    /// Sets the owner of a name if the daemon has the privilege.
    pub(crate) fn set_owner(&self, dir: &OwnedFd, name: &OsStr, owner: &FileStat) -> nix::Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchownat(dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }
}

/// Renames a staged file. If no entry existed, one that was created meanwhile is not replaced.
fn rename_over(destination: &Destination, nothing_stood: bool) -> nix::Result<()> {
    if nothing_stood {
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(&destination.dir, &*destination.temporary, &destination.dir, &*destination.name, flags) {
            // The file system does not support the flag.
            Err(Errno::EINVAL | Errno::ENOSYS) => {}
            result => return result,
        }
    }
    renameat(&destination.dir, &*destination.temporary, &destination.dir, &*destination.name)
}

/// Reads until the buffer is full or the source ends.
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

/// Writes bytes at an offset; with `sparse`, skips blocks of zeroes.
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

/// Runs work that waits for the disk on several things at once and returns the first error. Work that has begun
/// is finished.
pub(crate) fn in_parallel<T: Sync>(things: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(thing) = things.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(thing)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        // If a thread cannot be started, the others do its part.
        let begin = |_| std::thread::Builder::new().name("flush".to_owned()).spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..things.len().min(FLUSHES)).filter_map(begin).collect();
        let own = run();
        let end = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        others.into_iter().map(end).fold(own, Result::and)
    })
}

/// Removes a name; that it does not exist is no error.
pub(crate) fn unlink_if_there<Fd: AsFd>(dir: Fd, name: &OsStr) -> nix::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}
