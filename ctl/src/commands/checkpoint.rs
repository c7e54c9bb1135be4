//! `checkpoint …`.

use std::io;

use fermata_protocol::checkpoint::{
    ChangedPath, CheckpointCreate, CheckpointCreateResult, CheckpointDetail, CheckpointDiff, CheckpointDiffResult,
    CheckpointList, CheckpointMetadata, CheckpointPin, CheckpointRestore, CheckpointShow, CheckpointVerify,
    CheckpointView, VerifiedCheckpoint,
};
use fermata_protocol::retention::{CheckpointPrune, CheckpointRemove, CheckpointRemoveResult, RemovalReason};
use fermata_protocol::transfer::{CheckpointConsolidate, CheckpointExport};
use fermata_protocol::{CheckpointNumber, ProjectName};

use super::pause::{frozen_time, steps_text};
use super::{restore, transfer};
use crate::cli::groups::CheckpointCommand;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Cell, FieldList, Format, Paint, Printer, TextTable, note};
use crate::session::DaemonSession;
use crate::terminal_text::clean;
use crate::units::{bytes, counted, dollars, local, millis, number};

/// The page size of a list request.
const PAGE: u32 = 200;

pub fn run(session: &mut DaemonSession, command: CheckpointCommand) -> CommandResult {
    match command {
        CheckpointCommand::Create { project, name, description } => {
            let params = CheckpointCreate { project, name, description };
            let result = session.call_long("checkpoint", &params)?;
            let id = result.checkpoint_id.to_string();
            session.out.object(&result, Some(id), print_created)?;
        }
        CheckpointCommand::Ls { project, limit } => {
            let (checkpoints, disk_bytes) = list(session, &project, limit)?;
            let id = |checkpoint: &CheckpointView| checkpoint.id;
            session.out.rows(&checkpoints, "no checkpoints", id, table)?;
            if session.out.is_human() && !checkpoints.is_empty() {
                session.out.flush()?;
                note(&format!("disk usage of all checkpoints of {project}: {}", bytes(disk_bytes)));
            }
        }
        CheckpointCommand::Show { project, checkpoint } => {
            let detail = session.call(&CheckpointShow { project, checkpoint })?;
            let id = detail.checkpoint.id.to_string();
            session.out.object(&detail, Some(id), print_checkpoint)?;
        }
        CheckpointCommand::Diff { project, from, to, stat, patch } => {
            let params = CheckpointDiff { project, from, to, patch };
            let result = session.call_long("diff", &params)?;
            diff(session, &result, stat)?;
        }
        CheckpointCommand::Restore { project, checkpoint, dry_run, paths } => {
            let paths = restore::inside_workspace(session, &project, &paths)?;
            let params = CheckpointRestore { project: project.clone(), checkpoint, dry_run, paths };
            let result = session.call_long(&format!("restore {project}"), &params)?;
            let id = result.safety_checkpoint_id.map(|n| n.to_string());
            session.out.object(&result, id, |out, result| restore::print_restore(out, result, dry_run))?;
        }
        CheckpointCommand::Rm { project, checkpoints } => {
            let result = session.call_long("remove", &CheckpointRemove { project, checkpoints })?;
            print_removed(session, &result, false)?;
        }
        CheckpointCommand::Prune { project, keep, older_than, max_bytes, dry_run } => {
            let older_than_ms = older_than.map(millis);
            let params = CheckpointPrune { project, keep, older_than_ms, max_bytes, dry_run };
            let result = session.call_long("prune", &params)?;
            print_removed(session, &result, dry_run)?;
        }
        CheckpointCommand::Verify { project, checkpoint, all: _ } => {
            let params = CheckpointVerify { project, checkpoint };
            return verify(session, &params);
        }
        CheckpointCommand::Export { project, checkpoint, file } => {
            transfer::export(session, &CheckpointExport { project, checkpoint }, &file)?;
        }
        CheckpointCommand::Import { project, file } => {
            let result = transfer::import(session, project, &file)?;
            let id = result.checkpoint_id.to_string();
            session.out.object(&result, Some(id), print_created)?;
        }
        CheckpointCommand::Consolidate { project, everything } => {
            transfer::consolidate(session, &CheckpointConsolidate { project, everything })?;
        }
        CheckpointCommand::Pin { project, checkpoint } => pin(session, project, checkpoint, true)?,
        CheckpointCommand::Unpin { project, checkpoint } => pin(session, project, checkpoint, false)?,
    }
    Ok(0)
}

