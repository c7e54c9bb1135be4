//! The database part of a checkpoint: the project's rows and the context snapshot, both from one read transaction and
//! written concurrently.
//!
//! A pause *stages* the part before it freezes the agents, while they quiesce. Under the freeze the small tables are
//! written again, and the rest of the staged part is used if no row of it has changed since, which the store decides
//! exactly (see [`crate::store::pinned`]). Otherwise all of it is written again.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use fermata_core::Project;
use fermata_protocol::checkpoint::{ManifestPart, PartKind};
use fermata_protocol::context::ContextItem;
use fermata_protocol::{AgentName, CheckpointNumber, ProjectName, UnixMillis};

use crate::errors::Failure;
use crate::hashing::{hash, sha256};
use crate::operations::checkpoint::context_file::{ContextFile, ContextPiece};
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::directory;
use crate::operations::pause::flash_save::{self, Plans};
use crate::operations::{StepContext, blocking, failpoint, ms_since};
use crate::store::pinned::{self, CopiedRows, DatabaseCopy, Pinned, PreparedCopy};
use crate::store::{Store, StoreError};

/// How many items are sent to the writer of the context at once.
const BATCH: usize = 64;

/// The database part, written but not synced.
pub struct DatabasePart {
    /// The files that the caller has to sync.
    pub unsynced: Vec<File>,
    pub parts: Vec<ManifestPart>,
    /// The number of context items, with archived ones.
    pub item_count: u64,
    /// The tokens of the context items that are not archived.
    pub tokens: u64,
}

/// Both files, complete except for the fields that are known last.
pub struct StagedDatabase {
    copied: DatabaseCopy,
    context: ContextFile,
    agents: Vec<AgentName>,
    archived: HashSet<i64>,
}

fn rows(error: StoreError) -> Failure {
    Failure::fault("back up the project's rows", &error)
}

fn context(error: io::Error) -> Failure {
    Failure::fault("write the context snapshot", &error)
}

fn archived_by(plans: &Plans) -> HashSet<i64> {
    plans.iter().flat_map(|(_, plan)| plan.items.iter().filter(|item| item.archive).map(|item| item.id)).collect()
}

/// Creates the partial directory of a checkpoint, and in it the file that rows will be copied to.
///
/// # Errors
/// When either cannot be created.
pub async fn open(step: &StepContext, partial: &Path) -> Result<PreparedCopy, Failure> {
    let (store, project, partial) = (step.services.store.clone(), step.project.name.clone(), partial.to_owned());
    blocking("prepare the database part", move || create(&store, &project, &partial)).await
}

