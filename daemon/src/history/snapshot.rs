//! Takes a snapshot of a workspace, and publishes or discards it.
//!
//! A snapshot is a pack in a directory of its own below `pending/`. Publishing moves it among the others and then
//! creates the ref: only then does the checkpoint exist, and only then may others rely on its objects.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fermata_protocol::paths::escape;
use serde::{Deserialize, Serialize};

use super::beneath::sync_dir;
use super::errors::{HistoryError, Result};
use super::found::Skipped;
use super::listing::{CheckpointRoot, root_tree_of};
use super::meta::{FORMAT, Manifest};
use super::names::RelPath;
use super::observe::{Forced, Look, Observed};
use super::oid::{ObjectKind, Oid};
use super::picture::{Node, Picture};
use super::pool::Hurry;
use super::rules::Rules;
use super::scan::MANY;
use super::tree::{ObjectSink, Trees, build_root, seal};
use super::user_repository::UserRepository;
use super::{History, Live, OnProgress, Phase, Progress};
use crate::failpoint;
use crate::os::fsync::sync_together;

/// A look at everything is worth keeping on the disk at once; of smaller ones, as many as this.
pub(super) const WHOLE_LOOK: u64 = 50;

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
    pub(super) fn hurry(&self) -> Hurry {
        if self.is_checkpoint() { Hurry::Urgent } else { Hurry::Background }
    }

    /// Says whether it is to be a checkpoint, whose numbers begin at one, or only makes the workspace known.
    pub(super) fn is_checkpoint(&self) -> bool {
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
    /// None where an earlier checkpoint has all of it.
    pack: Option<String>,
    /// What its ref will say, not flushed yet; none where it is to have no number.
    named: Option<File>,
    draft: Draft,
    picture: Arc<Picture>,
    epoch: Option<u64>,
    /// Whether everything was looked at.
    pub(super) whole: bool,
}

impl Snapshot {
    /// Says whether the store holds all of this under the commit of a picture that is known.
    pub(super) fn shows_the_same(&self, known: &Picture) -> bool {
        (known.root.files, known.root.meta) == (self.picture.root.files, self.picture.root.meta)
    }

    /// Puts that picture's commit in the place of its own.
    pub(super) fn stands_for(&mut self, known: &Picture) {
        Arc::make_mut(&mut self.picture).commit = known.commit;
    }
}

/// The directory of a snapshot that is not published; it goes when its owner does.
#[derive(Debug)]
pub(super) struct Draft {
    /// The directory.
    pub dir: PathBuf,
    name: String,
    live: Live,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %self.dir.display(), "a draft stays until the next sweep");
        }
        self.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// A snapshot that has its number. Unless it is completed, the number is taken back.
pub struct Publication<'a> {
    history: &'a History,
    snapshot: &'a Snapshot,
    is_complete: bool,
    _writer: MutexGuard<'a, ()>,
}

impl Publication<'_> {
    /// Makes the snapshot's ref and the place of its pack durable, side by side with what `beside` it makes a checkpoint:
    /// before that checkpoint's row is there, nobody relies on any of them.
    ///
    /// # Errors
    /// Fails when that cannot be done; then the checkpoint does not exist.
    pub fn complete(mut self, beside: &[&File]) -> Result<()> {
        let Publication { history, snapshot, .. } = self;
        let refs = history.refs.dir();
        let packs = history.objects.pack_dir();
        let dirs = [Some(refs), snapshot.pack.as_ref().map(|_| &*packs)].into_iter().flatten();
        let failed = HistoryError::io("flush", refs);
        let dirs = dirs.map(File::open).collect::<io::Result<Vec<File>>>();
        let flushed = dirs.and_then(|dirs| {
            let all: Vec<&File> = beside.iter().copied().chain(&snapshot.named).chain(&dirs).collect();
            sync_together(&all)
        });
        flushed.map_err(failed)?;
        failpoint::hit("history.ref.created");
        self.is_complete = true;
        history.has_published(snapshot);
        Ok(())
    }
}

