//! Makes a checkpoint: workspace snapshot, database backup, context snapshot, transcripts, plugin
//! artifacts, manifest.
//!
//! ```text
//!   checkpoints/<n>.partial/   everything is written and synced here
//!   rename to checkpoints/<n>/
//!   refs/fermata/checkpoints/<n> published
//!   the row in the database: only now the checkpoint exists     (the caller's transaction)
//! ```
//! What a crash leaves before the row is swept by [`crate::operations::maintenance::leftovers`].

pub mod bundle;
pub mod context_file;
pub mod database;
mod deferred_removal;
pub mod layout;
pub mod order;
pub mod transcripts;
pub mod transfer;
pub mod warm_up;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fermata_protocol::checkpoint::{CheckpointMetadata, CheckpointView, Manifest, ManifestPart, PartKind, Trigger};
use fermata_protocol::task::TaskStatus;
use fermata_protocol::{AgentName, CheckpointNumber, Code, Refusal, UnixMillis};
use sha2::{Digest as _, Sha256};

use crate::errors::Failure;
use crate::hashing::{hash_file, hex};
use crate::operations::checkpoint::database::{DatabasePart, StagedDatabase};
use crate::operations::checkpoint::deferred_removal::DeferredRemoval;
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE, FORMAT, MANIFEST};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::transcripts::{Copied, Opened};
use crate::operations::pause::flash_save::Plans;
use crate::operations::run::session::Scouted;
use crate::operations::{StepContext, blocking, ms_since};
use crate::plugins::{AgentProcess, SaveRequest};
use crate::store::pinned::{Pinned, Prepared};
use fermata_failpoint as failpoint;
use fermata_history::{HistoryError, Mapped, Observed, Snapshot, SnapshotRequest};
use fermata_os::fsync::{sync_together, write_unsynced};

