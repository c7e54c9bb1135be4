//! Scans a workspace: the part of a snapshot during which the agents are frozen.
//!
//! ```text
//! paths that the watcher reported ─► a part of the workspace ─┐
//!              no reliable report ─► the whole workspace     ─┴─► read new and changed files ─► ScannedWorkspace
//! ```
//!
//! Decides which part to scan and collects what the walk needs: rules, the user's index, volatile paths, other
//! names of linked files. Contents go into the pack of the snapshot; `snapshot` builds the trees.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, Phase, Progress};
use crate::rules::coverage::{IgnoreChain, OwnPatterns, Rules};
use crate::rules::rule_cache::{CompiledRules, with_state};
use crate::rules::tracked::{Tracked, indexes_hold};
use crate::rules::user_repository::{Location, UserRepository};
use crate::scan::content::{BlobSink, ContentRead, Reading};
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{Entry, ScanResult, ScannedNode, Unread};
use crate::scan::walk::Walk;
use crate::scan::watcher::{Dirty, Watched};
use crate::scan::workspace_state::{Child, Node, Source, WorkspaceState};
use crate::snapshot::{Mapped, PendingSnapshot, SnapshotRequest, Timings, micros};
use crate::store::pack::PackWriter;
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::names::RelPath;
use fermata_os::mounts;

/// The parameters of a scan.
pub(crate) struct ScanContext<'a> {
    pub root: &'a Root,
    pub rules: &'a Rules,
    /// Files that processes have mapped writable or open for writing.
    pub mapped: &'a Mapped,
    /// When the scan began, in nanoseconds since 1970.
    pub started_ns: i128,
    /// Whether the result will be stored, so that it must not rely on objects that may have been removed.
    pub stores: bool,
    pub hurry: Urgency,
    /// Whether to make a full scan although the watcher knows what has changed.
    pub afresh: bool,
    /// Set by the caller to cancel the scan.
    pub cancel: &'a AtomicBool,
}

/// The result of a scan, before contents are read.
pub(crate) struct WorkspaceScan {
    pub found: ScanResult,
    /// The epoch of the watcher up to which the scan has taken in all events.
    pub epoch: Option<u64>,
    /// Whether the scan was a full one.
    pub whole: bool,
    /// The ignore files above the workspace.
    pub above: Vec<Source>,
    /// The ignore files of nested repositories.
    pub nested: Vec<Source>,
    /// The mount points below the workspace.
    pub mounts: Vec<String>,
    /// The user's index, and those of its submodules.
    pub indexes: Vec<Source>,
    pub forced: Forced,
    /// Warnings for the user, except those about ignore files.
    pub notes: Vec<String>,
    /// Warnings about ignore files and unreadable attributes.
    pub complaints: Vec<String>,
    pub repository: Option<UserRepository>,
}

/// The tracked files that the rules ignore.
pub(crate) enum Forced {
    /// All of them.
    These(Arc<BTreeSet<RelPath>>),
    /// Not determined yet: they follow from the index and the new workspace state.
    Follow(Tracked),
}

/// A scanned workspace whose contents are read but not yet stored as a checkpoint.
pub struct Observed {
    pub(crate) request: SnapshotRequest,
    pub(crate) look: WorkspaceScan,
    pub(crate) pack: Mutex<PackWriter>,
    pub(crate) draft: PendingSnapshot,
    pub(crate) read: u64,
    pub(crate) started_ns: i128,
    pub(crate) took: Timings,
}

