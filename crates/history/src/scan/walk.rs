//! Walks a workspace, or the parts of it that may have changed, and compares it with the last workspace state.
//! Opens no file; only `.gitignore` files are read, by the rule cache.
//!
//! ```text
//! full:    open -> watch -> list -> lstat each -> decide -> subdirectories, in parallel
//!          a directory with an unchanged fingerprint is not listed: its names are those of the last state
//! partial: from the root down to the reported names; every other directory is shared with the last state
//! ```
//!
//! The walk starts from descriptors that cannot leave the workspace. `.git` (at every level, in any case) is
//! never covered. Contents are read by `content`.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::dir::Dir as Listed;
use nix::errno::Errno;
use rayon::prelude::*;

use crate::errors::{HistoryError, Result};
use crate::rules::coverage::{OwnPatterns, Rules};
use crate::rules::decision::MatchDecision;
use crate::rules::rule_cache::{CompiledRules, RuleCache};
use crate::rules::tracked::Tracked;
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{Entry, NewDir, ScanResult, ScannedNode, SkipReason, Unread};
use crate::scan::watcher::{Dirty, Watched};
use crate::scan::workspace_state::{Dir, File, FileFingerprint, Node};
use crate::store::objects::ObjectStore;
use crate::tree::confined_dir::{FileKind, Root, Stat, stat_at, stat_fd, tells_of_changes};
use crate::tree::metadata::Xattrs;
use crate::tree::names::{RelPath, is_git, is_restore_draft};
use crate::tree::xattrs;

/// `PATH_MAX`: the kernel opens no longer paths.
const MAX_PATH: usize = 4096;

/// From this number of directories or files on, waking other threads is worth its cost.
pub(crate) const MANY: usize = 16;

/// Refuses workspaces that must never be covered, and returns the real path of the others.
pub(crate) fn check_workspace(workspace: &Path) -> Result<PathBuf> {
    let refuse = |reason| HistoryError::WorkspaceRefused { path: workspace.to_owned(), reason };
    if !workspace.is_absolute() {
        return Err(refuse("its path is not absolute"));
    }
    let real = std::fs::canonicalize(workspace).map_err(HistoryError::io("find workspace", workspace))?;
    if real == Path::new("/") {
        return Err(refuse("it is the root of the file system"));
    }
    let meta = std::fs::metadata(&real).map_err(HistoryError::io("find workspace", workspace))?;
    if !meta.is_dir() {
        return Err(refuse("it is not a directory"));
    }
    let owner = nix::unistd::Uid::from_raw(std::os::unix::fs::MetadataExt::uid(&meta));
    let mut homes: Vec<PathBuf> = std::env::var_os("HOME").map(PathBuf::from).into_iter().collect();
    for uid in [owner, nix::unistd::geteuid()] {
        homes.extend(nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.dir));
    }
    if homes.iter().any(|home| std::fs::canonicalize(home).is_ok_and(|home| home == real)) {
        return Err(refuse("it is a home directory"));
    }
    Ok(real)
}

/// The parameters and the shared results of a walk.
pub(crate) struct Walk<'a> {
    pub root: &'a Root,
    /// The device of the workspace.
    pub device: u64,
    pub rules: &'a Rules,
    /// The compiled include and exclude patterns of the project.
    pub own: OwnPatterns,
    /// The compiled ignore files.
    pub standings: &'a RuleCache,
    /// The path of the store, if it lies in the workspace; never covered.
    pub hidden: Option<RelPath>,
    /// Tracked paths that the rules ignore, if they are known.
    pub forced: &'a BTreeSet<RelPath>,
    /// The whole index, if it is not known which of its paths the rules ignore.
    pub tracked: Option<&'a Tracked>,
    /// Watches every directory before it is listed.
    pub watch: Option<&'a Watched>,
    /// Files whose fingerprint does not prove that their content is unchanged.
    pub mapped: &'a BTreeSet<RelPath>,
    /// Set if objects of the last state may have been removed: each must be looked up before the walk relies on
    /// it.
    pub check_in: Option<&'a ObjectStore>,
    /// When the scan began, in nanoseconds since 1970.
    pub started_ns: i128,
    pub hurry: Urgency,
    /// Set by the caller to cancel the walk.
    pub cancel: &'a AtomicBool,
    /// How many names the rules left out.
    pub ignored: AtomicU64,
    /// The inode numbers of files with several names of which the rules left out one.
    pub linked_out: Mutex<HashSet<u64>>,
    pub warnings: Mutex<Vec<String>>,
    /// Whether some directory has other ignore rules than in the last state.
    pub redecided: AtomicBool,
}