/// A checkpoint that is complete on disk and lacks only its row.
#[derive(Debug, Clone)]
pub struct Made {
    /// The row.
    pub view: CheckpointView,
    /// The sessions whose transcripts are in it.
    pub sessions: Vec<(AgentName, String)>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// What is read while the agents stand still.
pub struct Captured {
    observed: DeferredRemoval<Observed>,
    taken_at: UnixMillis,
    transcripts: Opened,
    rows: DatabaseCapture,
    parts_ms: BTreeMap<String, f64>,
}

impl Captured {
    /// Gives it up, and waits until nothing of it is left in the store.
    pub async fn discard(self) {
        self.observed.gone().await;
    }
}

/// When the database part is written.
pub enum Rows {
    /// While the agents stand still: from the draft, as far as it holds.
    Now(Option<Box<StagedDatabase>>),
    /// Once they run again: only its instant is pinned. Its file may be there already.
    Later(Option<Prepared>),
}

enum DatabaseCapture {
    Written(DatabasePart, f64),
    Pinned(Pinned),
}

/// Reads workspace, database and context into the partial checkpoint and opens the transcripts of what was scouted: the
/// part for which agents have to stand still.
///
/// # Errors
/// When any of it cannot be read or written.
pub async fn capture(
    site: &StepContext,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    rows: Rows,
    scouted: Option<Scouted>,
) -> Result<Captured, Failure> {
    crate::operations::failpoint("checkpoint.begin")?;
    let partial = site.dirs().partial_checkpoint(order.number);
    let database = async {
        match rows {
            Rows::Now(draft) => database::save(site, order, plans, now, &partial, draft.map(|draft| *draft))
                .await
                .map(|(part, ms)| DatabaseCapture::Written(part, ms)),
            Rows::Later(opened) => database::begin(site, &partial, opened).await.map(DatabaseCapture::Pinned),
        }
    };
    let (observed, rows, opened) = tokio::join!(workspace(site, order), database, transcripts::open(site, scouted));
    // All three have ended before any error is looked at, so that an undo finds nobody at work.
    let (observed, workspace_ms) = observed?;
    let others = rows.and_then(|rows| {
        let opened = opened?;
        crate::operations::failpoint("checkpoint.captured")?;
        Ok((rows, opened))
    });
    match others {
        Ok((rows, transcripts)) => {
            let parts_ms = [(PartKind::Workspace.to_string(), workspace_ms)].into();
            Ok(Captured { observed, taken_at: now, transcripts, rows, parts_ms })
        }
        Err(failure) => {
            observed.gone().await;
            Err(failure)
        }
    }
}

/// Completes the database part, where that was not done while the agents stood still.
async fn written(
    site: &StepContext,
    order: &CheckpointOrder,
    rows: DatabaseCapture,
    taken_at: UnixMillis,
    partial: &Path,
) -> Result<(DatabasePart, f64), Failure> {
    match rows {
        DatabaseCapture::Written(part, ms) => Ok((part, ms)),
        DatabaseCapture::Pinned(pinned) => {
            let start = Instant::now();
            let part = database::copy(site, pinned, order, &Vec::new(), taken_at, partial).await?;
            Ok((part, ms_since(start)))
        }
    }
}

/// Scans the workspace and reads the files that have changed.
async fn workspace(site: &StepContext, order: &CheckpointOrder) -> Result<(DeferredRemoval<Observed>, f64), Failure> {
    let start = Instant::now();
    let request = SnapshotRequest {
        workspace: PathBuf::from(&site.project.facts.workspace),
        number: order.number,
        message: format!("{} {} of {}\n", order.trigger.as_str(), order.number, site.project.name),
        parent: order.number.checked_sub(1).filter(|n| *n > 0),
        rules: site.rules(),
        mapped: Mapped::default(),
        whole_after: None,
    };
    let mapped = crate::operations::checkpoint::warm_up::mapped(site, &order.runs);
    let observed = site
        .with_history_at_once(&order.operation, "save the workspace", move |history, progress, cancel| {
            let mut request = request;
            request.mapped = match mapped() {
                Ok(mapped) => mapped,
                Err(failure) => return Ok(Err(failure)),
            };
            // Numbers have gaps where checkpoints failed or were removed.
            request.parent = history.list()?.into_iter().rfind(|n| *n < request.number);
            history.observe(&request, progress, cancel).map(DeferredRemoval::new).map(Ok)
        })
        .await??;
    Ok((observed, ms_since(start)))
}

/// Makes a snapshot of what was read: agents need not stand still for it.
async fn complete(
    site: &StepContext,
    order: &CheckpointOrder,
    observed: DeferredRemoval<Observed>,
    taken_at: UnixMillis,
) -> Result<DeferredRemoval<Snapshot>, Failure> {
    site.with_history(Some(&order.operation), "save the workspace", move |history, progress, cancel| {
        // Nobody else has it.
        let observed = observed.take().ok_or(HistoryError::Cancelled)?;
        history.complete(observed, taken_at.0, progress, cancel).map(DeferredRemoval::new)
    })
    .await
}

/// What a checkpoint has beside its snapshot, complete.
struct Beside {
    database: DatabasePart,
    transcripts: Copied,
    parts_ms: BTreeMap<String, f64>,
}

/// Copies the transcripts, adds plugin artifacts and the manifest, and gives the checkpoint its place; only the row is
/// missing then.
///
/// # Errors
/// When anything cannot be written. A plugin's failure is a warning.
pub async fn seal(
    site: &StepContext,
    order: &CheckpointOrder,
    captured: Captured,
    now: UnixMillis,
) -> Result<Made, Failure> {
    let start = Instant::now();
    let Captured { observed, taken_at, transcripts, rows, mut parts_ms } = captured;
    let partial = site.dirs().partial_checkpoint(order.number);
    let (snapshot, database, transcripts) = tokio::join!(
        complete(site, order, observed, taken_at),
        written(site, order, rows, taken_at, &partial),
        transcripts::copy(transcripts, &partial)
    );
    let snapshot = snapshot?;
    parts_ms.insert("snapshot".to_owned(), ms_since(start));
    let finished = async {
        let (database, database_ms) = database?;
        parts_ms.insert(PartKind::Database.to_string(), database_ms);
        let beside = Beside { database, transcripts: transcripts?, parts_ms };
        finish(site, order, &snapshot, beside, partial, now).await
    };
    match finished.await {
        Ok(made) => Ok(made),
        Err(failure) => {
            // The undo finds nothing of it.
            snapshot.gone().await;
            Err(failure)
        }
    }
}

async fn finish(
    site: &StepContext,
    order: &CheckpointOrder,
    snapshot: &DeferredRemoval<Snapshot>,
    beside: Beside,
    partial: PathBuf,
    now: UnixMillis,
) -> Result<Made, Failure> {
    let Beside { database, transcripts, mut parts_ms } = beside;
    let unsynced = database.unsynced;
    let Copied { sessions, mut parts, warnings: about_transcripts } = transcripts;
    parts.extend(database.parts);
    let mut warnings = snapshot.warnings.clone();
    warnings.extend(about_transcripts);
    if !snapshot.torn.is_empty() {
        warnings.push(format!("{} files changed while they were read", snapshot.torn.len()));
    }
    let start = Instant::now();
    let dirs = site.dirs();
    let place = dirs.checkpoint(order.number);
    parts.extend(artifacts(site, order, &partial, &mut warnings).await?);
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
        project: site.project.name.clone(),
        checkpoint: order.number,
        created_at: now,
        parts,
    };
    let mut metadata = metadata(site, snapshot, database.item_count, database.tokens);
    let files_bytes: u64 = manifest.parts.iter().skip(1).map(|part| part.bytes).sum();
    let size_bytes = files_bytes + snapshot.stats.new_bytes;
    let seal_start = Instant::now();
    let manifest_sha256 = publish(site, snapshot.share(), &manifest, unsynced, partial, place.clone()).await?;
    parts_ms.insert("seal".to_owned(), ms_since(seal_start));
    metadata.warnings.clone_from(&warnings);
    metadata.parts_ms = parts_ms;
    let view = row(site, order, &place, Contents { created_at: now, commit, manifest_sha256, size_bytes, metadata });
    crate::operations::failpoint("checkpoint.sealed")?;
    let sessions = sessions.into_iter().map(|(agent, session)| (agent, session.id)).collect();
    Ok(Made { view, sessions, warnings })
}

