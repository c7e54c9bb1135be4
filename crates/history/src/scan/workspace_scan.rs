//! Scans a workspace: the part of a snapshot during which the agents are frozen.
//!
//! ```text
//! paths that the watcher reported ─► a part of the workspace ─┐
//!              no reliable report ─► the whole workspace     ─┴─► read new and changed files ─► ScannedWorkspace
//! ```
//!
//! Decides which part to scan and collects what the walk needs: rules, the user's index, volatile paths, other names of
//! linked files. Contents go into the pack of the snapshot; `snapshot` builds the trees.

use std::collections::{BTreeSet, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::rules::coverage::{IgnoreChain, OwnPatterns, Rules};
use crate::rules::decision::CoverageMatcher;
use crate::rules::rule_cache::CompiledRules;
use crate::rules::tracked::{Tracked, indexes_unchanged};
use crate::rules::user_repository::{Location, UserRepository};
use crate::scan::content::{BlobSink, Reading};
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{ContentRead, ScanResult, Unread};
use crate::scan::walk::{WalkFindings, WorkspaceWalk};
use crate::scan::watcher::{Dirty, TakenEvents, WatchedWorkspace};
use crate::scan::workspace_state::{DirState, Node, WorkspaceState};
use crate::snapshot_request::{Mapped, SnapshotRequest};
use crate::stats::{Timings, micros_since};
use crate::store::pack::PackWriter;
use crate::store::pending::PendingSnapshot;
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::fingerprint::{RuleSource, with_fingerprint};
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
    pub urgency: Urgency,
    /// Whether to make a full scan although the watcher knows what has changed.
    pub full: bool,
    /// Set by the caller to cancel the scan.
    pub cancel: &'a AtomicBool,
}

/// The result of a scan, before contents are read.
pub(crate) struct WorkspaceScan {
    pub result: ScanResult,
    /// The epoch of the watcher up to which the scan has taken in all events.
    pub epoch: Option<u64>,
    /// Whether the scan was a full one.
    pub full: bool,
    /// The ignore files above the workspace.
    pub above: Vec<RuleSource>,
    /// The ignore files of nested repositories.
    pub nested: Vec<RuleSource>,
    /// The mount points below the workspace.
    pub mounts: Vec<String>,
    pub tracked: TrackedPaths,
    /// Warnings for the user, except those about ignore files.
    pub notes: Vec<String>,
    /// Warnings that hold for this scan only: about ignore files and unreadable attributes.
    pub complaints: Vec<String>,
    pub repository: Option<UserRepository>,
}

/// The paths that are tracked although the rules ignore them.
pub(crate) struct TrackedPaths {
    /// The user's index, and those of its submodules.
    pub indexes: Vec<RuleSource>,
    pub forced: Forced,
    /// The paths in which `forced` differs from the last state, with the directories above them.
    changed: Vec<RelPath>,
}

/// The tracked files that the rules ignore.
pub(crate) enum Forced {
    These(Arc<BTreeSet<RelPath>>),
    /// They follow from the index and the new workspace state.
    Undetermined(Tracked),
}

/// A scanned workspace whose contents are read but not yet stored as a checkpoint.
pub struct ScannedWorkspace {
    pub(crate) request: SnapshotRequest,
    pub(crate) scan: WorkspaceScan,
    pub(crate) pack: Mutex<PackWriter>,
    pub(crate) pending: PendingSnapshot,
    /// The number of files and symbolic links that were read.
    pub(crate) read: u64,
    pub(crate) started_ns: i128,
    pub(crate) took: Timings,
}

