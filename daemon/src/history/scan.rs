//! Walks a workspace and lists what the rules cover, with one `lstat` each and without opening any file but
//! `.gitignore`.
//!
//! The walk is our own, in parallel, from descriptors that cannot leave the workspace. `.git` (at every level, in any
//! case) and the temporary names of a restore are never listed. Must not read contents: that is `content`'s work.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::beneath::{FileKind, Root, Stat, stat_at};
use super::errors::{HistoryError, Result};
use super::names::{RelPath, is_git, is_restore_draft};
use super::rules::{IgnoreChain, OwnPatterns, Rules};
use super::user_repository::{Location, UserRepository};

/// Up to so many covered files, it is worth looking whether the rules hide nearly everything.
const FEW_FILES: u64 = 1_000;
const MAX_IGNORE_FILE: u64 = 4 * 1024 * 1024;

/// Why a path is not in a checkpoint although the rules cover it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Larger than the rules allow.
    TooLarge,
    /// It may not be opened, or reading it failed.
    Unreadable,
    /// A FIFO, socket or device; its kind and mode are recorded.
    Special,
    /// It became something else at every attempt to read it.
    Unsteady,
}

/// A path that is covered but not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The path.
    pub path: RelPath,
    /// Why.
    pub reason: SkipReason,
    /// What the system said, or the size.
    pub detail: String,
}

/// One covered path.
#[derive(Clone, Debug)]
pub(super) struct ScanEntry {
    /// The path; the workspace itself is there too.
    pub path: RelPath,
    /// Its state at the instant of the walk.
    pub stat: Stat,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// The covered paths in byte order, so that a directory precedes what is in it.
    pub entries: Vec<ScanEntry>,
    /// What could not even be looked at.
    pub skipped: Vec<Skipped>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// What restores that were given up have left behind.
    pub drafts: Vec<RelPath>,
    /// The user's repository.
    pub repository: Option<UserRepository>,
}

/// Refuses workspaces that must never be covered.
pub(super) fn check_workspace(workspace: &Path) -> Result<PathBuf> {
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

/// How the rules stand in one directory.
#[derive(Clone)]
enum Standing {
    /// The ignore files decide.
    Rules(IgnoreChain),
    /// All of it is covered.
    Everything,
    /// The directory is ignored; only what `include` names is covered.
    OnlyIncluded,
}

struct Task {
    dir: RelPath,
    standing: Standing,
}

struct Walk<'a> {
    root: &'a Root,
    real: &'a Path,
    own: OwnPatterns,
    use_gitignore: bool,
    /// The store itself, when it lies in the workspace.
    hidden: Option<RelPath>,
    cancel: &'a AtomicBool,
    queue: Mutex<Queue>,
    more: Condvar,
    ignored: AtomicU64,
}

#[derive(Default)]
struct Queue {
    tasks: Vec<Task>,
    /// Directories that are queued or being read.
    open: usize,
}

/// Walks a workspace.
pub(super) fn scan(root: &Root, real: &Path, store: &Path, rules: &Rules, cancel: &AtomicBool) -> Result<Scan> {
    let mut found = Scan::default();
    let location = Location::find(real);
    let standing = if rules.use_gitignore {
        Standing::Rules(IgnoreChain::above(real, location.as_ref(), &mut found.warnings))
    } else {
        Standing::Everything
    };
    let hidden = std::fs::canonicalize(store).ok().and_then(|store| {
        let below = store.strip_prefix(real).ok()?.as_os_str().as_bytes().to_vec();
        RelPath::new(below).ok()
    });
    if hidden.is_some() {
        found.warnings.push("the state directory lies in the workspace; it is not covered".to_owned());
    }
    let stat = root.stat(&RelPath::root()).map_err(HistoryError::io("look at workspace", real))?;
    found.entries.push(ScanEntry { path: RelPath::root(), stat });

    let walk = Walk {
        root,
        real,
        own: OwnPatterns::compile(rules)?,
        use_gitignore: rules.use_gitignore,
        hidden,
        cancel,
        queue: Mutex::new(Queue { tasks: vec![Task { dir: RelPath::root(), standing }], open: 1 }),
        more: Condvar::new(),
        ignored: AtomicU64::new(0),
    };
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let parts: Vec<Scan> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| walk.work())).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    if parts.len() < threads {
        return Err(HistoryError::io("walk", real)(std::io::Error::other("a worker of the walk broke")));
    }
    if cancel.load(Ordering::Relaxed) {
        return Err(HistoryError::Cancelled);
    }
    for part in parts {
        found.entries.extend(part.entries);
        found.skipped.extend(part.skipped);
        found.warnings.extend(part.warnings);
        found.drafts.extend(part.drafts);
    }
    found.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));

    if let Some(location) = &location {
        let mut repository = location.describe();
        walk.add_tracked(location, &mut found, &mut repository);
        found.repository = Some(repository);
    }
    walk.add_missing_parents(&mut found);
    walk.warn_if_nearly_empty(&mut found);
    found.skipped.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

