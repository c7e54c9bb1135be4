//! Applies a persisted plan to the workspace.
//!
//! ```text
//! check every object -> clear the way -> write -> remove -> attributes -> flush -> recheck
//! ```
//!
//! Each step may be repeated: after a crash, applying the same plan again rolls forward to the same end. A file is
//! written under a temporary name, flushed and renamed; nothing is opened through a link; what is not what the plan
//! expects is left alone and reported. Must not decide anything: that is the plan's work.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmod, fchmodat, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, fsync, geteuid, symlinkat, unlinkat};
use serde::{Deserialize, Serialize};

use super::beneath::{FileKind, Root, Stat, Time, stat_at, stat_fd};
use super::errors::{HistoryError, Result};
use super::names::{RESTORE_PREFIX, RelPath, is_plan_id, is_restore_draft, unescape};
use super::oid::{ObjectHasher, ObjectKind, Oid};
use super::plan::{Conflict, Held, HeldKind, Operation, RestorePlan};
use super::recheck::{Standing, recheck, standing};
use super::scan::check_workspace;
use super::verify::{BadObject, check_object};
use super::{History, OnProgress, Phase, Progress};
use crate::failpoint;

/// A path that is not what the plan wanted it to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The path.
    pub path: RelPath,
    /// What is different.
    pub problem: String,
}

/// The outcome of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Files and links written.
    pub written: u64,
    /// Files and links that were right already, as after a crash.
    pub already_right: u64,
    /// Files, links and directories removed.
    pub removed: u64,
    /// Directories that stay, since something that is not covered is in them.
    pub kept: Vec<RelPath>,
    /// What the plan left alone.
    pub conflicts: Vec<Conflict>,
    /// Paths that are not what they should be.
    pub mismatches: Vec<Mismatch>,
}

impl History {
    /// Applies a plan that the caller has persisted, from the start or again after a crash.
    ///
    /// # Errors
    /// Fails before anything is touched when an object is missing or damaged or the plan names an unsafe path, and in
    /// between when the file system fails: then the same plan can be applied again.
    pub fn apply_restore(&self, plan: &RestorePlan, progress: OnProgress<'_>) -> Result<RestoreReport> {
        if let Some(step) = plan.operations.iter().find(|step| !step.path().is_restorable()) {
            return Err(HistoryError::UnsafePath { path: step.path().to_string() });
        }
        self.check_objects(plan, progress)?;
        let workspace = unescape(&plan.workspace).map(OsString::from_vec);
        let workspace = workspace.ok_or_else(|| HistoryError::UnsafePath { path: plan.workspace.clone() })?;
        let real = check_workspace(Path::new(&workspace))?;
        if real != Path::new(&workspace) {
            let reason = "a link stands on the way to it since the plan was made";
            return Err(HistoryError::WorkspaceRefused { path: real, reason });
        }
        let root = Root::open(&real)?;
        let mut applying = Applying {
            history: self,
            root: &root,
            temporary: temporary_name(plan)?,
            touched: BTreeSet::new(),
            looked_at: BTreeSet::new(),
            opened: BTreeMap::new(),
            report: RestoreReport { conflicts: plan.conflicts.clone(), ..RestoreReport::default() },
        };
        for path in &plan.drafts {
            applying.remove_draft(path)?;
        }
        let total = plan.operations.len() as u64;
        for (done, step) in plan.operations.iter().enumerate() {
            applying.apply(step)?;
            failpoint::check("history.restore.step").map_err(HistoryError::io("restore", root.path()))?;
            progress(Progress { phase: Phase::Apply, done: done as u64 + 1, total });
        }
        applying.close_again(plan)?;
        applying.flush()?;
        failpoint::check("history.restore.flushed").map_err(HistoryError::io("restore", root.path()))?;
        progress(Progress { phase: Phase::Recheck, done: 0, total });
        let mut report = applying.report;
        report.mismatches.extend(recheck(&root, plan, &report.kept));
        report.mismatches.sort_by(|a, b| a.path.cmp(&b.path));
        report.mismatches.dedup_by(|a, b| a.path == b.path);
        Ok(report)
    }

