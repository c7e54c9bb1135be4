//! Restores a checkpoint: safety checkpoint, plan on disk, then the plan is carried out until it
//! has succeeded.

pub mod resume;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use fermata_core::command::RestoredProject;
use fermata_protocol::checkpoint::{
    ChangeKind, ChangedPath, CheckpointRestoreResult, LeftPath, MAX_RESTORE_PATHS, Trigger,
};
use fermata_protocol::paths::unescape;
use fermata_protocol::{CheckpointNumber, Code, OperationId, ProjectName, Refusal};
use serde::{Deserialize, Serialize};

use crate::errors::Failure;
use crate::operations::checkpoint::layout::DATABASE;
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::{self, Made};
use crate::operations::{StepContext, blocking, ms_since};
use crate::store::backup::{self, RestoredRows};
use fermata_history::{
    Change, Conflict, Diff, DiffEntry, Operation, Planned, Point, RelPath, RestorePlan, RestoreReport, RestoreRequest,
    Time,
};
use fermata_os::fsync::write_atomic;

/// The file that carries a restore over a crash.
#[derive(Debug, Serialize, Deserialize)]
struct PlanFile {
    plan: RestorePlan,
    changes: Vec<ChangedPath>,
    #[serde(default)]
    changes_total: u64,
    prepare_ms: f64,
}

/// The most changes that are listed.
const MAX_CHANGES: usize = 100_000;

/// The most bytes that the paths of the listed changes come to: a reply is one line, and a plan is read as a whole.
const MAX_CHANGES_BYTES: usize = 16 << 20;

/// Takes the safety checkpoint and writes the plan.
///
/// # Errors
/// When either fails; nothing in the workspace was changed then.
pub async fn plan(
    site: &StepContext,
    operation: &OperationId,
    number: CheckpointNumber,
    safety: CheckpointNumber,
    paths: &[String],
) -> Result<Made, Failure> {
    let start = Instant::now();
    crate::operations::failpoint("restore.begin")?;
    let paths = parse_paths(paths)?;
    crate::operations::pause::validate::run(site).await?;
    let order = CheckpointOrder {
        operation: operation.clone(),
        number: safety,
        name: checkpoint::default_name(Trigger::Safety, safety),
        description: format!("what was there before checkpoint {number} was restored"),
        trigger: Trigger::Safety,
        reason: None,
        frozen: false,
        runs: Vec::new(),
    };
    let now = crate::services::now();
    let checking = async { if paths.is_none() { check_parts(site, number).await } else { Ok(()) } };
    let nothing_planned = Vec::new();
    let capturing = checkpoint::capture(site, &order, &nothing_planned, now, checkpoint::Rows::Later(None), None);
    // Both have ended before any error is looked at, so that nobody is at work when the checkpoint is discarded.
    let (checked, captured) = tokio::join!(checking, capturing);
    let captured = match (checked, captured) {
        (Ok(()), captured) => captured?,
        (Err(failure), captured) => {
            if let Ok(captured) = captured {
                captured.discard().await;
            }
            return Err(failure);
        }
    };
    let made = checkpoint::seal(site, &order, captured, now).await?;
    let (workspace, rules) = (PathBuf::from(&site.project.facts.workspace), site.rules());
    let planned = site
        .with_history(Some(operation), "plan the restore", move |history, progress, cancel| {
            let (safety, paths) = (Some(safety), paths.as_deref());
            let request = RestoreRequest { number, safety, workspace: &workspace, rules: &rules, paths };
            history.plan_restore(&request, progress, cancel)
        })
        .await?;
    let Planned { plan, diff } = planned;
    let changes_total = diff.entries.len() as u64;
    let file = PlanFile { plan, changes: changed_paths(&diff), changes_total, prepare_ms: ms_since(start) };
    let path = site.dirs().restore_plan(operation);
    blocking("write the plan", move || {
        let bytes = serde_json::to_vec(&file).map_err(|e| Failure::fault("encode the plan", &e))?;
        write_atomic(&path, &bytes, 0o600).map_err(|e| Failure::fault("write the plan", &e))
    })
    .await?;
    crate::operations::failpoint("restore.planned")?;
    Ok(made)
}

