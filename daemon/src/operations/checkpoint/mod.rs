//! Makes a checkpoint: workspace snapshot, database backup, context snapshot, transcripts, plugin
//! artifacts, manifest.
//!
//! ```text
//!   checkpoints/<n>.partial/   all parts are written and synced here
//!   rename to checkpoints/<n>/
//!   refs/fermata/checkpoints/<n> published
//!   the row in the database: from now on the checkpoint exists     (the caller's transaction)
//! ```
//! [`crate::operations::maintenance::leftovers`] removes what a crash before the row has left.

mod blocking_drop;
pub mod bundle;
pub mod context_file;
pub mod database;
pub mod layout;
pub mod order;
pub mod transcripts;
pub mod transfer;
pub mod warm_up;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fermata_protocol::checkpoint::{CheckpointMetadata, CheckpointView, Manifest, ManifestPart, PartKind, Trigger};
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{AgentName, CheckpointNumber, UnixMillis};

use crate::errors::Failure;
use crate::hashing::{hash_file, sha256};
use crate::operations::checkpoint::blocking_drop::BlockingDrop;
use crate::operations::checkpoint::database::{DatabasePart, StagedDatabase};
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE, FORMAT, MANIFEST};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::transcripts::{CopiedTranscripts, OpenedTranscripts};
use crate::operations::context::cancelled_by_request;
use crate::operations::directory;
use crate::operations::pause::flash_save::Plans;
use crate::operations::run::session::FoundSessions;
use crate::operations::{StepContext, blocking, failpoint, ms_since};
use crate::plugins::{AgentProcess, SaveRequest};
use crate::store::pinned::{Pinned, PreparedCopy};
use fermata_history::{HistoryError, Mapped, ScannedWorkspace, Snapshot, SnapshotRequest};
use fermata_os::fsync::{sync_together, write_unsynced};

