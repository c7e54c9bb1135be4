//! The database part of a checkpoint: the project's rows, and the context snapshot, both from one
//! read transaction, written side by side.
//!
//! A pause writes them before it freezes anybody, while the agents come to a good place: a *draft*.
//! Once they stand still, what is small is written anew, and the rest is taken as it is if nothing of
//! it has changed since; that is known exactly (see [`crate::store::pinned`]). Else all is written anew.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use fermata_core::Project;
use fermata_protocol::checkpoint::{ManifestPart, PartKind};
use fermata_protocol::context::ContextItem;
use fermata_protocol::{AgentName, CheckpointNumber, ProjectName, UnixMillis};
use sha2::{Digest as _, Sha256};

use crate::errors::Failure;
use crate::hashing::{hash, hex};
use crate::operations::checkpoint::context_file::{ContextFile, Piece};
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::pause::flash_save::{self, Plans};
use crate::operations::{StepContext, blocking, ms_since};
use crate::store::pinned::{self, Copied, CopiedRows, Pinned, Prepared};
use crate::store::{Store, StoreError};

/// How many items are handed to the writer of the context at once.
const BATCH: usize = 64;

/// The database part, written and yet to be synced.
pub struct DatabasePart {
    /// What is to be synced before anybody relies on it.
    pub unsynced: Vec<File>,
    /// Its files.
    pub parts: Vec<ManifestPart>,
    /// How many context items there are, archived ones included.
    pub item_count: u64,
    /// Tokens of the unarchived ones.
    pub tokens: u64,
}

/// Both files, complete but for what is known last.
pub struct StagedDatabase {
    copied: Copied,
    context: ContextFile,
    agents: Vec<AgentName>,
    archived: HashSet<i64>,
}

fn fault(doing: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::fault(doing, error)
}

fn rows(error: StoreError) -> Failure {
    fault("back up the project's rows", &error)
}

fn context(error: io::Error) -> Failure {
    fault("write the context snapshot", &error)
}

fn archived_by(plans: &Plans) -> HashSet<i64> {
    plans.iter().flat_map(|(_, plan)| plan.items.iter().filter(|item| item.archive).map(|item| item.id)).collect()
}

/// Makes the directory of a checkpoint that is being made, and in it the file that rows will be copied to.
///
/// # Errors
/// When either cannot be made.
pub async fn open(site: &StepContext, partial: &Path) -> Result<Prepared, Failure> {
    let (store, project, partial) = (site.services.store.clone(), site.project.name.clone(), partial.to_owned());
    blocking("begin to save the database", move || make(&store, &project, &partial)).await
}

fn make(store: &Store, project: &ProjectName, partial: &Path) -> Result<Prepared, Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(partial)
        .map_err(|e| fault(&format!("create {}", partial.display()), &e))?;
    // What a draft that was not used has left.
    for name in [DATABASE, CONTEXT] {
        match fs::remove_file(partial.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fault("remove a draft", &error)),
            Ok(()) | Err(_) => {}
        }
    }
    pinned::open(&store.spare(), store.path(), project, &partial.join(DATABASE)).map_err(rows)
}

/// Pins the instant that the rows are copied from. What is written to the database afterwards is not in the copy.
///
/// # Errors
/// When the database cannot be read, or the file cannot be made where it is not `prepared` yet.
pub async fn begin(site: &StepContext, partial: &Path, prepared: Option<Prepared>) -> Result<Pinned, Failure> {
    let (store, project, partial) = (site.services.store.clone(), site.project.name.clone(), partial.to_owned());
    blocking("begin to save the database", move || {
        let prepared = prepared.map_or_else(|| make(&store, &project, &partial), Ok)?;
        prepared.pin().map_err(rows)
    })
    .await
}

/// Copies the pinned rows and writes the context snapshot.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written.
pub async fn copy(
    site: &StepContext,
    pinned: Pinned,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    partial: &Path,
) -> Result<DatabasePart, Failure> {
    let (project, partial, archived) = (Arc::clone(&site.project), partial.to_owned(), archived_by(plans));
    let number = order.number;
    blocking("save the database", move || write(pinned, &project, archived, &partial)?.finish(&project, number, now))
        .await
}

