//! Takes a snapshot of a workspace, and publishes or discards it.
//!
//! A snapshot is a pack in a directory of its own below `pending/`. Publishing moves it among the others and then
//! creates the ref: only then does the checkpoint exist, and only then may others rely on its objects.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::beneath::{FileKind, Root, sync_dir};
use super::cache::StatCache;
use super::content::{BlobSink, Hashing, Reading};
use super::errors::{HistoryError, Result};
use super::meta::{FORMAT, Manifest};
use super::names::{RelPath, escape};
use super::oid::{ObjectKind, Oid};
use super::pack::PackWriter;
use super::rules::Rules;
use super::scan::{Scan, SkipReason, Skipped, check_workspace, scan};
use super::tree::{ObjectSink, build, build_root};
use super::user_repository::UserRepository;
use super::{History, Live, OnProgress, Phase, Progress};
use crate::failpoint;

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

/// A snapshot that is durable but not yet visible.
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
    pack: String,
    draft: Draft,
    cache: Arc<StatCache>,
}

/// The directory of a snapshot that is not published; it goes when its owner does.
#[derive(Debug)]
struct Draft {
    dir: PathBuf,
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

static DRAFTS: AtomicU64 = AtomicU64::new(0);

impl History {
    /// Takes a snapshot. It is durable when this returns, and visible after [`History::publish`].
    ///
    /// # Errors
    /// Refuses `/`, home directories and bad patterns; fails when cancelled, or when the store cannot be written. A
    /// file that cannot be read is no error: it is skipped and reported.
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        now_ms: i64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Snapshot> {
        let real = check_workspace(&request.workspace)?;
        let started_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128);
        let before = self.cache();
        let trust_before = self.is_current(&before)?;
        let draft = self.start_draft(request.number)?;
        let dir = draft.dir.clone();
        let pack = PackWriter::create(&dir).map_err(HistoryError::io("start a pack in", &dir))?;
        let pack = Mutex::new(pack);
        let mut took = Timings::default();

        progress(Progress { phase: Phase::Scan, done: 0, total: 0 });
        let clock = Instant::now();
        let root = Root::open(&real)?;
        let mut scan = scan(&root, &real, &self.dir, &request.rules, cancel)?;
        took.scan_us = micros(clock);

        let clock = Instant::now();
        let reading = Reading {
            root: &root,
            cache: &before,
            check_in: (!trust_before).then_some(&self.objects),
            sink: Some(BlobSink { store: &self.objects, pack: &pack }),
            spool: &dir,
            max_file_bytes: request.rules.max_file_bytes,
            progress,
            cancel,
        };
        let hashing = reading.read_all(&scan.entries)?;
        took.read_us = micros(clock);

        progress(Progress { phase: Phase::Trees, done: 0, total: 0 });
        let clock = Instant::now();
        let mut now = StatCache::new();
        for file in hashing.files.iter().filter(|file| !file.torn) {
            now.enter(&file.path, &file.stat, file.oid, started_ns);
        }
        let mut unstored = std::mem::take(&mut scan.skipped);
        unstored.extend(hashing.skipped.iter().cloned());
        let mut sink = ObjectSink { before: &before, now: &mut now, store: &self.objects, pack: &pack, trust_before };
        let trees = build(&scan.entries, &hashing.files, &unstored, &mut sink)?;
        let skipped = with_special(unstored, &scan);
        let manifest = manifest(request, &real, now_ms, trees.files, &scan, &hashing, &skipped);
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| HistoryError::io("describe", &real)(std::io::Error::other(error)))?;
        let tree = build_root(&trees, &text, &mut sink)?;
        let commit = sink.put(ObjectKind::Commit, commit_text(&tree, &request.message, now_ms).as_bytes())?;
        took.trees_us = micros(clock);

        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        progress(Progress { phase: Phase::Pack, done: 0, total: 0 });
        let clock = Instant::now();
        let pack = pack.into_inner().unwrap_or_else(PoisonError::into_inner);
        let pack = pack.finish().map_err(HistoryError::io("complete a pack in", &dir))?;
        sync_dir(&self.pending()).map_err(HistoryError::io("flush", &dir))?;
        took.pack_us = micros(clock);