/// Refuses a checkpoint whose database part cannot be restored, before anything in the workspace is changed.
async fn check_parts(site: &StepContext, number: CheckpointNumber) -> Result<(), Failure> {
    let (file, project) = (site.dirs().checkpoint(number).join(DATABASE), site.project.name.clone());
    blocking("check the checkpoint", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("checkpoint {number} cannot be restored: {why}"))
                .hint("fermatactl checkpoint verify tells which checkpoints are good")
                .into()
        };
        match backup::check(&file, &project) {
            Ok(None) => Ok(()),
            Ok(Some(problem)) => Err(damaged(problem)),
            Err(error) => Err(damaged(fermata_protocol::error_chain(&error))),
        }
    })
    .await
}

/// A restore that was carried out.
pub struct Applied {
    /// What the rows say of the project, and the rows to put back; none where only some paths were restored.
    pub rows: Option<(RestoredProject, Arc<RestoredRows>)>,
    /// What was done to the workspace.
    pub done: Done,
    changes: Vec<ChangedPath>,
    changes_total: u64,
    /// How long the plan took, and how long carrying it out, milliseconds.
    prepare_ms: f64,
    apply_ms: f64,
}

/// What was done to a workspace, and when it was done.
pub struct Done {
    plan: RestorePlan,
    report: RestoreReport,
    ended: Time,
}

/// Carries out the plan, from the start or again.
///
/// # Errors
/// When it could not be finished; then it may be tried again.
pub async fn apply(site: &StepContext, operation: &OperationId, number: CheckpointNumber) -> Result<Applied, Failure> {
    let start = Instant::now();
    crate::operations::failpoint("restore.apply")?;
    let path = site.dirs().restore_plan(operation);
    let file = blocking("read the plan", move || {
        let bytes = std::fs::read(&path).map_err(|e| Failure::fault(&format!("read {}", path.display()), &e))?;
        serde_json::from_slice::<PlanFile>(&bytes)
            .map_err(|e| Failure::fault(&format!("understand {}", path.display()), &e))
    })
    .await?;
    let PlanFile { plan, changes, changes_total, prepare_ms } = file;
    let whole = plan.paths.is_none();
    let restoring = site.with_history(Some(operation), "restore the workspace", move |history, progress, _| {
        let report = history.apply_restore(&plan, progress)?;
        Ok((plan, report))
    });
    let reading = async { if whole { read_rows(site, number).await.map(Some) } else { Ok(None) } };
    let (restored, rows) = tokio::join!(restoring, reading);
    let (plan, report) = restored?;
    crate::operations::failpoint("restore.applied")?;
    let rows = rows?;
    let ns = fermata_os::clock::unix_ns();
    let ended = Time { sec: ns.div_euclid(1_000_000_000), nsec: ns.rem_euclid(1_000_000_000) as u32 };
    let done = Done { plan, report, ended };
    Ok(Applied { rows, done, changes, changes_total, prepare_ms, apply_ms: ms_since(start) })
}

async fn read_rows(
    site: &StepContext,
    number: CheckpointNumber,
) -> Result<(RestoredProject, Arc<RestoredRows>), Failure> {
    let (file, project) = (site.dirs().checkpoint(number).join(DATABASE), site.project.name.clone());
    blocking("read the backup", move || {
        let failed = |e| Failure::fault("read the backup", &e);
        let backed = backup::open(&file, &project).map_err(failed)?;
        let rows = backup::read_rows(&file, &project).map_err(failed)?;
        Ok((RestoredProject { phase: backed.phase, tasks: backed.tasks }, Arc::new(rows)))
    })
    .await
}

