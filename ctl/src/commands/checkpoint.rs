//! `checkpoint …`.

use std::io;

use fermata_protocol::checkpoint::{
    ChangedPath, CheckpointCreate, CheckpointCreateResult, CheckpointDetail, CheckpointDiff, CheckpointDiffResult,
    CheckpointList, CheckpointPin, CheckpointRestore, CheckpointShow, CheckpointVerify, CheckpointView,
    VerifiedCheckpoint,
};
use fermata_protocol::retention::{CheckpointPrune, CheckpointRemove, CheckpointRemoveResult, RemovalReason};
use fermata_protocol::transfer::{CheckpointConsolidate, CheckpointExport};
use fermata_protocol::{CheckpointNumber, ProjectName};

use super::pause::frozen;
use super::{Ended, restore, transfer};
use crate::cli::groups::CheckpointCommand;
use crate::errors::Failure;
use crate::output::{Cell, Facts, Format, Output, Paint, Table, clean, note};
use crate::session::Session;
use crate::units::{bytes, dollars, local, millis, number};

/// How many checkpoints are asked for at once.
const PAGE: u32 = 200;

/// Runs a `checkpoint` command.
pub fn run(session: &mut Session, command: CheckpointCommand) -> Ended {
    match command {
        CheckpointCommand::Create { project, name, description } => {
            let params = CheckpointCreate { project, name, description };
            let result = session.call_long("checkpoint", &params)?;
            let id = result.checkpoint_id.to_string();
            session.out.one(&result, Some(id), created)?;
        }
        CheckpointCommand::Ls { project, limit } => {
            let (checkpoints, disk_bytes) = list(session, &project, limit)?;
            let id = |checkpoint: &CheckpointView| checkpoint.id;
            session.out.rows(&checkpoints, "no checkpoints", id, table)?;
            if session.out.is_human() && !checkpoints.is_empty() {
                note(&format!("all checkpoints of {project} take {} on disk", bytes(disk_bytes)));
            }
        }
        CheckpointCommand::Show { project, checkpoint } => {
            let detail = session.call(&CheckpointShow { project, checkpoint })?;
            let id = detail.checkpoint.id.to_string();
            session.out.one(&detail, Some(id), shown)?;
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
            session.out.one(&result, id, |out, result| restore::shown(out, result, dry_run))?;
        }
        CheckpointCommand::Rm { project, checkpoints } => {
            let result = session.call_long("remove", &CheckpointRemove { project, checkpoints })?;
            removed(session, &result, false)?;
        }
        CheckpointCommand::Prune { project, keep, older_than, max_bytes, dry_run } => {
            let older_than_ms = older_than.map(millis);
            let params = CheckpointPrune { project, keep, older_than_ms, max_bytes, dry_run };
            let result = session.call_long("prune", &params)?;
            removed(session, &result, dry_run)?;
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
            session.out.one(&result, Some(id), created)?;
        }
        CheckpointCommand::Consolidate { project, everything } => {
            transfer::consolidate(session, &CheckpointConsolidate { project, everything })?;
        }
        CheckpointCommand::Pin { project, checkpoint } => pin(session, project, checkpoint, true)?,
        CheckpointCommand::Unpin { project, checkpoint } => pin(session, project, checkpoint, false)?,
    }
    Ok(0)
}

/// Asks page after page, newest first; returns with them what all of the project's take on disk.
fn list(
    session: &mut Session,
    project: &ProjectName,
    limit: Option<u32>,
) -> Result<(Vec<CheckpointView>, u64), Failure> {
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
        // A daemon may give fewer than were asked for; only an empty page is the end for sure.
        if count == 0 {
            break;
        }
    }
    all.truncate(wanted);
    Ok((all, disk_bytes))
}

