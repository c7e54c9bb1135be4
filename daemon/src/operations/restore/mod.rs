//! Restores a checkpoint: takes a safety checkpoint, writes a plan to disk, and carries the plan out, again after a crash
//! or an error until it has succeeded.

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
use crate::operations::checkpoint::{self, SealedCheckpoint};
use crate::operations::{StepContext, blocking, failpoint, ms_since};
use crate::store::backup::{self, RestoredRows};
use fermata_history::{
    Conflict, Diff, DiffChange, DiffEntry, Mismatch, Operation, Planned, Point, RelPath, RestoreOptions, RestorePlan,
    RestoreReport, Time,
};
use fermata_os::fsync::write_atomic;

/// The file from which a restore is continued after a crash.
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

/// The most bytes in the paths of the listed changes: a reply is one line, and a plan is read at once.
const MAX_CHANGES_BYTES: usize = 16 << 20;

/// Takes the safety checkpoint and writes the plan; returns the safety checkpoint.
///
/// # Errors
/// When either fails. The workspace is unchanged then.
pub async fn plan(
    step: &StepContext,
    operation: &OperationId,
    number: CheckpointNumber,
    safety: CheckpointNumber,
    paths: &[String],
) -> Result<SealedCheckpoint, Failure> {
    let start = Instant::now();
    failpoint("restore.begin")?;
    let paths = parse_paths(paths)?;
    crate::operations::pause::validate::run(step).await?;
    let order = CheckpointOrder {
        operation: operation.clone(),
        number: safety,
        name: checkpoint::default_name(Trigger::Safety, safety),
        description: format!("the state before checkpoint {number} was restored"),
        trigger: Trigger::Safety,
        reason: None,
        frozen: false,
        runs: Vec::new(),
    };
    let now = crate::services::now();
    let checking = async { if paths.is_none() { check_parts(step, number).await } else { Ok(()) } };
    let no_plans = Vec::new();
    let capturing = checkpoint::capture(step, &order, &no_plans, now, checkpoint::RowsTiming::AfterThaw(None), None);
    // Both have ended before an error is returned: the checkpoint must not be discarded while it is being written.
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
    let safety_checkpoint = checkpoint::seal(step, &order, captured, now).await?;
    let (workspace, rules) = (PathBuf::from(&step.project.facts.workspace), step.rules());
    let planned = step
        .with_history(Some(operation), "plan the restore", move |history, progress, cancel| {
            let (safety, paths) = (Some(safety), paths.as_deref());
            let request = RestoreOptions { number, safety, workspace: &workspace, rules: &rules, paths };
            history.plan_restore(&request, progress, cancel)
        })
        .await?;
    let Planned { plan, diff } = planned;
    let changes_total = diff.entries.len() as u64;
    let file = PlanFile { plan, changes: changed_paths(&diff), changes_total, prepare_ms: ms_since(start) };
    let path = step.dirs().restore_plan(operation);
    blocking("write the plan", move || {
        let bytes = serde_json::to_vec(&file).map_err(|e| Failure::fault("encode the plan", &e))?;
        write_atomic(&path, &bytes, 0o600).map_err(|e| Failure::fault("write the plan", &e))
    })
    .await?;
    failpoint("restore.planned")?;
    Ok(safety_checkpoint)
}