/// A checkpoint that is complete on disk and lacks only its row.
#[derive(Debug, Clone)]
pub struct SealedCheckpoint {
    /// The row.
    pub view: CheckpointView,
    /// The ids of the sessions whose transcripts are in it.
    pub sessions: Vec<(AgentName, String)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// The part of a checkpoint that is read while the agents are frozen.
pub struct CapturedCheckpoint {
    scan: BlockingDrop<ScannedWorkspace>,
    taken_at: UnixMillis,
    transcripts: OpenedTranscripts,
    rows: CapturedRows,
    parts_ms: BTreeMap<String, f64>,
}

impl CapturedCheckpoint {
    /// Discards it, and waits until its files in the store are removed.
    pub async fn discard(self) {
        self.scan.dropped().await;
    }
}

/// When the database part is written.
pub enum RowsTiming {
    /// Under the freeze: the staged part where it is still valid, else all of it.
    UnderFreeze(Option<Box<StagedDatabase>>),
    /// After the thaw: under the freeze only the instant of the copy is pinned. The file may be prepared already.
    AfterThaw(Option<PreparedCopy>),
}

enum CapturedRows {
    /// With the milliseconds that it took.
    Written(DatabasePart, f64),
    Pinned(Pinned),
}

/// Reads workspace, database and context into the partial checkpoint and opens the transcripts of the sessions: the part
/// for which agents are frozen. Without `sessions` it searches for them first.
///
/// # Errors
/// When a part cannot be read or written.
pub async fn capture(
    step: &StepContext,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    rows: RowsTiming,
    sessions: Option<FoundSessions>,
) -> Result<CapturedCheckpoint, Failure> {
    failpoint("checkpoint.begin")?;
    let partial = step.dirs().partial_checkpoint(order.number);
    let database = async {
        match rows {
            RowsTiming::UnderFreeze(staged) => {
                database::save(step, order, plans, now, &partial, staged.map(|staged| *staged))
                    .await
                    .map(|(part, ms)| CapturedRows::Written(part, ms))
            }
            RowsTiming::AfterThaw(prepared) => {
                database::begin(step, &partial, prepared).await.map(CapturedRows::Pinned)
            }
        }
    };
    let (scan, rows, opened) = tokio::join!(scan_workspace(step, order), database, transcripts::open(step, sessions));
    // All three have ended before an error is returned: the undo must not run beside them.
    let (scan, workspace_ms) = scan?;
    let others = rows.and_then(|rows| {
        let opened = opened?;
        failpoint("checkpoint.captured")?;
        Ok((rows, opened))
    });
    match others {
        Ok((rows, transcripts)) => {
            let parts_ms = [(PartKind::Workspace.to_string(), workspace_ms)].into();
            Ok(CapturedCheckpoint { scan, taken_at: now, transcripts, rows, parts_ms })
        }
        Err(failure) => {
            scan.dropped().await;
            Err(failure)
        }
    }
}

/// Returns the database part, copying the rows now where the capture has only pinned them.
async fn write_rows(
    step: &StepContext,
    order: &CheckpointOrder,
    rows: CapturedRows,
    taken_at: UnixMillis,
    partial: &Path,
) -> Result<(DatabasePart, f64), Failure> {
    match rows {
        CapturedRows::Written(part, ms) => Ok((part, ms)),
        CapturedRows::Pinned(pinned) => {
            let start = Instant::now();
            let part = database::copy(step, pinned, order, &Vec::new(), taken_at, partial).await?;
            Ok((part, ms_since(start)))
        }
    }
}

/// Scans the workspace and reads the files that have changed; returns the scan and the milliseconds that it took.
async fn scan_workspace(
    step: &StepContext,
    order: &CheckpointOrder,
) -> Result<(BlockingDrop<ScannedWorkspace>, f64), Failure> {
    let start = Instant::now();
    let request = SnapshotRequest {
        workspace: PathBuf::from(&step.project.facts.workspace),
        number: order.number,
        message: format!("{} {} of {}\n", order.trigger.as_str(), order.number, step.project.name),
        parent: order.number.checked_sub(1).filter(|n| *n > 0),
        rules: step.rules(),
        mapped: Mapped::default(),
        full_scan_after: None,
    };
    let mapped = crate::operations::checkpoint::warm_up::mapped(step, &order.runs);
    let scan = step
        .with_history_at_once(&order.operation, "save the workspace", move |history, progress, cancel| {
            let mut request = request;
            request.mapped = match mapped() {
                Ok(mapped) => mapped,
                Err(failure) => return Ok(Err(failure)),
            };
            // Numbers have gaps where checkpoints failed or were removed.
            request.parent = history.list()?.into_iter().rfind(|n| *n < request.number);
            history.scan(&request, progress, cancel).map(BlockingDrop::new).map(Ok)
        })
        .await??;
    Ok((scan, ms_since(start)))
}

/// Makes a snapshot of the files that the scan has read; agents need not be frozen for it.
async fn complete_snapshot(
    step: &StepContext,
    order: &CheckpointOrder,
    scan: BlockingDrop<ScannedWorkspace>,
    taken_at: UnixMillis,
) -> Result<BlockingDrop<Snapshot>, Failure> {
    step.with_history(Some(&order.operation), "save the workspace", move |history, progress, cancel| {
        // `None` only while it is shared, and it is not.
        let scan = scan.take().ok_or(HistoryError::Cancelled)?;
        history.complete(scan, taken_at.0, progress, cancel).map(BlockingDrop::new)
    })
    .await
}

/// The parts of a checkpoint except the workspace, complete.
struct OtherParts {
    database: DatabasePart,
    transcripts: CopiedTranscripts,
    parts_ms: BTreeMap<String, f64>,
}

/// Copies the transcripts, adds plugin artifacts and the manifest, and renames the checkpoint to its final place. Only
/// the row is missing then.
///
/// # Errors
/// When a part cannot be written. A plugin's failure is a warning.
pub async fn seal(
    step: &StepContext,
    order: &CheckpointOrder,
    captured: CapturedCheckpoint,
    now: UnixMillis,
) -> Result<SealedCheckpoint, Failure> {
    let start = Instant::now();
    let CapturedCheckpoint { scan, taken_at, transcripts, rows, mut parts_ms } = captured;
    let partial = step.dirs().partial_checkpoint(order.number);
    let (snapshot, database, transcripts) = tokio::join!(
        complete_snapshot(step, order, scan, taken_at),
        write_rows(step, order, rows, taken_at, &partial),
        transcripts::copy(transcripts, &partial)
    );
    let snapshot = snapshot?;
    parts_ms.insert("snapshot".to_owned(), ms_since(start));
    let finished = async {
        let (database, database_ms) = database?;
        parts_ms.insert(PartKind::Database.to_string(), database_ms);
        let others = OtherParts { database, transcripts: transcripts?, parts_ms };
        finish(step, order, &snapshot, others, partial, now).await
    };
    match finished.await {
        Ok(sealed) => Ok(sealed),
        Err(failure) => {
            // Before the undo begins.
            snapshot.dropped().await;
            Err(failure)
        }
    }
}

async fn finish(
    step: &StepContext,
    order: &CheckpointOrder,
    snapshot: &BlockingDrop<Snapshot>,
    others: OtherParts,
    partial: PathBuf,
    now: UnixMillis,
) -> Result<SealedCheckpoint, Failure> {
    let OtherParts { database, transcripts, mut parts_ms } = others;
    let unsynced = database.unsynced;
    let CopiedTranscripts { sessions, mut parts, warnings: transcript_warnings } = transcripts;
    parts.extend(database.parts);
    let mut warnings = snapshot.warnings.clone();
    warnings.extend(transcript_warnings);
    if !snapshot.torn.is_empty() {
        warnings.push(format!("{} files changed while they were read", snapshot.torn.len()));
    }
    let start = Instant::now();
    let dirs = step.dirs();
    let place = dirs.checkpoint(order.number);
    parts.extend(artifacts(step, order, &partial, &mut warnings).await?);
    parts_ms.insert("plugins".to_owned(), ms_since(start));
    let commit = snapshot.commit.to_string();
    parts.insert(
        0,
        ManifestPart {
            kind: PartKind::Workspace,
            path: commit.clone(),
            bytes: snapshot.stats.bytes,
            sha256: snapshot.files.to_string(),
        },
    );
    let manifest = Manifest {
        format: FORMAT,
        project: step.project.name.clone(),
        checkpoint: order.number,
        created_at: now,
        parts,
    };
    let mut metadata = metadata(step, snapshot, database.item_count, database.tokens);
    let files_bytes: u64 = manifest.parts.iter().skip(1).map(|part| part.bytes).sum();
    let size_bytes = files_bytes + snapshot.stats.new_bytes;
    let seal_start = Instant::now();
    let manifest_sha256 = publish(step, snapshot.share(), &manifest, unsynced, partial, place.clone()).await?;
    parts_ms.insert("seal".to_owned(), ms_since(seal_start));
    metadata.warnings.clone_from(&warnings);
    metadata.parts_ms = parts_ms;
    let files = FilesSummary { created_at: now, commit, manifest_sha256, size_bytes, metadata };
    let view = row(step, order, &place, files);
    failpoint("checkpoint.sealed")?;
    let sessions = sessions.into_iter().map(|(agent, session)| (agent, session.id)).collect();
    Ok(SealedCheckpoint { view, sessions, warnings })
}

/// The fields of a checkpoint's row that come from its files.
pub(super) struct FilesSummary {
    pub created_at: UnixMillis,
    /// The commit of the workspace's snapshot.
    pub commit: String,
    pub manifest_sha256: String,
    /// The bytes that the checkpoint has added to the disk.
    pub size_bytes: u64,
    pub metadata: CheckpointMetadata,
}

/// Makes the row of the ordered checkpoint, whose files are in `place`.
pub(super) fn row(step: &StepContext, order: &CheckpointOrder, place: &Path, files: FilesSummary) -> CheckpointView {
    let text = |name: &str| place.join(name).to_string_lossy().into_owned();
    let FilesSummary { created_at, commit, manifest_sha256, size_bytes, metadata } = files;
    CheckpointView {
        project: step.project.name.clone(),
        id: order.number,
        name: order.name.clone(),
        description: order.description.clone(),
        trigger: order.trigger,
        format: FORMAT,
        created_at,
        operation_id: order.operation.clone(),
        pause_reason: order.reason.clone(),
        git_commit: commit,
        database_backup: text(DATABASE),
        context_snapshot: text(CONTEXT),
        manifest_sha256,
        size_bytes,
        pinned: false,
        metadata,
    }
}

/// Asks the plugins for their artifacts; a plugin's failure becomes a warning.
async fn artifacts(
    step: &StepContext,
    order: &CheckpointOrder,
    partial: &Path,
    warnings: &mut Vec<String>,
) -> Result<Vec<ManifestPart>, Failure> {
    if !step.services.plugins.may_save() {
        return Ok(Vec::new());
    }
    let directory = partial.join("plugins");
    let path = directory.clone();
    blocking("create the plugins' directory", move || directory::create(&path).map_err(Failure::io("create", &path)))
        .await?;
    let agents = step.project.alive_agents().filter_map(|agent| {
        let processes = agent.run()?.processes.as_ref()?;
        Some(AgentProcess { name: agent.name.to_string(), pid: Some(processes.pid), cgroup: None })
    });
    let request = SaveRequest {
        project: step.project.name.to_string(),
        checkpoint: order.number.to_string(),
        operation: order.operation.to_string(),
        workspace: PathBuf::from(&step.project.facts.workspace),
        directory,
        agents: agents.collect(),
        frozen: order.frozen,
        deadline_ms: None,
    };
    let mut parts = Vec::new();
    // Dropping the call cancels it in the plugins.
    let saved = tokio::select! {
        saved = step.services.plugins.checkpoint_save(&request) => saved,
        () = step.cancel.cancelled() => return Err(cancelled_by_request()),
    };
    for result in saved {
        match result {
            Ok(artifact) => parts.push(ManifestPart {
                kind: PartKind::Plugin(artifact.plugin),
                path: Path::new("plugins").join(&artifact.path).to_string_lossy().into_owned(),
                bytes: artifact.bytes,
                sha256: artifact.sha256,
            }),
            Err(failure) => {
                warnings.push(format!("plugin '{}' saved nothing: {}", failure.plugin, failure.message));
            }
        }
    }
    Ok(parts)
}

/// Publishes a snapshot and renames the other parts to their final place. Everything that is not durable yet, with the
/// files `unsynced`, is synced together. Returns the SHA-256 of the manifest.
async fn publish(
    step: &StepContext,
    snapshot: Arc<Snapshot>,
    manifest: &Manifest,
    unsynced: Vec<File>,
    partial: PathBuf,
    place: PathBuf,
) -> Result<String, Failure> {
    let bytes = encoded(manifest)?;
    let manifest_sha256 = step
        .with_history(None, "publish the snapshot", move |history, _, _| {
            // Neither the ref nor the directory is a checkpoint before it has a row.
            let publication = history.begin_to_publish(&snapshot)?;
            match move_to_place(&bytes, &partial, &place) {
                Ok(placed) => publication.complete(&unsynced.iter().chain(&placed).collect::<Vec<_>>())?,
                Err(failure) => return Ok(Err(failure)),
            }
            Ok(Ok(sha256(&bytes)))
        })
        .await??;
    failpoint("checkpoint.placed")?;
    Ok(manifest_sha256)
}

fn encoded(manifest: &Manifest) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec_pretty(manifest).map_err(|e| Failure::fault("encode the manifest", &e))
}