/// Lists checkpoints page by page, newest first; also returns the disk usage of all checkpoints of the project.
fn list(
    session: &mut DaemonSession,
    project: &ProjectName,
    limit: Option<u32>,
) -> Result<(Vec<CheckpointView>, u64), CommandError> {
    let mut disk_bytes = 0;
    let wanted = limit.map_or(usize::MAX, |n| n as usize);
    let mut all: Vec<CheckpointView> = Vec::new();
    while all.len() < wanted {
        let page = session.call(&CheckpointList {
            project: project.clone(),
            before: all.last().map(|checkpoint| checkpoint.id),
            limit: Some(limit.map_or(PAGE, |n| n.min(PAGE))),
        })?;
        let count = page.checkpoints.len();
        disk_bytes = page.disk_bytes;
        all.extend(page.checkpoints);
        // A daemon may return fewer than requested; only an empty page is the end.
        if count == 0 {
            break;
        }
    }
    all.truncate(wanted);
    Ok((all, disk_bytes))
}

fn table(out: &Printer, checkpoints: &[CheckpointView]) -> TextTable {
    let mut table = TextTable::new(&[">N", "TRIGGER", "CREATED", ">SIZE", ">FILES", "PIN", "NAME"]);
    for checkpoint in checkpoints {
        let warned = !checkpoint.metadata.warnings.is_empty() || checkpoint.metadata.skipped > 0;
        let paint = if warned { Paint::Attention } else { Paint::Plain };
        table.row([
            Cell::painted(checkpoint.id.to_string(), paint),
            checkpoint.trigger.as_str().into(),
            out.ago(checkpoint.created_at).into(),
            bytes(checkpoint.size_bytes).into(),
            number(checkpoint.metadata.files).into(),
            if checkpoint.pinned { "pinned" } else { "" }.into(),
            Cell::from(&checkpoint.name),
        ]);
    }
    table
}

fn print_created(out: &mut Printer, result: &CheckpointCreateResult) -> io::Result<()> {
    let metadata = &result.checkpoint.metadata;
    let fields = FieldList::default()
        .add("checkpoint", result.checkpoint_id.to_string())
        .add("name", &result.checkpoint.name)
        .add("files", files_text(metadata))
        .add("stored", bytes(result.checkpoint.size_bytes))
        .add_some("time frozen", frozen_time(result.frozen_ms))
        .add_some("steps", steps_text(&result.steps_ms))
        .add("operation", result.operation_id.as_str());
    out.fields(&fields)?;
    out.warnings(&result.warnings)
}

/// The number and total size of the files in a checkpoint.
fn files_text(metadata: &CheckpointMetadata) -> String {
    format!("{} ({})", number(metadata.files), bytes(metadata.bytes))
}

fn print_checkpoint(out: &mut Printer, detail: &CheckpointDetail) -> io::Result<()> {
    let checkpoint = &detail.checkpoint;
    let metadata = &checkpoint.metadata;
    let filled = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
    let fields = FieldList::default()
        .add("checkpoint", format!("{} of {}", checkpoint.id, checkpoint.project))
        .add("name", &checkpoint.name)
        .add_some("description", filled(&checkpoint.description))
        .add("trigger", checkpoint.trigger.as_str())
        .add_some("pause reason", checkpoint.pause_reason.as_ref())
        .add("created", format!("{} ({})", local(checkpoint.created_at), out.ago(checkpoint.created_at)))
        .add("pinned", if checkpoint.pinned { "yes" } else { "no" })
        .add("phase", metadata.phase.as_str())
        .add_some(
            "tasks",
            (metadata.tasks_total > 0)
                .then(|| format!("{} of {} completed", metadata.tasks_done, metadata.tasks_total)),
        )
        .add_some("last completed", metadata.last_task_done.as_ref())
        .add_some("active agents", filled(&metadata.active_agents.join(", ")))
        .add("files", files_text(metadata))
        .add("stored", bytes(checkpoint.size_bytes))
        .add(
            "context",
            format!("{}, {}", counted(metadata.context_items, "item"), counted(metadata.context_tokens, "token")),
        )
        .add_some("cost", (metadata.cost_micro_usd > 0).then(|| dollars(metadata.cost_micro_usd)))
        .add_some("repository", metadata.repository.as_ref().map(|r| r.to_string()))
        .add("format", checkpoint.format.to_string())
        .add("manifest", &checkpoint.manifest_sha256)
        .add("operation", checkpoint.operation_id.as_str());
    out.fields(&fields)?;
    out.line("")?;
    let mut parts = TextTable::new(&["PART", ">SIZE", "HASH", "PATH"]);
    for part in &detail.manifest.parts {
        parts.row([
            Cell::from(part.kind.to_string()),
            bytes(part.bytes).into(),
            part.sha256.chars().take(16).collect::<String>().into(),
            Cell::from(&part.path),
        ]);
    }
    out.table(&parts)?;
    if !detail.skipped.is_empty() {
        out.line("")?;
        let mut skipped = TextTable::new(&["SKIPPED", "REASON"]);
        for path in &detail.skipped {
            let detail = path.detail.as_ref().map(|detail| format!(" ({detail})"));
            let reason = format!("{}{}", path.reason.replace('_', " "), detail.unwrap_or_default());
            skipped.row([Cell::from(&path.path), reason.into()]);
        }
        out.table(&skipped)?;
        restore::print_remaining(out, detail.skipped.len(), detail.skipped_total)?;
    }
    if !detail.torn.is_empty() {
        out.line("")?;
        let mut torn = TextTable::new(&["CHANGED WHILE BEING READ"]);
        for path in &detail.torn {
            torn.row([Cell::from(path)]);
        }
        out.table(&torn)?;
        restore::print_remaining(out, detail.torn.len(), detail.torn_total)?;
    }
    out.warnings(&metadata.warnings)
}

