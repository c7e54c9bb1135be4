//! Takes a snapshot of a workspace, or discards it.
//!
//! A snapshot is a pack in a directory of its own below `pending/`. Publishing (`publish`) moves it among the others and
//! then creates the ref: only then does the checkpoint exist, and only then may others rely on its objects.

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

/// A look at everything is worth keeping on the disk at once; of smaller ones, as many as this.
pub(crate) const WHOLE_LOOK: u64 = 50;

/// What to take a snapshot of.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// The workspace, by its absolute path.
    pub workspace: PathBuf,
    /// The number of the checkpoint that this is to be.
    pub number: u64,
    /// Its message.
    pub message: String,
    /// The checkpoint before it.
    pub parent: Option<u64>,
    /// What it covers.
    pub rules: Rules,
    /// Files that somebody can write to through a mapping, which shows in no state of theirs.
    pub mapped: Mapped,
    /// How long after a look at everything another one is due, whatever the watcher says; none when never.
    pub whole_after: Option<Duration>,
}

impl SnapshotRequest {
    /// Says who waits for it.
    pub(crate) fn hurry(&self) -> Urgency {
        if self.is_checkpoint() { Urgency::Urgent } else { Urgency::Background }
    }

    /// Says whether it is to be a checkpoint, whose numbers begin at one, or only makes the workspace known.
    pub(crate) fn is_checkpoint(&self) -> bool {
        self.number > 0
    }
}

/// Files of the workspace that somebody can write to through memory.
#[derive(Clone, Debug, Default)]
pub struct Mapped {
    /// By path, with the inode.
    pub paths: BTreeMap<RelPath, u64>,
    /// By inode, where the path is not one of the workspace.
    pub inodes: HashSet<u64>,
    /// Files that are only open for writing: their state vouches for them, but no event tells that it has changed.
    pub open: BTreeSet<RelPath>,
    /// Processes whose mappings are not told.
    pub untold: u64,
}

/// Counts of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Files and links.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files and links whose content was known without reading them.
    pub unchanged: u64,
    /// Objects in the new pack; 0 in the manifest, which is part of the pack.
    pub new_objects: u64,
    /// Bytes of the new pack; 0 in the manifest.
    pub new_bytes: u64,
}

/// How long each part of a snapshot took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Listing the workspace.
    pub scan_us: u64,
    /// Reading and compressing contents.
    pub read_us: u64,
    /// Building trees.
    pub trees_us: u64,
    /// Completing and flushing the pack.
    pub pack_us: u64,
}

/// A snapshot that is not yet visible; what it consists of is durable.
#[derive(Debug)]
pub struct Snapshot {
    /// The number of the checkpoint that it is to be.
    pub number: u64,
    /// The commit.
    pub commit: Oid,
    /// The tree of the files: equal for equal contents.
    pub files: Oid,
    /// The metadata tree: equal for equal contents, modes and times.
    pub meta: Oid,
    /// Counts.
    pub stats: Stats,
    /// What is covered but not stored.
    pub skipped: Vec<Skipped>,
    /// Files that changed at every attempt to read them.
    pub torn: Vec<RelPath>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// The user's repository at that instant.
    pub user_repository: Option<UserRepository>,
    /// How long each part took.
    pub took: Timings,
    /// The name of its pack; none where an earlier checkpoint has all of it.
    pub(crate) pack: Option<String>,
    /// What its ref will say, not flushed yet; none where it is to have no number.
    pub(crate) named: Option<File>,
    /// Where it lies.
    pub(crate) draft: PendingSnapshot,
    /// What it shows.
    pub(crate) picture: Arc<WorkspaceState>,
    /// Up to where the watcher's events are dealt with.
    pub(crate) epoch: Option<u64>,
    /// Whether everything was looked at.
    pub(crate) whole: bool,
}

impl Snapshot {
    /// Says whether the store holds all of this under the commit of a picture that is known.
    pub(crate) fn shows_the_same(&self, known: &WorkspaceState) -> bool {
        (known.root.files, known.root.meta) == (self.picture.root.files, self.picture.root.meta)
    }

    /// Puts that picture's commit in the place of its own.
    pub(crate) fn stands_for(&mut self, known: &WorkspaceState) {
        Arc::make_mut(&mut self.picture).commit = known.commit;
    }
}

/// The directory of a snapshot that is not published; it goes when its owner does.
#[derive(Debug)]
pub(crate) struct PendingSnapshot {
    /// The directory.
    pub dir: PathBuf,
    /// Its name, below the drafts.
    pub(crate) name: String,
    live: Live,
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %self.dir.display(), "a draft stays until the next sweep");
        }
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

static DRAFTS: AtomicU64 = AtomicU64::new(0);

impl History {
    /// Takes a snapshot: looks and completes in one go.
    ///
    /// # Errors
    /// As for [`History::observe`] and [`History::complete`].
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Snapshot> {
        self.complete(self.observe(request, progress, cancel)?, now_ms, progress, cancel)
    }

    /// Makes a snapshot of what was observed. It is durable when this returns, and visible after [`History::publish`].
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

    /// Returns the commit of the checkpoint before, where that says the same but for number and time: a checkpoint of a
    /// workspace in which nothing has changed is another name for it.
    fn same_as_before(&self, now: &Manifest, trees: &Trees) -> Result<Option<Oid>> {
        // Whatever cannot be read, or was found damaged, is written anew.
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

    /// Forgets a snapshot that was not published, as dropping it does.
    pub fn discard(&self, snapshot: Snapshot) {
        let _writer = self.lock_writer();
        // A pack that a failed publication has moved stays for the sweep, which knows whether anybody relies on it.
        drop(snapshot);
    }

    /// Starts the directory of what is to become a checkpoint; while it lasts, no object goes.
    pub(crate) fn start_draft(&self, number: u64) -> Result<PendingSnapshot> {
        let count = DRAFTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{number}-{}-{count}", std::process::id());
        let dir = self.pending().join(&name);
        // What a process with our pid left behind before a reboot.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(HistoryError::io("clear", &dir))?;
        }
        {
            // Packs are removed under this lock and only while nobody is entered.
            let _writer = self.lock_writer();
            self.objects.refresh_if_changed()?;
            self.live().insert(name.clone());
        }
        let draft = PendingSnapshot { dir, name, live: Live::clone(&self.live) };
        fs::create_dir(&draft.dir).map_err(HistoryError::io("create", &draft.dir))?;
        Ok(draft)
    }
}

/// Returns the microseconds since an instant.
pub(crate) fn micros(clock: Instant) -> u64 {
    clock.elapsed().as_micros() as u64
}

fn commit_text(tree: &Oid, message: &str, now_ms: i64) -> String {
    let sec = now_ms.div_euclid(1000).max(0);
    // Git ends a message at a NUL.
    let message = message.replace('\0', "\u{fffd}");
    let person = format!("Fermata <fermata@localhost> {sec} +0000");
    format!("tree {tree}\nauthor {person}\ncommitter {person}\n\n{}\n", message.trim_end())
}