impl Walk<'_> {
    fn work(&self) -> Scan {
        let mut found = Scan::default();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(task) = queue.tasks.pop() {
                drop(queue);
                let children = self.read_dir(task, &mut found);
                queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.open = queue.open + children.len() - 1;
                queue.tasks.extend(children);
                self.more.notify_all();
            } else if queue.open == 0 {
                return found;
            } else {
                queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn read_dir(&self, task: Task, found: &mut Scan) -> Vec<Task> {
        let Task { dir, mut standing } = task;
        if self.cancel.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let opened = self.root.open_dir(&dir).and_then(Dir::from_fd);
        let mut handle = match opened {
            Ok(handle) => handle,
            // Removed or replaced since it was listed: its parent changes under us, the next checkpoint sees it.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Vec::new(),
            Err(errno) => {
                found.skipped.push(unreadable(dir, errno));
                return Vec::new();
            }
        };
        let mut names = Vec::new();
        for entry in handle.iter() {
            match entry {
                Ok(entry) => names.push(entry.file_name().to_bytes().to_vec()),
                Err(errno) => {
                    found.skipped.push(unreadable(dir.clone(), errno));
                    break;
                }
            }
        }
        if let Standing::Rules(chain) = &mut standing {
            let has = |wanted: &[u8]| names.iter().any(|name| name == wanted);
            if !dir.is_root() && has(b".git") {
                *chain = IgnoreChain::nested(&dir, &self.real.join(dir.as_path()), &mut found.warnings);
            }
            if has(b".gitignore")
                && let Some(text) = self.read_ignore_file(&dir.join(b".gitignore"))
            {
                *chain = chain.below(&dir, &text, &mut found.warnings);
            }
        }
        let mut children = Vec::new();
        for name in names {
            let passed_over = name == b"." || name == b".." || is_git(&name);
            let path = dir.join(&name);
            if passed_over || self.hidden.as_ref() == Some(&path) {
                continue;
            }
            if is_restore_draft(&name) {
                found.drafts.push(path);
                continue;
            }
            match stat_at(&handle, OsStr::from_bytes(&name)) {
                Ok(stat) => self.decide(ScanEntry { path, stat }, &standing, found, &mut children),
                Err(Errno::ENOENT) => {}
                Err(errno) => found.skipped.push(unreadable(path, errno)),
            }
        }
        children
    }

    fn decide(&self, entry: ScanEntry, standing: &Standing, found: &mut Scan, children: &mut Vec<Task>) {
        let is_dir = entry.stat.kind() == FileKind::Directory;
        let ignored = || {
            self.ignored.fetch_add(1, Ordering::Relaxed);
        };
        if self.own.excludes(&entry.path, is_dir) {
            return ignored();
        }
        let below = match standing {
            Standing::Everything => Standing::Everything,
            Standing::Rules(chain) if !chain.ignores(&entry.path, is_dir) => Standing::Rules(chain.clone()),
            Standing::Rules(_) | Standing::OnlyIncluded if self.own.includes(&entry.path, is_dir) => {
                Standing::Everything
            }
            Standing::Rules(_) | Standing::OnlyIncluded => {
                ignored();
                if is_dir && self.own.has_includes() {
                    children.push(Task { dir: entry.path, standing: Standing::OnlyIncluded });
                }
                return;
            }
        };
        if is_dir {
            children.push(Task { dir: entry.path.clone(), standing: below });
        }
        found.entries.push(entry);
    }

    fn read_ignore_file(&self, path: &RelPath) -> Option<Vec<u8>> {
        use std::io::Read;
        let stat = self.root.stat(path).ok()?;
        if stat.kind() != FileKind::Regular || stat.size > MAX_IGNORE_FILE {
            return None;
        }
        let file = self.root.open_file(path).ok()?;
        let mut text = Vec::new();
        file.take(MAX_IGNORE_FILE).read_to_end(&mut text).ok()?;
        Some(text)
    }

    /// Adds what is tracked although it is ignored.
    fn add_tracked(&self, location: &Location, found: &mut Scan, repository: &mut UserRepository) {
        let tracked = match location.tracked() {
            Ok(tracked) => tracked,
            Err(error) => {
                let text = format!("the index cannot be read, files both tracked and ignored are not covered: {error}");
                return found.warnings.push(text);
            }
        };
        let mut extra = Vec::new();
        let mut unstaged = false;
        for file in tracked {
            let known = found.entries.binary_search_by(|entry| entry.path.cmp(&file.path));
            let stat = match known {
                Ok(at) => Some(found.entries[at].stat),
                Err(_) => self.root.stat(&file.path).ok(),
            };
            let stat = stat.filter(|stat| matches!(stat.kind(), FileKind::Regular | FileKind::Symlink));
            unstaged |= stat.is_none_or(|stat| stat.size as u32 != file.size || stat.mtime != file.mtime);
            let Some(stat) = stat.filter(|_| known.is_err()) else {
                continue;
            };
            let forbidden = file.path.bytes().split(|b| *b == b'/').any(is_git);
            let hidden = self.hidden.as_ref().is_some_and(|hidden| file.path.is_within(hidden));
            if self.use_gitignore && !forbidden && !hidden && !self.own.excludes_with_parents(&file.path) {
                extra.push(ScanEntry { path: file.path, stat });
            }
        }
        repository.unstaged = Some(unstaged);
        if !extra.is_empty() {
            found.entries.extend(extra);
            found.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
            found.entries.dedup_by(|a, b| a.path == b.path);
        }
    }

    /// Adds the directories above covered files that are ignored themselves.
    fn add_missing_parents(&self, found: &mut Scan) {
        let known: HashSet<&RelPath> = found.entries.iter().map(|entry| &entry.path).collect();
        let mut missing = HashSet::new();
        for entry in &found.entries {
            let mut above = entry.path.parent();
            while let Some(dir) = above {
                above = dir.parent();
                if known.contains(&dir) || !missing.insert(dir) {
                    break;
                }
            }
        }
        let stats = missing.into_iter().filter_map(|path| Some(ScanEntry { stat: self.root.stat(&path).ok()?, path }));
        let added: Vec<_> = stats.collect();
        if !added.is_empty() {
            found.entries.extend(added);
            found.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        }
    }

    fn warn_if_nearly_empty(&self, found: &mut Scan) {
        let covered = found.entries.iter().filter(|entry| entry.stat.kind() != FileKind::Directory).count() as u64;
        if covered >= FEW_FILES || self.ignored.load(Ordering::Relaxed) == 0 {
            return;
        }
        let limit = (covered * 100).max(100) + 1;
        let there = self.count_files(limit);
        if (covered == 0 && there > 0) || (there > 100 && there > covered * 100) {
            let more = if there >= limit { "or more " } else { "" };
            found.warnings.push(format!(
                "the rules exclude nearly the whole workspace: {covered} of {there} {more}files are covered"
            ));
        }
    }

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
}

fn unreadable(path: RelPath, errno: Errno) -> Skipped {
    Skipped { path, reason: SkipReason::Unreadable, detail: errno.desc().to_owned() }
}
