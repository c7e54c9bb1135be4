//! Takes a snapshot of a workspace, or discards it.
//!
//! A snapshot is a pack in its own directory below `pending/`. Publishing (`publish`) moves the pack to the
//! others and then creates the ref. Only then does the checkpoint exist, and only then may other snapshots rely
//! on its objects.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use fermata_protocol::paths::escape;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::rules::user_repository::UserRepository;
use crate::scan::pool;
use crate::scan::seal::seal;
use crate::scan::workspace_scan::{Forced, ScannedWorkspace, WorkspaceScan, ignored_paths};
use crate::scan::workspace_state::{DirState, Totals, WorkspaceState};
use crate::snapshot_request::SnapshotRequest;
use crate::stats::{Stats, Timings, micros_since};
use crate::store::oid::{ObjectKind, Oid};
use crate::store::pack::{FinishedPack, PackWriter};
use crate::store::pending::{LiveSnapshots, PendingSnapshot};
use crate::tree::listing::{CheckpointRoot, root_tree_of};
use crate::tree::manifest::{CheckpointManifest, FORMAT};
use crate::tree::names::RelPath;
use crate::tree::skipped::Skipped;
use crate::tree::trees::{ObjectSink, Trees, build_root};
use fermata_failpoint as failpoint;

/// A full scan is worth this many partial ones; the state is saved once so many have been published.
pub(crate) const FULL_SCAN_WEIGHT: u64 = 50;

/// A snapshot that is not published. Its pack is complete; `publish` makes it durable and visible.
#[derive(Debug)]
pub struct Snapshot {
    /// The number of the future checkpoint.
    pub number: u64,
    pub commit: Oid,
    /// The tree of the files; equal for equal contents.
    pub files: Oid,
    /// The metadata tree; equal for equal contents, modes and times.
    pub meta: Oid,
    pub stats: Stats,
    /// Paths that are covered but not stored.
    pub skipped: Vec<Skipped>,
    /// Files that changed at every attempt to read them.
    pub torn: Vec<RelPath>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The state of the user's repository at the time of the scan.
    pub user_repository: Option<UserRepository>,
    pub took: Timings,
    /// The name of its pack; `None` if an earlier checkpoint has all objects.
    pub(crate) pack: Option<String>,
    /// The file that becomes the ref, not flushed yet; `None` for a warm-up scan.
    pub(crate) staged_ref: Option<File>,
    /// The directory of the pack.
    pub(crate) pending: PendingSnapshot,
    /// The workspace state after the scan.
    pub(crate) state: Arc<WorkspaceState>,
    /// The epoch of the watcher up to which the scan has taken in all events.
    pub(crate) epoch: Option<u64>,
    /// Whether the scan was a full one.
    pub(crate) full: bool,
}

impl Snapshot {
    /// Says whether the files and metadata equal those of another workspace state.
    pub(crate) fn has_same_trees(&self, other: &WorkspaceState) -> bool {
        (other.root.files, other.root.meta) == (self.state.root.files, self.state.root.meta)
    }

    /// Takes over the commit of an equal workspace state.
    pub(crate) fn take_commit_of(&mut self, other: &WorkspaceState) {
        Arc::make_mut(&mut self.state).commit = other.commit;
    }
}

static PENDING_COUNT: AtomicU64 = AtomicU64::new(0);

impl History {
    /// Takes a snapshot: scans the workspace and stores the result.
    ///
    /// # Errors
    /// As for [`History::scan`] and [`History::complete`].
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Snapshot> {
        self.complete(self.scan(request, progress, cancel)?, now_ms, progress, cancel)
    }