fn create(store: &Store, project: &ProjectName, partial: &Path) -> Result<PreparedCopy, Failure> {
    directory::create(partial).map_err(Failure::io("create", partial))?;
    // The files of a staged part that was not used.
    for name in [DATABASE, CONTEXT] {
        match fs::remove_file(partial.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::fault("remove a staged file", &error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    pinned::open(&store.spare(), store.path(), project, &partial.join(DATABASE)).map_err(rows)
}

/// Pins the instant that the rows are copied from: the copy has no later change of the database.
///
/// # Errors
/// When the database cannot be read, or the file cannot be created where it is not `prepared` yet.
pub async fn begin(step: &StepContext, partial: &Path, prepared: Option<PreparedCopy>) -> Result<Pinned, Failure> {
    let (store, project, partial) = (step.services.store.clone(), step.project.name.clone(), partial.to_owned());
    blocking("prepare the database part", move || {
        let prepared = prepared.map_or_else(|| create(&store, &project, &partial), Ok)?;
        prepared.pin().map_err(rows)
    })
    .await
}

/// Copies the pinned rows and writes the context snapshot.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written.
pub async fn copy(
    step: &StepContext,
    pinned: Pinned,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    partial: &Path,
) -> Result<DatabasePart, Failure> {
    let (project, partial, archived) = (Arc::clone(&step.project), partial.to_owned(), archived_by(plans));
    let number = order.number;
    blocking("save the database", move || write(pinned, &project, archived, &partial)?.finish(&project, number, now))
        .await
}

/// Saves the database part, from the staged one where that is still valid. Returns it with the milliseconds that it took.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written.
pub async fn save(
    step: &StepContext,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    partial: &Path,
    staged: Option<StagedDatabase>,
) -> Result<(DatabasePart, f64), Failure> {
    let start = Instant::now();
    if let Some(mut staged) = staged {
        let (project, archived) = (Arc::clone(&step.project), archived_by(plans));
        let number = order.number;
        let saved = blocking("save the database", move || {
            let same = staged.archived == archived && project.agents.keys().eq(&staged.agents);
            if !same || !staged.copied.refresh().map_err(rows)? {
                return Ok(None);
            }
            staged.finish(&project, number, now).map(Some)
        });
        if let Some(saved) = saved.await? {
            return Ok((saved, ms_since(start)));
        }
    }
    let pinned = begin(step, partial, None).await?;
    let saved = copy(step, pinned, order, plans, now, partial).await?;
    Ok((saved, ms_since(start)))
}

/// Writes and syncs both files before the freeze, so that little remains to be done under it.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written. The checkpoint does not need the staged part.
pub async fn stage(step: StepContext, number: CheckpointNumber) -> Result<StagedDatabase, Failure> {
    failpoint("checkpoint.stage")?;
    let partial = step.dirs().partial_checkpoint(number);
    let plans = flash_save::plan(&step, None, crate::services::now()).await?;
    let pinned = begin(&step, &partial, None).await?;
    let (project, archived) = (Arc::clone(&step.project), archived_by(&plans));
    let staged = blocking("stage the database part", move || {
        let mut staged = write(pinned, &project, archived, &partial)?;
        std::thread::scope(|scope| {
            let (copied, file) = (&mut staged.copied, &mut staged.context);
            let rows_synced = scope.spawn(move || copied.sync().map_err(rows));
            let file_synced = file.sync().map_err(context);
            join(rows_synced).and(file_synced)
        })?;
        Ok(staged)
    })
    .await?;
    failpoint("checkpoint.staged")?;
    Ok(staged)
}

/// Copies the rows and writes the context items as they are read: on a second thread where there are many.
fn write(pinned: Pinned, project: &Project, archived: HashSet<i64>, partial: &Path) -> Result<StagedDatabase, Failure> {
    let agents: Vec<AgentName> = project.agents.keys().cloned().collect();
    // Bounds the memory when the writer is slower than the reader.
    let (sender, pieces) = mpsc::sync_channel(16);
    std::thread::scope(|scope| {
        let (path, agents, archived) = (partial.join(CONTEXT), &agents, &archived);
        let write = move || ContextFile::write(&path, agents, archived, &pieces).map_err(context);
        // Few pieces fit into the channel: they are written on this thread once the rows are copied.
        let writing = if pinned.few { Err(write) } else { Ok(scope.spawn(write)) };
        let mut batch: Vec<ContextItem> = Vec::with_capacity(BATCH);
        let mut sender = Some(sender);
        let copied = pinned.copy(|rows| {
            let Some(open) = &sender else { return };
            // Fails when the writer has failed, which returns its own error.
            let send = |piece: ContextPiece| drop(open.send(piece));
            match rows {
                CopiedRows::States(states) => send(ContextPiece::States(states.clone())),
                CopiedRows::Item(item) => {
                    batch.push(item);
                    if batch.len() >= BATCH {
                        send(ContextPiece::Items(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))));
                    }
                }
                CopiedRows::All => {
                    send(ContextPiece::Items(std::mem::take(&mut batch)));
                    // The writer finishes while the other rows are copied.
                    sender = None;
                }
            }
        });
        drop(sender);
        let context = match writing {
            Ok(thread) => join(thread)?,
            Err(write) => write()?,
        };
        Ok((copied.map_err(rows)?, context))
    })
    .map(|(copied, context)| StagedDatabase { copied, context, agents, archived })
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T, Failure>>) -> Result<T, Failure> {
    let panicked = || Failure::fault("save the database", &io::Error::other("the thread panicked"));
    thread.join().unwrap_or_else(|_| Err(panicked()))
}

impl StagedDatabase {
    /// Completes both files.
    fn finish(self, project: &Project, number: CheckpointNumber, now: UnixMillis) -> Result<DatabasePart, Failure> {
        let Self { copied, context: file, .. } = self;
        let (item_count, tokens) = (copied.item_count, file.tokens);
        let (context_file, bytes, hash_of_context) =
            file.finish(&project.name, number, now, project.facts.phase).map_err(context)?;
        let context_part =
            ManifestPart { kind: PartKind::Context, path: CONTEXT.into(), bytes, sha256: hash_of_context };
        let (rows_file, content) = copied.finish().map_err(rows)?;
        let (bytes, hash_of_rows) = match content {
            Some(content) => (content.len() as u64, sha256(&content)),
            None => hash(&rows_file).map_err(|e| Failure::fault("hash the copy of the rows", &e))?,
        };
        let rows_part = ManifestPart { kind: PartKind::Database, path: DATABASE.into(), bytes, sha256: hash_of_rows };
        let parts = vec![rows_part, context_part];
        Ok(DatabasePart { unsynced: vec![rows_file, context_file], parts, item_count, tokens })
    }
}
