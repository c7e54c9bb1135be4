//! Handlers of `checkpoint.*` that only look, and of pinning.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use fermata_core::command::Command;
use fermata_protocol::checkpoint::{
    CheckpointDetail, CheckpointDiff, CheckpointDiffResult, CheckpointList, CheckpointListResult, CheckpointPin,
    CheckpointShow, CheckpointView, Manifest, SkippedPath,
};
use fermata_protocol::{CheckpointNumber, Code, Refusal};
use serde_json::{Value, json};

use super::reply::wire;
use crate::errors::Failure;
use crate::operations::checkpoint::layout::MANIFEST;
use crate::operations::{StepContext, blocking, restore};
use crate::project::{ProjectHandle, Projects, Tell};
use crate::store::checkpoints;
use crate::store::commit::Write;
use crate::store::idempotency::Keyed;
use fermata_history::{Point, RelPath, SkipReason, TextDiff};

/// How many rows one list shows at most.
const MAX_ROWS: u32 = 1000;

/// How many skipped or torn paths are shown at most; a line of the protocol has its limit.
const MAX_PATHS: usize = 500;

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

/// Finds the row of a checkpoint.
pub(super) async fn find(handle: &ProjectHandle, number: CheckpointNumber) -> Result<CheckpointView, Failure> {
    let name = handle.name();
    let shown = name.clone();
    let found = handle
        .step_context()
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
    let site = handle.step_context();
    let path = site.dirs().checkpoint(number).join(MANIFEST);
    let manifest = blocking("read the manifest", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("the manifest of checkpoint {number} {why}")).into()
        };
        let bytes = std::fs::read(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        serde_json::from_slice::<Manifest>(&bytes).map_err(|e| damaged(format!("makes no sense: {e}")))
    })
    .await?;
    let snapshot = site.with_history(None, "read what was skipped", move |h, _, _| h.manifest(number)).await?;
    let (skipped_total, torn_total) = (snapshot.skipped.len() as u64, snapshot.torn.len() as u64);
    let skipped = snapshot.skipped.into_iter().take(MAX_PATHS).map(|one| SkippedPath {
        path: text_of(&one.path),
        reason: reason(one.reason).to_owned(),
        detail: Some(one.detail).filter(|detail| !detail.is_empty()),
    });
    let torn = snapshot.torn.iter().take(MAX_PATHS).map(text_of).collect();
    wire(&CheckpointDetail { checkpoint, manifest, skipped: skipped.collect(), skipped_total, torn, torn_total })
}

/// Writes a path; bytes that are no UTF-8 are replaced.
fn text_of(path: &RelPath) -> String {
    String::from_utf8_lossy(path.bytes()).into_owned()
}

/// Says why a path was left out.
fn reason(reason: SkipReason) -> &'static str {
    match reason {
        SkipReason::TooLarge => "too_large",
        SkipReason::Unreadable => "unreadable",
        SkipReason::Special => "special",
        SkipReason::Unsteady => "unsteady",
        SkipReason::Reserved => "reserved",
    }
}

pub(super) async fn diff(projects: &Projects, params: &CheckpointDiff) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    find(&handle, params.from).await?;
    if let Some(to) = params.to {
        find(&handle, to).await?;
    }
    let site = handle.step_context();
    let diff = restore::diff(&site, params.from, params.to).await?;
    let (changes, changes_total) = (restore::changed_paths(&diff), diff.entries.len() as u64);
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
    wire(&CheckpointDiffResult { changes, changes_total, patch })
}

fn points(site: &StepContext, params: &CheckpointDiff) -> (Point, Point) {
    let to = match params.to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(Path::new(&site.project.facts.workspace).to_owned(), site.rules()),
    };
    (Point::Checkpoint(params.from), to)
}

pub(super) async fn pin(projects: &Projects, params: &CheckpointPin, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let mut view = find(&handle, params.checkpoint).await?;
    view.pinned = params.pinned;
    let command = Command::PinCheckpoint { checkpoint: params.checkpoint, pinned: params.pinned };
    let writes = vec![Write::CheckpointPin(params.checkpoint, params.pinned)];
    handle.tell(Tell { command, writes, tokens: Vec::new(), keyed, view: Box::new(move |_, _| json!(view)) }).await
}