impl History {
    /// Scans the workspace and reads new and changed files. When this returns, agents may be thawed.
    ///
    /// # Errors
    /// Refuses `/`, home directories and bad patterns; fails when cancelled, or when the store cannot be
    /// written. A file that cannot be read is no error: it is skipped and reported.
    pub fn observe(
        &self,
        request: &SnapshotRequest,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Observed> {
        let real = self.checked_workspace(&request.workspace)?;
        let draft = self.start_draft(request.number)?;
        let dir = draft.dir.clone();
        let pack = Mutex::new(PackWriter::create(&dir).map_err(HistoryError::io("start a pack in", &dir))?);
        let started_ns = nanos_now();
        let mut took = Timings::default();

        progress(Progress { phase: Phase::Scan, done: 0, total: 0 });
        let clock = Instant::now();
        let root = Root::open(&real)?;
        let (rules, mapped) = (&request.rules, &request.mapped);
        let afresh = self.is_overdue(request);
        let hurry = request.hurry();
        let looking = ScanContext { root: &root, rules, mapped, started_ns, stores: true, hurry, afresh, cancel };
        let look = self.scan_workspace(&looking)?;
        took.scan_us = micros(clock);

        let clock = Instant::now();
        let unread = unread_in(&look.found);
        let reading = Reading {
            root: &root,
            sink: Some(BlobSink { store: &self.objects, pack: &pack }),
            spool: &dir,
            max_file_bytes: rules.max_file_bytes,
            hurry,
            progress,
            cancel,
        };
        reading.read_all(&unread)?;
        self.come_back_to(&unread);
        took.read_us = micros(clock);
        let read = unread.len() as u64;
        Ok(Observed { request: request.clone(), look, pack, draft, read, started_ns, took })
    }

    /// Walks the part of the workspace that may have changed.
    pub(crate) fn scan_workspace(&self, looking: &ScanContext<'_>) -> Result<WorkspaceScan> {
        match self.goes_deep(looking) {
            true => pool::on(looking.hurry, || self.scan_full(looking)),
            false => self.scan_full(looking),
        }
    }

    /// Says whether the scan may visit a path so deep that it needs a large stack.
    fn goes_deep(&self, looking: &ScanContext<'_>) -> bool {
        let known = self.known().0.is_some_and(|before| before.root.totals.height > pool::DEEP);
        let mut mapped = looking.mapped.paths.keys().chain(&looking.mapped.open);
        known || self.watch.as_ref().is_some_and(Watched::is_deep) || mapped.any(|path| path.depth() > pool::DEEP)
    }

    fn scan_full(&self, looking: &ScanContext<'_>) -> Result<WorkspaceScan> {
        let ScanContext { root, rules, .. } = looking;
        let real = root.path();
        let tells = root.tells_of_changes();
        let watch = self.watch.as_ref().filter(|_| tells);
        if let (Some(watch), false) = (&self.watch, tells) {
            watch.mark_damaged("the file system does not tell of changes");
        }
        // The events come first: a change that is published in between is then either in them or in the state.
        let taken = watch.map(|watch| watch.take());
        let (before, trusted) = self.known();
        let mounts = mounts::below(real);
        let location = Location::find(real);
        let chain = match rules.use_gitignore {
            true => CompiledRules::Rules(self.standings.above(real, location.as_ref())),
            false => CompiledRules::Everything,
        };
        let as_before = before.as_ref().filter(|before| {
            before.rules == **rules && before.mounts == mounts && rules_hold(before, real, location.as_ref())
        });
        let mut notes = as_before.map(|before| before.notes.clone()).unwrap_or_default();

        // Tracked paths that the rules ignore: taken from the last state, or determined again.
        let mut dirty = Dirty::default();
        let mut forced_changed = false;
        let mut indexes = Vec::new();
        let mut forced = match as_before {
            Some(before) if indexes_hold(before, location.as_ref()) => {
                indexes.clone_from(&before.indexes);
                Forced::These(Arc::clone(&before.forced))
            }
            Some(before) => {
                let tracked = Tracked::of(location.as_ref(), real, looking.started_ns, &mut notes);
                indexes.clone_from(&tracked.indexes);
                let now: BTreeSet<RelPath> = tracked.left_out_of(&before.root).cloned().collect();
                for path in now.symmetric_difference(&before.forced) {
                    dirty.mark(path);
                    // The directories above may be ignored themselves and are then not in the workspace state.
                    let mut above = path.parent();
                    while let Some(dir) = above.filter(|dir| !dir.is_root()) {
                        dirty.mark(&dir);
                        above = dir.parent();
                    }
                    forced_changed = true;
                }
                Forced::These(Arc::new(now))
            }
            None => {
                notes.clear();
                let tracked = Tracked::of(location.as_ref(), real, looking.started_ns, &mut notes);
                indexes.clone_from(&tracked.indexes);
                Forced::Follow(tracked)
            }
        };
        let hidden = self.place_in(real);
        let mut mapped = mapped_paths(looking.mapped, before.as_deref());
        let device = root.stat(&RelPath::root()).map_err(HistoryError::io("look at workspace", real))?.dev;
        let epoch = taken.as_ref().map(|taken| taken.epoch);
        let events = taken.map(|taken| taken.dirty).unwrap_or(Err("nothing is watched"));
        let partly = match (as_before.filter(|_| trusted && !looking.afresh), events) {
            (Some(before), Ok(events)) => {
                dirty.merge(events);
                before.volatile_paths().iter().for_each(|path| dirty.mark(path));
                // A file that is a mount point may be written to through another path, without an event.
                mounts.iter().filter_map(|line| place_below(real, line)).for_each(|path| dirty.mark(&path));
                mapped.iter().for_each(|path| dirty.mark_written(path));
                looking.mapped.open.iter().for_each(|path| dirty.mark(path));
                Some((before, dirty))
            }
            (_, events) => {
                // A written file may have the same fingerprint as before, so a full scan has to read it too.
                mapped.extend(events.iter().flat_map(Dirty::written));
                tracing::debug!(workspace = %real.display(), why = events.err(), "looking at everything");
                None
            }
        };
        let whole = partly.is_none();
        let none = BTreeSet::new();
        let mut complaints;
        let found = loop {
            let (forced_paths, tracked) = match &forced {
                Forced::These(paths) => (&**paths, None),
                Forced::Follow(tracked) => (&none, Some(tracked)),
            };
            let walk = Walk {
                root,
                device,
                rules,
                own: OwnPatterns::compile(rules)?,
                standings: &self.standings,
                hidden: hidden.clone(),
                forced: forced_paths,
                tracked,
                watch,
                mapped: &mapped,
                check_in: (looking.stores && !trusted).then_some(&self.objects),
                started_ns: looking.started_ns,
                hurry: looking.hurry,
                cancel: looking.cancel,
                ignored: AtomicU64::new(0),
                linked_out: Mutex::default(),
                warnings: Mutex::default(),
                redecided: AtomicBool::new(false),
            };
            let found = match &partly {
                Some((before, dirty)) if dirty.is_deeper_than(pool::DEEP) => {
                    pool::on(looking.hurry, || part(&walk, before, chain.clone(), dirty.clone()))?
                }
                Some((before, dirty)) => part(&walk, before, chain.clone(), dirty.clone())?,
                None => {
                    let decided = as_before.is_some() && !forced_changed && tells;
                    walk.whole(before.as_ref().map(|before| &before.root), chain.clone(), decided)?
                }
            };
            // A file that the rules covered may be ignored now; it is then covered only if it is tracked.
            if tracked.is_none() && walk.redecided.load(Ordering::Relaxed) {
                let tracked = Tracked::of(location.as_ref(), real, looking.started_ns, &mut notes);
                indexes.clone_from(&tracked.indexes);
                forced = Forced::Follow(tracked);
                continue;
            }
            if as_before.is_none() {
                notes.extend(walk.warn_if_nearly_empty(count_files(&found)));
            }
            complaints = walk.warnings.into_inner().unwrap_or_else(PoisonError::into_inner);
            break found;
        };
        if as_before.is_none() && hidden.is_some() {
            notes.push("the state directory lies in the workspace; it is not covered".to_owned());
        }
        if looking.mapped.untold > 0 {
            let processes = looking.mapped.untold;
            complaints.push(format!("what {processes} processes write to files through memory is not known"));
        }
        self.standings.retain_telling(|path| holds_dir(&found, path));
        let (above, nested, of_rules) = self.standings.sources();
        complaints.extend(of_rules);
        let repository = location.as_ref().map(Location::describe);
        Ok(WorkspaceScan { found, epoch, whole, above, nested, mounts, indexes, forced, notes, complaints, repository })
    }

    /// Says whether the decisions about a workspace are still those of its last scan, as far as files outside
    /// the watched directories matter.
    pub(crate) fn is_as_before(&self, workspace: &Path, before: &WorkspaceState) -> bool {
        let location = Location::find(workspace);
        indexes_hold(before, location.as_ref())
            && before.mounts == mounts::below(workspace)
            && rules_hold(before, workspace, location.as_ref())
    }

    /// Makes the next scan visit the paths that vanished while they were read: they may be moved back without
    /// an event.
    fn come_back_to(&self, unread: &[&Unread]) {
        let Some(watch) = &self.watch else { return };
        let vanished = |unread: &&&Unread| matches!(unread.outcome.get(), Some(ContentRead::Vanished));
        unread.iter().filter(vanished).for_each(|unread| watch.note(&unread.path));
    }

    /// Returns the path of the store in the workspace, if it lies there.
    fn place_in(&self, real: &Path) -> Option<RelPath> {
        use std::os::unix::ffi::OsStrExt;
        let store = std::fs::canonicalize(&self.dir).ok()?;
        RelPath::new(store.strip_prefix(real).ok()?.as_os_str().as_bytes().to_vec()).ok()
    }
}

/// Walks the dirty paths, and then the other names of files that have become linked.
fn part(walk: &Walk<'_>, before: &WorkspaceState, top: CompiledRules, mut dirty: Dirty) -> Result<ScanResult> {
    let mut asked = HashSet::new();
    loop {
        let found = walk.part(&before.root, top.clone(), &dirty)?;
        let linked: HashSet<u64> = unread_in(&found)
            .iter()
            .filter(|unread| unread.stat.kind() == FileKind::Regular && unread.stat.nlink > 1)
            .map(|unread| unread.stat.ino)
            .chain(walk.linked_out.lock().unwrap_or_else(PoisonError::into_inner).iter().copied())
            .filter(|file| !asked.contains(file))
            .collect();
        if linked.is_empty() {
            return Ok(found);
        }
        // A write under one name of a file changes its other names, whatever their fingerprints are.
        before.names_of(&linked).iter().for_each(|path| dirty.mark_written(path));
        asked.extend(linked);
    }
}

/// Says whether the ignore files outside the covered tree are unchanged.
fn rules_hold(before: &WorkspaceState, real: &Path, location: Option<&Location>) -> bool {
    let above = if before.rules.use_gitignore { IgnoreChain::sources_above(real, location) } else { Vec::new() };
    above.into_iter().map(with_state).eq(before.above.iter().cloned())
        && before.nested.iter().all(|source| with_state(source.0.clone()) == *source)
}

/// Returns the path of a mount point below the workspace.
fn place_below(real: &Path, mount: &str) -> Option<RelPath> {
    use std::os::unix::ffi::OsStrExt;
    let place = mounts::place(mount.as_bytes())?;
    RelPath::new(place.strip_prefix(real).ok()?.as_os_str().as_bytes().to_vec()).ok()
}

/// Lists the paths of files that are mapped writable, with all names of linked ones.
fn mapped_paths(mapped: &Mapped, before: Option<&WorkspaceState>) -> BTreeSet<RelPath> {
    let mut paths: BTreeSet<RelPath> = mapped.paths.keys().cloned().collect();
    let Some(before) = before else { return paths };
    let mut inodes = mapped.inodes.clone();
    for (path, inode) in &mapped.paths {
        // The inode may have another name: it was renamed, or the mapping process sees it under another path in
        // a container.
        let alone =
            matches!(before.root.find(path), Some(Node::File(file)) if file.seen.ino == *inode && !file.remarks.linked);
        if !alone {
            inodes.insert(*inode);
        }
    }
    if !inodes.is_empty() {
        paths.extend(before.names_of(&inodes));
    }
    paths
}

/// Says whether a directory is part of the result.
fn holds_dir(found: &ScanResult, path: &RelPath) -> bool {
    let mut at = found;
    let mut names = path.bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    while let ScanResult::New(dir) = at {
        let Some(name) = names.next() else { return true };
        match dir.entries.binary_search_by(|entry| entry.name().cmp(name)).ok().map(|at| &dir.entries[at]) {
            Some(Entry::Anew(_, ScannedNode::Below(below))) => at = below,
            Some(Entry::Kept(child)) => return holds_dir_in(child, names),
            _ => return false,
        }
    }
    let ScanResult::Same(dir) = at else { return false };
    match names.next() {
        None => true,
        Some(name) => dir.child(name).is_some_and(|child| holds_dir_in(child, names)),
    }
}

/// Says whether the child, and each of these names below it, is a directory.
fn holds_dir_in<'n>(child: &Child, names: impl Iterator<Item = &'n [u8]>) -> bool {
    let mut node = &child.node;
    for name in names {
        let Node::Dir(dir) = node else { return false };
        let Some(child) = dir.child(name) else { return false };
        node = &child.node;
    }
    matches!(node, Node::Dir(_))
}