impl Applied {
    /// Returns the answer to whoever asked for the restore.
    pub fn reply(
        &self,
        site: &StepContext,
        operation: &OperationId,
        number: CheckpointNumber,
        safety: CheckpointNumber,
    ) -> CheckpointRestoreResult {
        let Done { plan, report, .. } = &self.done;
        let mut warnings = plan_warnings(plan);
        warnings.extend(report.warnings.iter().cloned());
        if !report.kept.is_empty() {
            let count = report.kept.len();
            warnings.push(format!("{count} directories stay, since files that checkpoints do not cover are in them"));
        }
        let problems = report.mismatches.iter().map(|one| format!("{}: {}", one.path, one.problem));
        warnings.extend(summary("not as they should be", report.mismatches.len(), problems));
        CheckpointRestoreResult {
            operation_id: Some(operation.clone()),
            checkpoint_id: number,
            safety_checkpoint_id: Some(safety),
            changes: self.changes.clone(),
            changes_total: self.changes_total,
            written: report.written,
            removed: report.removed,
            paths: shown(plan),
            left_alone: left_alone(plan),
            undo: Some(undo(&site.project.name, safety, plan)),
            steps_ms: [("prepare".to_owned(), self.prepare_ms), ("apply".to_owned(), self.apply_ms)].into(),
            warnings,
        }
    }
}

/// Tells what a restore would do, and does nothing.
///
/// # Errors
/// When the checkpoint or the workspace cannot be read.
pub async fn preview(
    site: &StepContext,
    number: CheckpointNumber,
    paths: Option<Vec<RelPath>>,
) -> Result<CheckpointRestoreResult, Failure> {
    let (workspace, rules) = (PathBuf::from(&site.project.facts.workspace), site.rules());
    let planned = site
        .with_history(None, "plan the restore", move |history, progress, cancel| {
            let paths = paths.as_deref();
            let request = RestoreRequest { number, safety: None, workspace: &workspace, rules: &rules, paths };
            history.plan_restore(&request, progress, cancel)
        })
        .await?;
    let Planned { plan, diff } = planned;
    let (written, removed) = plan.counts();
    Ok(CheckpointRestoreResult {
        operation_id: None,
        checkpoint_id: number,
        safety_checkpoint_id: None,
        changes: changed_paths(&diff),
        changes_total: diff.entries.len() as u64,
        written,
        removed,
        paths: shown(&plan),
        left_alone: left_alone(&plan),
        undo: None,
        steps_ms: Default::default(),
        warnings: plan_warnings(&plan),
    })
}

fn shown(plan: &RestorePlan) -> Vec<String> {
    plan.paths.iter().flatten().map(RelPath::to_string).collect()
}

fn left_alone(plan: &RestorePlan) -> Vec<LeftPath> {
    let one = |conflict: &Conflict| LeftPath {
        path: conflict.path.to_string(),
        reason: conflict.reason.in_words().to_owned(),
    };
    plan.conflicts.iter().map(one).collect()
}

fn plan_warnings(plan: &RestorePlan) -> Vec<String> {
    let mut warnings = plan.warnings.clone();
    let reasons = plan.conflicts.iter().map(|one| format!("{}: {}", one.path, one.reason.in_words()));
    warnings.extend(summary("left as they are", plan.conflicts.len(), reasons));
    if plan.paths.is_some() {
        warnings.push("files alone: tasks, context, agents' states and the phase stay as they are".to_owned());
    }
    warnings
}

/// The most paths that one warning names.
const NAMED: usize = 5;

/// Names the first of many in one line; nothing when there are none.
fn summary(what: &str, count: usize, each: impl Iterator<Item = String>) -> Option<String> {
    let named: Vec<String> = each.take(NAMED).collect();
    let more = if count > named.len() { format!(" and {} more", count - named.len()) } else { String::new() };
    let paths = if count == 1 { "path is" } else { "paths are" };
    let what = if count == 1 { what.replace("they are", "it is").replace("they", "it") } else { what.to_owned() };
    (count > 0).then(|| format!("{count} {paths} {what}: {}{more}", named.join("; ")))
}

