//! The checkpoint store: one bare repository per workspace, with one pack per checkpoint.
//!
//! ```text
//! snapshot: scan -> contents -> trees -> pack (in pending/)         nothing is visible yet
//! publish:  pack -> objects/pack, then the ref                      the checkpoint exists
//! later:    many packs -> one, with deltas (consolidate)            readers see the same objects
//! restore:  plan (persisted by the caller) -> apply -> recheck      rolls forward after a crash
//! ```
//!
//! The store owns everything below its directory and is the only user of libgit2. It never writes to the user's
//! `.git`, never opens the user's repository with the library, never follows a symbolic link inside a workspace
//! and reads no git configuration. All calls are synchronous; callers run them on blocking threads and may
//! cancel them.
//!
//! Invariants:
//! - All objects of a published ref are in `objects/pack`. A pack arrives there before the ref that needs it
//!   and is removed only when no ref needs it.
//! - A snapshot relies only on published packs and its own pack, never on the objects of another unpublished
//!   snapshot.
//! - Checkpoints have no parent commits, so that removing one frees the objects that no other checkpoint needs.

#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

mod diff;
mod errors;
mod progress;
mod restore;
mod rules;
mod scan;
mod snapshot;
mod snapshot_request;
mod stats;
mod store;
#[cfg(test)]
mod tests;
mod transfer;
mod tree;
mod verify;
mod workspace;

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use diff::{Diff, DiffChange, DiffEntry, EntryKind, Point, TextDiff};
pub use errors::{BadObject, HistoryError, Result};
pub use progress::{OnProgress, StorePhase, StoreProgress};
pub use restore::full_verification::FullVerification;
pub use restore::plan::{
    Conflict, ConflictReason, ContentKind, Operation, Planned, RestoreOptions, RestorePlan, StoredContent,
};
pub use restore::report::{Mismatch, RestoreReport};
pub use rules::coverage::Rules;
pub use rules::user_repository::UserRepository;
pub use scan::warm_up::WarmUp;
pub use scan::watcher::FileWatcher;
pub use scan::workspace_scan::ScannedWorkspace;
pub use snapshot::Snapshot;
pub use snapshot_request::{Mapped, SnapshotRequest};
pub use stats::{Stats, Timings};
pub use store::consolidate::{Attempt, Consolidated, Extent, PackStats};
pub use store::oid::{NotAnOid, Oid};
pub use store::publish::Publication;
pub use store::sweep::SweepReport;
pub use transfer::bundle::{Exported, IncomingPack};
pub use tree::confined_dir::Time;
pub use tree::manifest::{CheckpointManifest, FORMAT};
pub use tree::names::{RESTORE_PREFIX, RelPath, UnsafePath, is_staged_name};
pub use tree::skipped::{SkipReason, Skipped};
pub use verify::VerifyReport;

use rules::rule_cache::RuleCache;
use scan::watcher::WatchedWorkspace;
use scan::workspace_state::WorkspaceState;
use store::objects::ObjectStore;
use store::pending::LiveSnapshots;
use store::refs::Refs;
use tree::confined_dir::sync_dir;
use tree::listing::{CheckpointRoot, Listing};
use workspace::check_workspace;

/// The checkpoint store of one workspace.
pub struct History {
    dir: PathBuf,
    repository: PathBuf,
    objects: ObjectStore,
    refs: Refs,
    /// Held by publication, removal, discarding and sweeping, which exclude each other.
    writer: Mutex<()>,
    /// Snapshots of this process that are neither published nor discarded, by the name of their directory.
    live: LiveSnapshots,
    last: Mutex<LastScan>,
    /// Locked while packs are consolidated.
    consolidating: Mutex<()>,
    /// Checkpoints removed since the last search for unreachable objects.
    removed: AtomicU64,
    /// Held during a warm-up scan, so that only one runs at a time.
    warming_up: Mutex<()>,
    rule_cache: RuleCache,
    /// The workspace that was checked last: its path as given and its real path.
    checked: Mutex<Option<(PathBuf, PathBuf)>>,
    watch: Option<WatchedWorkspace>,
}