/// Refuses a checkpoint whose database part cannot be restored, before the workspace is changed.
async fn check_parts(step: &StepContext, number: CheckpointNumber) -> Result<(), Failure> {
    let (file, project) = (step.dirs().checkpoint(number).join(DATABASE), step.project.name.clone());
    blocking("check the checkpoint", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("checkpoint {number} cannot be restored: {why}"))
                .hint("fermatactl checkpoint verify lists the checkpoints that are intact")
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

/// A restore whose plan was carried out; only the transaction is missing.
pub struct AppliedRestore {
    /// The project's restored state and rows; `None` where only some paths were restored.
    pub rows: Option<(RestoredProject, Arc<RestoredRows>)>,
    pub workspace: RestoredWorkspace,
    changes: Vec<ChangedPath>,
    changes_total: u64,
    prepare_ms: f64,
    apply_ms: f64,
}

/// The part of a restore that changed the workspace.
pub struct RestoredWorkspace {
    plan: RestorePlan,
    report: RestoreReport,
    ended: Time,
}

/// Carries out the plan, for the first time or again.
///
/// # Errors
/// When it could not be completed; then it may be tried again.
pub async fn apply(
    step: &StepContext,
    operation: &OperationId,
    number: CheckpointNumber,
) -> Result<AppliedRestore, Failure> {
    let start = Instant::now();
    failpoint("restore.apply")?;
    let path = step.dirs().restore_plan(operation);
    let file = blocking("read the plan", move || {
        let bytes = std::fs::read(&path).map_err(Failure::io("read", &path))?;
        serde_json::from_slice::<PlanFile>(&bytes).map_err(Failure::io("parse", &path))
    })
    .await?;
    let PlanFile { plan, changes, changes_total, prepare_ms } = file;
    let with_rows = plan.paths.is_none();
    let restoring = step.with_history(Some(operation), "restore the workspace", move |history, progress, _| {
        let report = history.apply_restore(&plan, progress)?;
        Ok((plan, report))
    });
    let reading = async { if with_rows { read_rows(step, number).await.map(Some) } else { Ok(None) } };
    let (restored, rows) = tokio::join!(restoring, reading);
    let (plan, report) = restored?;
    failpoint("restore.applied")?;
    let rows = rows?;
    let ns = fermata_os::clock::unix_ns();
    let ended = Time { sec: ns.div_euclid(1_000_000_000), nsec: ns.rem_euclid(1_000_000_000) as u32 };
    let workspace = RestoredWorkspace { plan, report, ended };
    Ok(AppliedRestore { rows, workspace, changes, changes_total, prepare_ms, apply_ms: ms_since(start) })
}

async fn read_rows(
    step: &StepContext,
    number: CheckpointNumber,
) -> Result<(RestoredProject, Arc<RestoredRows>), Failure> {
    let (file, project) = (step.dirs().checkpoint(number).join(DATABASE), step.project.name.clone());
    blocking("read the backup", move || {
        let failed = |e| Failure::fault("read the backup", &e);
        let backup = backup::open(&file, &project).map_err(failed)?;
        let rows = backup::read_rows(&file, &project).map_err(failed)?;
        Ok((RestoredProject { phase: backup.phase, tasks: backup.tasks }, Arc::new(rows)))
    })
    .await
}

impl AppliedRestore {
    /// Returns the reply to the client.
    pub fn reply(
        &self,
        step: &StepContext,
        operation: &OperationId,
        number: CheckpointNumber,
        safety: CheckpointNumber,
    ) -> CheckpointRestoreResult {
        let RestoredWorkspace { plan, report, .. } = &self.workspace;
        let mut warnings = plan_warnings(plan);
        warnings.extend(report.warnings.iter().cloned());
        if !report.kept.is_empty() {
            let count = report.kept.len();
            warnings.push(format!("{count} directories stay, since they contain files that checkpoints do not cover"));
        }
        let problems = report.mismatches.iter().map(|mismatch| format!("{}: {}", mismatch.path, mismatch.problem));
        warnings.extend(summary("not restored correctly", report.mismatches.len(), problems));
        CheckpointRestoreResult {
            operation_id: Some(operation.clone()),
            checkpoint_id: number,
            safety_checkpoint_id: Some(safety),
            changes: self.changes.clone(),
            changes_total: self.changes_total,
            written: report.written,
            removed: report.removed,
            paths: path_texts(plan),
            left_alone: left_alone(plan),
            undo: Some(undo_command(&step.project.name, safety, plan)),
            steps_ms: [("prepare".to_owned(), self.prepare_ms), ("apply".to_owned(), self.apply_ms)].into(),
            warnings,
        }
    }
}

/// Returns what a restore would do, without doing it.
///
/// # Errors
/// When the checkpoint or the workspace cannot be read.
pub async fn preview(
    step: &StepContext,
    number: CheckpointNumber,
    paths: Option<Vec<RelPath>>,
) -> Result<CheckpointRestoreResult, Failure> {
    let (workspace, rules) = (PathBuf::from(&step.project.facts.workspace), step.rules());
    let planned = step
        .with_history(None, "plan the restore", move |history, progress, cancel| {
            let paths = paths.as_deref();
            let request = RestoreOptions { number, safety: None, workspace: &workspace, rules: &rules, paths };
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
        paths: path_texts(&plan),
        left_alone: left_alone(&plan),
        undo: None,
        steps_ms: Default::default(),
        warnings: plan_warnings(&plan),
    })
}

fn path_texts(plan: &RestorePlan) -> Vec<String> {
    plan.paths.iter().flatten().map(RelPath::to_string).collect()
}

fn left_alone(plan: &RestorePlan) -> Vec<LeftPath> {
    let left = |conflict: &Conflict| LeftPath {
        path: conflict.path.to_string(),
        reason: conflict.reason.in_words().to_owned(),
    };
    plan.conflicts.iter().map(left).collect()
}

fn plan_warnings(plan: &RestorePlan) -> Vec<String> {
    let mut warnings = plan.warnings.clone();
    let reasons = plan.conflicts.iter().map(|conflict| format!("{}: {}", conflict.path, conflict.reason.in_words()));
    warnings.extend(summary("left unchanged", plan.conflicts.len(), reasons));
    if plan.paths.is_some() {
        warnings
            .push("only files are restored: tasks, context, agents' states and the phase stay unchanged".to_owned());
    }
    warnings
}

/// The most paths that one warning names.
const NAMED: usize = 5;

/// Returns one line about `count` paths that names the first ones; `None` when there are none.
fn summary(state: &str, count: usize, texts: impl Iterator<Item = String>) -> Option<String> {
    let named: Vec<String> = texts.take(NAMED).collect();
    let more = if count > named.len() { format!(" and {} more", count - named.len()) } else { String::new() };
    let paths = if count == 1 { "path is" } else { "paths are" };
    (count > 0).then(|| format!("{count} {paths} {state}: {}{more}", named.join("; ")))
}

/// Returns the command that restores the state before the restore.
fn undo_command(project: &ProjectName, safety: CheckpointNumber, plan: &RestorePlan) -> String {
    let is_made = |dir: &RelPath| {
        plan.operations.iter().any(|operation| matches!(operation, Operation::MakeDirectory { path } if path == dir))
    };
    let mut command = format!("fermatactl checkpoint restore {project} {safety}");
    let mut named = Vec::new();
    for path in plan.paths.iter().flatten() {
        // To remove also the directories above it that the restore makes.
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

/// Quotes a path for the shell.
fn shell_word(path: &RelPath) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+@:,".contains(byte);
    match std::str::from_utf8(path.bytes()) {
        Ok("") => ".".to_owned(),
        Ok(text) if text.bytes().all(|byte| plain(&byte)) && !text.starts_with('-') => text.to_owned(),
        Ok(text) if !text.contains(char::is_control) && !text.starts_with('-') => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        Ok(_) | Err(_) => {
            let bytes: String = path.bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("$'./{bytes}'")
        }
    }
}

/// Parses the paths of a request; `None` when there are none, which means the workspace and the rows.
///
/// # Errors
/// Refuses a path that is not inside the workspace or is in a `.git`.
pub fn parse_paths(paths: &[String]) -> Result<Option<Vec<RelPath>>, Failure> {
    let parse = |text: &String| -> Result<RelPath, Failure> {
        let refuse = |why: &str| {
            Failure::from(
                Refusal::new(Code::InvalidParams, format!("the path '{text}' {why}"))
                    .hint("give paths relative to the workspace, for instance src/main.rs"),
            )
        };
        if text.is_empty() {
            return Err(refuse("is empty; '.' is the whole workspace"));
        }
        let bytes = if text == "." { Some(Vec::new()) } else { unescape(text) };
        let path = bytes
            .and_then(|bytes| RelPath::new(bytes).ok())
            .ok_or_else(|| refuse("is not a relative path inside the workspace"))?;
        if path.is_restorable() { Ok(path) } else { Err(refuse("is in a .git, which no restore changes")) }
    };
    if paths.len() > MAX_RESTORE_PATHS {
        let text = format!("{} paths are more than {MAX_RESTORE_PATHS}", paths.len());
        return Err(Refusal::new(Code::TooLarge, text).hint("give the directories that contain them").into());
    }
    let paths = paths.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    Ok(Some(paths).filter(|paths| !paths.is_empty()))
}

/// Refuses paths that exist neither in the checkpoint nor in the workspace.
///
/// # Errors
/// `path_not_found`, or when the checkpoint cannot be read.
pub async fn check_paths(step: &StepContext, number: CheckpointNumber, paths: Vec<RelPath>) -> Result<(), Failure> {
    let workspace = PathBuf::from(&step.project.facts.workspace);
    step.with_history(None, "find the paths", move |history, _, _| history.check_paths(number, &workspace, &paths))
        .await
}

/// The result of comparing the workspace with the restored checkpoint.
pub struct RestoreCheck {
    /// How many paths were compared.
    pub paths: u64,
    /// How many of them differ.
    pub differing: u64,
    /// The first of them, each with the difference.
    pub examples: Vec<String>,
}

/// The most paths that a check names.
const EXAMPLES: usize = 20;

/// Compares the workspace with the restored checkpoint. Ends early when `moved_on` completes, since the workspace may
/// change from then on. `None` when the comparison was not completed.
pub async fn check(
    step: &StepContext,
    restored: RestoredWorkspace,
    moved_on: impl Future<Output = ()>,
) -> Option<RestoreCheck> {
    fermata_failpoint::hit("restore.check");
    let rules = step.rules();
    let checking = step.with_history(None, "check the restored workspace", move |history, progress, cancel| {
        let RestoredWorkspace { plan, report, ended } = &restored;
        history.check_restored(plan, report, &rules, *ended, progress, cancel)
    });
    tokio::pin!(checking);
    let checked = tokio::select! {
        checked = &mut checking => checked,
        () = moved_on => {
            step.cancel.cancel();
            checking.await
        }
        () = step.services.stopping.cancelled() => {
            step.cancel.cancel();
            checking.await
        }
    };
    fermata_failpoint::hit("restore.checked");
    match checked {
        Ok(check) => {
            let project = &step.project.name;
            for Mismatch { path, problem } in &check.mismatches {
                tracing::error!(%project, %path, problem, "a path was not restored correctly");
            }
            let examples = check.mismatches.iter().take(EXAMPLES);
            Some(RestoreCheck {
                paths: check.paths,
                differing: check.mismatches.len() as u64,
                examples: examples.map(|mismatch| format!("{}: {}", mismatch.path, mismatch.problem)).collect(),
            })
        }
        Err(failure) => {
            tracing::info!(project = %step.project.name, %failure, "the check of the restored workspace was not completed");
            None
        }
    }
}

/// Removes the plan of a restore that has ended.
pub fn remove_plan(step: &StepContext, operation: &OperationId) {
    let path = step.dirs().restore_plan(operation);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "the plan of an ended restore could not be removed");
    }
}

