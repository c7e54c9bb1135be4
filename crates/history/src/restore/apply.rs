//! Applies a persisted plan to the workspace.
//!
//! ```text
//! check every object -> clear the way -> write -> remove -> attributes -> flush -> recheck
//! ```
//!
//! Every step may be repeated: after a crash, applying the same plan again rolls forward to the same end. A
//! file is written under a temporary name, flushed and renamed, several of them at once. No path is opened
//! through a symbolic link. An entry that differs from what the plan expects is left unchanged and reported.
//! All decisions are in the plan. `staging` writes files; `attributes` sets modes, owners and times.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, fsync, unlinkat};

use crate::History;
use crate::errors::BadObject;
use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::restore::plan::{Operation, RestorePlan, StoredContent, workspace_of};
use crate::restore::recheck::{PathState, recheck, steady_state};
use crate::restore::report::{Mismatch, RestoreReport};
use crate::restore::staging::{MAX_STAGED, PlannedFile, Staged, in_parallel, unlink_if_there};
use crate::store::oid::ObjectKind;
use crate::tree::confined_dir::{FileKind, Root, stat_at, stat_fd};
use crate::tree::names::{RESTORE_PREFIX, RelPath, is_plan_id, is_staged_name};
use crate::verify::check_object;
use crate::workspace::check_workspace;
use fermata_failpoint as failpoint;

impl History {
    /// Applies a plan that the caller has persisted, for the first time or again after a crash.
    ///
    /// # Errors
    /// Fails before any change if an object is missing or damaged or the plan contains an unsafe path. Fails
    /// later if the file system fails; the same plan can then be applied again.
    pub fn apply_restore(&self, plan: &RestorePlan, progress: OnProgress<'_>) -> Result<RestoreReport> {
        if let Some(step) = plan.operations.iter().find(|step| !step.path().is_restorable()) {
            return Err(HistoryError::UnsafePath { path: step.path().to_string() });
        }
        self.check_objects(plan, progress)?;
        let workspace = workspace_of(plan)?;
        let real = check_workspace(&workspace)?;
        if real != workspace {
            let reason = "a symbolic link has been put into its path since the plan was made";
            return Err(HistoryError::WorkspaceRefused { path: real, reason });
        }
        let root = Root::open(&real)?;
        let mut applying = Applying {
            history: self,
            root: &root,
            temporary: temporary_name(plan)?,
            staged: Staged::default(),
            touched: BTreeSet::new(),
            checked_dirs: BTreeSet::new(),
            opened: BTreeMap::new(),
            without_xattrs: BTreeSet::new(),
            unlinked: BTreeSet::new(),
            report: RestoreReport { conflicts: plan.conflicts.clone(), ..RestoreReport::default() },
        };
        if let Err(error) = applying.apply_all(plan, progress) {
            // The caller may give up this restore: remove its temporary files. The next run repeats what fails
            // here.
            applying.clean_up(plan);
            return Err(error);
        }
        failpoint::check("history.restore.flushed").map_err(HistoryError::io("restore", root.path()))?;
        progress(StoreProgress { phase: StorePhase::Recheck, done: 0, total: plan.operations.len() as u64 });
        let Applying { mut report, without_xattrs, unlinked, .. } = applying;
        (report.without_xattrs, report.unlinked) = (without_xattrs, unlinked);
        recheck(&root, plan, &mut report);
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
            progress(StoreProgress { phase: StorePhase::Verify, done: done as u64 + 1, total });
        }
        if bad.is_empty() {
            return Ok(());
        }
        self.mark_damaged(&bad.iter().map(|bad| bad.oid).collect::<Vec<_>>());
        Err(HistoryError::Unrestorable { bad })
    }
}

/// Returns the prefix of a plan's temporary names. Every run uses the same names and removes existing files.
fn temporary_name(plan: &RestorePlan) -> Result<OsString> {
    if !is_plan_id(plan.id.as_bytes()) {
        return Err(HistoryError::UnsafePath { path: plan.id.clone() });
    }
    Ok(OsString::from_vec([RESTORE_PREFIX, plan.id.as_bytes()].concat()))
}

