//! Takes a snapshot of a workspace, or discards it.
//!
//! A snapshot is a pack in its own directory below `pending/`. Publishing (`publish`) moves the pack to the
//! others and then creates the ref. Only then does the checkpoint exist, and only then may other snapshots rely
//! on its objects.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use fermata_protocol::paths::escape;
use serde::{Deserialize, Serialize};

use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, Phase, Progress};
use crate::rules::coverage::Rules;
use crate::rules::user_repository::UserRepository;
use crate::scan::pool::Urgency;
use crate::scan::scan_result::Skipped;
use crate::scan::walk::MANY;
use crate::scan::workspace_scan::{Forced, Observed, WorkspaceScan};
use crate::scan::workspace_state::WorkspaceState;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::listing::{CheckpointRoot, root_tree_of};
use crate::tree::metadata::{FORMAT, Manifest};
use crate::tree::names::RelPath;
use crate::tree::trees::{ObjectSink, Trees, build_root, seal};
use crate::{History, Live};
use fermata_failpoint as failpoint;

/// A full scan is worth this many partial ones; the state is saved once so many have been published.
pub(crate) const WHOLE_LOOK: u64 = 50;

/// The parameters of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// The absolute path of the workspace.
    pub workspace: PathBuf,
    /// The number of the future checkpoint; 0 for a warm-up scan, which becomes none.
    pub number: u64,
    /// The commit message.
    pub message: String,
    /// The number of the previous checkpoint.
    pub parent: Option<u64>,
    pub rules: Rules,
    /// Files that processes can write to without an event of the watcher.
    pub mapped: Mapped,
    /// The age of the last full scan from which another one is made, whatever the watcher reports. `None` means
    /// never.
    pub whole_after: Option<Duration>,
}

impl SnapshotRequest {
    /// Returns whether frozen agents wait for the result.
    pub(crate) fn hurry(&self) -> Urgency {
        if self.is_checkpoint() { Urgency::Urgent } else { Urgency::Background }
    }

    /// Says whether the snapshot becomes a checkpoint. Numbers begin at one; 0 is a warm-up scan.
    pub(crate) fn is_checkpoint(&self) -> bool {
        self.number > 0
    }
}

/// Files of the workspace that processes have mapped writable or open for writing.
#[derive(Clone, Debug, Default)]
pub struct Mapped {
    /// Mapped files by path, with their inode numbers.
    pub paths: BTreeMap<RelPath, u64>,
    /// The inode numbers of mapped files whose path is not in the workspace.
    pub inodes: HashSet<u64>,
    /// Files that are only open for writing. Their fingerprint shows every change, but a change raises no
    /// event.
    pub open: BTreeSet<RelPath>,
    /// How many processes have mappings that could not be read.
    pub untold: u64,
}

/// Counts of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Files and symbolic links.
    pub files: u64,
    /// The bytes of their contents.
    pub bytes: u64,
    /// Files and symbolic links that were not read, since the workspace state had their content.
    pub unchanged: u64,
    /// Objects in the new pack; 0 in the manifest, which is part of that pack.
    pub new_objects: u64,
    /// Bytes of the new pack; 0 in the manifest.
    pub new_bytes: u64,
}

/// The duration of each phase of a snapshot, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Scanning the workspace.
    pub scan_us: u64,
    /// Reading and compressing contents.
    pub read_us: u64,
    /// Building trees.
    pub trees_us: u64,
    /// Completing and flushing the pack.
    pub pack_us: u64,
}

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
    pub(crate) named: Option<File>,
    /// The directory of the pack.
    pub(crate) draft: PendingSnapshot,
    /// The workspace state after the scan.
    pub(crate) picture: Arc<WorkspaceState>,
    /// The epoch of the watcher up to which the scan has taken in all events.
    pub(crate) epoch: Option<u64>,
    /// Whether the scan was a full one.
    pub(crate) whole: bool,
}

impl Snapshot {
    /// Says whether the files and metadata equal those of another workspace state.
    pub(crate) fn shows_the_same(&self, known: &WorkspaceState) -> bool {
        (known.root.files, known.root.meta) == (self.picture.root.files, self.picture.root.meta)
    }

    /// Takes over the commit of an equal workspace state.
    pub(crate) fn stands_for(&mut self, known: &WorkspaceState) {
        Arc::make_mut(&mut self.picture).commit = known.commit;
    }
}

/// The directory of a snapshot that is not published. Dropping it removes the directory.
#[derive(Debug)]
pub(crate) struct PendingSnapshot {
    pub dir: PathBuf,
    /// The name of the directory below `pending/`.
    pub(crate) name: String,
    live: Live,
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %self.dir.display(), "the directory of a snapshot could not be removed; the next sweep removes it");
        }
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

