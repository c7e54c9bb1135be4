//! Walks a workspace, or the parts of it that may have changed, and compares it with the last workspace state. Opens no
//! file; only `.gitignore` files are read, by the rule cache.
//!
//! ```text
//! full:    open -> watch -> list -> lstat each -> decide -> subdirectories, in parallel
//!          a directory with an unchanged fingerprint is not listed: its names are those of the last state
//! partial: from the root down to the reported names; every other directory is shared with the last state
//! ```
//!
//! The walk starts from descriptors that cannot leave the workspace. `.git` (at every level, in any case) is never
//! covered. `dir_walk` visits the names of one directory; `content` reads files.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::dir::{Dir, Type};
use nix::errno::Errno;

use crate::errors::{HistoryError, Result};
use crate::rules::decision::CoverageMatcher;
use crate::rules::rule_cache::{CompiledRules, RuleCache};
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{NewDir, ScanResult, ScannedNode, Unread};
use crate::scan::watcher::{Dirty, WatchedWorkspace};
use crate::scan::workspace_state::{DirProperties, DirState, FileState, Node};
use crate::store::objects::ObjectStore;
use crate::tree::confined_dir::{FileKind, FileStat, Root, is_resource_shortage, reports_changes, stat_at, stat_fd};
use crate::tree::fingerprint::FileFingerprint;
use crate::tree::names::{RelPath, is_git};
use crate::tree::skipped::SkipReason;
use crate::tree::xattrs::{self, Xattrs};

/// Up to this number of covered files, a scan checks whether the rules exclude nearly everything.
const FEW_FILES: u64 = 1_000;

/// The parameters and the shared results of a walk.
pub(crate) struct WorkspaceWalk<'a> {
    pub root: &'a Root,
    /// The device of the workspace.
    pub device: u64,
    pub matcher: CoverageMatcher<'a>,
    /// The compiled ignore files.
    pub rule_cache: &'a RuleCache,
    /// The path of the store, if it lies in the workspace; never covered.
    pub store_path: Option<RelPath>,
    /// Watches every directory before it is listed.
    pub watch: Option<&'a WatchedWorkspace>,
    /// Files whose fingerprint does not prove that their content is unchanged.
    pub unreliable: &'a BTreeSet<RelPath>,
    /// Set if objects of the last state may have been removed: each must be looked up before the walk relies on it.
    pub check_in: Option<&'a ObjectStore>,
    /// When the scan began, in nanoseconds since 1970.
    pub started_ns: i128,
    pub urgency: Urgency,
    /// Set by the caller to cancel the walk.
    pub cancel: &'a AtomicBool,
    pub findings: WalkFindings,
}

/// What a walk finds besides the directories.
#[derive(Default)]
pub(crate) struct WalkFindings {
    /// How many names the rules left out.
    pub ignored: AtomicU64,
    /// The inode numbers of files with several names of which the rules left out one.
    pub linked_out: Mutex<HashSet<u64>>,
    pub warnings: Mutex<Vec<String>>,
    /// Whether some directory has other ignore rules than in the last state.
    pub rules_changed: AtomicBool,
}

/// A directory of the last state, and how far it can be relied on.
#[derive(Clone, Copy)]
pub(super) struct LastDir<'s> {
    pub dir: Option<&'s Arc<DirState>>,
    /// Whether the rules would still make the same decisions about the names in it.
    pub decided: bool,
}

/// A directory that is being walked.
pub(super) struct WalkedDir<'p> {
    pub path: &'p RelPath,
    /// The rules outside of the directory.
    pub outside: CompiledRules,
    pub covered: bool,
}

/// An open directory and the metadata that decides how to list it.
pub(super) struct OpenedDir {
    pub fd: OwnedFd,
    pub fingerprint: FileFingerprint,
    /// The fingerprint of its `.gitignore`.
    pub ignore_file: Option<FileFingerprint>,
}

/// The names of a directory that a walk visits.
pub(super) enum VisitedNames {
    /// All names in the directory.
    All(BTreeSet<Box<[u8]>>),
    /// The covered names of the last state; the directory has not changed.
    Covered(BTreeSet<Box<[u8]>>),
    /// The reported names.
    Reported(BTreeSet<Box<[u8]>>),
}