/// Compares a checkpoint with another one, or with the workspace where `to` is `None`.
///
/// # Errors
/// When one of them cannot be read.
pub async fn diff(step: &StepContext, from: CheckpointNumber, to: Option<CheckpointNumber>) -> Result<Diff, Failure> {
    let to = match to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(PathBuf::from(&step.project.facts.workspace), step.rules()),
    };
    step.with_history(None, "compare the checkpoint", move |history, progress, cancel: &AtomicBool| {
        history.diff(&Point::Checkpoint(from), &to, progress, cancel)
    })
    .await
}

/// Converts a difference for the wire: its first 100,000 paths, up to 16 MiB of them.
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
                DiffChange::Added => ChangeKind::Added,
                DiffChange::Removed => ChangeKind::Removed,
                DiffChange::Modified => ChangeKind::Modified,
                DiffChange::TypeChanged => ChangeKind::TypeChanged,
                DiffChange::ModeChanged => ChangeKind::ModeChanged,
                DiffChange::AttributesChanged => ChangeKind::AttributesChanged,
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
            change: DiffChange::Added,
            kind: EntryKind::File,
            old_size: None,
            new_size: Some(1),
            old_mode: None,
            new_mode: None,
        };
        Diff { entries: paths.map(entry).collect() }
    }

    #[test]
    fn only_as_many_changes_are_listed_as_fit_into_a_reply() {
        let listed = changed_paths(&diff((0..120_000).map(|n| format!("f{n:06}"))));
        assert_eq!((listed.len(), &*listed[0].path), (MAX_CHANGES, "f000000"));
        let long = "x".repeat(4000);
        let listed = changed_paths(&diff((0..9000).map(|n| format!("{n:04}{long}"))));
        assert!(!listed.is_empty() && listed.len() * 4004 <= MAX_CHANGES_BYTES, "{}", listed.len());
    }
}
