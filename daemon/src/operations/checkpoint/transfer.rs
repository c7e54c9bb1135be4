//! Exports a checkpoint as one file, and imports such a file as a checkpoint.
//!
//! ```text
//!   export:  snapshot -> one pack;  pack + the checkpoint's files -> one file without a name
//!   import:  checksum, header -> every part into checkpoints/<n>.partial -> all checked
//!            -> rewritten for this project and number -> renamed -> ref -> (the caller's transaction) row
//! ```
//! The exported file has no name on the disk: the kernel removes it when it is closed. The environment of agents is in no
//! part of a checkpoint, and so in no export.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fermata_protocol::checkpoint::{
    CheckpointView, MAX_CHECKPOINT_DESCRIPTION, MAX_CHECKPOINT_NAME, Manifest, ManifestPart, PartKind,
};
use fermata_protocol::{Code, OperationId, ProjectName, Refusal};
use serde_json::{Value, json};

use crate::errors::Failure;
use crate::operations::checkpoint::bundle::{self, Bundle, BundlePart, INDEX, PACK};
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE, FORMAT, MANIFEST};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::{FilesSummary, SealedCheckpoint, part, place, row};
use crate::operations::context::cancelled_by_request;
use crate::operations::pause::validate;
use crate::operations::progress::note_bytes;
use crate::operations::{StepContext, blocking, failpoint, ms_since};
use crate::store::backup;
use fermata_history::{HistoryError, IncomingPack, Oid};
use fermata_os::fsync::write_atomic;

/// An exported checkpoint for a client, or from one. The file has no name and is removed when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct BundleFile {
    pub file: Arc<File>,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// Writes a checkpoint into one file.
///
/// # Errors
/// When a part is missing or damaged, or the disk is full.
pub async fn export(step: &StepContext, view: CheckpointView, operation: &OperationId) -> Result<BundleFile, Failure> {
    let number = view.id;
    check_room(step, view.size_bytes).await?;
    let exported = step
        .with_history(Some(operation), "export the workspace", move |h, progress, cancel| {
            h.export(number, progress, cancel)
        })
        .await?;
    if exported.commit.to_string() != view.git_commit {
        return Err(damaged(number, "its snapshot is not the one that its row names"));
    }
    let (dir, project_dir) = (step.dirs().checkpoint(number), step.dirs().root);
    blocking("export the checkpoint", move || {
        let bytes = fs::read(dir.join(MANIFEST)).map_err(|e| damaged(number, &format!("its manifest: {e}")))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| damaged(number, &format!("its manifest: {e}")))?;
        let mut parts = vec![(MANIFEST.to_owned(), dir.join(MANIFEST))];
        parts.extend(files(&manifest).map(|part| (part.path.clone(), dir.join(&part.path))));
        parts.push((PACK.to_owned(), exported.pack.clone()));
        parts.push((INDEX.to_owned(), exported.index.clone()));
        let failed = |e: io::Error| Failure::fault(&format!("export checkpoint {number}"), &e);
        let mut file = tempfile::tempfile_in(&project_dir).map_err(failed)?;
        let (bytes, sha256) =
            bundle::write(&mut file, portable(view), crate::services::now(), &parts).map_err(failed)?;
        // An import would refuse a damaged file: the export fails instead.
        let bundle = Bundle::open(file.try_clone().map_err(failed)?)?;
        match changed(&manifest, &bundle.header.parts) {
            Some(path) => Err(damaged(number, &format!("its file {path} has changed"))),
            None => Ok(BundleFile { file: Arc::new(file), bytes, sha256 }),
        }
    })
    .await
}

fn damaged(number: u64, why: &str) -> Failure {
    Refusal::new(Code::CheckpointDamaged, format!("checkpoint {number} cannot be exported: {why}"))
        .hint("fermatactl checkpoint verify lists the checkpoints that are intact")
        .into()
}

fn refuse(why: impl std::fmt::Display) -> Failure {
    Refusal::new(Code::BundleRefused, format!("the file cannot be imported: {why}")).into()
}

/// Returns the parts of a checkpoint that are files in its directory.
fn files(manifest: &Manifest) -> impl Iterator<Item = &ManifestPart> {
    manifest.parts.iter().filter(|part| part.kind != PartKind::Workspace)
}

/// Returns the path of the first file of a manifest that is not among `parts` with the same size and hash.
fn changed<'a>(manifest: &'a Manifest, parts: &[BundlePart]) -> Option<&'a str> {
    let is_in_parts = |file: &ManifestPart| {
        parts.iter().any(|part| part.name == file.path && part.bytes == file.bytes && part.sha256 == file.sha256)
    };
    files(manifest).find(|file| !is_in_parts(file)).map(|file| file.path.as_str())
}

/// Removes the paths of this machine from a row.
fn portable(view: CheckpointView) -> CheckpointView {
    CheckpointView { database_backup: DATABASE.to_owned(), context_snapshot: CONTEXT.to_owned(), ..view }
}

