//! Checkpoints that leave as one file, and files that become checkpoints.
//!
//! ```text
//!   export:  snapshot -> one pack;  pack + the checkpoint's files -> one file without a name
//!   import:  checksum, header -> every part into checkpoints/<n>.partial -> all checked
//!            -> rewritten for this project and number -> placed -> ref -> (the caller's transaction) row
//! ```
//! The file has no name on the disk, so that nothing of it survives whoever holds it. The environment of agents is in no
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
use crate::operations::checkpoint::bundle::{self, Bundle, INDEX, PACK, Part};
use crate::operations::checkpoint::layout::{CONTEXT, DATABASE, FORMAT, MANIFEST};
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::{Contents, Made, part, place, row};
use crate::operations::pause::validate;
use crate::operations::progress::note_bytes;
use crate::operations::{StepContext, blocking, ms_since};
use crate::store::backup;
use fermata_history::{Incoming, Oid};
use fermata_os::fsync::write_atomic;

/// A file that was made for, or sent by, somebody: it has no name and goes when nobody holds it.
#[derive(Debug, Clone)]
pub struct BundleFile {
    /// The file.
    pub file: Arc<File>,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
}

/// Makes one file of a checkpoint.
///
/// # Errors
/// When any part is missing or damaged, or the disk is full.
pub async fn export(site: &StepContext, view: CheckpointView, operation: &OperationId) -> Result<BundleFile, Failure> {
    let number = view.id;
    has_room(site, view.size_bytes).await?;
    let exported = site
        .with_history(Some(operation), "export the workspace", move |h, progress, cancel| {
            h.export(number, progress, cancel)
        })
        .await?;
    if exported.commit.to_string() != view.git_commit {
        return Err(damaged(number, "the snapshot is another one than the row names"));
    }
    let (dir, project_dir) = (site.dirs().checkpoint(number), site.dirs().root);
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
        // What was damaged here would be refused there: better to say it now.
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
        .hint("fermatactl checkpoint verify tells which checkpoints are good")
        .into()
}

fn refuse(why: impl std::fmt::Display) -> Failure {
    Refusal::new(Code::BundleRefused, format!("the file cannot be imported: {why}")).into()
}

/// Lists the parts of a checkpoint that are files.
fn files(manifest: &Manifest) -> impl Iterator<Item = &ManifestPart> {
    manifest.parts.iter().filter(|part| part.kind != PartKind::Workspace)
}

/// Returns the first file of a manifest that is not among the parts with its size and hash.
fn changed<'a>(manifest: &'a Manifest, parts: &[Part]) -> Option<&'a str> {
    let there = |wanted: &ManifestPart| {
        parts.iter().any(|p| p.name == wanted.path && p.bytes == wanted.bytes && p.sha256 == wanted.sha256)
    };
    files(manifest).find(|part| !there(part)).map(|part| part.path.as_str())
}

/// Takes the paths of this machine out of a row.
fn portable(view: CheckpointView) -> CheckpointView {
    CheckpointView { database_backup: DATABASE.to_owned(), context_snapshot: CONTEXT.to_owned(), ..view }
}