/// The workspace state in memory, and how far it can be relied on.
#[derive(Default)]
struct LastScan {
    /// The state of the last published scan.
    state: Option<Arc<WorkspaceState>>,
    /// Whether the store holds every object that the state names.
    trusted: bool,
    /// The epoch of the watcher up to which the state has taken in all events.
    epoch: Option<u64>,
    /// When the last full scan was published.
    full_scan_at: Option<Instant>,
    /// How many changes the state has taken in since it was last saved.
    unsaved: u64,
    /// Whether loading the saved state was attempted.
    loaded: bool,
    /// Snapshots that may rely on objects that were found damaged after they had begun.
    doubtful_snapshots: HashSet<String>,
}

const CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tfilemode = true\n\
    \tlogallrefupdates = false\n\thooksPath = /dev/null\n[gc]\n\tauto = 0\n";

impl History {
    /// Opens the store in a directory, creating it if it is new. Without a watcher, every snapshot compares the
    /// fingerprints of all files.
    ///
    /// # Errors
    /// Fails when the directory cannot be created or read.
    pub fn open(dir: &Path) -> Result<History> {
        Self::open_watched(dir, None)
    }

    /// Opens the store as [`History::open`] does. Snapshots read only the paths that the watcher has reported.
    ///
    /// # Errors
    /// Fails when the directory cannot be created or read.
    pub fn open_watched(dir: &Path, watcher: Option<&Arc<FileWatcher>>) -> Result<History> {
        let create = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        create(dir).map_err(HistoryError::io("create", dir))?;
        // The store holds copies of the user's files, so it is private whatever the umask was.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(HistoryError::io("protect", dir))?;
        let repository = dir.join("history.git");
        if !repository.is_dir() {
            let temporary = dir.join("history.git.new");
            init(&temporary, &repository).map_err(HistoryError::io("create", &repository))?;
        }
        let pending = repository.join("pending");
        create(&pending).map_err(HistoryError::io("create", &pending))?;
        // The name of the saved workspace state in the first versions. A failure leaves a file that nothing reads.
        fs::remove_file(dir.join("picture")).ok();
        Ok(History {
            dir: dir.to_owned(),
            objects: ObjectStore::open(&repository.join("objects"))?,
            refs: Refs::below(&repository),
            repository,
            writer: Mutex::new(()),
            live: LiveSnapshots::default(),
            last: Mutex::default(),
            consolidating: Mutex::default(),
            removed: AtomicU64::new(0),
            warming_up: Mutex::default(),
            rule_cache: RuleCache::default(),
            checked: Mutex::default(),
            watch: watcher.map(|watcher| watcher.watch_workspace(dir.display().to_string())),
        })
    }

    /// Returns the path of the bare repository.
    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// Lists the numbers of the published checkpoints, ascending.
    ///
    /// # Errors
    /// Fails when the refs cannot be listed.
    pub fn list(&self) -> Result<Vec<u64>> {
        self.refs.list()
    }

    /// Returns the commit of a checkpoint.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint.
    pub fn commit_of(&self, number: u64) -> Result<Oid> {
        self.refs.get(number)
    }