impl VisitedNames {
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        match self {
            VisitedNames::All(names) | VisitedNames::Covered(names) | VisitedNames::Reported(names) => {
                names.iter().map(|name| &**name)
            }
        }
    }
}

impl WorkspaceWalk<'_> {
    /// Walks the whole workspace. A directory with an unchanged fingerprint is not listed again if the rules are those of
    /// the last state (`decided`).
    pub fn full(&self, last: Option<&Arc<DirState>>, rules: CompiledRules, decided: bool) -> Result<ScanResult> {
        let top = WalkedDir { path: &RelPath::root(), outside: rules, covered: true };
        let result = self.walk_full(&top, LastDir { dir: last, decided })?;
        result.ok_or_else(|| self.vanished())
    }

    /// Walks the directories with reported names.
    pub fn partial(&self, last: &Arc<DirState>, rules: CompiledRules, dirty: &Dirty) -> Result<ScanResult> {
        let top = WalkedDir { path: &RelPath::root(), outside: rules, covered: true };
        let result = self.walk_partial(&top, last, dirty)?;
        result.ok_or_else(|| self.vanished())
    }

    fn vanished(&self) -> HistoryError {
        HistoryError::io("list workspace", self.root.path())(std::io::Error::from(std::io::ErrorKind::NotFound))
    }

    pub(super) fn warn(&self, text: String) {
        self.findings.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn check_cancel(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(HistoryError::Cancelled) } else { Ok(()) }
    }

    /// Opens a directory; `None` if it was removed or replaced meanwhile, which the next scan sees in its parent.
    fn open(&self, path: &RelPath) -> Result<Option<std::result::Result<OwnedFd, Errno>>> {
        match self.root.open_dir(path) {
            Ok(fd) => Ok(Some(Ok(fd))),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            // A shortage of the daemon is no reason to leave out files of the user.
            Err(errno) if is_resource_shortage(errno) => {
                Err(HistoryError::io("open directory", &self.root.show(path))(errno))
            }
            Err(errno) => Ok(Some(Err(errno))),
        }
    }

    /// Walks a directory and everything below it, on a thread of the pool.
    pub(super) fn walk_full(&self, dir: &WalkedDir<'_>, last: LastDir<'_>) -> Result<Option<ScanResult>> {
        pool::on(self.urgency, || self.walk_full_here(dir, last))
    }

    fn walk_full_here(&self, dir: &WalkedDir<'_>, last: LastDir<'_>) -> Result<Option<ScanResult>> {
        self.check_cancel()?;
        let fd = match self.open(dir.path)? {
            None => return Ok(None),
            Some(Ok(fd)) => fd,
            Some(Err(errno)) => return self.unreadable_dir(dir, errno),
        };
        if let Some(watch) = self.watch {
            watch.add(fd.as_fd(), dir.path);
        }
        let fingerprint = self.fingerprint_of(&fd, dir.path)?;
        // Another file system may be mounted here, one that does not report changes.
        let unreported = fingerprint.dev != self.device && !reports_changes(&fd);
        if unreported && let Some(watch) = self.watch {
            watch.mark_incomplete("a file system in the workspace does not report changes");
        }
        let ignore_file = self.ignore_file(&fd);
        let same = last.dir.filter(|state| {
            let before = &state.properties;
            let same_rules =
                before.ignore_file.is_none() || (before.ignore_settled && before.ignore_file == ignore_file);
            last.decided
                && !unreported
                && before.settled
                && before.fingerprint == fingerprint
                && before.covered == dir.covered
                && before.unreadable.is_none()
                && same_rules
        });
        let names = match same {
            Some(state) => VisitedNames::Covered(state.children.iter().map(|child| child.name.clone()).collect()),
            None => match read_names(&fd) {
                Ok(names) => VisitedNames::All(names),
                Err(errno) => return self.unreadable_dir(dir, errno),
            },
        };
        self.list(dir, OpenedDir { fd, fingerprint, ignore_file }, last, &names, None).map(Some)
    }

    pub(super) fn walk_partial(
        &self,
        dir: &WalkedDir<'_>,
        last: &Arc<DirState>,
        dirty: &Dirty,
    ) -> Result<Option<ScanResult>> {
        self.check_cancel()?;
        let fd = match self.open(dir.path)? {
            None => return Ok(None),
            Some(Ok(fd)) => fd,
            Some(Err(errno)) => return self.unreadable_dir(dir, errno),
        };
        let fingerprint = self.fingerprint_of(&fd, dir.path)?;
        let ignore_file = self.ignore_file(&fd);
        let before = &last.properties;
        let unsure = before.ignore_file.is_some() && !before.ignore_settled;
        let rules_changed = dirty.names.contains(&b".gitignore"[..]) || ignore_file != before.ignore_file || unsure;
        let nested_changed = dirty.names.contains(&b".git"[..]) && !dir.path.is_root();
        let replaced = dirty.anew || before.unreadable.is_some() || !fingerprint.same_file(&before.fingerprint);
        let last = LastDir { dir: Some(last), decided: true };
        if replaced || rules_changed || nested_changed {
            drop(fd);
            return self.walk_full(dir, last);
        }
        let names = if dirty.all {
            match read_names(&fd) {
                Ok(names) => VisitedNames::All(names),
                Err(errno) => return self.unreadable_dir(dir, errno),
            }
        } else {
            let mut names = dirty.names.clone();
            names.extend(dirty.below.keys().cloned());
            VisitedNames::Reported(names)
        };
        self.list(dir, OpenedDir { fd, fingerprint, ignore_file }, last, &names, Some(dirty)).map(Some)
    }

    fn fingerprint_of(&self, fd: &OwnedFd, path: &RelPath) -> Result<FileFingerprint> {
        let stat = stat_fd(fd).map_err(HistoryError::io("read the metadata of", &self.root.show(path)))?;
        Ok(FileFingerprint::from(&stat))
    }

    fn ignore_file(&self, fd: &OwnedFd) -> Option<FileFingerprint> {
        let stat = stat_at(fd, OsStr::new(".gitignore")).ok()?;
        // Like git, this ignores a `.gitignore` that is a symbolic link.
        let applies = stat.kind() == FileKind::Regular && self.matcher.rules.use_gitignore;
        applies.then(|| FileFingerprint::from(&stat))
    }

    /// Returns the result for a directory that cannot be listed.
    fn unreadable_dir(&self, dir: &WalkedDir<'_>, errno: Errno) -> Result<Option<ScanResult>> {
        if dir.path.is_root() {
            return Err(HistoryError::io("list workspace", self.root.path())(errno));
        }
        let stat = match self.root.stat_if_there(dir.path) {
            Ok(Some(stat)) if stat.kind() == FileKind::Directory => stat,
            Ok(_) | Err(Errno::ELOOP) => return Ok(None),
            Err(errno) => {
                return Err(HistoryError::io("read the metadata of", &self.root.show(dir.path))(errno));
            }
        };
        let properties = DirProperties {
            fingerprint: FileFingerprint::from(&stat),
            xattrs: Xattrs::default(),
            covered: dir.covered,
            settled: false,
            unreadable: Some(errno.desc().into()),
            ignore_file: None,
            ignore_settled: false,
            nested: false,
        };
        Ok(Some(ScanResult::New(Box::new(NewDir { properties, entries: Vec::new() }))))
    }

    /// Says whether an entry that is no directory is unchanged in every respect.
    pub(super) fn is_unchanged(&self, path: &RelPath, stat: &FileStat, forced: bool, last: &Node) -> bool {
        match last {
            Node::File(file) => {
                let too_large = stat.kind() == FileKind::Regular && stat.size > self.matcher.rules.max_file_bytes;
                !too_large && file.remarks.forced == forced && self.has_same_content(path, stat, file)
            }
            Node::Special { fingerprint, kind } => {
                *fingerprint == FileFingerprint::from(stat)
                    && matches!(stat.kind(), FileKind::Special(now) if now == *kind)
            }
            Node::Dir(_) | Node::Skipped { .. } | Node::StagedFile => false,
        }
    }

    /// Says whether the fingerprint of a file proves that its content is unchanged.
    fn has_same_content(&self, path: &RelPath, stat: &FileStat, last: &FileState) -> bool {
        last.fingerprint == FileFingerprint::from(stat)
            && !(last.remarks.torn || last.remarks.doubtful || self.unreliable.contains(path))
            && self.check_in.is_none_or(|store| store.contains(&last.oid))
    }

    /// Returns the result for an entry that is no directory.
    pub(super) fn scanned_node(
        &self,
        path: RelPath,
        stat: &FileStat,
        forced: bool,
        last: Option<&Node>,
    ) -> ScannedNode {
        match stat.kind() {
            FileKind::Special(kind) => {
                ScannedNode::Complete(Node::Special { fingerprint: FileFingerprint::from(stat), kind })
            }
            FileKind::Regular if stat.size > self.matcher.rules.max_file_bytes => {
                let detail = format!("{} bytes", stat.size).into();
                ScannedNode::Complete(Node::Skipped { reason: SkipReason::TooLarge, detail })
            }
            FileKind::Regular | FileKind::Symlink | FileKind::Directory => {
                if let Some(Node::File(file)) = last
                    && self.has_same_content(&path, stat, file)
                {
                    let mut file = file.clone();
                    file.remarks.forced = forced;
                    return ScannedNode::Complete(Node::File(file));
                }
                let mapped = self.unreliable.contains(&path);
                ScannedNode::Unread(Box::new(Unread { path, stat: *stat, forced, mapped, content: OnceLock::new() }))
            }
        }
    }

    /// Returns a warning if the rules exclude nearly everything.
    pub fn warn_if_nearly_empty(&self, covered: u64) -> Option<String> {
        if covered >= FEW_FILES || self.findings.ignored.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let limit = (covered * 100).max(100) + 1;
        let existing = self.count_files(limit);
        let nearly = (covered == 0 && existing > 0) || (existing > 100 && existing > covered * 100);
        let more = if existing >= limit { "or more " } else { "" };
        nearly.then(|| {
            format!("the rules exclude nearly the whole workspace: {covered} of {existing} {more}files are covered")
        })
    }

    /// Counts the files of the workspace, covered or not, up to `limit`.
    fn count_files(&self, limit: u64) -> u64 {
        let mut dirs = vec![RelPath::root()];
        let mut count = 0;
        while let Some(dir) = dirs.pop() {
            let Ok(mut handle) = self.root.open_dir(&dir).and_then(Dir::from_fd) else {
                continue;
            };
            for entry in handle.iter().filter_map(std::result::Result::ok) {
                let name = entry.file_name().to_bytes();
                if name == b"." || name == b".." || is_git(name) {
                    continue;
                }
                if entry.file_type() == Some(Type::Directory) {
                    dirs.push(dir.join(name));
                } else {
                    count += 1;
                }
                if count >= limit || self.cancel.load(Ordering::Relaxed) {
                    return count;
                }
            }
        }
        count
    }

    /// Returns the extended attributes of a directory, which are read only if its fingerprint has changed.
    pub(super) fn dir_xattrs(&self, path: &RelPath, opened: &OpenedDir, last: LastDir<'_>) -> Xattrs {
        match last.dir.filter(|state| state.properties.fingerprint == opened.fingerprint) {
            Some(state) => state.properties.xattrs.clone(),
            None => xattrs::read(&opened.fd).unwrap_or_else(|errno| {
                self.warn(format!("the extended attributes of {path} cannot be read: {}", errno.desc()));
                Xattrs::default()
            }),
        }
    }
}

fn read_names(fd: &OwnedFd) -> nix::Result<BTreeSet<Box<[u8]>>> {
    // The listing takes ownership of its descriptor.
    let copy = fd.try_clone().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut handle = Dir::from_fd(copy)?;
    handle.iter().map(|entry| entry.map(|entry| entry.file_name().to_bytes().into())).collect()
}