/// What only the files of a checkpoint can tell of it.
pub(super) struct Contents {
    /// When it was made.
    pub created_at: UnixMillis,
    /// The commit of the workspace.
    pub commit: String,
    /// The hash of its manifest, in hexadecimal.
    pub manifest_sha256: String,
    /// What it has added, bytes.
    pub size_bytes: u64,
    /// What is known of it besides.
    pub metadata: CheckpointMetadata,
}

/// Describes the checkpoint that was ordered, in its place.
pub(super) fn row(site: &StepContext, order: &CheckpointOrder, place: &Path, contents: Contents) -> CheckpointView {
    let text = |name: &str| place.join(name).to_string_lossy().into_owned();
    let Contents { created_at, commit, manifest_sha256, size_bytes, metadata } = contents;
    CheckpointView {
        project: site.project.name.clone(),
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

async fn artifacts(
    site: &StepContext,
    order: &CheckpointOrder,
    partial: &Path,
    warnings: &mut Vec<String>,
) -> Result<Vec<ManifestPart>, Failure> {
    if !site.services.plugins.may_save() {
        return Ok(Vec::new());
    }
    let directory = partial.join("plugins");
    let create = directory.clone();
    blocking("create the plugins' directory", move || {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&create)
            .map_err(|e| Failure::fault(&format!("create {}", create.display()), &e))
    })
    .await?;
    let agents = site.project.alive_agents().filter_map(|agent| {
        let processes = agent.run()?.processes.as_ref()?;
        Some(AgentProcess { name: agent.name.to_string(), pid: Some(processes.pid), cgroup: None })
    });
    let request = SaveRequest {
        project: site.project.name.to_string(),
        checkpoint: order.number.to_string(),
        operation: order.operation.to_string(),
        workspace: PathBuf::from(&site.project.facts.workspace),
        directory,
        agents: agents.collect(),
        frozen: order.frozen,
        deadline_ms: None,
    };
    let mut parts = Vec::new();
    // Dropping the call cancels it in the plugins.
    let saved = tokio::select! {
        saved = site.services.plugins.checkpoint_save(&request) => saved,
        () = site.cancel.cancelled() => {
            return Err(Refusal::new(Code::OperationCancelled, "the operation was cancelled").into());
        }
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

/// Publishes a snapshot, and gives what is beside it its place: all that is not durable yet, `unsynced` among it, becomes so
/// together. Returns the SHA-256 of the manifest.
async fn publish(
    site: &StepContext,
    snapshot: Arc<Snapshot>,
    manifest: &Manifest,
    unsynced: Vec<File>,
    partial: PathBuf,
    place: PathBuf,
) -> Result<String, Failure> {
    let bytes = encoded(manifest)?;
    let sha256 = site
        .with_history(None, "publish the snapshot", move |history, _, _| {
            // Neither means anything without the row.
            let publication = history.begin_to_publish(&snapshot)?;
            match put_in_place(&bytes, &partial, &place) {
                Ok(placed) => publication.complete(&unsynced.iter().chain(&placed).collect::<Vec<_>>())?,
                Err(failure) => return Ok(Err(failure)),
            }
            Ok(Ok(hex(&Sha256::digest(&bytes))))
        })
        .await??;
    crate::operations::failpoint("checkpoint.placed")?;
    Ok(sha256)
}

fn encoded(manifest: &Manifest) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec_pretty(manifest).map_err(|e| Failure::fault("encode the manifest", &e))
}

/// Writes the manifest into a checkpoint's directory, of which nothing else is missing, and gives that its place. Returns
/// what is to be synced for that.
fn put_in_place(manifest: &[u8], partial: &Path, place: &Path) -> Result<[File; 3], Failure> {
    // The directory is nobody's checkpoint yet: nothing has to be replaced.
    let manifest = write_unsynced(&partial.join(MANIFEST), manifest, 0o600)
        .map_err(|e| Failure::fault("write the manifest", &e))?;
    let failed = |error: io::Error| Failure::fault(&format!("rename to {}", place.display()), &error);
    fs::rename(partial, place).map_err(failed)?;
    failpoint::check("checkpoint.renamed").map_err(failed)?;
    let parent = place.parent().unwrap_or(place);
    Ok([manifest, File::open(place).map_err(failed)?, File::open(parent).map_err(failed)?])
}

/// Gives a checkpoint's directory, of which only the manifest is missing, its place, durably. Returns the SHA-256 of the
/// manifest.
pub(super) async fn place(manifest: &Manifest, partial: PathBuf, place: PathBuf) -> Result<String, Failure> {
    let bytes = encoded(manifest)?;
    let sha256 = blocking("give the checkpoint its place", move || {
        let placed = put_in_place(&bytes, &partial, &place)?;
        sync_together(&placed.iter().collect::<Vec<_>>())
            .map_err(|e| Failure::fault(&format!("sync {}", place.display()), &e))?;
        Ok(hex(&Sha256::digest(&bytes)))
    })
    .await?;
    crate::operations::failpoint("checkpoint.placed")?;
    Ok(sha256)
}

fn metadata(site: &StepContext, snapshot: &Snapshot, item_count: u64, context_tokens: u64) -> CheckpointMetadata {
    let project = &site.project;
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

/// Describes a file of a checkpoint.
///
/// # Errors
/// When it cannot be read.
pub fn part(kind: PartKind, directory: &Path, path: &str) -> Result<ManifestPart, Failure> {
    let file = directory.join(path);
    let (bytes, sha256) = hash_file(&file).map_err(|e| Failure::fault(&format!("hash {}", file.display()), &e))?;
    Ok(ManifestPart { kind, path: path.into(), bytes, sha256 })
}

/// The default name of a checkpoint.
pub fn default_name(trigger: Trigger, number: CheckpointNumber) -> String {
    format!("{} {number}", trigger.as_str().replace('_', " "))
}