    /// Removes a checkpoint's ref; its space is freed by a later [`History::sweep`] or consolidation.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint.
    pub fn remove(&self, number: u64) -> Result<()> {
        let _writer = self.lock_writer();
        // A ref that cannot be read (torn by a power failure before the checkpoint had a row) is removed as
        // well.
        if let Some(last) = self.last_state().0
            && self.refs.find(number).is_ok_and(|commit| commit == Some(last.commit))
        {
            // The workspace state relies on the objects of this commit: the base ref keeps them.
            self.refs.set_base(last.commit, &self.pending())?;
        }
        self.refs.remove(number)?;
        self.removed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Reads the manifest of a checkpoint.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint, or when it is damaged or written by a newer version.
    pub fn manifest(&self, number: u64) -> Result<CheckpointManifest> {
        CheckpointRoot::read(&self.objects, &self.refs.get(number)?)?.manifest(&self.objects)
    }

    /// Returns the trees of a checkpoint's files and metadata. They equal those of a snapshot exactly when
    /// nothing has changed.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint, or when it is damaged.
    pub fn trees_of(&self, number: u64) -> Result<(Oid, Oid)> {
        let root = CheckpointRoot::read(&self.objects, &self.refs.get(number)?)?;
        Ok((root.files, root.meta))
    }

    /// Lists the paths that a checkpoint covers but does not store.
    ///
    /// # Errors
    /// As for [`History::manifest`].
    pub fn skipped(&self, number: u64) -> Result<Vec<Skipped>> {
        Ok(self.manifest(number)?.skipped)
    }

    fn listing_of(&self, number: u64) -> Result<Listing> {
        Listing::of_checkpoint(&self.objects, &self.refs.get(number)?)
    }

    /// Marks objects as missing or damaged: writers store them again, and readers prefer other copies. The next
    /// snapshot is a full scan, since the workspace state may name damaged objects.
    pub fn mark_damaged(&self, ids: &[Oid]) {
        if ids.is_empty() {
            return;
        }
        self.objects.mark_damaged(ids);
        let live = self.live().clone();
        let mut last = self.lock_last();
        last.trusted = false;
        last.doubtful_snapshots.extend(live);
    }

    /// Frees the memory of caches that only make reading faster; called after a long operation.
    pub fn free_caches(&self) {
        self.objects.free_cache();
    }

    /// Refuses workspaces that must never be covered. The result is cached, since looking up accounts and home
    /// directories may take long.
    fn checked_workspace(&self, workspace: &Path) -> Result<PathBuf> {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((given, real)) = &*checked
            && given == workspace
            && fs::canonicalize(workspace).is_ok_and(|now| now == *real && now.is_dir())
        {
            return Ok(real.clone());
        }
        let real = check_workspace(workspace)?;
        *checked = Some((workspace.to_owned(), real.clone()));
        Ok(real)
    }

    fn pending(&self) -> PathBuf {
        self.repository.join("pending")
    }

    /// Returns the path of the saved workspace state.
    fn state_path(&self) -> PathBuf {
        self.dir.join("workspace-state")
    }

    fn lock_last(&self) -> MutexGuard<'_, LastScan> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the workspace state, loaded from the disk on the first call, and whether the store holds every object
    /// that it names.
    fn last_state(&self) -> (Option<Arc<WorkspaceState>>, bool) {
        let live = self.live().clone();
        let mut last = self.lock_last();
        if !last.loaded {
            last.loaded = true;
            last.state = scan::pool::on_new_thread(|| scan::state_file::load(&self.state_path()).map(Arc::new));
            let base = self.refs.base().ok().flatten();
            let state = last.state.as_ref();
            last.trusted = state
                .is_some_and(|state| Some(state.commit) == base && self.objects.contains(&state.commit))
                && self.objects.is_sound();
        }
        if !last.doubtful_snapshots.is_empty() {
            // One of these snapshots may have been published since then and have marked the state as trusted.
            last.trusted = false;
            last.doubtful_snapshots.retain(|name| live.contains(name));
        }
        (last.state.clone(), last.trusted)
    }

    fn lock_writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, HashSet<String>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Creates a bare repository under a temporary name and renames it, so that an incomplete one never has the
/// final name.
fn init(temporary: &Path, repository: &Path) -> io::Result<()> {
    if temporary.exists() {
        fs::remove_dir_all(temporary)?;
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    for dir in ["objects/pack", "objects/info", "refs/heads", "refs/fermata/checkpoints", "pending"] {
        builder.create(temporary.join(dir))?;
    }
    for (name, text) in [("HEAD", "ref: refs/heads/none\n"), ("config", CONFIG)] {
        fs::write(temporary.join(name), text)?;
        fs::File::open(temporary.join(name))?.sync_all()?;
    }
    for dir in ["objects", "refs/fermata", "refs", ""] {
        sync_dir(&temporary.join(dir))?;
    }
    fs::rename(temporary, repository)?;
    repository.parent().map_or(Ok(()), sync_dir)
}