/// Makes a checkpoint of an exported file. Only its row is missing then.
///
/// # Errors
/// Refuses a file that is damaged, of a newer format or unsafe before any of it is visible; fails when the disk is full.
pub async fn import(
    step: &StepContext,
    order: &CheckpointOrder,
    source: BundleFile,
) -> Result<SealedCheckpoint, Failure> {
    let start = Instant::now();
    failpoint("import.begin")?;
    let number = order.number;
    // The unpacked parts need as much again.
    check_room(step, source.bytes).await?;
    let incoming = step.with_history(None, "receive the workspace", move |h, _, _| h.receive(number)).await?;
    let partial = step.dirs().partial_checkpoint(number);
    let (bundle, incoming) = unpack(step, order, source, incoming, partial.clone()).await?;
    failpoint("import.unpacked")?;
    let header = bundle.header;
    let origin = sanitized(header.checkpoint)?;
    let manifest = check(&partial, &header.parts, &origin)?;
    let commit: Oid = origin.git_commit.parse().map_err(|_| refuse("its header names no commit"))?;
    let incoming = step
        .with_history(Some(&order.operation), "check the workspace", move |h, progress, cancel| {
            let checked = h.check_received(&incoming, commit, progress, cancel);
            Ok(checked.map(|()| incoming))
        })
        .await?
        .map_err(|error| {
            if matches!(error, HistoryError::Cancelled) {
                cancelled_by_request()
            } else {
                refuse(format!("its snapshot is damaged: {}", fermata_protocol::error_chain(&error)))
            }
        })?;
    let manifest = adapt(step, order, &partial, manifest).await?;
    let packed: u64 = header.parts.iter().filter(|p| p.name == PACK || p.name == INDEX).map(|p| p.bytes).sum();
    let size_bytes = packed + files(&manifest).map(|part| part.bytes).sum::<u64>();
    let placed = step.dirs().checkpoint(number);
    let manifest_sha256 = place(&manifest, partial, placed.clone()).await?;
    step.with_history(None, "publish the snapshot", move |h, _, _| h.publish_received(&incoming, commit)).await?;
    let mut warnings = Vec::new();
    if origin.project != step.project.name {
        warnings.push(format!("it was checkpoint {} of project '{}'", origin.id, origin.project));
    }
    let mut metadata = origin.metadata;
    metadata.parts_ms = [("import".to_owned(), ms_since(start))].into();
    let files = FilesSummary {
        created_at: origin.created_at,
        commit: commit.to_string(),
        manifest_sha256,
        size_bytes,
        metadata,
    };
    let view = CheckpointView {
        name: if origin.name.is_empty() { order.name.clone() } else { origin.name },
        description: origin.description,
        pause_reason: origin.pause_reason,
        ..row(step, order, &placed, files)
    };
    failpoint("import.sealed")?;
    Ok(SealedCheckpoint { view, sessions: Vec::new(), warnings })
}

/// Refuses to write `bytes` where the quota or the free space does not allow it.
async fn check_room(step: &StepContext, bytes: u64) -> Result<(), Failure> {
    validate::check_quota(step, bytes)?;
    let (state, floor) = (step.services.paths.state.clone(), step.services.settings().pause.disk_floor_bytes);
    blocking("read the free space", move || validate::check_free_space(&state, floor, bytes)).await
}

/// The largest metadata and pause reason of an imported row, bytes of JSON.
const MAX_METADATA: usize = 256 << 10;

/// Refuses a row that exceeds the limits of the protocol, and removes control characters from its texts, which could
/// control a terminal.
fn sanitized(row: CheckpointView) -> Result<CheckpointView, Failure> {
    let limits =
        [("name", &row.name, MAX_CHECKPOINT_NAME), ("description", &row.description, MAX_CHECKPOINT_DESCRIPTION)];
    if let Some((field, _, limit)) = limits.iter().find(|(_, text, limit)| text.chars().count() > *limit) {
        return Err(refuse(format!("its {field} has more than {limit} characters")));
    }
    let metadata = serde_json::to_value(&row.metadata).map_err(|e| Failure::fault("read the metadata", &e))?;
    let reason = row.pause_reason.as_ref().map_or(0, String::len);
    if metadata.to_string().len() + reason > MAX_METADATA {
        return Err(refuse(format!("its metadata are more than {MAX_METADATA} bytes")));
    }
    Ok(CheckpointView {
        name: plain(&row.name),
        description: plain(&row.description),
        pause_reason: row.pause_reason.as_deref().map(plain),
        metadata: serde_json::from_value(plain_value(metadata)).map_err(|e| Failure::fault("read the metadata", &e))?,
        ..row
    })
}

/// Replaces control characters except line breaks by spaces.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

fn plain_value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(plain(&text)),
        Value::Array(values) => values.into_iter().map(plain_value).collect(),
        Value::Object(members) => members.into_iter().map(|(name, value)| (plain(&name), plain_value(value))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value,
    }
}

