//! Handlers of `checkpoint.*` that only look, and of pinning.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use fermata_core::command::Command;
use fermata_protocol::checkpoint::{
    CheckpointDetail, CheckpointDiff, CheckpointDiffResult, CheckpointList, CheckpointListResult, CheckpointPin,
    CheckpointShow, CheckpointVerify, CheckpointVerifyResult, CheckpointView, Manifest, SkippedPath,
    VerifiedCheckpoint,
};
use fermata_protocol::{CheckpointNumber, Code, Refusal};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::dispatch::wire;
use crate::errors::{Failure, chain};
use crate::history::{Point, TextDiff};
use crate::project::{ProjectHandle, Projects, Tell};
use crate::steps::checkpoint::{DATABASE, MANIFEST, hash_file, hex};
use crate::steps::{Site, blocking, restore};
use crate::store::commit::Write;
use crate::store::idempotency::Keyed;
use crate::store::{backup, checkpoints};

/// How many rows one list shows at most.
const MAX_ROWS: u32 = 1000;

/// Larger files have no text in a patch.
const MAX_PATCHED_FILE: u64 = 1 << 20;

/// A patch ends here; a line of the protocol has its limit.
const MAX_PATCH: usize = 8 << 20;

pub(super) async fn list(projects: &Projects, params: CheckpointList) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let name = handle.name();
    let limit = params.limit.unwrap_or(200).min(MAX_ROWS);
    let checkpoints = projects
        .services()
        .store
        .read(move |c| checkpoints::list(c, &name, params.before, limit))
        .await
        .map_err(|e| Failure::fault("list checkpoints", &e))?;
    wire(&CheckpointListResult { checkpoints, disk_bytes: handle.disk_bytes() })
}

async fn find(handle: &ProjectHandle, number: CheckpointNumber) -> Result<CheckpointView, Failure> {
    let name = handle.name();
    let shown = name.clone();
    let found = handle
        .site()
        .services
        .store
        .read(move |c| checkpoints::find(c, &name, number))
        .await
        .map_err(|e| Failure::fault("find the checkpoint", &e))?;
    found.ok_or_else(|| {
        Refusal::new(Code::CheckpointNotFound, format!("project '{shown}' has no checkpoint {number}"))
            .hint(format!("fermatactl checkpoint ls {shown}"))
            .into()
    })
}

pub(super) async fn show(projects: &Projects, params: &CheckpointShow) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let checkpoint = find(&handle, params.checkpoint).await?;
    let number = params.checkpoint;
    let site = handle.site();
    let path = site.dirs().checkpoint(number).join(MANIFEST);
    let manifest = blocking("read the manifest", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("the manifest of checkpoint {number} {why}")).into()
        };
        let bytes = std::fs::read(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        serde_json::from_slice::<Manifest>(&bytes).map_err(|e| damaged(format!("makes no sense: {e}")))
    })
    .await?;
    let skipped = site.with_history(None, "read what was skipped", move |h, _, _| h.skipped(number)).await?;
    let skipped = skipped.into_iter().map(|one| SkippedPath {
        path: String::from_utf8_lossy(one.path.bytes()).into_owned(),
        reason: serde_json::to_value(one.reason)
            .ok()
            .map(|reason| reason.as_str().map_or_else(|| reason.to_string(), str::to_owned))
            .unwrap_or_default(),
    });
    wire(&CheckpointDetail { checkpoint, manifest, skipped: skipped.collect() })
}

pub(super) async fn diff(projects: &Projects, params: &CheckpointDiff) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    find(&handle, params.from).await?;
    if let Some(to) = params.to {
        find(&handle, to).await?;
    }
    let site = handle.site();
    let diff = restore::diff(&site, params.from, params.to).await?;
    let changes = restore::changed_paths(&diff);
    let mut patch = None;
    if params.patch {
        let (from, to) = points(&site, params);
        patch = Some(
            site.with_history(None, "compare texts", move |history, _, _: &AtomicBool| {
                let mut text = String::new();
                for entry in &diff.entries {
                    match history.diff_text(&from, &to, &entry.path, MAX_PATCHED_FILE)? {
                        TextDiff::Patch(one) => text.push_str(&one),
                        TextDiff::Binary => text.push_str(&format!("Binary file {} differs\n", entry.path)),
                        TextDiff::TooLarge => text.push_str(&format!("Large file {} differs\n", entry.path)),
                    }
                    if text.len() > MAX_PATCH {
                        text.push_str("\n(cut off here: the patch is too long)\n");
                        break;
                    }
                }
                Ok(text)
            })
            .await?,
        );
    }
    wire(&CheckpointDiffResult { changes, patch })
}

fn points(site: &Site, params: &CheckpointDiff) -> (Point, Point) {
    let to = match params.to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(Path::new(&site.project.facts.workspace).to_owned(), site.rules()),
    };
    (Point::Checkpoint(params.from), to)
}

pub(super) async fn verify(projects: &Projects, params: &CheckpointVerify) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let name = handle.name();
    let views = match params.checkpoint {
        Some(number) => vec![find(&handle, number).await?],
        None => {
            let store = &projects.services().store;
            let list = store.read(move |c| checkpoints::list(c, &name, None, u32::MAX)).await;
            list.map_err(|e| Failure::fault("list checkpoints", &e))?
        }
    };
    let mut verified = Vec::new();
    for view in views {
        let problems = verify_one(&handle.site(), view.clone()).await?;
        verified.push(VerifiedCheckpoint { checkpoint_id: view.id, good: problems.is_empty(), problems });
    }
    wire(&CheckpointVerifyResult { checkpoints: verified })
}

async fn verify_one(site: &Site, view: CheckpointView) -> Result<Vec<String>, Failure> {
    let number = view.id;
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
                Ok(manifest) => problems.extend(changed_parts(&dir, &manifest)),
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
    match site
        .with_history(None, "verify the snapshot", move |h, progress, cancel| h.verify(number, progress, cancel))
        .await
    {
        Ok(report) => problems.extend(report.bad.iter().map(|bad| format!("workspace: {bad:?}"))),
        Err(failure) => problems.push(format!("workspace: {failure}")),
    }
    Ok(problems)
}

fn changed_parts(dir: &Path, manifest: &Manifest) -> Vec<String> {
    let files = manifest.parts.iter().filter(|part| part.kind != "workspace");
    files
        .filter_map(|part| match hash_file(&dir.join(&part.path)) {
            Ok((_, hash)) if hash == part.sha256 => None,
            Ok(_) => Some(format!("{}: {} has changed", part.kind, part.path)),
            Err(error) => Some(format!("{}: {}: {error}", part.kind, part.path)),
        })
        .collect()
}

pub(super) async fn pin(projects: &Projects, params: &CheckpointPin, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let mut view = find(&handle, params.checkpoint).await?;
    view.pinned = params.pinned;
    let command = Command::PinCheckpoint { checkpoint: params.checkpoint, pinned: params.pinned };
    let writes = vec![Write::CheckpointPin(params.checkpoint, params.pinned)];
    handle.tell(Tell { command, writes, tokens: Vec::new(), keyed, view: Box::new(move |_, _| json!(view)) }).await
}