/// Writes the manifest into the directory of a checkpoint whose other parts are complete, and renames the directory.
/// Returns the files that have to be synced for that.
fn move_to_place(manifest: &[u8], partial: &Path, place: &Path) -> Result<[File; 3], Failure> {
    // The directory is no checkpoint yet, so that no older manifest has to be replaced atomically.
    let manifest = write_unsynced(&partial.join(MANIFEST), manifest, 0o600)
        .map_err(|e| Failure::fault("write the manifest", &e))?;
    let failed = |error: io::Error| Failure::fault(&format!("rename to {}", place.display()), &error);
    fs::rename(partial, place).map_err(failed)?;
    fermata_failpoint::check("checkpoint.renamed").map_err(failed)?;
    let parent = place.parent().unwrap_or(place);
    Ok([manifest, File::open(place).map_err(failed)?, File::open(parent).map_err(failed)?])
}

/// Writes the manifest of an imported checkpoint, whose other parts are complete and synced, and renames its directory,
/// durably. Returns the SHA-256 of the manifest.
pub(super) async fn place(manifest: &Manifest, partial: PathBuf, place: PathBuf) -> Result<String, Failure> {
    let bytes = encoded(manifest)?;
    let manifest_sha256 = blocking("move the checkpoint to its place", move || {
        let placed = move_to_place(&bytes, &partial, &place)?;
        sync_together(&placed.iter().collect::<Vec<_>>()).map_err(Failure::io("sync", &place))?;
        Ok(sha256(&bytes))
    })
    .await?;
    failpoint("checkpoint.placed")?;
    Ok(manifest_sha256)
}