    /// Builds the trees of a scanned workspace and completes its pack. [`History::publish`] makes the snapshot durable
    /// and visible.
    ///
    /// # Errors
    /// Fails when cancelled, or when the store cannot be written.
    pub fn complete(
        &self,
        scanned: ScannedWorkspace,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Snapshot> {
        let ScannedWorkspace { request, scan, pack, pending, read, started_ns, mut took } = scanned;
        let real = self.checked_workspace(&request.workspace)?;

        progress(StoreProgress { phase: StorePhase::Trees, done: 0, total: 0 });
        let start = Instant::now();
        let sink = ObjectSink { store: &self.objects, pack: Some(&pack) };
        let WorkspaceScan { result, epoch, full, above, nested, mounts, tracked, notes, complaints, repository } = scan;
        let root = seal(result, started_ns, request.urgency(), read > pool::MANY as u64, &sink)?;
        let forced = match tracked.forced {
            Forced::These(paths) => paths,
            Forced::Undetermined(tracked) => Arc::new(ignored_paths(&tracked, &root).cloned().collect()),
        };
        let manifest = CheckpointManifest {
            format: FORMAT,
            number: request.number,
            parent: request.parent,
            taken_ms: now_ms,
            workspace: escape(real.as_os_str().as_bytes()),
            rules: request.rules.clone(),
            files: root.files.map_or_else(|| sink.put(ObjectKind::Tree, &[]), Ok)?,
            stats: stats_of(&root, read),
            skipped: root.skipped(),
            torn: root.torn(),
            warnings: complaints.into_iter().chain(notes.iter().cloned()).collect(),
            user_repository: repository,
        };
        let trees = Trees { files: manifest.files, meta: root.meta };
        let is_new = !pack.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let reused = if is_new { None } else { self.equal_previous(&manifest, &trees)? };
        let commit = match reused {
            Some(commit) => commit,
            None => {
                let tree = build_root(&trees, &manifest.text()?, &sink)?;
                sink.put(ObjectKind::Commit, commit_text(&tree, &request.message, now_ms).as_bytes())?
            }
        };
        let (rules, indexes) = (request.rules.clone(), tracked.indexes);
        let state = WorkspaceState { commit, rules, above, nested, mounts, indexes, forced, notes, root };
        took.trees_us = micros_since(start);

        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        progress(StoreProgress { phase: StorePhase::Pack, done: 0, total: 0 });
        let start = Instant::now();
        let staged_ref = if request.is_checkpoint() { Some(self.refs.stage(commit, &pending.dir)?) } else { None };
        let is_needed = reused.is_none() || staged_ref.is_none();
        let pack = finish_pack(pack, is_needed, &request, &pending.dir)?;
        took.pack_us = micros_since(start);
        let (new_objects, new_bytes) = pack.as_ref().map_or((0, 0), |pack| (pack.objects, pack.bytes));
        Ok(Snapshot {
            number: request.number,
            commit,
            files: trees.files,
            meta: trees.meta,
            stats: Stats { new_objects, new_bytes, ..manifest.stats },
            skipped: manifest.skipped,
            torn: manifest.torn,
            warnings: manifest.warnings,
            user_repository: manifest.user_repository,
            took,
            pack: pack.map(|pack| pack.name),
            staged_ref,
            pending,
            state: Arc::new(state),
            epoch,
            full,
        })
    }

    /// Returns the commit of the previous checkpoint if its manifest differs only in number and time. A
    /// checkpoint of an unchanged workspace is another ref to that commit.
    fn equal_previous(&self, now: &CheckpointManifest, trees: &Trees) -> Result<Option<Oid>> {
        // A previous checkpoint that cannot be read or was found damaged is not reused.
        let Some(Ok(Some(commit))) = now.parent.map(|parent| self.refs.find(parent)) else { return Ok(None) };
        let Ok(root) = CheckpointRoot::read(&self.objects, &commit) else { return Ok(None) };
        let Ok(tree) = root_tree_of(&self.objects, &commit) else { return Ok(None) };
        let sound = [commit, tree, root.manifest].iter().all(|oid| self.objects.contains(oid));
        if !sound || (root.files, root.meta) != (trees.files, trees.meta) {
            return Ok(None);
        }
        let Ok(then) = root.manifest(&self.objects) else { return Ok(None) };
        let stats = Stats { unchanged: now.stats.unchanged, ..then.stats };
        let CheckpointManifest { number, parent, taken_ms, .. } = *now;
        let then = CheckpointManifest { number, parent, taken_ms, stats, ..then };
        Ok((then.text()? == now.text()?).then_some(commit))
    }

    /// Removes a snapshot that was not published, under the writer lock.
    pub fn discard(&self, snapshot: Snapshot) {
        let _writer = self.lock_writer();
        // A pack that a failed publication has already moved stays for the sweep, which knows whether it is
        // needed.
        drop(snapshot);
    }

    /// Creates the directory of a new snapshot. No pack is removed while such a directory is registered.
    pub(crate) fn start_pending(&self, number: u64) -> Result<PendingSnapshot> {
        let count = PENDING_COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{number}-{}-{count}", std::process::id());
        let dir = self.pending().join(&name);
        // A process with the same pid may have left a directory before a reboot.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(HistoryError::io("clear", &dir))?;
        }
        {
            // Packs are removed under this lock and only while no snapshot is registered.
            let _writer = self.lock_writer();
            self.objects.refresh_if_changed()?;
            self.live().insert(name.clone());
        }
        let pending = PendingSnapshot { dir, name, live: LiveSnapshots::clone(&self.live) };
        fs::create_dir(&pending.dir).map_err(HistoryError::io("create", &pending.dir))?;
        Ok(pending)
    }
}

fn stats_of(root: &DirState, read: u64) -> Stats {
    let Totals { files, bytes, .. } = root.totals;
    Stats { files, bytes, unchanged: files.saturating_sub(read), ..Stats::default() }
}

/// Completes the pack of a snapshot; without effect if an earlier checkpoint has all of its objects.
fn finish_pack(
    pack: Mutex<PackWriter>,
    is_needed: bool,
    request: &SnapshotRequest,
    dir: &Path,
) -> Result<Option<FinishedPack>> {
    let pack = pack.into_inner().unwrap_or_else(PoisonError::into_inner);
    let pack = if is_needed { Some(pack.finish()) } else { None };
    let pack = pack.transpose().map_err(HistoryError::io("complete a pack in", dir))?;
    failpoint::check(if request.is_checkpoint() { "history.pack.written" } else { "history.warm_up.written" })
        .map_err(HistoryError::io("complete a pack in", dir))?;
    Ok(pack)
}

fn commit_text(tree: &Oid, message: &str, now_ms: i64) -> String {
    let sec = now_ms.div_euclid(1000).max(0);
    // Git ends a message at a NUL byte.
    let message = message.replace('\0', "\u{fffd}");
    let person = format!("Fermata <fermata@localhost> {sec} +0000");
    format!("tree {tree}\nauthor {person}\ncommitter {person}\n\n{}\n", message.trim_end())
}