fn diff(session: &mut DaemonSession, result: &CheckpointDiffResult, stat: bool) -> Result<(), CommandError> {
    let out = &mut session.out;
    match (&result.patch, out.format()) {
        // Not cleaned: other programs read the patch.
        (Some(patch), Format::Human) => out.text(patch)?,
        (Some(_), Format::Json) => out.json(result)?,
        (Some(_), Format::Ids) | (None, _) => {
            let path = |change: &ChangedPath| clean(&change.path);
            out.rows(&result.changes, "no differences", path, |_, changes| restore::change_table(changes))?;
            if out.format() == Format::Human {
                restore::print_remaining(out, result.changes.len(), result.changes_total)?;
            } else if result.changes_total > result.changes.len() as u64 {
                note(&format!("{} changed in total", counted(result.changes_total, "path")));
            }
            if stat && out.format() == Format::Human && !result.changes.is_empty() {
                out.line("")?;
                out.line(restore::totals(&result.changes))?;
            }
        }
    }
    Ok(())
}

fn print_removed(
    session: &mut DaemonSession,
    result: &CheckpointRemoveResult,
    dry_run: bool,
) -> Result<(), CommandError> {
    let out = &mut session.out;
    match out.format() {
        Format::Json => out.json(result)?,
        Format::Ids => {
            for one in &result.removed {
                out.line(one.checkpoint_id)?;
            }
        }
        Format::Human => {
            if !result.removed.is_empty() {
                let mut table = TextTable::new(&[">N", "TRIGGER", "REASON", ">SIZE"]);
                for one in &result.removed {
                    let reason = match one.reason {
                        RemovalReason::Asked => "requested",
                        RemovalReason::Count => "count limit",
                        RemovalReason::Thinned => "thinned out",
                        RemovalReason::Age => "expired",
                        RemovalReason::Quota => "size limit",
                        RemovalReason::DiskFloor => "low disk space",
                    };
                    table.row([
                        one.checkpoint_id.to_string().into(),
                        one.trigger.as_str().into(),
                        reason.into(),
                        bytes(one.size_bytes).into(),
                    ]);
                }
                out.table(&table)?;
            }
            out.flush()?;
            let verb = if dry_run { "would remove" } else { "removed" };
            let disk = result.disk_bytes.map(|disk| format!("; disk usage: {}", bytes(disk))).unwrap_or_default();
            let removed = counted(result.removed.len() as u64, "checkpoint");
            note(&format!("{verb} {removed}, {} kept{disk}", result.kept));
        }
    }
    Ok(())
}

/// Exit code 1 when a checkpoint is damaged.
fn verify(session: &mut DaemonSession, params: &CheckpointVerify) -> CommandResult {
    let checkpoints = session.call_long("verify", params)?.checkpoints;
    let id = |checkpoint: &VerifiedCheckpoint| checkpoint.checkpoint_id;
    session.out.rows(&checkpoints, "no checkpoints", id, |_, rows| {
        let mut table = TextTable::new(&[">N", "STATE", "PROBLEMS"]);
        for row in rows {
            let state = if row.good { Cell::painted("ok", Paint::Good) } else { Cell::painted("damaged", Paint::Bad) };
            table.row([row.checkpoint_id.to_string().into(), state, row.problems.join("; ").into()]);
        }
        table
    })?;
    Ok(if checkpoints.iter().all(|c| c.good) { 0 } else { 1 })
}

fn pin(
    session: &mut DaemonSession,
    project: ProjectName,
    checkpoint: CheckpointNumber,
    pinned: bool,
) -> Result<(), CommandError> {
    let view = session.call(&CheckpointPin { project, checkpoint, pinned })?;
    let id = view.id.to_string();
    session.out.object(&view, Some(id), |out, view| {
        let word = if view.pinned { "pinned" } else { "unpinned" };
        out.line(format_args!("checkpoint {} of {} {word}", view.id, view.project))
    })?;
    Ok(())
}
