//! Handlers of the methods `checkpoint.*` that only read, and of `checkpoint.pin`.

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

/// The most rows of one list.
const MAX_ROWS: u32 = 1000;

/// The most skipped or torn paths of a reply, which is one line of the protocol.
const MAX_PATHS: usize = 500;

/// The size of the largest file whose changes a patch contains, in bytes.
const MAX_PATCHED_FILE: u64 = 1 << 20;

/// The size at which a patch is cut off, in bytes; a reply is one line of the protocol.
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
    let project = handle.name();
    let name = project.clone();
    let view = handle
        .step_context()
        .services
        .store
        .read(move |c| checkpoints::find(c, &name, number))
        .await
        .map_err(|e| Failure::fault("find the checkpoint", &e))?;
    view.ok_or_else(|| {
        Refusal::new(Code::CheckpointNotFound, format!("project '{project}' has no checkpoint {number}"))
            .hint(format!("fermatactl checkpoint ls {project}"))
            .into()
    })
}

pub(super) async fn show(projects: &Projects, params: &CheckpointShow) -> Result<Value, Failure> {
    let handle = projects.get(&params.project)?;
    let checkpoint = find(&handle, params.checkpoint).await?;
    let number = params.checkpoint;
    let step = handle.step_context();
    let path = step.dirs().checkpoint(number).join(MANIFEST);
    let manifest = blocking("read the manifest", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("the manifest of checkpoint {number} {why}")).into()
        };
        let bytes = std::fs::read(&path).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        serde_json::from_slice::<Manifest>(&bytes).map_err(|e| damaged(format!("cannot be parsed: {e}")))
    })
    .await?;
    let snapshot = step.with_history(None, "read what was skipped", move |h, _, _| h.manifest(number)).await?;
    let (skipped_total, torn_total) = (snapshot.skipped.len() as u64, snapshot.torn.len() as u64);
    let skipped = snapshot.skipped.into_iter().take(MAX_PATHS).map(|one| SkippedPath {
        path: text_of(&one.path),
        reason: reason(one.reason).to_owned(),
        detail: Some(one.detail).filter(|detail| !detail.is_empty()),
    });
    let torn = snapshot.torn.iter().take(MAX_PATHS).map(text_of).collect();
    wire(&CheckpointDetail { checkpoint, manifest, skipped: skipped.collect(), skipped_total, torn, torn_total })
}

/// Returns a path as text; bytes that are not UTF-8 are replaced.
fn text_of(path: &RelPath) -> String {
    String::from_utf8_lossy(path.bytes()).into_owned()
}

/// Returns the text of the wire for why a path was skipped.
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
    let step = handle.step_context();
    let diff = restore::diff(&step, params.from, params.to).await?;
    let (changes, changes_total) = (restore::changed_paths(&diff), diff.entries.len() as u64);
    let mut patch = None;
    if params.patch {
        let (from, to) = points(&step, params);
        patch = Some(
            step.with_history(None, "compare texts", move |history, _, _: &AtomicBool| {
                let mut text = String::new();
                for entry in &diff.entries {
                    match history.diff_text(&from, &to, &entry.path, MAX_PATCHED_FILE)? {
                        TextDiff::Patch(one) => text.push_str(&one),
                        TextDiff::Binary => text.push_str(&format!("Binary file {} differs\n", entry.path)),
                        TextDiff::TooLarge => text.push_str(&format!("Large file {} differs\n", entry.path)),
                    }
                    if text.len() > MAX_PATCH {
                        text.push_str("\n(the patch is too long and ends here)\n");
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

fn points(step: &StepContext, params: &CheckpointDiff) -> (Point, Point) {
    let to = match params.to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(Path::new(&step.project.facts.workspace).to_owned(), step.rules()),
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