impl History {
    /// Scans the workspace and reads new and changed files. When this returns, agents may be thawed.
    ///
    /// # Errors
    /// Refuses `/`, home directories and bad patterns; fails when cancelled, or when the store cannot be written. A file
    /// that cannot be read is no error: it is skipped and reported.
    pub fn scan(
        &self,
        request: &SnapshotRequest,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<ScannedWorkspace> {
        let real = self.checked_workspace(&request.workspace)?;
        let pending = self.start_pending(request.number)?;
        let dir = pending.dir.clone();
        let pack = Mutex::new(PackWriter::create(&dir).map_err(HistoryError::io("start a pack in", &dir))?);
        let started_ns = nanos_now();
        let mut took = Timings::default();

        progress(StoreProgress { phase: StorePhase::Scan, done: 0, total: 0 });
        let start = Instant::now();
        let root = Root::open(&real)?;
        let (rules, mapped) = (&request.rules, &request.mapped);
        let full = self.is_full_scan_due(request);
        let urgency = request.urgency();
        let context = ScanContext { root: &root, rules, mapped, started_ns, stores: true, urgency, full, cancel };
        let scan = self.scan_workspace(&context)?;
        took.scan_us = micros_since(start);

        let start = Instant::now();
        let unread = scan.result.unread();
        let reading = Reading {
            root: &root,
            sink: Some(BlobSink { store: &self.objects, pack: &pack }),
            spool: &dir,
            max_file_bytes: rules.max_file_bytes,
            urgency,
            progress,
            cancel,
        };
        reading.read_all(&unread)?;
        self.revisit_vanished(&unread);
        took.read_us = micros_since(start);
        let read = unread.len() as u64;
        Ok(ScannedWorkspace { request: request.clone(), scan, pack, pending, read, started_ns, took })
    }

    /// Walks the part of the workspace that may have changed.
    pub(crate) fn scan_workspace(&self, context: &ScanContext<'_>) -> Result<WorkspaceScan> {
        let scan = || ScanRun::begin(self, context)?.finish();
        if self.goes_deep(context) { pool::on(context.urgency, scan) } else { scan() }
    }

    /// Says whether the scan may visit a path so deep that it needs a large stack.
    fn goes_deep(&self, context: &ScanContext<'_>) -> bool {
        let deep_state = self.last_state().0.is_some_and(|last| last.root.totals.height > pool::DEEP);
        let mut mapped = context.mapped.paths.keys().chain(&context.mapped.open);
        deep_state
            || self.watch.as_ref().is_some_and(WatchedWorkspace::is_deep)
            || mapped.any(|path| path.depth() > pool::DEEP)
    }

    /// Says whether the decisions about a workspace are still those of its last scan, as far as files outside the watched
    /// directories matter.
    pub(crate) fn has_same_rules(&self, workspace: &Path, last: &WorkspaceState) -> bool {
        let location = Location::find(workspace);
        indexes_unchanged(&last.indexes, location.as_ref())
            && last.mounts == mounts::below(workspace)
            && rules_unchanged(last, workspace, location.as_ref())
    }

    /// Makes the next scan visit the paths that vanished while they were read: they may be moved back without an event.
    fn revisit_vanished(&self, unread: &[&Unread]) {
        let Some(watch) = &self.watch else { return };
        let vanished = |unread: &&&Unread| matches!(unread.content.get(), Some(ContentRead::Vanished));
        unread.iter().filter(vanished).for_each(|unread| watch.note(&unread.path));
    }

    /// Returns the path of the store in the workspace, if it lies there.
    fn store_path_in(&self, real: &Path) -> Option<RelPath> {
        let store = std::fs::canonicalize(&self.dir).ok()?;
        RelPath::new(store.strip_prefix(real).ok()?.as_os_str().as_bytes().to_vec()).ok()
    }
}

/// A scan in progress.
struct ScanRun<'a> {
    history: &'a History,
    context: &'a ScanContext<'a>,
    /// The real path of the workspace.
    real: &'a Path,
    watch: Option<&'a WatchedWorkspace>,
    /// Whether the file system reports changes.
    reports_changes: bool,
    /// The changes since the last scan; `None` without a watcher.
    events: Option<TakenEvents>,
    last: Option<Arc<WorkspaceState>>,
    /// Whether the store has all objects of `last`.
    trusted: bool,
    /// Whether rules and mount points are those of `last`.
    same_rules: bool,
    mounts: Vec<String>,
    location: Option<Location>,
    /// The rules at the top of the workspace.
    rules: CompiledRules,
    tracked: TrackedPaths,
    notes: Vec<String>,
    /// Files whose fingerprint does not prove that their content is unchanged.
    unreliable: BTreeSet<RelPath>,
}