    fn check_objects(&self, plan: &RestorePlan, progress: OnProgress<'_>) -> Result<()> {
        let mut needed = BTreeMap::new();
        for step in &plan.operations {
            if let Operation::WriteFile { path, oid, .. } | Operation::WriteLink { path, oid, .. } = step {
                needed.entry(*oid).or_insert(path);
            }
        }
        let total = needed.len() as u64;
        let mut bad = Vec::new();
        for (done, (oid, path)) in needed.into_iter().enumerate() {
            if let Err(error) = check_object(&self.objects, &oid, ObjectKind::Blob) {
                bad.push(BadObject { oid, path: path.to_string(), problem: error.to_string() });
            }
            progress(Progress { phase: Phase::Verify, done: done as u64 + 1, total });
        }
        if bad.is_empty() { Ok(()) } else { Err(HistoryError::Unrestorable { bad }) }
    }
}

/// One name per plan suffices, since one file is written at a time; the next run finds it again and removes it.
fn temporary_name(plan: &RestorePlan) -> Result<OsString> {
    if !is_plan_id(plan.id.as_bytes()) {
        return Err(HistoryError::UnsafePath { path: plan.id.clone() });
    }
    Ok(OsString::from_vec([RESTORE_PREFIX, plan.id.as_bytes()].concat()))
}

struct Applying<'a> {
    history: &'a History,
    root: &'a Root,
    temporary: OsString,
    /// Directories whose names changed.
    touched: BTreeSet<RelPath>,
    /// Directories that were looked at for being closed to their owner.
    looked_at: BTreeSet<RelPath>,
    /// Those that were opened for the time being, with the mode that they had.
    opened: BTreeMap<RelPath, u32>,
    report: RestoreReport,
}