fn metadata(step: &StepContext, snapshot: &Snapshot, item_count: u64, context_tokens: u64) -> CheckpointMetadata {
    let project = &step.project;
    let done = || project.tasks.values().filter(|task| task.status == TaskStatus::Completed);
    CheckpointMetadata {
        phase: project.facts.phase,
        tasks_total: project.tasks.len() as u64,
        tasks_done: done().count() as u64,
        active_agents: project.alive_agents().map(|agent| agent.name.to_string()).collect(),
        last_task_done: done().max_by_key(|task| task.updated_at).map(|task| task.title.clone()),
        context_items: item_count,
        context_tokens,
        cost_micro_usd: project.agents.values().map(|agent| agent.usage.cost_micro_usd).sum(),
        repository: snapshot.user_repository.as_ref().and_then(|r| serde_json::to_value(r).ok()),
        files: snapshot.stats.files,
        bytes: snapshot.stats.bytes,
        skipped: snapshot.skipped.len() as u64,
        warnings: Vec::new(),
        parts_ms: BTreeMap::new(),
    }
}

/// Makes the manifest's entry of a file; reads the file to hash it.
///
/// # Errors
/// When the file cannot be read.
pub fn part(kind: PartKind, directory: &Path, path: &str) -> Result<ManifestPart, Failure> {
    let file = directory.join(path);
    let (bytes, sha256) = hash_file(&file).map_err(Failure::io("hash", &file))?;
    Ok(ManifestPart { kind, path: path.into(), bytes, sha256 })
}

pub fn default_name(trigger: Trigger, number: CheckpointNumber) -> String {
    format!("{} {number}", trigger.as_str().replace('_', " "))
}