impl<'a> ScanRun<'a> {
    fn begin(history: &'a History, context: &'a ScanContext<'a>) -> Result<ScanRun<'a>> {
        let ScanContext { root, rules, .. } = context;
        let real = root.path();
        let reports_changes = root.reports_changes();
        let watch = history.watch.as_ref().filter(|_| reports_changes);
        if let (Some(watch), false) = (&history.watch, reports_changes) {
            watch.mark_incomplete("the file system does not report changes");
        }
        // The events come first: a change that is published in between is then either in them or in the state.
        let events = watch.map(WatchedWorkspace::take);
        let (last, trusted) = history.last_state();
        let mounts = mounts::below(real);
        let location = Location::find(real);
        let compiled = match rules.use_gitignore {
            true => CompiledRules::Rules(history.rule_cache.above(real, location.as_ref())),
            false => CompiledRules::Everything,
        };
        let valid = last.as_ref().filter(|last| {
            last.rules == **rules && last.mounts == mounts && rules_unchanged(last, real, location.as_ref())
        });
        let mut notes = valid.map(|last| last.notes.clone()).unwrap_or_default();
        let tracked = TrackedPaths::of(valid.map(|last| &**last), location.as_ref(), context, &mut notes);
        Ok(ScanRun {
            history,
            context,
            real,
            watch,
            reports_changes,
            events,
            trusted,
            same_rules: valid.is_some(),
            mounts,
            location,
            rules: compiled,
            tracked,
            notes,
            unreliable: mapped_paths(context.mapped, last.as_deref()),
            last,
        })
    }

    fn finish(mut self) -> Result<WorkspaceScan> {
        let epoch = self.events.as_ref().map(|events| events.epoch);
        let dirty = self.dirty_paths();
        let store_path = self.history.store_path_in(self.real);
        let (result, mut complaints) = self.walk(dirty.as_ref(), store_path.as_ref())?;
        if !self.same_rules && store_path.is_some() {
            self.notes.push("the state directory lies in the workspace; it is not covered".to_owned());
        }
        let unreadable = self.context.mapped.unreadable_processes;
        if unreadable > 0 {
            complaints.push(format!("the memory mappings of {unreadable} processes could not be read"));
        }
        let rule_cache = &self.history.rule_cache;
        rule_cache.retain_reporting(|path| result.has_dir(path));
        let (above, nested, of_rules) = rule_cache.sources();
        complaints.extend(of_rules);
        Ok(WorkspaceScan {
            result,
            epoch,
            full: dirty.is_none(),
            above,
            nested,
            mounts: self.mounts,
            tracked: self.tracked,
            notes: self.notes,
            complaints,
            repository: self.location.as_ref().map(Location::describe),
        })
    }

    /// Returns the paths that a partial scan must visit; `None` if a full scan is necessary.
    fn dirty_paths(&mut self) -> Option<Dirty> {
        let context = self.context;
        let events = self.events.take().map_or(Err("no directory is watched"), |events| events.dirty);
        match (self.last.as_ref().filter(|_| self.same_rules && self.trusted && !context.full), events) {
            (Some(last), Ok(mut dirty)) => {
                self.tracked.changed.iter().for_each(|path| dirty.mark(path));
                last.volatile_paths().iter().for_each(|path| dirty.mark(path));
                // A file that is a mount point may be written to through another path, without an event.
                self.mounts.iter().filter_map(|line| path_of_mount(self.real, line)).for_each(|path| dirty.mark(&path));
                self.unreliable.iter().for_each(|path| dirty.mark_written(path));
                context.mapped.open.iter().for_each(|path| dirty.mark(path));
                Some(dirty)
            }
            (_, events) => {
                // A written file may have the same fingerprint as before, so a full scan has to read it too.
                self.unreliable.extend(events.iter().flat_map(Dirty::written));
                tracing::debug!(workspace = %self.real.display(), why = events.err(), "making a full scan");
                None
            }
        }
    }

    /// Walks the dirty paths, or the whole workspace, and returns the result with its warnings.
    fn walk(&mut self, dirty: Option<&Dirty>, store_path: Option<&RelPath>) -> Result<(ScanResult, Vec<String>)> {
        let context = self.context;
        let device = context.root.stat(&RelPath::root());
        let device = device.map_err(HistoryError::io("read the metadata of workspace", self.real))?.dev;
        let none = BTreeSet::new();
        loop {
            let (forced, tracked) = match &self.tracked.forced {
                Forced::These(paths) => (&**paths, None),
                Forced::Undetermined(tracked) => (&none, Some(tracked)),
            };
            let walk = WorkspaceWalk {
                root: context.root,
                device,
                matcher: CoverageMatcher {
                    rules: context.rules,
                    own: OwnPatterns::compile(context.rules)?,
                    forced,
                    tracked,
                },
                rule_cache: &self.history.rule_cache,
                store_path: store_path.cloned(),
                watch: self.watch,
                unreliable: &self.unreliable,
                check_in: (context.stores && !self.trusted).then_some(&self.history.objects),
                started_ns: context.started_ns,
                urgency: context.urgency,
                cancel: context.cancel,
                findings: WalkFindings::default(),
            };
            let last = self.last.as_deref();
            let result = match (last, dirty) {
                (Some(last), Some(dirty)) if dirty.is_deeper_than(pool::DEEP) => {
                    pool::on(context.urgency, || walk_partial(&walk, last, self.rules.clone(), dirty.clone()))?
                }
                (Some(last), Some(dirty)) => walk_partial(&walk, last, self.rules.clone(), dirty.clone())?,
                (last, _) => {
                    let decided = self.same_rules && self.tracked.changed.is_empty() && self.reports_changes;
                    walk.full(last.map(|last| &last.root), self.rules.clone(), decided)?
                }
            };
            let WalkFindings { warnings, rules_changed, .. } = &walk.findings;
            // A file that the rules covered may be ignored now; it is then covered only if it is tracked.
            if tracked.is_none() && rules_changed.load(Ordering::Relaxed) {
                let changed = std::mem::take(&mut self.tracked.changed);
                self.tracked = TrackedPaths::undetermined(self.location.as_ref(), context, &mut self.notes);
                self.tracked.changed = changed;
                continue;
            }
            if !self.same_rules {
                self.notes.extend(walk.warn_if_nearly_empty(result.count_files()));
            }
            let warnings = std::mem::take(&mut *warnings.lock().unwrap_or_else(PoisonError::into_inner));
            return Ok((result, warnings));
        }
    }
}

impl TrackedPaths {
    /// Determines the tracked paths from the last state, if its rules are still valid, and from the indexes.
    fn of(
        valid: Option<&WorkspaceState>,
        location: Option<&Location>,
        context: &ScanContext<'_>,
        notes: &mut Vec<String>,
    ) -> TrackedPaths {
        let Some(last) = valid else { return Self::undetermined(location, context, notes) };
        if indexes_unchanged(&last.indexes, location) {
            let forced = Forced::These(Arc::clone(&last.forced));
            return TrackedPaths { indexes: last.indexes.clone(), forced, changed: Vec::new() };
        }
        let tracked = Tracked::of(location, context.root.path(), context.started_ns, notes);
        let forced: BTreeSet<RelPath> = ignored_paths(&tracked, &last.root).cloned().collect();
        let mut changed = Vec::new();
        for path in forced.symmetric_difference(&last.forced) {
            changed.push(path.clone());
            // The directories above may be ignored themselves and are then not in the workspace state.
            let mut above = path.parent();
            while let Some(dir) = above.filter(|dir| !dir.is_root()) {
                above = dir.parent();
                changed.push(dir);
            }
        }
        TrackedPaths { indexes: tracked.indexes, forced: Forced::These(Arc::new(forced)), changed }
    }