static DRAFTS: AtomicU64 = AtomicU64::new(0);

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
        self.complete(self.observe(request, progress, cancel)?, now_ms, progress, cancel)
    }

    /// Builds the trees of a scanned workspace and completes its pack. [`History::publish`] makes the snapshot
    /// durable and visible.
    ///
    /// # Errors
    /// Fails when cancelled, or when the store cannot be written.
    pub fn complete(
        &self,
        observed: Observed,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Snapshot> {
        let Observed { request, look, pack, draft, read, started_ns, mut took } = observed;
        let WorkspaceScan {
            found,
            epoch,
            whole,
            above,
            nested,
            mounts,
            indexes,
            forced,
            notes,
            complaints,
            repository,
        } = look;
        let dir = draft.dir.clone();
        let real = self.checked_workspace(&request.workspace)?;

        progress(Progress { phase: Phase::Trees, done: 0, total: 0 });
        let clock = Instant::now();
        let sink = ObjectSink { store: &self.objects, pack: Some(&pack) };
        let root = seal(found, started_ns, request.hurry(), read > MANY as u64, &sink)?;
        let files = match root.files {
            Some(files) => files,
            None => sink.put(ObjectKind::Tree, &[])?,
        };
        let forced = match forced {
            Forced::These(paths) => paths,
            Forced::Follow(tracked) => Arc::new(tracked.left_out_of(&root).cloned().collect()),
        };
        let rules = request.rules.clone();
        let mut picture = WorkspaceState { commit: files, rules, above, nested, mounts, indexes, forced, notes, root };
        let root = &picture.root;
        let manifest = Manifest {
            format: FORMAT,
            number: request.number,
            parent: request.parent,
            taken_ms: now_ms,
            workspace: escape(real.as_os_str().as_bytes()),
            rules: request.rules.clone(),
            files,
            stats: Stats {
                files: root.totals.files,
                bytes: root.totals.bytes,
                unchanged: root.totals.files.saturating_sub(read),
                ..Stats::default()
            },
            skipped: picture.skipped(),
            torn: picture.torn(),
            warnings: complaints.into_iter().chain(picture.notes.iter().cloned()).collect(),
            user_repository: repository,
        };
        let trees = Trees { files, meta: root.meta };
        let is_new = !pack.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let same = if is_new { None } else { self.same_as_before(&manifest, &trees)? };
        let commit = match same {
            Some(commit) => commit,
            None => {
                let tree = build_root(&trees, &manifest.text()?, &sink)?;
                sink.put(ObjectKind::Commit, commit_text(&tree, &request.message, now_ms).as_bytes())?
            }
        };
        picture.commit = commit;
        took.trees_us = micros(clock);

        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        progress(Progress { phase: Phase::Pack, done: 0, total: 0 });
        let clock = Instant::now();
        let pack = pack.into_inner().unwrap_or_else(PoisonError::into_inner);
        let failed = HistoryError::io("complete a pack in", &dir);
        let named = if request.is_checkpoint() { Some(self.refs.draft(commit, &dir)?) } else { None };
        let pack = match (same, &named) {
            (Some(_), Some(_)) => None,
            _ => Some(pack.finish().map_err(failed)?),
        };
        failpoint::check(if request.is_checkpoint() { "history.pack.written" } else { "history.prime.written" })
            .map_err(HistoryError::io("complete a pack in", &dir))?;
        took.pack_us = micros(clock);
        Ok(Snapshot {
            number: request.number,
            commit,
            files,
            meta: trees.meta,
            stats: Stats {
                new_objects: pack.as_ref().map_or(0, |pack| pack.objects),
                new_bytes: pack.as_ref().map_or(0, |pack| pack.bytes),
                ..manifest.stats
            },
            skipped: manifest.skipped,
            torn: manifest.torn,
            warnings: manifest.warnings,
            user_repository: manifest.user_repository,
            took,
            pack: pack.map(|pack| pack.name),
            named,
            draft,
            picture: Arc::new(picture),
            epoch,
            whole,
        })
    }

    /// Returns the commit of the previous checkpoint if its manifest differs only in number and time. A
    /// checkpoint of an unchanged workspace is another ref to that commit.
    fn same_as_before(&self, now: &Manifest, trees: &Trees) -> Result<Option<Oid>> {
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
        let Manifest { number, parent, taken_ms, .. } = *now;
        let then = Manifest { number, parent, taken_ms, stats, ..then };
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
    pub(crate) fn start_draft(&self, number: u64) -> Result<PendingSnapshot> {
        let count = DRAFTS.fetch_add(1, Ordering::Relaxed);
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
        let draft = PendingSnapshot { dir, name, live: Live::clone(&self.live) };
        fs::create_dir(&draft.dir).map_err(HistoryError::io("create", &draft.dir))?;
        Ok(draft)
    }
}

pub(crate) fn micros(clock: Instant) -> u64 {
    clock.elapsed().as_micros() as u64
}

fn commit_text(tree: &Oid, message: &str, now_ms: i64) -> String {
    let sec = now_ms.div_euclid(1000).max(0);
    // Git ends a message at a NUL byte.
    let message = message.replace('\0', "\u{fffd}");
    let person = format!("Fermata <fermata@localhost> {sec} +0000");
    format!("tree {tree}\nauthor {person}\ncommitter {person}\n\n{}\n", message.trim_end())
}
