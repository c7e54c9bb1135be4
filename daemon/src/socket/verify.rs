//! Handler of `checkpoint.verify`: reads every part of checkpoints and compares hashes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fermata_protocol::checkpoint::PartKind;
use fermata_protocol::checkpoint::{
    CheckpointVerify, CheckpointVerifyResult, CheckpointView, Manifest, VerifiedCheckpoint,
};
use fermata_protocol::{CheckpointNumber, Code, OperationId};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::checkpoints::find;
use super::connection::ClientConnection;
use super::operations::with_progress;
use super::reply::wire;
use crate::errors::Failure;
use crate::hashing::{hash_file, hex};
use crate::operations::checkpoint::layout::{DATABASE, MANIFEST};
use crate::operations::{Cancel, StepContext, blocking};
use crate::project::{ProjectHandle, new_operation};
use crate::services::ProgressNote;
use crate::store::{backup, checkpoints};
use fermata_history::HistoryError;
use fermata_protocol::error_chain;

/// Cancels the verification when its caller is gone and the handler is dropped.
struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

pub(super) async fn run(connection: &Arc<ClientConnection>, params: &CheckpointVerify) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    // It only reads, so it is no operation of the project. The id is that of its progress notifications.
    let operation = new_operation();
    let verified = with_progress(connection, &operation, verify(&handle, params, &operation)).await?;
    wire(&CheckpointVerifyResult { checkpoints: verified })
}

async fn verify(
    handle: &ProjectHandle,
    params: &CheckpointVerify,
    operation: &OperationId,
) -> Result<Vec<VerifiedCheckpoint>, Failure> {
    let step = handle.step_context();
    let _cancel = CancelOnDrop(step.cancel.clone());
    let views = match params.checkpoint {
        Some(number) => vec![find(handle, number).await?],
        None => {
            let name = handle.name();
            let list = step.services.store.read(move |c| checkpoints::list(c, &name, None, u32::MAX)).await;
            list.map_err(|e| Failure::fault("list checkpoints", &e))?
        }
    };
    // All snapshots at once, since they share most objects.
    let mut snapshots = snapshots(&step, &views, operation).await?;
    let mut verified = Vec::new();
    for view in views {
        let number = view.id;
        let mut problems = files(&step, view.clone()).await?;
        match snapshots.remove(&number) {
            Some(of_snapshot) => problems.extend(of_snapshot),
            None => problems.push("workspace: it was not verified".to_owned()),
        }
        if !problems.is_empty() && params.checkpoint.is_none() && is_gone(handle, number).await? {
            // The checkpoint was removed meanwhile, so the missing parts are no problem.
            continue;
        }
        verified.push(VerifiedCheckpoint { checkpoint_id: number, good: problems.is_empty(), problems });
    }
    Ok(verified)
}

async fn is_gone(handle: &ProjectHandle, number: u64) -> Result<bool, Failure> {
    match find(handle, number).await {
        Ok(_) => Ok(false),
        Err(Failure::Refused(refusal)) if refusal.code == Code::CheckpointNotFound => Ok(true),
        Err(failure) => Err(failure),
    }
}

/// Returns the problems of each snapshot.
async fn snapshots(
    step: &StepContext,
    views: &[CheckpointView],
    operation: &OperationId,
) -> Result<BTreeMap<CheckpointNumber, Vec<String>>, Failure> {
    let named: Vec<(CheckpointNumber, String)> = views.iter().map(|view| (view.id, view.git_commit.clone())).collect();
    let (notes, operation_id) = (step.services.progress.clone(), operation.clone());
    // Progress counts the objects of a single checkpoint, else the checkpoints.
    let counted = (named.len() == 1).then_some(operation);
    step.with_history(counted, "verify the snapshots", move |history, progress, cancel| {
        let numbers: Vec<CheckpointNumber> = named.iter().map(|(number, _)| *number).collect();
        let total = numbers.len() as u64;
        let begins = |done: usize| {
            if total > 1 {
                let (operation_id, step) = (operation_id.clone(), format!("checkpoint {}", numbers[done]));
                // Fails when there is no receiver.
                drop(notes.send(ProgressNote { operation_id, step, done: done as u64, total, unit: "checkpoints" }));
            }
        };
        let mut reports = history.verify_all(&numbers, &begins, progress, cancel);
        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        let each = named.into_iter().map(|(number, named)| {
            let mut problems = Vec::new();
            match history.commit_of(number) {
                Ok(commit) if commit.to_string() != named => {
                    problems.push(format!("workspace: its snapshot is {commit}, not {named}"));
                }
                // The report has the error too.
                Ok(_) | Err(_) => {}
            }
            match reports.remove(&number) {
                Some(Ok(report)) => problems.extend(report.bad.iter().map(|bad| {
                    let place = if bad.path.is_empty() { String::new() } else { format!("{}: ", bad.path) };
                    format!("workspace: {place}object {}: {}", bad.oid, bad.problem)
                })),
                Some(Err(error)) => problems.push(format!("workspace: {}", error_chain(&error))),
                None => problems.push("workspace: it was not verified".to_owned()),
            }
            (number, problems)
        });
        Ok(each.collect())
    })
    .await
}

/// Returns the problems of the other parts of a checkpoint.
async fn files(step: &StepContext, view: CheckpointView) -> Result<Vec<String>, Failure> {
    let (dir, project) = (step.dirs().checkpoint(view.id), step.project.name.clone());
    blocking("verify the files", move || {
        let mut problems = Vec::new();
        match std::fs::read(dir.join(MANIFEST)) {
            Err(error) => problems.push(format!("manifest: {error}")),
            Ok(bytes) if hex(&Sha256::digest(&bytes)) != view.manifest_sha256 => {
                problems.push("manifest: its bytes have changed".to_owned());
            }
            Ok(bytes) => match serde_json::from_slice::<Manifest>(&bytes) {
                Err(error) => problems.push(format!("manifest: {error}")),
                Ok(manifest) => problems.extend(changed_parts(&dir, &view, &manifest)),
            },
        }
        match backup::check(&dir.join(DATABASE), &project) {
            Ok(None) => {}
            Ok(Some(problem)) => problems.push(format!("database: {problem}")),
            Err(error) => problems.push(format!("database: {}", error_chain(&error))),
        }
        Ok(problems)
    })
    .await
}

/// Compares every file with its hash in the manifest, and the manifest's snapshot with that of the row.
fn changed_parts(dir: &Path, view: &CheckpointView, manifest: &Manifest) -> Vec<String> {
    let mut problems = Vec::new();
    for part in &manifest.parts {
        if part.kind == PartKind::Workspace {
            if part.path != view.git_commit {
                problems.push(format!("manifest: its snapshot is {}, not {}", part.path, view.git_commit));
            }
            continue;
        }
        match hash_file(&dir.join(&part.path)) {
            Ok((_, hash)) if hash == part.sha256 => {}
            Ok(_) => problems.push(format!("{}: {} has changed", part.kind, part.path)),
            Err(error) => problems.push(format!("{}: {}: {error}", part.kind, part.path)),
        }
    }
    problems
}