    fn undetermined(location: Option<&Location>, context: &ScanContext<'_>, notes: &mut Vec<String>) -> TrackedPaths {
        let tracked = Tracked::of(location, context.root.path(), context.started_ns, notes);
        let indexes = tracked.indexes.clone();
        TrackedPaths { indexes, forced: Forced::Undetermined(tracked), changed: Vec::new() }
    }
}

/// Lists the tracked paths that the rules ignore: paths that are not in the tree, or only because they are tracked.
pub(crate) fn ignored_paths<'t>(tracked: &'t Tracked, root: &DirState) -> impl Iterator<Item = &'t RelPath> {
    tracked.paths().iter().filter(move |path| match root.find(path) {
        Some(Node::File(file)) => file.remarks.forced,
        Some(Node::Special { .. } | Node::Dir(_)) => false,
        // Once the file can be stored, it may be covered only because it is tracked.
        Some(Node::Skipped { .. } | Node::StagedFile) | None => true,
    })
}

/// Walks the dirty paths, and then the other names of files that have become linked.
fn walk_partial(
    walk: &WorkspaceWalk<'_>,
    last: &WorkspaceState,
    rules: CompiledRules,
    mut dirty: Dirty,
) -> Result<ScanResult> {
    let mut visited = HashSet::new();
    loop {
        let result = walk.partial(&last.root, rules.clone(), &dirty)?;
        let linked: HashSet<u64> = result
            .unread()
            .iter()
            .filter(|unread| unread.stat.kind() == FileKind::Regular && unread.stat.nlink > 1)
            .map(|unread| unread.stat.ino)
            .chain(walk.findings.linked_out.lock().unwrap_or_else(PoisonError::into_inner).iter().copied())
            .filter(|inode| !visited.contains(inode))
            .collect();
        if linked.is_empty() {
            return Ok(result);
        }
        // A write under one name of a file changes its other names, whatever their fingerprints are.
        last.names_of(&linked).iter().for_each(|path| dirty.mark_written(path));
        visited.extend(linked);
    }
}