/// Lists the entries whose content must be read, in the order of the tree.
pub(crate) fn unread_in(found: &ScanResult) -> Vec<&Unread> {
    fn gather<'f>(found: &'f ScanResult, unread: &mut Vec<&'f Unread>) {
        if let ScanResult::New(dir) = found {
            for entry in &dir.entries {
                match entry {
                    Entry::Anew(_, ScannedNode::Unread(entry)) => unread.push(entry),
                    Entry::Anew(_, ScannedNode::Below(found)) => gather(found, unread),
                    Entry::Anew(_, ScannedNode::Known(_)) | Entry::Kept(_) => {}
                }
            }
        }
    }
    let mut unread = Vec::new();
    gather(found, &mut unread);
    unread
}

fn count_files(found: &ScanResult) -> u64 {
    match found {
        ScanResult::Same(dir) => dir.totals.files + dir.totals.skipped,
        ScanResult::New(dir) => dir
            .entries
            .iter()
            .map(|entry| match entry {
                Entry::Anew(_, ScannedNode::Known(_) | ScannedNode::Unread(_)) => 1,
                Entry::Anew(_, ScannedNode::Below(found)) => count_files(found),
                Entry::Kept(child) => match &child.node {
                    Node::Dir(dir) => dir.totals.files + dir.totals.skipped,
                    Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::Draft => 1,
                },
            })
            .sum(),
    }
}

/// Returns the wall clock time in nanoseconds since 1970.
pub(crate) fn nanos_now() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128)
}