/// A directory of the last state, and how far it can be relied on.
#[derive(Clone, Copy)]
struct KnownDir<'k> {
    dir: Option<&'k Arc<Dir>>,
    /// Whether the rules would still make the same decisions about the names in it.
    decided: bool,
}

/// The directory that is being walked.
struct Place<'p> {
    path: &'p RelPath,
    standing: CompiledRules,
    covered: bool,
}

impl Walk<'_> {
    /// Walks the whole workspace. A directory with an unchanged fingerprint is not listed again if the rules
    /// are those of the last state (`decided`).
    pub fn whole(&self, known: Option<&Arc<Dir>>, top: CompiledRules, decided: bool) -> Result<ScanResult> {
        let path = RelPath::root();
        let place = Place { path: &path, standing: top, covered: true };
        let found = self.whole_dir(&place, KnownDir { dir: known, decided })?;
        found.ok_or_else(|| self.vanished())
    }

    /// Walks the directories with reported names.
    pub fn part(&self, known: &Arc<Dir>, top: CompiledRules, dirty: &Dirty) -> Result<ScanResult> {
        let path = RelPath::root();
        let place = Place { path: &path, standing: top, covered: true };
        let found = self.part_dir(&place, known, dirty)?;
        found.ok_or_else(|| self.vanished())
    }

    fn vanished(&self) -> HistoryError {
        HistoryError::io("list workspace", self.root.path())(std::io::Error::from(std::io::ErrorKind::NotFound))
    }

    /// Makes the next scan visit a path, whatever its fingerprint is by then.
    fn scan_changed(&self, path: &RelPath) {
        if let Some(watch) = self.watch {
            watch.note(path);
        }
    }

    fn warn(&self, text: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn check_cancel(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(HistoryError::Cancelled) } else { Ok(()) }
    }

    /// Opens a directory; `None` if it was removed or replaced meanwhile, which the next scan sees in its
    /// parent.
    fn open(&self, path: &RelPath) -> Result<Option<std::result::Result<OwnedFd, Errno>>> {
        match self.root.open_dir(path) {
            Ok(fd) => Ok(Some(Ok(fd))),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
            // A shortage of the daemon is no reason to leave out files of the user.
            Err(errno) if is_our_shortage(errno) => {
                Err(HistoryError::io("open directory", &self.root.show(path))(errno))
            }
            Err(errno) => Ok(Some(Err(errno))),
        }
    }

    /// Walks a directory and everything below it, on a thread of the pool.
    fn whole_dir(&self, place: &Place<'_>, known: KnownDir<'_>) -> Result<Option<ScanResult>> {
        pool::on(self.hurry, || self.walk_whole(place, known))
    }

    fn walk_whole(&self, place: &Place<'_>, known: KnownDir<'_>) -> Result<Option<ScanResult>> {
        self.check_cancel()?;
        let fd = match self.open(place.path)? {
            None => return Ok(None),
            Some(Ok(fd)) => fd,
            Some(Err(errno)) => return self.closed_dir(place, errno),
        };
        if let Some(watch) = self.watch {
            watch.add(fd.as_fd(), place.path);
        }
        let seen = self.seen_of(&fd, place.path)?;
        // Another file system may be mounted here, one that does not report changes.
        let elsewhere = seen.dev != self.device && !tells_of_changes(&fd);
        if elsewhere && let Some(watch) = self.watch {
            watch.mark_damaged("a file system in the workspace does not tell of changes");
        }
        let ignore_file = self.ignore_file(&fd);
        let same = known.dir.filter(|dir| {
            known.decided
                && !elsewhere
                && dir.settled
                && dir.seen == seen
                && dir.covered == place.covered
                && dir.unreadable.is_none()
        });
        if let Some(dir) = same {
            let unchanged_rules = dir.ignore_file.is_none_or(|_| dir.ignore_settled && ignore_file == dir.ignore_file);
            if unchanged_rules {
                let names = dir.children.iter().map(|child| child.name.clone()).collect();
                return self.list(place, (fd, ignore_file), seen, known, Names::Covered(names), None);
            }
        }
        let names = match read_names(&fd) {
            Ok(names) => names,
            Err(errno) => return self.closed_dir(place, errno),
        };
        self.list(place, (fd, ignore_file), seen, known, Names::All(names), None)
    }

    fn part_dir(&self, place: &Place<'_>, known: &Arc<Dir>, dirty: &Dirty) -> Result<Option<ScanResult>> {
        self.check_cancel()?;
        let fd = match self.open(place.path)? {
            None => return Ok(None),
            Some(Ok(fd)) => fd,
            Some(Err(errno)) => return self.closed_dir(place, errno),
        };
        let seen = self.seen_of(&fd, place.path)?;
        let ignore_file = self.ignore_file(&fd);
        let unsure = known.ignore_file.is_some() && !known.ignore_settled;
        let rules_changed = dirty.names.contains(&b".gitignore"[..]) || ignore_file != known.ignore_file || unsure;
        let top_changed = dirty.names.contains(&b".git"[..]) && !place.path.is_root();
        let other = dirty.anew || known.unreadable.is_some() || !seen.same_file(&known.seen);
        if other || rules_changed || top_changed {
            drop(fd);
            return self.whole_dir(place, KnownDir { dir: Some(known), decided: true });
        }
        let names = if dirty.all {
            match read_names(&fd) {
                Ok(names) => Names::All(names),
                Err(errno) => return self.closed_dir(place, errno),
            }
        } else {
            let mut names = dirty.names.clone();
            names.extend(dirty.below.keys().cloned());
            Names::Some(names)
        };
        let known = KnownDir { dir: Some(known), decided: true };
        self.list(place, (fd, ignore_file), seen, known, names, Some(dirty))
    }

    fn seen_of(&self, fd: &OwnedFd, path: &RelPath) -> Result<FileFingerprint> {
        let stat = stat_fd(fd).map_err(HistoryError::io("look at", &self.root.show(path)))?;
        Ok(FileFingerprint::from(&stat))
    }

    fn ignore_file(&self, fd: &OwnedFd) -> Option<FileFingerprint> {
        let stat = stat_at(fd, OsStr::new(".gitignore")).ok()?;
        // Like git, this ignores a `.gitignore` that is a symbolic link.
        let counts = stat.kind() == FileKind::Regular && self.rules.use_gitignore;
        counts.then(|| FileFingerprint::from(&stat))
    }

    /// Returns the result for a directory that cannot be listed.
    fn closed_dir(&self, place: &Place<'_>, errno: Errno) -> Result<Option<ScanResult>> {
        if place.path.is_root() {
            return Err(HistoryError::io("list workspace", self.root.path())(errno));
        }
        let stat = match self.root.stat_if_there(place.path) {
            Ok(Some(stat)) if stat.kind() == FileKind::Directory => stat,
            Ok(_) | Err(Errno::ELOOP) => return Ok(None),
            Err(errno) => return Err(HistoryError::io("look at", &self.root.show(place.path))(errno)),
        };
        Ok(Some(ScanResult::New(Box::new(NewDir {
            seen: FileFingerprint::from(&stat),
            xattrs: Xattrs::default(),
            covered: place.covered,
            settled: false,
            unreadable: Some(errno.desc().into()),
            ignore_file: None,
            ignore_settled: false,
            nested: false,
            entries: Vec::new(),
        }))))
    }

    fn list(
        &self,
        place: &Place<'_>,
        (fd, ignore_file): (OwnedFd, Option<FileFingerprint>),
        seen: FileFingerprint,
        known: KnownDir<'_>,
        names: Names,
        dirty: Option<&Dirty>,
    ) -> Result<Option<ScanResult>> {
        let nested = !place.path.is_root()
            && match &names {
                Names::All(names) => names.contains(&b".git"[..]),
                Names::Covered(_) | Names::Some(_) => known.dir.is_some_and(|dir| dir.nested),
            };
        // Other rules in this directory are other rules below it, too. A tracked file may be ignored now.
        let ignore_settled = ignore_file.is_none_or(|seen| seen.is_settled(self.started_ns));
        let same_rules = known.dir.is_none_or(|dir| {
            (dir.ignore_file, dir.nested) == (ignore_file, nested) && (dir.ignore_settled || ignore_file.is_none())
        });
        if !same_rules {
            self.redecided.store(true, Ordering::Relaxed);
        }
        let known = KnownDir { decided: known.decided && same_rules, ..known };
        let standing =
            self.standings.within(place.path, &place.standing, self.root, ignore_file, nested, self.started_ns);
        let same_state = known.dir.filter(|dir| dir.seen == seen);
        let xattrs = match same_state {
            Some(dir) => dir.xattrs.clone(),
            None => xattrs::read(&fd).unwrap_or_else(|errno| {
                self.warn(format!("the extended attributes of {} cannot be read: {}", place.path, errno.desc()));
                Xattrs::default()
            }),
        };
        let mut settled = seen.is_settled(self.started_ns);
        let mut changed = same_state.is_none_or(|dir| {
            dir.settled != settled
                || (dir.ignore_file, dir.nested, dir.covered) != (ignore_file, nested, place.covered)
                || dir.ignore_settled != ignore_settled
                || dir.unreadable.is_some()
        });

        // Names that were not reported stay as they are.
        let mut entries: Vec<Entry> = Vec::new();
        if let (Names::Some(names), Some(dir)) = (&names, known.dir) {
            let kept = dir.children.iter().filter(|child| !names.contains(&child.name));
            entries.extend(kept.cloned().map(Entry::Kept));
        }
        let mut dirs: Vec<(Box<[u8]>, RelPath, CompiledRules, bool)> = Vec::new();
        for name in names.iter() {
            if matches!(&**name, b"." | b".." | b".git") {
                continue;
            }
            let path = place.path.join(name);
            if self.hidden.as_ref() == Some(&path) {
                continue;
            }
            let known_child = known.dir.and_then(|dir| dir.child(name));
            let before = known_child.map(|child| &child.node);
            if is_git(name) {
                let there = stat_at(&fd, OsStr::from_bytes(name)).is_ok();
                changed |= there != before.is_some();
                if there {
                    let (reason, detail) = (SkipReason::Reserved, "git takes this name for its own".into());
                    entries.push(Entry::Anew(name.clone(), ScannedNode::Known(Node::Skipped { reason, detail })));
                }
                continue;
            }
            let is_gone = |fd| matches!(stat_at(fd, OsStr::from_bytes(name)), Err(Errno::ENOENT));
            if path.bytes().len() >= MAX_PATH && !is_gone(&fd) {
                let (reason, detail) = (SkipReason::Unreadable, "its path is longer than the system allows".into());
                changed |= !matches!(before, Some(Node::Skipped { .. }));
                entries.push(Entry::Anew(name.clone(), ScannedNode::Known(Node::Skipped { reason, detail })));
                continue;
            }
            if is_restore_draft(name) {
                match stat_at(&fd, OsStr::from_bytes(name)) {
                    Ok(_) => {
                        changed |= before.is_none();
                        entries.push(Entry::Anew(name.clone(), ScannedNode::Known(Node::Draft)));
                    }
                    Err(_) => changed |= before.is_some(),
                }
                continue;
            }
            let stat = match stat_at(&fd, OsStr::from_bytes(name)) {
                Ok(stat) => stat,
                Err(Errno::ENOENT) => {
                    changed |= before.is_some();
                    continue;
                }
                Err(errno) if is_our_shortage(errno) => {
                    return Err(HistoryError::io("look at", &self.root.show(&path))(errno));
                }
                Err(errno) => {
                    let (reason, detail) = (SkipReason::Unreadable, errno.desc().into());
                    changed = true;
                    entries.push(Entry::Anew(name.clone(), ScannedNode::Known(Node::Skipped { reason, detail })));
                    continue;
                }
            };
            let is_dir = stat.kind() == FileKind::Directory;
            let verdict = match (&names, before) {
                // The earlier decision is still valid.
                (Names::Covered(_), Some(Node::File(file))) if !is_dir && !file.remarks.forced => {
                    MatchDecision::Covered(CompiledRules::Everything)
                }
                (Names::Covered(_), Some(Node::Dir(dir))) if is_dir && !self.own.has_includes() => {
                    if dir.covered {
                        MatchDecision::Covered(standing.clone())
                    } else {
                        MatchDecision::Through
                    }
                }
                _ => self.decide_name(&path, is_dir, &standing),
            };
            let (below, covered, forced) = match verdict {
                MatchDecision::Out => {
                    self.ignored.fetch_add(1, Ordering::Relaxed);
                    // It may be another name of a covered file.
                    if stat.kind() == FileKind::Regular && stat.nlink > 1 {
                        let mut linked = self.linked_out.lock().unwrap_or_else(PoisonError::into_inner);
                        linked.insert(stat.ino);
                    }
                    changed |= before.is_some();
                    continue;
                }
                MatchDecision::Covered(below) => (below, true, false),
                MatchDecision::Through if is_dir => {
                    self.ignored.fetch_add(1, Ordering::Relaxed);
                    (CompiledRules::OnlyIncluded, false, false)
                }
                MatchDecision::Through | MatchDecision::Forced => (CompiledRules::OnlyIncluded, true, true),
            };
            if is_dir {
                dirs.push((name.clone(), path, below, covered));
                continue;
            }
            let written = dirty.is_some_and(|dirty| dirty.written.contains(name));
            let entry = match known_child.filter(|child| !written && self.is_kept(&path, &stat, forced, &child.node)) {
                Some(child) => Entry::Kept(Arc::clone(child)),
                None => Entry::Anew(name.clone(), self.scanned_node(path, &stat, forced, before.filter(|_| !written))),
            };
            changed |= matches!(entry, Entry::Anew(..));
            entries.push(entry);
        }

        drop(fd);
        let walk_below =
            |(name, path, standing, covered): &(Box<[u8]>, RelPath, CompiledRules, bool)| -> Result<Option<Entry>> {
                let place = Place { path, standing: standing.clone(), covered: *covered };
                let known_child = known.dir.and_then(|dir| dir.child(name));
                let before = match known_child.map(|child| &child.node) {
                    Some(Node::Dir(dir)) => Some(dir),
                    _ => None,
                };
                let nothing = Dirty::default();
                let found = match (dirty, before) {
                    (Some(dirty), Some(dir)) => {
                        self.part_dir(&place, dir, dirty.below.get(name).unwrap_or(&nothing))?
                    }
                    _ => self.whole_dir(&place, KnownDir { dir: before, decided: known.decided })?,
                };
                Ok(found.map(|found| match (&found, before, known_child) {
                    (ScanResult::Same(same), Some(before), Some(child)) if Arc::ptr_eq(same, before) => {
                        Entry::Kept(Arc::clone(child))
                    }
                    _ => Entry::Anew(name.clone(), ScannedNode::Below(found)),
                }))
            };
        let below: Vec<Option<Entry>> = if dirs.len() > if dirty.is_none() { 1 } else { MANY } {
            pool::on(self.hurry, || dirs.par_iter().map(walk_below).collect::<Result<_>>())?
        } else {
            dirs.iter().map(walk_below).collect::<Result<_>>()?
        };
        for ((name, path, ..), entry) in dirs.iter().zip(below) {
            if entry.is_none() {
                // The directory existed a moment ago. It may be moved back without an event.
                settled = false;
                self.scan_changed(path);
            }
            let before = known.dir.and_then(|dir| dir.child(name));
            changed |= match (&entry, before) {
                (Some(Entry::Kept(_)), Some(_)) | (None, None) => false,
                (Some(_), _) | (None, Some(_)) => true,
            };
            entries.extend(entry);
        }
        // Objects of an earlier workspace state may be gone, unless the scan relies on that state.
        if let (false, Some(dir), None) = (changed, known.dir, self.check_in) {
            return Ok(Some(ScanResult::Same(Arc::clone(dir))));
        }
        entries.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(Some(ScanResult::New(Box::new(NewDir {
            seen,
            xattrs,
            covered: place.covered,
            settled,
            unreadable: None,
            ignore_file,
            ignore_settled,
            nested,
            entries,
        }))))
    }

    /// Says whether an entry that is no directory is unchanged in every respect.
    fn is_kept(&self, path: &RelPath, stat: &Stat, forced: bool, before: &Node) -> bool {
        match before {
            Node::File(file) => {
                let too_large = stat.kind() == FileKind::Regular && stat.size > self.rules.max_file_bytes;
                !too_large && file.remarks.forced == forced && self.vouches(path, stat, file)
            }
            Node::Special { seen, kind } => {
                *seen == FileFingerprint::from(stat) && matches!(stat.kind(), FileKind::Special(now) if now == *kind)
            }
            Node::Dir(_) | Node::Skipped { .. } | Node::Draft => false,
        }
    }

    /// Says whether the fingerprint of a file proves that its content is unchanged.
    fn vouches(&self, path: &RelPath, stat: &Stat, file: &File) -> bool {
        file.seen == FileFingerprint::from(stat)
            && !(file.remarks.torn || file.remarks.doubtful || self.mapped.contains(path))
            && self.check_in.is_none_or(|store| store.contains(&file.oid))
    }

    /// Returns the result for an entry that is no directory.
    fn scanned_node(&self, path: RelPath, stat: &Stat, forced: bool, before: Option<&Node>) -> ScannedNode {
        let seen = FileFingerprint::from(stat);
        match stat.kind() {
            FileKind::Special(kind) => ScannedNode::Known(Node::Special { seen, kind }),
            FileKind::Regular if stat.size > self.rules.max_file_bytes => {
                let detail = format!("{} bytes", stat.size).into();
                ScannedNode::Known(Node::Skipped { reason: SkipReason::TooLarge, detail })
            }
            FileKind::Regular | FileKind::Symlink | FileKind::Directory => {
                if let Some(Node::File(file)) = before
                    && self.vouches(&path, stat, file)
                {
                    let mut file = file.clone();
                    file.remarks.forced = forced;
                    return ScannedNode::Known(Node::File(file));
                }
                let mapped = self.mapped.contains(&path);
                ScannedNode::Unread(Box::new(Unread { path, stat: *stat, forced, mapped, outcome: OnceLock::new() }))
            }
        }
    }
}

/// The names of a directory that a walk visits.
enum Names {
    /// All names in the directory.
    All(BTreeSet<Box<[u8]>>),
    /// The covered names of the last state; the directory has not changed.
    Covered(BTreeSet<Box<[u8]>>),
    /// The reported names.
    Some(BTreeSet<Box<[u8]>>),
}

impl Names {
    fn iter(&self) -> impl Iterator<Item = &Box<[u8]>> {
        match self {
            Names::All(names) | Names::Covered(names) | Names::Some(names) => names.iter(),
        }
    }
}

/// Says whether an error is a shortage of this process and says nothing about the file.
pub(crate) fn is_our_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
}

fn read_names(fd: &OwnedFd) -> nix::Result<BTreeSet<Box<[u8]>>> {
    // The listing takes ownership of its descriptor.
    let copy = fd.try_clone().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut handle = Listed::from_fd(copy)?;
    handle.iter().map(|entry| entry.map(|entry| entry.file_name().to_bytes().into())).collect()
}