/// The command that brings back what was there before.
fn undo(project: &ProjectName, safety: CheckpointNumber, plan: &RestorePlan) -> String {
    let is_made = |dir: &RelPath| {
        plan.operations.iter().any(|step| matches!(step, Operation::MakeDirectory { path } if path == dir))
    };
    let mut command = format!("fermatactl checkpoint restore {project} {safety}");
    let mut named = Vec::new();
    for path in plan.paths.iter().flatten() {
        // Directories that were made above a path go again.
        let mut path = path.clone();
        while let Some(dir) = path.parent().filter(|dir| is_made(dir)) {
            path = dir;
        }
        if !named.contains(&path) {
            command.push_str(if named.is_empty() { " --paths " } else { " " });
            command.push_str(&shell_word(&path));
            named.push(path);
        }
    }
    command
}

fn shell_word(path: &RelPath) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+@:,".contains(byte);
    match std::str::from_utf8(path.bytes()) {
        Ok("") => ".".to_owned(),
        Ok(text) if text.bytes().all(|byte| plain(&byte)) && !text.starts_with('-') => text.to_owned(),
        Ok(text) if !text.contains(char::is_control) && !text.starts_with('-') => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        // Anything else, byte by byte.
        _ => {
            let bytes: String = path.bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("$'./{bytes}'")
        }
    }
}

/// Reads the paths of a request; `None` when there are none, which means everything.
///
/// # Errors
/// Refuses what is no path inside a workspace, and a `.git`.
pub fn parse_paths(paths: &[String]) -> Result<Option<Vec<RelPath>>, Failure> {
    let parse = |text: &String| -> Result<RelPath, Failure> {
        let refuse = |why: &str| {
            Failure::from(
                Refusal::new(Code::InvalidParams, format!("the path '{text}' {why}"))
                    .hint("paths are those inside the workspace, for instance src/main.rs"),
            )
        };
        if text.is_empty() {
            return Err(refuse("names nothing; '.' is the whole workspace"));
        }
        let bytes = if text == "." { Some(Vec::new()) } else { unescape(text) };
        let path = bytes.and_then(|bytes| RelPath::new(bytes).ok()).ok_or_else(|| refuse("leads nowhere"))?;
        if path.is_restorable() { Ok(path) } else { Err(refuse("is in a repository's own directory")) }
    };
    if paths.len() > MAX_RESTORE_PATHS {
        let text = format!("{} paths are more than {MAX_RESTORE_PATHS}", paths.len());
        return Err(Refusal::new(Code::TooLarge, text).hint("name the directories that they are in").into());
    }
    let paths = paths.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(paths).filter(|paths| !paths.is_empty()))
}

/// Refuses paths that neither the checkpoint nor the workspace has.
///
/// # Errors
/// When there is such a path, or when the checkpoint cannot be read.
pub async fn check_paths(site: &StepContext, number: CheckpointNumber, paths: Vec<RelPath>) -> Result<(), Failure> {
    let workspace = PathBuf::from(&site.project.facts.workspace);
    site.with_history(None, "find the paths", move |history, _, _| history.check_paths(number, &workspace, &paths))
        .await
}

/// What a full check found.
pub struct Checked {
    /// How many paths were compared.
    pub paths: u64,
    /// How many are not as the checkpoint has them.
    pub differing: u64,
    /// Some of them, each with what is different.
    pub examples: Vec<String>,
}

/// The most paths that a full check names.
const EXAMPLES: usize = 20;