impl Applying<'_> {
    fn failed<E: Into<io::Error>>(
        &self,
        action: &'static str,
        path: &RelPath,
    ) -> impl FnOnce(E) -> HistoryError + use<E> {
        HistoryError::io(action, &self.root.show(path))
    }

    fn mismatch(&mut self, path: &RelPath, problem: impl Into<String>) {
        self.report.mismatches.push(Mismatch { path: path.clone(), problem: problem.into() });
    }

    fn touch(&mut self, path: &RelPath) {
        self.touched.extend(path.parent());
    }

    fn apply(&mut self, step: &Operation) -> Result<()> {
        if !matches!(step, Operation::SetAttributes { .. }) {
            self.open_up(step.path())?;
        }
        match step {
            Operation::MakeDirectory { path } => self.make_directory(path),
            Operation::WriteFile { path, oid, mode, mtime, replaces } => {
                let wanted = Held { kind: HeldKind::File, oid: *oid };
                self.write(path, wanted, Some(*mode), *mtime, replaces.as_ref())
            }
            Operation::WriteLink { path, oid, mtime, replaces } => {
                let wanted = Held { kind: HeldKind::Symlink, oid: *oid };
                self.write(path, wanted, None, *mtime, replaces.as_ref())
            }
            Operation::RemoveFile { path, holds } => self.remove_file(path, holds),
            Operation::RemoveDirectory { path } => self.remove_directory(path),
            Operation::SetAttributes { path, mode, mtime } => self.set_attributes(path, *mode, *mtime),
        }
    }

    /// Opens the directory of a path; `None`, with a report, when there is none that can be entered without a link.
    fn parent<'p>(&mut self, path: &'p RelPath) -> Result<Option<(OwnedFd, &'p OsStr)>> {
        match self.root.open_parent(path) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                self.mismatch(path, "there is no directory for it");
                Ok(None)
            }
            Err(errno) => Err(self.failed("open the directory of", path)(errno)),
        }
    }

    fn make_directory(&mut self, path: &RelPath) -> Result<()> {
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(());
        };
        match mkdirat(&dir, name, Mode::S_IRWXU) {
            Ok(()) => {
                let owner = stat_fd(&dir).map_err(self.failed("look at the directory of", path))?;
                self.give_name(&dir, name, &owner).map_err(self.failed("give away", path))?;
                self.touch(path);
            }
            Err(Errno::EEXIST) => match stat_at(&dir, name).map(|stat| stat.kind()) {
                Ok(FileKind::Directory) => {}
                _ => self.mismatch(path, "something else stands where a directory must go"),
            },
            Err(errno) => return Err(self.failed("make directory", path)(errno)),
        }
        Ok(())
    }

    fn write(
        &mut self,
        path: &RelPath,
        wanted: Held,
        mode: Option<u32>,
        mtime: Time,
        replaces: Option<&Held>,
    ) -> Result<()> {
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(());
        };
        let temporary = self.temporary.clone();
        unlink_if_there(&dir, &temporary).map_err(self.failed("clear the draft of", path))?;
        match standing(&dir, name).map_err(self.failed("look at", path))? {
            Standing::Content(held) if held == wanted => {
                self.report.already_right += 1;
                return self.set_attributes(path, mode, mtime);
            }
            Standing::Content(held) if Some(&held) == replaces => {}
            Standing::Nothing => {}
            Standing::Content(_) => {
                self.mismatch(path, "it has changed since the plan was made");
                return Ok(());
            }
            Standing::Directory | Standing::Other => {
                self.mismatch(path, "something else stands where a file must go");
                return Ok(());
            }
        }
        // The owner stays who it was; a new file belongs to the owner of its directory, not to the daemon's user.
        let owner = stat_at(&dir, name).or_else(|_| stat_fd(&dir));
        let owner = owner.map_err(self.failed("look at the directory of", path))?;
        match mode {
            Some(mode) => self.draft_file(&dir, &temporary, path, wanted.oid, mode, mtime, &owner)?,
            None => self.draft_link(&dir, &temporary, path, wanted.oid, mtime, &owner)?,
        }
        failpoint::check("history.restore.drafted").map_err(self.failed("write", path))?;
        renameat(&dir, &*temporary, &dir, name).map_err(self.failed("put in place", path))?;
        self.report.written += 1;
        self.touch(path);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn draft_file(
        &self,
        dir: &OwnedFd,
        temporary: &OsStr,
        path: &RelPath,
        oid: Oid,
        mode: u32,
        mtime: Time,
        owner: &Stat,
    ) -> Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(dir, temporary, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let mut file = File::from(fd.map_err(self.failed("draft", path))?);
        let mut object = self.history.objects.open_object(&oid)?;
        let mut hasher = ObjectHasher::new(ObjectKind::Blob, object.size);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let n = object.read(&mut buffer).map_err(self.failed("read the content of", path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            file.write_all(&buffer[..n]).map_err(self.failed("write", path))?;
        }
        if hasher.finish() != oid {
            return Err(HistoryError::DamagedObject { oid, problem: "its content has another hash".to_owned() });
        }
        if geteuid().is_root() {
            fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
                .map_err(self.failed("give away", path))?;
        }
        // After the change of owner, which takes set-id bits away.
        fchmod(&file, Mode::from_bits_truncate(mode)).map_err(self.failed("set the mode of", path))?;
        futimens(&file, &TimeSpec::UTIME_OMIT, &time_spec(mtime)).map_err(self.failed("set the time of", path))?;
        file.sync_all().map_err(self.failed("flush", path))
    }

    fn draft_link(
        &self,
        dir: &OwnedFd,
        temporary: &OsStr,
        path: &RelPath,
        oid: Oid,
        mtime: Time,
        owner: &Stat,
    ) -> Result<()> {
        let target = self.history.objects.read(&oid, ObjectKind::Blob)?;
        symlinkat(OsStr::from_bytes(&target), dir, temporary).map_err(self.failed("make link", path))?;
        self.give_name(dir, temporary, owner).map_err(self.failed("give away", path))?;
        utimensat(dir, temporary, &TimeSpec::UTIME_OMIT, &time_spec(mtime), UtimensatFlags::NoFollowSymlink)
            .map_err(self.failed("set the time of", path))
    }

    fn give_name(&self, dir: &OwnedFd, name: &OsStr, owner: &Stat) -> nix::Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchownat(dir, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    fn remove_file(&mut self, path: &RelPath, holds: &Held) -> Result<()> {
        let (dir, name) = match self.root.open_parent(path) {
            Ok(opened) => opened,
            // Its directory is gone or became something else: an earlier run came further than this.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            Err(errno) => return Err(self.failed("open the directory of", path)(errno)),
        };
        match standing(&dir, name).map_err(self.failed("look at", path))? {
            Standing::Content(held) if held == *holds => {
                unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir).map_err(self.failed("remove", path))?;
                self.report.removed += 1;
                self.touch(path);
            }
            Standing::Nothing | Standing::Directory => {}
            Standing::Content(_) | Standing::Other => {
                self.mismatch(path, "it has changed since the plan was made, and is kept");
            }
        }
        Ok(())
    }

    /// Removes an unfinished file of an earlier restore.
    fn remove_draft(&mut self, path: &RelPath) -> Result<()> {
        self.open_up(path)?;
        match self.root.open_parent(path) {
            Ok((dir, name)) if is_restore_draft(name.as_bytes()) => {
                unlink_if_there(&dir, name).map_err(self.failed("remove", path))
            }
            _ => Ok(()),
        }
    }

    fn remove_directory(&mut self, path: &RelPath) -> Result<()> {
        let (dir, name) = match self.root.open_parent(path) {
            Ok(opened) => opened,
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            Err(errno) => return Err(self.failed("open the directory of", path)(errno)),
        };
        self.clear_drafts_in(path)?;
        match unlinkat(&dir, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => {
                self.report.removed += 1;
                self.touch(path);
                // What was touched in it cannot be flushed any more.
                self.touched.retain(|touched| !touched.is_within(path));
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => self.report.kept.push(path.clone()),
            Err(errno) => return Err(self.failed("remove directory", path)(errno)),
        }
        Ok(())
    }

    /// Removes this plan's own draft, should a crash have left one in a directory that is to go.
    fn clear_drafts_in(&self, path: &RelPath) -> Result<()> {
        match self.root.open_dir(path) {
            Ok(dir) => unlink_if_there(&dir, &self.temporary).map_err(self.failed("clear drafts in", path)),
            Err(_) => Ok(()),
        }
    }

    /// Lets the owner write into the directory of a path, as a daemon without privileges must for read-only ones.
    fn open_up(&mut self, path: &RelPath) -> Result<()> {
        let Some(dir) = path.parent() else {
            return Ok(());
        };
        if geteuid().is_root() || !self.looked_at.insert(dir.clone()) {
            return Ok(());
        }
        // What cannot be looked at is reported by the step itself.
        let Ok(stat) = self.root.stat(&dir) else {
            return Ok(());
        };
        let closed = stat.kind() == FileKind::Directory && stat.permissions() & 0o300 != 0o300;
        if closed && stat.uid == geteuid().as_raw() {
            self.set_mode(&dir, stat.permissions() | 0o700)?;
            self.opened.insert(dir, stat.permissions());
        }
        Ok(())
    }

    /// Closes what was opened, except where the plan itself has set a mode.
    fn close_again(&mut self, plan: &RestorePlan) -> Result<()> {
        for step in &plan.operations {
            if let Operation::SetAttributes { path, .. } = step {
                self.opened.remove(path);
            }
        }
        for (path, mode) in std::mem::take(&mut self.opened) {
            if self.root.stat(&path).is_ok_and(|stat| stat.kind() == FileKind::Directory) {
                self.set_mode(&path, mode)?;
            }
        }
        Ok(())
    }

    /// Sets the permission bits of a file or directory, without following a link.
    fn set_mode(&self, path: &RelPath, mode: u32) -> Result<()> {
        let mode = Mode::from_bits_truncate(mode);
        let set = match self.root.open_parent(path) {
            Ok((dir, name)) => fchmodat(&dir, name, mode, FchmodatFlags::NoFollowSymlink),
            Err(Errno::EINVAL) if path.is_root() => self.root.open_dir(path).and_then(|dir| fchmod(&dir, mode)),
            Err(errno) => Err(errno),
        };
        set.map_err(self.failed("set the mode of", path))
    }

    fn set_attributes(&mut self, path: &RelPath, mode: Option<u32>, mtime: Time) -> Result<()> {
        let time = time_spec(mtime);
        if path.is_root() {
            let dir = self.root.open_dir(path).map_err(self.failed("open", path))?;
            if let Some(mode) = mode {
                self.set_mode(path, mode)?;
            }
            return futimens(&dir, &TimeSpec::UTIME_OMIT, &time).map_err(self.failed("set the time of", path));
        }
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(());
        };
        match (stat_at(&dir, name).map(|stat| stat.kind()), mode) {
            (Ok(FileKind::Regular | FileKind::Directory), Some(mode)) => self.set_mode(path, mode)?,
            (Ok(FileKind::Symlink), None) => {}
            _ => {
                self.mismatch(path, "it is not what it was when the plan was made");
                return Ok(());
            }
        }
        utimensat(&dir, name, &TimeSpec::UTIME_OMIT, &time, UtimensatFlags::NoFollowSymlink)
            .map_err(self.failed("set the time of", path))
    }

    fn flush(&mut self) -> Result<()> {
        for path in &self.touched {
            match self.root.open_dir(path) {
                Ok(dir) => fsync(&dir).map_err(self.failed("flush", path))?,
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => return Err(self.failed("flush", path)(errno)),
            }
        }
        Ok(())
    }
}

fn unlink_if_there(dir: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        result => result,
    }
}

fn time_spec(time: Time) -> TimeSpec {
    TimeSpec::new(time.sec, i64::from(time.nsec))
}