/// Says whether the ignore files outside the covered tree are unchanged.
fn rules_unchanged(last: &WorkspaceState, real: &Path, location: Option<&Location>) -> bool {
    let above = if last.rules.use_gitignore { IgnoreChain::sources_above(real, location) } else { Vec::new() };
    above.into_iter().map(with_fingerprint).eq(last.above.iter().cloned())
        && last.nested.iter().all(|source| with_fingerprint(source.0.clone()) == *source)
}

/// Returns the path of a mount point below the workspace.
fn path_of_mount(real: &Path, mount: &str) -> Option<RelPath> {
    let place = mounts::place(mount.as_bytes())?;
    RelPath::new(place.strip_prefix(real).ok()?.as_os_str().as_bytes().to_vec()).ok()
}

/// Lists the paths of files that are mapped writable, with all names of linked ones.
fn mapped_paths(mapped: &Mapped, last: Option<&WorkspaceState>) -> BTreeSet<RelPath> {
    let mut paths: BTreeSet<RelPath> = mapped.paths.keys().cloned().collect();
    let Some(last) = last else { return paths };
    let mut inodes = mapped.inodes.clone();
    for (path, inode) in &mapped.paths {
        // The inode may have another name: it was renamed, or the mapping process sees it under another path in a
        // container.
        let has_one_name = matches!(
            last.root.find(path),
            Some(Node::File(file)) if file.fingerprint.ino == *inode && !file.remarks.linked
        );
        if !has_one_name {
            inodes.insert(*inode);
        }
    }
    if !inodes.is_empty() {
        paths.extend(last.names_of(&inodes));
    }
    paths
}

/// Returns the wall clock time in nanoseconds since 1970.
pub(crate) fn nanos_now() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128)
}