/// Saves the database part, from the draft where it still holds. Returns it with the milliseconds that it took.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written.
pub async fn save(
    site: &StepContext,
    order: &CheckpointOrder,
    plans: &Plans,
    now: UnixMillis,
    partial: &Path,
    draft: Option<StagedDatabase>,
) -> Result<(DatabasePart, f64), Failure> {
    let start = Instant::now();
    if let Some(mut draft) = draft {
        let (project, archived) = (Arc::clone(&site.project), archived_by(plans));
        let number = order.number;
        let saved = blocking("save the database", move || {
            let same = draft.archived == archived && project.agents.keys().eq(&draft.agents);
            if !same || !draft.copied.refresh().map_err(rows)? {
                return Ok(None);
            }
            draft.finish(&project, number, now).map(Some)
        });
        if let Some(saved) = saved.await? {
            return Ok((saved, ms_since(start)));
        }
    }
    let pinned = begin(site, partial, None).await?;
    let saved = copy(site, pinned, order, plans, now, partial).await?;
    Ok((saved, ms_since(start)))
}

/// Writes both files as they are now, and hands them to the disk, so that little is left to be done
/// while the agents stand still.
///
/// # Errors
/// When a row cannot be read, or a file cannot be written; nothing depends on it.
pub async fn stage(site: StepContext, number: CheckpointNumber) -> Result<StagedDatabase, Failure> {
    crate::operations::failpoint("checkpoint.draft")?;
    let partial = site.dirs().partial_checkpoint(number);
    let plans = flash_save::plan(&site, None, crate::services::now()).await?;
    let pinned = begin(&site, &partial, None).await?;
    let (project, archived) = (Arc::clone(&site.project), archived_by(&plans));
    let draft = blocking("draft the database part", move || {
        let mut draft = write(pinned, &project, archived, &partial)?;
        std::thread::scope(|scope| {
            let (copied, file) = (&mut draft.copied, &mut draft.context);
            let rows_synced = scope.spawn(move || copied.sync().map_err(rows));
            let file_synced = file.sync().map_err(context);
            join(rows_synced).and(file_synced)
        })?;
        Ok(draft)
    })
    .await?;
    crate::operations::failpoint("checkpoint.drafted")?;
    Ok(draft)
}

/// Copies the rows; beside it another thread writes what the agents know as it is read, where that is much.
fn write(pinned: Pinned, project: &Project, archived: HashSet<i64>, partial: &Path) -> Result<StagedDatabase, Failure> {
    let agents: Vec<AgentName> = project.agents.keys().cloned().collect();
    // A few batches: a writer that is behind must not let the whole context pile up.
    let (sender, pieces) = mpsc::sync_channel(16);
    std::thread::scope(|scope| {
        let (path, agents_there, left_out) = (partial.join(CONTEXT), &agents, &archived);
        let write = move || ContextFile::write(&path, agents_there, left_out, &pieces).map_err(context);
        // A few pieces wait in the channel until the rows are copied.
        let writing = if pinned.few { Err(write) } else { Ok(scope.spawn(write)) };
        let mut batch: Vec<ContextItem> = Vec::with_capacity(BATCH);
        let mut sender = Some(sender);
        let copied = pinned.copy(|told| {
            let Some(open) = &sender else { return };
            // A writer that has failed takes nothing more; its own error is the one that is told.
            let send = |piece: Piece| drop(open.send(piece));
            match told {
                CopiedRows::States(states) => send(Piece::States(states.clone())),
                CopiedRows::Item(item) => {
                    batch.push(item);
                    if batch.len() >= BATCH {
                        send(Piece::Items(std::mem::replace(&mut batch, Vec::with_capacity(BATCH))));
                    }
                }
                CopiedRows::All => {
                    send(Piece::Items(std::mem::take(&mut batch)));
                    // The writer comes to its end beside the copy of the rows.
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
        let (context_file, bytes, sha256) =
            file.finish(&project.name, number, now, project.facts.phase).map_err(context)?;
        let context_part = ManifestPart { kind: PartKind::Context, path: CONTEXT.into(), bytes, sha256 };
        let (rows_file, content) = copied.finish().map_err(rows)?;
        let (bytes, sha256) = match content {
            Some(content) => (content.len() as u64, hex(&Sha256::digest(&content))),
            None => hash(&rows_file).map_err(|e| fault("hash the copy of the rows", &e))?,
        };
        let rows_part = ManifestPart { kind: PartKind::Database, path: DATABASE.into(), bytes, sha256 };
        let parts = vec![rows_part, context_part];
        Ok(DatabasePart { unsynced: vec![rows_file, context_file], parts, item_count, tokens })
    }
}