/// Makes a checkpoint of a file; only its row is missing then.
///
/// # Errors
/// Refuses what is damaged, newer or unsafe before anything of it is visible; fails when the disk is full.
pub async fn import(site: &StepContext, order: &CheckpointOrder, held: BundleFile) -> Result<Made, Failure> {
    let start = Instant::now();
    crate::operations::failpoint("import.begin")?;
    let number = order.number;
    // What is unpacked takes as much again.
    has_room(site, held.bytes).await?;
    let incoming = site.with_history(None, "receive the workspace", move |h, _, _| h.receive(number)).await?;
    let partial = site.dirs().partial_checkpoint(number);
    let (bundle, incoming) = unpack(site, order, held, incoming, partial.clone()).await?;
    crate::operations::failpoint("import.unpacked")?;
    let header = bundle.header;
    let from = bounded(header.checkpoint)?;
    let manifest = check(&partial, &header.parts, &from)?;
    let commit: Oid = from.git_commit.parse().map_err(|_| refuse("its header names no commit"))?;
    let incoming = site
        .with_history(Some(&order.operation), "check the workspace", move |h, progress, cancel| {
            let checked = h.check_received(&incoming, commit, progress, cancel);
            Ok(checked.map(|()| incoming))
        })
        .await?
        .map_err(|e| match e {
            fermata_history::HistoryError::Cancelled => crate::operations::context::cancelled_by_request(),
            e => refuse(format!("its snapshot is damaged: {}", fermata_protocol::error_chain(&e))),
        })?;
    let manifest = adapt(site, order, &partial, manifest).await?;
    let packed: u64 = header.parts.iter().filter(|p| p.name == PACK || p.name == INDEX).map(|p| p.bytes).sum();
    let size_bytes = packed + files(&manifest).map(|part| part.bytes).sum::<u64>();
    let placed = site.dirs().checkpoint(number);
    let manifest_sha256 = place(&manifest, partial, placed.clone()).await?;
    site.with_history(None, "publish the snapshot", move |h, _, _| h.publish_received(&incoming, commit)).await?;
    let mut warnings = Vec::new();
    if from.project != site.project.name {
        warnings.push(format!("it was checkpoint {} of project '{}'", from.id, from.project));
    }
    let mut metadata = from.metadata;
    metadata.parts_ms = [("import".to_owned(), ms_since(start))].into();
    let contents =
        Contents { created_at: from.created_at, commit: commit.to_string(), manifest_sha256, size_bytes, metadata };
    let view = CheckpointView {
        name: if from.name.is_empty() { order.name.clone() } else { from.name },
        description: from.description,
        pause_reason: from.pause_reason,
        ..row(site, order, &placed, contents)
    };
    crate::operations::failpoint("import.sealed")?;
    Ok(Made { view, sessions: Vec::new(), warnings })
}

async fn has_room(site: &StepContext, bytes: u64) -> Result<(), Failure> {
    validate::keeps_quota(site, bytes)?;
    let (state, floor) = (site.services.paths.state.clone(), site.services.settings().pause.disk_floor_bytes);
    blocking("look for free space", move || validate::leaves_room(&state, floor, bytes)).await
}

/// The most that the metadata of a row from elsewhere come to, bytes of JSON.
const MAX_METADATA: usize = 256 << 10;

/// Refuses a row that could not have been made here, and takes what would steer a terminal out of its texts.
fn bounded(from: CheckpointView) -> Result<CheckpointView, Failure> {
    let limits =
        [("name", &from.name, MAX_CHECKPOINT_NAME), ("description", &from.description, MAX_CHECKPOINT_DESCRIPTION)];
    if let Some((what, _, limit)) = limits.iter().find(|(_, text, limit)| text.chars().count() > *limit) {
        return Err(refuse(format!("its {what} has more than {limit} characters")));
    }
    let metadata = serde_json::to_value(&from.metadata).map_err(|e| Failure::fault("read the metadata", &e))?;
    let reason = from.pause_reason.as_ref().map_or(0, String::len);
    if metadata.to_string().len() + reason > MAX_METADATA {
        return Err(refuse(format!("its metadata are more than {MAX_METADATA} bytes")));
    }
    Ok(CheckpointView {
        name: plain(&from.name),
        description: plain(&from.description),
        pause_reason: from.pause_reason.as_deref().map(plain),
        metadata: serde_json::from_value(plain_value(metadata)).map_err(|e| Failure::fault("read the metadata", &e))?,
        ..from
    })
}

/// Replaces control characters, line breaks apart.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

fn plain_value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(plain(&text)),
        Value::Array(all) => all.into_iter().map(plain_value).collect(),
        Value::Object(all) => all.into_iter().map(|(name, value)| (plain(&name), plain_value(value))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value,
    }
}