/// Writes the parts of a file into the partial checkpoint, and the pack into the history's staging directory.
async fn unpack(
    step: &StepContext,
    order: &CheckpointOrder,
    source: BundleFile,
    incoming: IncomingPack,
    partial: PathBuf,
) -> Result<(Bundle, IncomingPack), Failure> {
    let (cancel, notes, operation) = (step.cancel.clone(), step.services.progress.clone(), order.operation.clone());
    blocking("unpack the file", move || {
        let file = source.file.try_clone().map_err(|e| Failure::fault("read the file", &e))?;
        let mut bundle = Bundle::open(file)?;
        if bundle.header.checkpoint.format > FORMAT {
            return Err(refuse(format!(
                "the format of the checkpoint is {}, and this program reads formats up to {FORMAT}",
                bundle.header.checkpoint.format
            )));
        }
        let mut reported = 0;
        let total = source.bytes;
        let report = |done: u64| {
            if done - reported >= 4 << 20 {
                reported = done;
                // Fails when no client follows the operation.
                drop(notes.send(note_bytes(operation.clone(), "unpack", done, total)));
            }
        };
        let path_of = |part: &BundlePart| match part.name.as_str() {
            PACK => incoming.pack(),
            INDEX => incoming.index(),
            name => partial.join(name),
        };
        bundle.unpack(path_of, report, || cancel.is_cancelled())?;
        Ok((bundle, incoming))
    })
    .await
}

/// Reads the manifest and compares it with the unpacked parts and the row.
fn check(partial: &Path, parts: &[BundlePart], row: &CheckpointView) -> Result<Manifest, Failure> {
    let bytes = fs::read(partial.join(MANIFEST)).map_err(|_| refuse("it has no manifest"))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|e| refuse(format!("its manifest is not valid: {e}")))?;
    if manifest.format > FORMAT {
        return Err(refuse(format!(
            "the format of its manifest is {}, and this program reads formats up to {FORMAT}",
            manifest.format
        )));
    }
    if let Some(path) = changed(&manifest, parts) {
        return Err(refuse(format!("its file {path} is missing or differs from its manifest")));
    }
    let is_described = |part: &&BundlePart| {
        [MANIFEST, PACK, INDEX].contains(&part.name.as_str()) || files(&manifest).any(|file| file.path == part.name)
    };
    if let Some(part) = parts.iter().find(|part| !is_described(part)) {
        return Err(refuse(format!("its part {} is not in its manifest", part.name)));
    }
    if !files(&manifest).any(|part| part.path == DATABASE) || !files(&manifest).any(|part| part.path == CONTEXT) {
        return Err(refuse("it has no database or no context"));
    }
    if !manifest.parts.iter().any(|part| part.kind == PartKind::Workspace && part.path == row.git_commit) {
        return Err(refuse("its manifest and its header name different snapshots"));
    }
    Ok(manifest)
}

/// Rewrites the project's name and the checkpoint's number in the files; returns the new manifest.
async fn adapt(
    step: &StepContext,
    order: &CheckpointOrder,
    partial: &Path,
    manifest: Manifest,
) -> Result<Manifest, Failure> {
    let (project, number, partial) = (step.project.name.clone(), order.number, partial.to_owned());
    blocking("adapt the checkpoint", move || {
        let old_project = manifest.project.clone();
        let database = partial.join(DATABASE);
        match backup::check(&database, &old_project) {
            Ok(None) => {}
            Ok(Some(problem)) => return Err(refuse(format!("its database is damaged: {problem}"))),
            Err(error) => {
                return Err(refuse(format!("its database cannot be read: {}", fermata_protocol::error_chain(&error))));
            }
        }
        if old_project != project {
            backup::rename(&database, &old_project, &project).map_err(|e| Failure::fault("adapt the database", &e))?;
        }
        adapt_context(&partial.join(CONTEXT), &project, number)?;
        let mut parts = Vec::with_capacity(manifest.parts.len());
        for old in manifest.parts {
            let new = match old.path.as_str() {
                DATABASE | CONTEXT => part(old.kind, &partial, &old.path)?,
                _ => old,
            };
            parts.push(new);
        }
        Ok(Manifest { format: FORMAT, project, checkpoint: number, created_at: manifest.created_at, parts })
    })
    .await
}

fn adapt_context(path: &Path, project: &ProjectName, number: u64) -> Result<(), Failure> {
    let bytes = fs::read(path).map_err(|e| Failure::fault("read the context", &e))?;
    let mut document: serde_json::Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|e| refuse(format!("its context snapshot is not valid: {e}")))?;
    document.insert("project".to_owned(), json!(project));
    document.insert("checkpoint".to_owned(), json!(number));
    let text = Value::Object(document).to_string();
    write_atomic(path, text.as_bytes(), 0o600).map_err(|e| Failure::fault("write the context", &e))
}