        now.base = Some((request.number, commit));
        Ok(Snapshot {
            number: request.number,
            commit,
            files: trees.files,
            meta: trees.meta,
            stats: Stats { new_objects: pack.objects, new_bytes: pack.bytes, ..manifest.stats },
            skipped,
            torn: manifest.torn,
            warnings: manifest.warnings,
            user_repository: manifest.user_repository,
            took,
            pack: pack.name,
            draft,
            cache: Arc::new(now),
        })
    }

    /// Makes a snapshot the checkpoint that it was taken for.
    ///
    /// # Errors
    /// Fails when the number is taken, when the snapshot was discarded, or when the store cannot be written; then the
    /// checkpoint does not exist, and the snapshot may be published again or discarded.
    pub fn publish(&self, snapshot: &Snapshot) -> Result<()> {
        let _writer = self.lock_writer();
        let number = snapshot.number;
        if !self.live().contains(&snapshot.draft.name) {
            return Err(HistoryError::SnapshotGone { number });
        }
        if self.refs.find(number)?.is_some() {
            return Err(HistoryError::NumberTaken { number });
        }
        let (from, to) = (self.pending().join(&snapshot.draft.name), self.objects.pack_dir());
        // The index comes last: a pack counts from the instant that it has one.
        for end in ["pack", "idx"] {
            let name = format!("{}.{end}", snapshot.pack);
            let (source, target) = (from.join(&name), to.join(&name));
            // A publication that failed half way has moved the first already.
            if source.exists() || !target.exists() {
                fs::rename(&source, &target).map_err(HistoryError::io("move a pack to", &target))?;
            }
            failpoint::check("history.pack.moved").map_err(HistoryError::io("move a pack to", &target))?;
        }
        sync_dir(&to).map_err(HistoryError::io("flush", &to))?;
        self.objects.refresh()?;
        failpoint::check("history.ref.before").map_err(HistoryError::io("publish from", &from))?;
        self.refs.create(number, snapshot.commit, &from)?;
        failpoint::hit("history.ref.created");

        // From here the checkpoint exists; what follows only makes the next one fast and the place tidy.
        if let Err(error) = self.keep_cache(snapshot, &from) {
            tracing::warn!(%error, number, "the stat cache could not be written; the next checkpoint reads all files");
        }
        if let Err(error) = fs::remove_dir_all(&from) {
            tracing::warn!(%error, dir = %from.display(), "a draft stays until the next sweep");
        }
        self.live().remove(&snapshot.draft.name);
        Ok(())
    }

    /// Forgets a snapshot that was not published, as dropping it does.
    pub fn discard(&self, snapshot: Snapshot) {
        let _writer = self.lock_writer();
        // A pack that a failed publication has moved stays for the sweep, which knows whether anybody relies on it.
        drop(snapshot);
    }

    fn keep_cache(&self, snapshot: &Snapshot, aside: &Path) -> std::io::Result<()> {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&snapshot.cache));
        let draft = aside.join("stat-cache");
        snapshot.cache.save(&draft)?;
        fs::rename(draft, self.cache_path())
    }

    /// Says whether the checkpoint that a cache belongs to still exists, so that its objects do.
    fn is_current(&self, cache: &StatCache) -> Result<bool> {
        match cache.base {
            Some((number, commit)) => Ok(self.refs.find(number)? == Some(commit)),
            None => Ok(false),
        }
    }

    fn start_draft(&self, number: u64) -> Result<Draft> {
        let count = DRAFTS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{number}-{}-{count}", std::process::id());
        let dir = self.pending().join(&name);
        // What a process with our pid left behind before a reboot.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(HistoryError::io("clear", &dir))?;
        }
        self.live().insert(name.clone());
        let draft = Draft { dir, name, live: Live::clone(&self.live) };
        fs::create_dir(&draft.dir).map_err(HistoryError::io("create", &draft.dir))?;
        Ok(draft)
    }
}

fn micros(clock: Instant) -> u64 {
    clock.elapsed().as_micros() as u64
}

/// Adds the special files to the report of what is not stored.
fn with_special(mut skipped: Vec<Skipped>, scan: &Scan) -> Vec<Skipped> {
    for entry in &scan.entries {
        if let FileKind::Special(kind) = entry.stat.kind() {
            let (path, reason) = (entry.path.clone(), SkipReason::Special);
            skipped.push(Skipped { path, reason, detail: kind.to_owned() });
        }
    }
    skipped.sort_by(|a, b| a.path.cmp(&b.path));
    skipped
}

fn manifest(
    request: &SnapshotRequest,
    real: &Path,
    now_ms: i64,
    files: Oid,
    scan: &Scan,
    hashing: &Hashing,
    skipped: &[Skipped],
) -> Manifest {
    use std::os::unix::ffi::OsStrExt;
    let stats = Stats {
        files: hashing.files.len() as u64,
        bytes: hashing.files.iter().map(|file| file.size).sum(),
        unchanged: hashing.unchanged,
        ..Stats::default()
    };
    Manifest {
        format: FORMAT,
        number: request.number,
        parent: request.parent,
        taken_ms: now_ms,
        workspace: escape(real.as_os_str().as_bytes()),
        rules: request.rules.clone(),
        files,
        stats,
        skipped: skipped.to_vec(),
        torn: hashing.files.iter().filter(|file| file.torn).map(|file| file.path.clone()).collect(),
        warnings: scan.warnings.clone(),
        user_repository: scan.repository.clone(),
    }
}

fn commit_text(tree: &Oid, message: &str, now_ms: i64) -> String {
    let sec = now_ms.div_euclid(1000).max(0);
    // Git ends a message at a NUL.
    let message = message.replace('\0', "\u{fffd}");
    let person = format!("Fermata <fermata@localhost> {sec} +0000");
    format!("tree {tree}\nauthor {person}\ncommitter {person}\n\n{}\n", message.trim_end())
}