impl Drop for Publication<'_> {
    fn drop(&mut self) {
        if !self.is_complete {
            self.history.refs.take_back(self.snapshot.number);
        }
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
        let Look { found, epoch, whole, above, nested, mounts, index, forced, notes, complaints, repository } = look;
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
        let mut picture = Picture { commit: files, rules, above, nested, mounts, index, forced, notes, root };
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

    /// Makes a snapshot the checkpoint that it was taken for.
    ///
    /// # Errors
    /// As for [`History::begin_to_publish`] and [`Publication::complete`].
    pub fn publish(&self, snapshot: &Snapshot) -> Result<()> {
        self.begin_to_publish(snapshot)?.complete(&[])
    }

    /// Gives a snapshot its number; it is a checkpoint once the publication is complete.
    ///
    /// # Errors
    /// Fails when the number is taken, when the snapshot was discarded, or when the store cannot be written; then the
    /// checkpoint does not exist, and the snapshot may be published again or discarded.
    pub fn begin_to_publish<'a>(&'a self, snapshot: &'a Snapshot) -> Result<Publication<'a>> {
        let writer = self.lock_writer();
        let number = snapshot.number;
        if !self.live().contains(&snapshot.draft.name) {
            return Err(HistoryError::SnapshotGone { number });
        }
        if self.refs.find(number)?.is_some() {
            return Err(HistoryError::NumberTaken { number });
        }
        let from = self.pending().join(&snapshot.draft.name);
        self.move_pack(snapshot)?;
        failpoint::check("history.ref.before").map_err(HistoryError::io("publish from", &from))?;
        self.refs.create(number, &from)?;
        Ok(Publication { history: self, snapshot, is_complete: false, _writer: writer })
    }

    /// Makes a snapshot the known picture without making it a checkpoint, so that the next one only costs what has
    /// changed since.
    ///
    /// # Errors
    /// Fails when the snapshot was discarded, or when the store cannot be written.
    pub(super) fn publish_base(&self, snapshot: &Snapshot) -> Result<()> {
        let _writer = self.lock_writer();
        if !self.live().contains(&snapshot.draft.name) {
            return Err(HistoryError::SnapshotGone { number: snapshot.number });
        }
        self.move_pack(snapshot)?;
        let packs = self.objects.pack_dir();
        sync_dir(&packs).map_err(HistoryError::io("flush", &packs))?;
        self.refs.set_base(snapshot.commit, &self.pending().join(&snapshot.draft.name))?;
        failpoint::hit("history.prime.based");
        self.has_published(snapshot);
        Ok(())
    }

    /// Moves a snapshot's pack among the published ones; repeatable. The caller flushes their directory.
    fn move_pack(&self, snapshot: &Snapshot) -> Result<()> {
        let Some(pack) = &snapshot.pack else { return Ok(()) };
        let (from, to) = (self.pending().join(&snapshot.draft.name), self.objects.pack_dir());
        // The index comes last: a pack counts from the instant that it has one.
        for end in ["pack", "idx"] {
            let name = format!("{pack}.{end}");
            let (source, target) = (from.join(&name), to.join(&name));
            // A publication that failed half way has moved the first already.
            if source.exists() || !target.exists() {
                fs::rename(&source, &target).map_err(HistoryError::io("move a pack to", &target))?;
            }
            failpoint::check(if snapshot.number > 0 { "history.pack.moved" } else { "history.prime.moved" })
                .map_err(HistoryError::io("move a pack to", &target))?;
        }
        self.objects.refresh()
    }

    /// Takes note of a publication. What fails here only costs the next snapshot time, or the place its tidiness.
    fn has_published(&self, snapshot: &Snapshot) {
        self.adopt(snapshot);
        let from = self.pending().join(&snapshot.draft.name);
        if let Err(error) = fs::remove_dir_all(&from) {
            tracing::warn!(%error, dir = %from.display(), "a draft stays until the next sweep");
        }
        self.live().remove(&snapshot.draft.name);
    }

    /// Makes a snapshot's picture the known one, unless a later one is.
    pub(super) fn adopt(&self, snapshot: &Snapshot) {
        let mut known = self.lock_known();
        if known.epoch > snapshot.epoch {
            return;
        }
        known.epoch = snapshot.epoch;
        known.picture = Some(Arc::clone(&snapshot.picture));
        known.trusted = true;
        if snapshot.whole {
            known.whole_at = Some(Instant::now());
        }
        known.unsaved += if snapshot.whole { WHOLE_LOOK } else { 1 };
        // Under the same lock: a later look's watches and events must not be taken for this one's.
        let picture = &snapshot.picture;
        let is_dir = |path: &RelPath| path.is_root() || matches!(picture.root.find(path), Some(Node::Dir(_)));
        if let (Some(watch), Some(epoch)) = (&self.watch, snapshot.epoch) {
            watch.settle(epoch);
            // The kernel gives up the watches of removed directories by itself; the others cost little meanwhile.
            if snapshot.whole {
                watch.retain(epoch, is_dir);
            }
        }
        if snapshot.whole {
            self.standings.retain(is_dir);
        }
    }

    /// Forgets a snapshot that was not published, as dropping it does.
    pub fn discard(&self, snapshot: Snapshot) {
        let _writer = self.lock_writer();
        // A pack that a failed publication has moved stays for the sweep, which knows whether anybody relies on it.
        drop(snapshot);
    }

    /// Starts the directory of what is to become a checkpoint; while it lasts, no object goes.
    pub(super) fn start_draft(&self, number: u64) -> Result<Draft> {
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
        let draft = Draft { dir, name, live: Live::clone(&self.live) };
        fs::create_dir(&draft.dir).map_err(HistoryError::io("create", &draft.dir))?;
        Ok(draft)
    }
}

/// Returns the microseconds since an instant.
pub(super) fn micros(clock: Instant) -> u64 {
    clock.elapsed().as_micros() as u64
}

fn commit_text(tree: &Oid, message: &str, now_ms: i64) -> String {
    let sec = now_ms.div_euclid(1000).max(0);
    // Git ends a message at a NUL.
    let message = message.replace('\0', "\u{fffd}");
    let person = format!("Fermata <fermata@localhost> {sec} +0000");
    format!("tree {tree}\nauthor {person}\ncommitter {person}\n\n{}\n", message.trim_end())
}