/// Compares the whole workspace with the checkpoint that was restored, until somebody else works in it; `None` when it
/// could not be done.
pub async fn check(site: &StepContext, done: Done, moved_on: impl Future<Output = ()>) -> Option<Checked> {
    fermata_failpoint::hit("restore.check");
    let rules = site.rules();
    let checking = site.with_history(None, "look through the restored workspace", move |history, progress, cancel| {
        history.check_restored(&done.plan, &done.report, &rules, done.ended, progress, cancel)
    });
    tokio::pin!(checking);
    let checked = tokio::select! {
        checked = &mut checking => checked,
        () = moved_on => {
            site.cancel.cancel();
            checking.await
        }
        () = site.services.stopping.cancelled() => {
            site.cancel.cancel();
            checking.await
        }
    };
    fermata_failpoint::hit("restore.checked");
    match checked {
        Ok(check) => {
            for one in &check.mismatches {
                tracing::error!(project = %site.project.name, path = %one.path, problem = one.problem, "not restored");
            }
            let examples = check.mismatches.iter().take(EXAMPLES);
            Some(Checked {
                paths: check.paths,
                differing: check.mismatches.len() as u64,
                examples: examples.map(|one| format!("{}: {}", one.path, one.problem)).collect(),
            })
        }
        Err(failure) => {
            tracing::info!(project = %site.project.name, %failure, "the restored workspace was not looked through");
            None
        }
    }
}

/// Forgets the plan of a restore that has ended.
pub fn forget(site: &StepContext, operation: &OperationId) {
    let path = site.dirs().restore_plan(operation);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a plan that is no longer needed stays");
    }
}

/// Compares two points of a project.
///
/// # Errors
/// When a point cannot be read.
pub async fn diff(site: &StepContext, from: CheckpointNumber, to: Option<CheckpointNumber>) -> Result<Diff, Failure> {
    let to = match to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(PathBuf::from(&site.project.facts.workspace), site.rules()),
    };
    site.with_history(None, "compare", move |history, progress, cancel: &AtomicBool| {
        history.diff(&Point::Checkpoint(from), &to, progress, cancel)
    })
    .await
}

/// Shows a difference on the wire; of very many paths the first.
pub fn changed_paths(diff: &Diff) -> Vec<ChangedPath> {
    let mut bytes = 0;
    let fits = |entry: &&DiffEntry| {
        bytes += entry.path.bytes().len();
        bytes <= MAX_CHANGES_BYTES
    };
    diff.entries
        .iter()
        .take(MAX_CHANGES)
        .take_while(fits)
        .map(|entry| ChangedPath {
            path: entry.path.to_string(),
            change: match entry.change {
                Change::Added => ChangeKind::Added,
                Change::Removed => ChangeKind::Removed,
                Change::Modified => ChangeKind::Modified,
                Change::TypeChanged => ChangeKind::TypeChanged,
                Change::ModeChanged => ChangeKind::ModeChanged,
                Change::AttributesChanged => ChangeKind::AttributesChanged,
            },
            old_bytes: entry.old_size,
            new_bytes: entry.new_size,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_history::EntryKind;

    fn diff(paths: impl Iterator<Item = String>) -> Diff {
        let entry = |path: String| DiffEntry {
            path: RelPath::new(path.into_bytes()).unwrap(),
            change: Change::Added,
            kind: EntryKind::File,
            old_size: None,
            new_size: Some(1),
            old_mode: None,
            new_mode: None,
        };
        Diff { entries: paths.map(entry).collect() }
    }

    #[test]
    fn of_very_many_changes_as_many_are_listed_as_a_reply_can_hold() {
        let listed = changed_paths(&diff((0..120_000).map(|n| format!("f{n:06}"))));
        assert_eq!((listed.len(), &*listed[0].path), (MAX_CHANGES, "f000000"));
        let long = "x".repeat(4000);
        let listed = changed_paths(&diff((0..9000).map(|n| format!("{n:04}{long}"))));
        assert!(!listed.is_empty() && listed.len() * 4004 <= MAX_CHANGES_BYTES, "{}", listed.len());
    }
}