/// A restore in progress.
pub(crate) struct Applying<'a> {
    pub history: &'a History,
    pub root: &'a Root,
    /// The prefix of the temporary names.
    temporary: OsString,
    /// Files that are written but not renamed yet.
    pub staged: Staged,
    /// Directories in which names changed.
    touched: BTreeSet<RelPath>,
    /// Directories that were checked for being closed to their owner.
    pub checked_dirs: BTreeSet<RelPath>,
    /// Directories that were opened for the duration of the restore, with their original modes.
    pub opened: BTreeMap<RelPath, u32>,
    /// Paths whose extended attributes the file system does not support.
    pub without_xattrs: BTreeSet<RelPath>,
    /// Names that could not be hard-linked.
    pub unlinked: BTreeSet<RelPath>,
    pub report: RestoreReport,
}

impl Applying<'_> {
    fn apply_all(&mut self, plan: &RestorePlan, progress: OnProgress<'_>) -> Result<()> {
        for path in &plan.staged_files {
            self.remove_temporary_file(path)?;
        }
        let total = plan.operations.len() as u64;
        for (done, step) in plan.operations.iter().enumerate() {
            // A temporary name is used again only after its file was renamed.
            if done.is_multiple_of(MAX_STAGED) || self.staged.is_full() || !goes_beside_staged(step) {
                self.put_all_in_place()?;
            }
            let name = self.temporary_name_of(done);
            match self.apply(step, &name) {
                // Renaming a staged file frees the space of the file that it replaces.
                Err(error) if error.is_disk_full() && !self.staged.is_empty() => {
                    self.put_all_in_place()?;
                    self.apply(step, &name)?;
                }
                result => result?,
            }
            failpoint::check("history.restore.step").map_err(HistoryError::io("restore", self.root.path()))?;
            progress(StoreProgress { phase: StorePhase::Apply, done: done as u64 + 1, total });
        }
        self.put_all_in_place()?;
        self.close_again(plan)?;
        self.flush()
    }

    /// Removes temporary files and closes opened directories as far as possible.
    fn clean_up(&mut self, plan: &RestorePlan) {
        let dirs: BTreeSet<RelPath> = plan.operations.iter().filter_map(|step| step.path().parent()).collect();
        let cleared = dirs.iter().try_for_each(|dir| self.clear_temporary_files_in(dir));
        if let Err(error) = cleared.and_then(|()| self.close_again(plan)) {
            tracing::warn!(%error, "failed to clean up after a failed restore; the next attempt does so");
        }
    }

    /// Returns a closure for `map_err` that adds an action and a path to a system error.
    pub(crate) fn failed<E: Into<io::Error>>(
        &self,
        action: &'static str,
        path: &RelPath,
    ) -> impl FnOnce(E) -> HistoryError + use<E> {
        HistoryError::io(action, &self.root.show(path))
    }

    pub(crate) fn mismatch(&mut self, path: &RelPath, problem: impl Into<String>) {
        self.report.mismatches.push(Mismatch { path: path.clone(), problem: problem.into() });
    }

    /// Records that a name in the directory of `path` changed.
    pub(crate) fn touch(&mut self, path: &RelPath) {
        self.touched.extend(path.parent());
    }

    fn temporary_name_of(&self, step: usize) -> OsString {
        let number = format!("-{}", step % MAX_STAGED);
        OsString::from_vec([self.temporary.as_bytes(), number.as_bytes()].concat())
    }

    fn apply(&mut self, step: &Operation, temporary: &OsStr) -> Result<()> {
        if !matches!(step, Operation::SetAttributes { .. }) {
            self.open_up(step.path())?;
        }
        match step {
            Operation::MakeDirectory { path } => self.make_directory(path),
            Operation::WriteFile { path, oid, mode, mtime, replaces, xattrs, sparse, linked_to } => {
                let (oid, mode, mtime, sparse) = (*oid, *mode, *mtime, *sparse);
                let file = PlannedFile { oid, mode, mtime, xattrs, sparse, linked_to: linked_to.as_ref() };
                self.write_file(path, &file, replaces.as_ref(), temporary)
            }
            Operation::WriteLink { path, oid, mtime, replaces } => {
                self.write_link(path, *oid, *mtime, replaces.as_ref(), temporary)
            }
            Operation::RemoveFile { path, holds } => self.remove_file(path, holds),
            Operation::RemoveDirectory { path } => self.remove_directory(path),
            Operation::SetAttributes { path, mode, mtime, xattrs, names } => {
                self.set_attributes(path, *mode, *mtime, xattrs.as_ref(), *names)
            }
        }
    }

    /// Opens the directory of a path. Returns `None` and reports a mismatch if it does not exist or a symbolic
    /// link is in the way.
    pub(crate) fn parent<'p>(&mut self, path: &'p RelPath) -> Result<Option<(OwnedFd, &'p OsStr)>> {
        match self.root.open_parent(path) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                self.mismatch(path, "its directory does not exist");
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
                let owner = stat_fd(&dir).map_err(self.failed("read the metadata of the directory of", path))?;
                self.set_owner(&dir, name, &owner).map_err(self.failed("set the owner of", path))?;
                self.touch(path);
            }
            Err(Errno::EEXIST) => match stat_at(&dir, name).map(|stat| stat.kind()) {
                Ok(FileKind::Directory) => {}
                _ => self.mismatch(path, "another entry is where a directory must be"),
            },
            Err(errno) => return Err(self.failed("create directory", path)(errno)),
        }
        Ok(())
    }

    fn remove_file(&mut self, path: &RelPath, holds: &StoredContent) -> Result<()> {
        let (dir, name) = match self.root.open_parent(path) {
            Ok(opened) => opened,
            // The directory was removed or replaced: an earlier run has come further than this step.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            Err(errno) => return Err(self.failed("open the directory of", path)(errno)),
        };
        match steady_state(&dir, name).map_err(self.failed("determine the state of", path))? {
            Some(PathState::Content(content)) if content == *holds => {
                unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir).map_err(self.failed("remove", path))?;
                self.report.removed += 1;
                self.touch(path);
            }
            Some(PathState::Nothing | PathState::Directory) => {}
            Some(PathState::Content(_) | PathState::Other) => {
                self.mismatch(path, "it has changed since the plan was made and was left unchanged");
            }
            None => self.mismatch(path, "it kept changing and was left unchanged"),
        }
        Ok(())
    }

    /// Removes a temporary file of an earlier restore.
    fn remove_temporary_file(&mut self, path: &RelPath) -> Result<()> {
        self.open_up(path)?;
        match self.root.open_parent(path) {
            Ok((dir, name)) if is_staged_name(name.as_bytes()) => {
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
        self.clear_temporary_files_in(path)?;
        match unlinkat(&dir, name, UnlinkatFlags::RemoveDir) {
            Ok(()) => {
                self.report.removed += 1;
                self.touch(path);
                // Directories below the removed one cannot be flushed any more.
                self.touched.retain(|touched| !touched.is_within(path));
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => self.report.kept.push(path.clone()),
            Err(errno) => return Err(self.failed("remove directory", path)(errno)),
        }
        Ok(())
    }

    /// Removes this plan's temporary files from a directory, which a crash or a failure may have left.
    fn clear_temporary_files_in(&self, path: &RelPath) -> Result<()> {
        let Ok(mut dir) = self.root.open_dir(path).and_then(Dir::from_fd) else {
            return Ok(());
        };
        let is_own = |name: &[u8]| is_staged_name(name) && name.starts_with(self.temporary.as_bytes());
        let names = dir.iter().filter_map(std::result::Result::ok).map(|entry| entry.file_name().to_owned());
        let own: Vec<_> = names.filter(|name| is_own(name.to_bytes())).collect();
        own.iter()
            .try_for_each(|name| unlink_if_there(&dir, OsStr::from_bytes(name.to_bytes())))
            .map_err(self.failed("remove temporary files in", path))
    }

    fn flush(&self) -> Result<()> {
        let touched: Vec<&RelPath> = self.touched.iter().collect();
        in_parallel(&touched, |path| match self.root.open_dir(path) {
            Ok(dir) => fsync(&dir).map_err(self.failed("flush", path)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(()),
            Err(errno) => Err(self.failed("flush", path)(errno)),
        })
    }
}

/// Says whether a step may be applied while staged files wait to be renamed. A hard link needs the file that it
/// links to.
fn goes_beside_staged(step: &Operation) -> bool {
    match step {
        Operation::MakeDirectory { .. } | Operation::WriteLink { .. } => true,
        Operation::WriteFile { linked_to, .. } => linked_to.is_none(),
        Operation::RemoveFile { .. } | Operation::RemoveDirectory { .. } | Operation::SetAttributes { .. } => false,
    }
}
