//! Sets permission bits, times and extended attributes of entries whose content is right, and opens closed
//! directories for the duration of a restore.
//!
//! A file with more names than the plan knows is not changed, since all its names would change.

use nix::errno::Errno;
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmod, fchmodat, futimens, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::geteuid;

use crate::errors::Result;
use crate::restore::apply::Applying;
use crate::restore::plan::{Operation, RestorePlan};
use crate::tree::confined_dir::{FileKind, FileStat, Time, stat_at};
use crate::tree::names::RelPath;
use crate::tree::xattrs::{self, Xattrs, XattrsRead};

impl Applying<'_> {
    /// Makes the directory of a path writable for its owner, which a daemon without privileges needs for
    /// read-only ones.
    pub(crate) fn open_up(&mut self, path: &RelPath) -> Result<()> {
        let Some(dir) = path.parent() else {
            return Ok(());
        };
        if geteuid().is_root() || !self.checked_dirs.insert(dir.clone()) {
            return Ok(());
        }
        // The step itself reports a directory whose metadata cannot be read.
        let Ok(stat) = self.root.stat(&dir) else {
            return Ok(());
        };
        let closed = stat.kind() == FileKind::Directory && is_closed(&stat);
        if closed && stat.uid == geteuid().as_raw() {
            self.set_mode(&dir, opened(stat.permissions()))?;
            self.opened.insert(dir, stat.permissions());
        }
        Ok(())
    }

    /// Restores the modes of directories that this run, or an earlier one, has opened, unless the plan sets a
    /// mode.
    pub(crate) fn close_again(&mut self, plan: &RestorePlan) -> Result<()> {
        for step in &plan.operations {
            if let Operation::SetAttributes { path, .. } = step {
                self.opened.remove(path);
            }
        }
        let mut closing = std::mem::take(&mut self.opened);
        for (path, mode) in plan.closed.iter().filter(|_| !geteuid().is_root()) {
            if !closing.contains_key(path) && self.root.stat(path).is_ok_and(|it| it.permissions() == opened(*mode)) {
                closing.insert(path.clone(), *mode);
            }
        }
        for (path, mode) in closing {
            if self.root.stat(&path).is_ok_and(|stat| stat.kind() == FileKind::Directory) {
                self.set_mode(&path, mode)?;
            }
        }
        Ok(())
    }

    /// Sets the permission bits of a file or directory without following a symbolic link.
    fn set_mode(&self, path: &RelPath, mode: u32) -> Result<()> {
        let mode = Mode::from_bits_truncate(mode);
        let set = match self.root.open_parent(path) {
            Ok((dir, name)) => fchmodat(&dir, name, mode, FchmodatFlags::NoFollowSymlink),
            Err(Errno::EINVAL) if path.is_root() => self.root.open_dir(path).and_then(|dir| fchmod(&dir, mode)),
            Err(errno) => Err(errno),
        };
        set.map_err(self.failed("set the mode of", path))
    }

    /// Sets the given attributes. A symbolic link has no mode, and a file with more than `names` names is left
    /// unchanged.
    pub(crate) fn set_attributes(
        &mut self,
        path: &RelPath,
        mode: Option<u32>,
        mtime: Time,
        xattrs: Option<&Xattrs>,
        names: u64,
    ) -> Result<()> {
        let time = time_spec(mtime);
        if path.is_root() {
            let stat = self.root.stat(path).map_err(self.failed("read the metadata of", path))?;
            self.set_xattrs(path, &stat, xattrs)?;
            let dir = self.root.open_dir(path).map_err(self.failed("open", path))?;
            if let Some(mode) = mode {
                self.set_mode(path, mode)?;
            }
            return futimens(&dir, &TimeSpec::UTIME_OMIT, &time).map_err(self.failed("set the time of", path));
        }
        let Some((dir, name)) = self.parent(path)? else {
            return Ok(());
        };
        let stat = stat_at(&dir, name);
        match (stat.as_ref().map(FileStat::kind), &stat, mode) {
            (Ok(FileKind::Regular), Ok(stat), Some(_)) if stat.nlink > names => {
                self.mismatch(path, "it has got other names, which would change too");
                return Ok(());
            }
            (Ok(FileKind::Regular | FileKind::Directory), Ok(stat), Some(mode)) => {
                self.set_xattrs(path, stat, xattrs)?;
                self.set_mode(path, mode)?;
            }
            (Ok(FileKind::Symlink), _, None) => {}
            _ => {
                self.mismatch(path, "it has changed since the plan was made");
                return Ok(());
            }
        }
        utimensat(&dir, name, &TimeSpec::UTIME_OMIT, &time, UtimensatFlags::NoFollowSymlink)
            .map_err(self.failed("set the time of", path))
    }

    fn set_xattrs(&mut self, path: &RelPath, stat: &FileStat, wanted: Option<&Xattrs>) -> Result<()> {
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let (directory, mode) = (stat.kind() == FileKind::Directory, stat.permissions());
        let needed = if directory { 0o700 } else { 0o600 };
        // The owner needs read and write permission for this; the final mode is set afterwards.
        if !geteuid().is_root() && stat.uid == geteuid().as_raw() && mode & needed != needed {
            self.set_mode(path, mode | needed)?;
        }
        let set = if directory {
            self.root.open_dir(path).map(|dir| xattrs::set(dir, wanted))
        } else {
            self.root.open_file(path).map(|file| xattrs::set(file, wanted))
        };
        let outcome = set.map_err(self.failed("open", path))?;
        if outcome.map_err(self.failed("set the attributes of", path))? == XattrsRead::NotKept {
            self.without_xattrs.insert(path.clone());
        }
        Ok(())
    }
}

/// Says whether the owner of a directory cannot change the names in it.
pub(crate) fn is_closed(stat: &FileStat) -> bool {
    stat.permissions() & 0o300 != 0o300
}

/// Returns the mode of a closed directory while it is open.
fn opened(mode: u32) -> u32 {
    mode | 0o700
}

pub(crate) fn time_spec(time: Time) -> TimeSpec {
    TimeSpec::new(time.sec, i64::from(time.nsec))
}