/// Writes the parts of a file to their places, each compared with its hash.
async fn unpack(
    site: &StepContext,
    order: &CheckpointOrder,
    held: BundleFile,
    incoming: Incoming,
    partial: PathBuf,
) -> Result<(Bundle, Incoming), Failure> {
    let (cancel, notes, operation) = (site.cancel.clone(), site.services.progress.clone(), order.operation.clone());
    blocking("unpack the file", move || {
        let file = held.file.try_clone().map_err(|e| Failure::fault("read the file", &e))?;
        let mut bundle = Bundle::open(file)?;
        if bundle.header.checkpoint.format > FORMAT {
            return Err(refuse(format!(
                "the checkpoint has the format {}, which is newer than this program",
                bundle.header.checkpoint.format
            )));
        }
        let mut told = 0;
        let total = held.bytes;
        let tell = |done: u64| {
            if done - told >= 4 << 20 {
                told = done;
                // Nobody may be listening.
                drop(notes.send(note_bytes(operation.clone(), "unpack", done, total)));
            }
        };
        let place = |part: &Part| match part.name.as_str() {
            PACK => incoming.pack(),
            INDEX => incoming.index(),
            name => partial.join(name),
        };
        bundle.unpack(place, tell, || cancel.is_cancelled())?;
        Ok((bundle, incoming))
    })
    .await
}

/// Compares the manifest with what was unpacked.
fn check(partial: &Path, parts: &[Part], from: &CheckpointView) -> Result<Manifest, Failure> {
    let bytes = fs::read(partial.join(MANIFEST)).map_err(|_| refuse("it has no manifest"))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|e| refuse(format!("its manifest makes no sense: {e}")))?;
    if manifest.format > FORMAT {
        return Err(refuse(format!(
            "its manifest has the format {}, which is newer than this program",
            manifest.format
        )));
    }
    if let Some(path) = changed(&manifest, parts) {
        return Err(refuse(format!("its file {path} is not the one that its manifest describes")));
    }
    let described = |part: &Part| files(&manifest).any(|one| one.path == part.name);
    let known = |part: &&Part| [MANIFEST, PACK, INDEX].contains(&part.name.as_str()) || described(part);
    if let Some(stranger) = parts.iter().find(|part| !known(part)) {
        return Err(refuse(format!("its manifest says nothing of the part {}", stranger.name)));
    }
    if !files(&manifest).any(|part| part.path == DATABASE) || !files(&manifest).any(|part| part.path == CONTEXT) {
        return Err(refuse("it has no database or no context"));
    }
    if !manifest.parts.iter().any(|part| part.kind == PartKind::Workspace && part.path == from.git_commit) {
        return Err(refuse("its manifest names another snapshot than its header"));
    }
    Ok(manifest)
}

/// Makes the files those of this project and number.
async fn adapt(
    site: &StepContext,
    order: &CheckpointOrder,
    partial: &Path,
    manifest: Manifest,
) -> Result<Manifest, Failure> {
    let (project, number, partial) = (site.project.name.clone(), order.number, partial.to_owned());
    blocking("adapt the checkpoint", move || {
        let from = manifest.project.clone();
        let database = partial.join(DATABASE);
        match backup::check(&database, &from) {
            Ok(None) => {}
            Ok(Some(problem)) => return Err(refuse(format!("its database is damaged: {problem}"))),
            Err(error) => return Err(refuse(format!("its database: {}", fermata_protocol::error_chain(&error)))),
        }
        if from != project {
            backup::rename(&database, &from, &project).map_err(|e| Failure::fault("adapt the database", &e))?;
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
        serde_json::from_slice(&bytes).map_err(|e| refuse(format!("its context makes no sense: {e}")))?;
    document.insert("project".to_owned(), json!(project));
    document.insert("checkpoint".to_owned(), json!(number));
    let text = Value::Object(document).to_string();
    write_atomic(path, text.as_bytes(), 0o600).map_err(|e| Failure::fault("write the context", &e))
}
