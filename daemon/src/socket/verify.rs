//! The handler of `checkpoint.verify`: reads every part of checkpoints again and compares hashes.

use std::path::Path;
use std::sync::Arc;

use fermata_protocol::checkpoint::{
    CheckpointVerify, CheckpointVerifyResult, CheckpointView, Manifest, VerifiedCheckpoint,
};
use fermata_protocol::{Code, OperationId};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::checkpoints::find;
use super::connection::Connection;
use super::dispatch::wire;
use super::operations::with_progress;
use crate::errors::{Failure, chain};
use crate::project::{ProjectHandle, new_operation};
use crate::services::ProgressNote;
use crate::steps::checkpoint::{DATABASE, MANIFEST, hash_file, hex};
use crate::steps::{Cancel, Site, blocking};
use crate::store::{backup, checkpoints};

/// Ends the work when whoever asked for it no longer waits.
struct Asked(Cancel);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

pub(super) async fn run(connection: &Arc<Connection>, params: &CheckpointVerify) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    // No operation of the project's: it only reads. The id is what its progress is told under.
    let operation = new_operation();
    let verified = with_progress(connection, &operation, verify(&handle, params, &operation)).await?;
    wire(&CheckpointVerifyResult { checkpoints: verified })
}

async fn verify(
    handle: &ProjectHandle,
    params: &CheckpointVerify,
    operation: &OperationId,
) -> Result<Vec<VerifiedCheckpoint>, Failure> {
    let site = handle.site();
    let _asked = Asked(site.cancel.clone());
    let views = match params.checkpoint {
        Some(number) => vec![find(handle, number).await?],
        None => {
            let name = handle.name();
            let list = site.services.store.read(move |c| checkpoints::list(c, &name, None, u32::MAX)).await;
            list.map_err(|e| Failure::fault("list checkpoints", &e))?
        }
    };
    let total = views.len() as u64;
    // One checkpoint counts its objects, several are counted themselves.
    let counted = (total == 1).then_some(operation);
    let mut verified = Vec::new();
    for (done, view) in views.into_iter().enumerate() {
        let number = view.id;
        if counted.is_none() {
            let step = format!("checkpoint {number}");
            let operation_id = operation.clone();
            let note = ProgressNote { operation_id, step, done: done as u64, total, unit: "checkpoints" };
            // Nobody may be listening.
            drop(site.services.progress.send(note));
        }
        let problems = verify_one(&site, view, counted).await?;
        if !problems.is_empty() && params.checkpoint.is_none() && is_gone(handle, number).await? {
            // The retention has removed it meanwhile: its parts are not missing, they are no more.
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

async fn verify_one(
    site: &Site,
    view: CheckpointView,
    operation: Option<&OperationId>,
) -> Result<Vec<String>, Failure> {
    let (number, named) = (view.id, view.git_commit.clone());
    let (dir, project) = (site.dirs().checkpoint(number), site.project.name.clone());
    let mut problems = blocking("verify the files", move || {
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
            Err(error) => problems.push(format!("database: {}", chain(&error))),
        }
        Ok(problems)
    })
    .await?;
    let found = site
        .with_history(operation, "verify the snapshot", move |history, progress, cancel| {
            let commit = history.commit_of(number)?.to_string();
            Ok((commit, history.verify(number, progress, cancel)?))
        })
        .await;
    match found {
        Ok((commit, report)) => {
            if commit != named {
                problems.push(format!("workspace: its snapshot is {commit}, not {named}"));
            }
            let place = |path: &str| if path.is_empty() { String::new() } else { format!("{path}: ") };
            let bad = report.bad.iter();
            problems
                .extend(bad.map(|bad| format!("workspace: {}object {}: {}", place(&bad.path), bad.oid, bad.problem)));
        }
        Err(Failure::Refused(refusal)) if refusal.code == Code::OperationCancelled => return Err(refusal.into()),
        Err(failure) => problems.push(format!("workspace: {failure}")),
    }
    Ok(problems)
}

/// Compares every file with the manifest, and the snapshot that it names with the row's.
fn changed_parts(dir: &Path, view: &CheckpointView, manifest: &Manifest) -> Vec<String> {
    let mut problems = Vec::new();
    for part in &manifest.parts {
        if part.kind == "workspace" {
            if part.path != view.git_commit {
                problems.push(format!("manifest: it names the snapshot {}, not {}", part.path, view.git_commit));
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