fn table(out: &Output, checkpoints: &[CheckpointView]) -> Table {
    let mut table = Table::new(&[">N", "TRIGGER", "CREATED", ">SIZE", ">FILES", "PIN", "NAME"]);
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

fn created(out: &mut Output, result: &CheckpointCreateResult) -> io::Result<()> {
    let metadata = &result.checkpoint.metadata;
    let facts = Facts::default()
        .add("checkpoint", result.checkpoint_id.to_string())
        .add("name", &result.checkpoint.name)
        .add("covers", format!("{} files, {}", number(metadata.files), bytes(metadata.bytes)))
        .add("added", bytes(result.checkpoint.size_bytes))
        .add("frozen", frozen(result.frozen_ms, &result.steps_ms))
        .add("operation", result.operation_id.as_str());
    out.facts(&facts)?;
    out.warnings(&result.warnings)
}

fn shown(out: &mut Output, detail: &CheckpointDetail) -> io::Result<()> {
    let checkpoint = &detail.checkpoint;
    let metadata = &checkpoint.metadata;
    let filled = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
    let facts = Facts::default()
        .add("checkpoint", format!("{} of {}", checkpoint.id, checkpoint.project))
        .add("name", &checkpoint.name)
        .maybe("description", filled(&checkpoint.description))
        .add("trigger", checkpoint.trigger.as_str())
        .maybe("pause reason", checkpoint.pause_reason.as_ref())
        .add("created", format!("{} ({})", local(checkpoint.created_at), out.ago(checkpoint.created_at)))
        .add("pinned", if checkpoint.pinned { "yes" } else { "no" })
        .add("phase", metadata.phase.as_str())
        .maybe(
            "tasks",
            (metadata.tasks_total > 0).then(|| format!("{} of {} done", metadata.tasks_done, metadata.tasks_total)),
        )
        .maybe("last task", metadata.last_task_done.as_ref())
        .maybe("agents", filled(&metadata.active_agents.join(", ")))
        .add("covers", format!("{} files, {}", number(metadata.files), bytes(metadata.bytes)))
        .add("added", format!("{} to the disk", bytes(checkpoint.size_bytes)))
        .add("context", format!("{} items, {} tokens", number(metadata.context_items), number(metadata.context_tokens)))
        .maybe("cost so far", (metadata.cost_micro_usd > 0).then(|| dollars(metadata.cost_micro_usd)))
        .maybe("repository", metadata.repository.as_ref().map(|r| r.to_string()))
        .add("format", checkpoint.format.to_string())
        .add("manifest", &checkpoint.manifest_sha256)
        .add("operation", checkpoint.operation_id.as_str());
    out.facts(&facts)?;
    out.line("")?;
    let mut parts = Table::new(&["PART", ">SIZE", "HASH", "PATH"]);
    for part in &detail.manifest.parts {
        parts.row([
            Cell::from(&part.kind),
            bytes(part.bytes).into(),
            part.sha256.chars().take(16).collect::<String>().into(),
            Cell::from(&part.path),
        ]);
    }
    out.table(&parts)?;
    if !detail.skipped.is_empty() {
        out.line("")?;
        let mut skipped = Table::new(&["LEFT OUT", "BECAUSE"]);
        for path in &detail.skipped {
            let detail = path.detail.as_ref().map(|detail| format!(" ({detail})"));
            let because = format!("{}{}", path.reason.replace('_', " "), detail.unwrap_or_default());
            skipped.row([Cell::from(&path.path), because.into()]);
        }
        out.table(&skipped)?;
        restore::more(out, detail.skipped.len(), detail.skipped_total)?;
    }
    if !detail.torn.is_empty() {
        out.line("")?;
        let mut torn = Table::new(&["CHANGED WHILE IT WAS READ"]);
        for path in &detail.torn {
            torn.row([Cell::from(path)]);
        }
        out.table(&torn)?;
        restore::more(out, detail.torn.len(), detail.torn_total)?;
    }
    out.warnings(&metadata.warnings)
}

fn diff(session: &mut Session, result: &CheckpointDiffResult, stat: bool) -> Result<(), Failure> {
    let out = &mut session.out;
    match (&result.patch, out.format()) {
        // A patch is data: other programs read it as it is.
        (Some(patch), Format::Human) => out.text(patch)?,
        (Some(_), Format::Json) => out.json(result)?,
        (Some(_), Format::Ids) | (None, _) => {
            let path = |change: &ChangedPath| clean(&change.path);
            out.rows(&result.changes, "no differences", path, |_, changes| restore::change_table(changes))?;
            if out.format() == Format::Human {
                restore::more(out, result.changes.len(), result.changes_total)?;
            } else if result.changes_total > result.changes.len() as u64 {
                note(&format!("{} paths differ in all", number(result.changes_total)));
            }
            if stat && out.format() == Format::Human && !result.changes.is_empty() {
                out.line("")?;
                out.line(restore::sums(&result.changes))?;
            }
        }
    }
    Ok(())
}

fn removed(session: &mut Session, result: &CheckpointRemoveResult, dry_run: bool) -> Result<(), Failure> {
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
                let mut table = Table::new(&[">N", "TRIGGER", "BECAUSE", ">SIZE"]);
                for one in &result.removed {
                    let because = match one.reason {
                        RemovalReason::Asked => "you asked for it",
                        RemovalReason::Count => "there are newer ones",
                        RemovalReason::Thinned => "a newer one stands for it",
                        RemovalReason::Age => "its time is over",
                        RemovalReason::Quota => "the quota",
                        RemovalReason::DiskFloor => "the disk is full",
                    };
                    table.row([
                        one.checkpoint_id.to_string().into(),
                        one.trigger.as_str().into(),
                        because.into(),
                        bytes(one.size_bytes).into(),
                    ]);
                }
                out.table(&table)?;
            }
            let word = if dry_run { "would be removed" } else { "removed" };
            let disk = result.disk_bytes.map(|disk| {
                let what = if dry_run { "they take" } else { "what is left takes" };
                format!("; {what} {} on disk", bytes(disk))
            });
            note(&format!("{} {word}, {} kept{}", result.removed.len(), result.kept, disk.unwrap_or_default()));
        }
    }
    Ok(())
}

/// Exit code 1 when anything is damaged.
fn verify(session: &mut Session, params: &CheckpointVerify) -> Ended {
    let checkpoints = session.call_long("verify", params)?.checkpoints;
    let id = |checkpoint: &VerifiedCheckpoint| checkpoint.checkpoint_id;
    session.out.rows(&checkpoints, "no checkpoints", id, |_, rows| {
        let mut table = Table::new(&[">N", "STATE", "PROBLEMS"]);
        for row in rows {
            let state =
                if row.good { Cell::painted("good", Paint::Good) } else { Cell::painted("damaged", Paint::Bad) };
            table.row([row.checkpoint_id.to_string().into(), state, row.problems.join("; ").into()]);
        }
        table
    })?;
    Ok(if checkpoints.iter().all(|c| c.good) { 0 } else { 1 })
}

fn pin(session: &mut Session, project: ProjectName, checkpoint: CheckpointNumber, pinned: bool) -> Result<(), Failure> {
    let view = session.call(&CheckpointPin { project, checkpoint, pinned })?;
    let id = view.id.to_string();
    session.out.one(&view, Some(id), |out, view| {
        let word = if view.pinned { "pinned" } else { "unpinned" };
        out.line(format_args!("checkpoint {} of {} {word}", view.id, view.project))
    })?;
    Ok(())
}
