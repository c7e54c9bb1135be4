//! Restores a checkpoint: safety checkpoint, plan on disk, then the plan is carried out until it
//! has succeeded.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use fermata_protocol::checkpoint::{ChangeKind, ChangedPath, Trigger};
use fermata_protocol::project::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{CheckpointNumber, Code, OperationId, Refusal};
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Made, Order};
use super::{Site, blocking, ms_since};
use crate::errors::Failure;
use crate::history::{Change, Diff, Point, RestorePlan, RestoreRequest};
use crate::os::fsync::write_atomic;
use crate::store::backup::{self, RestoredRows};

/// The file that carries a restore over a crash.
#[derive(Debug, Serialize, Deserialize)]
struct PlanFile {
    plan: RestorePlan,
    changes: Vec<ChangedPath>,
    prepare_ms: f64,
    warnings: Vec<String>,
}

/// Takes the safety checkpoint and writes the plan.
///
/// # Errors
/// When either fails; nothing in the workspace was changed then.
pub async fn plan(
    site: &Site,
    operation: &OperationId,
    number: CheckpointNumber,
    safety: CheckpointNumber,
) -> Result<Made, Failure> {
    let start = Instant::now();
    super::failpoint("restore.begin")?;
    super::validate::run(site).await?;
    check_parts(site, number).await?;
    let order = Order {
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
    let captured = checkpoint::capture(site, &order, &Vec::new(), now, None).await?;
    let made = checkpoint::seal(site, &order, captured, now).await?;
    let (workspace, rules) = (PathBuf::from(&site.project.facts.workspace), site.rules());
    let (plan, diff) = site
        .with_history(Some(operation), "plan the restore", move |history, progress, cancel| {
            let request = RestoreRequest { number, safety, workspace: &workspace, rules: &rules, paths: None };
            let plan = history.plan_restore(&request, progress, cancel)?;
            let diff = history.diff(&Point::Checkpoint(safety), &Point::Checkpoint(number), progress, cancel)?;
            Ok((plan, diff))
        })
        .await?;
    let mut warnings = plan.warnings.clone();
    for conflict in &plan.conflicts {
        warnings.push(format!("{} stays as it is: {:?}", conflict.path, conflict.reason));
    }
    let file = PlanFile { plan, changes: changed_paths(&diff), prepare_ms: ms_since(start), warnings };
    let path = site.dirs().restore_plan(operation);
    blocking("write the plan", move || {
        let bytes = serde_json::to_vec(&file).map_err(|e| Failure::fault("encode the plan", &e))?;
        write_atomic(&path, &bytes, 0o600).map_err(|e| Failure::fault("write the plan", &e))
    })
    .await?;
    super::failpoint("restore.planned")?;
    Ok(made)
}

/// Refuses a checkpoint whose database part cannot be restored, before anything is done.
async fn check_parts(site: &Site, number: CheckpointNumber) -> Result<(), Failure> {
    let (file, project) = (site.dirs().checkpoint(number).join(checkpoint::DATABASE), site.project.name.clone());
    blocking("check the checkpoint", move || {
        let damaged = |why: String| -> Failure {
            Refusal::new(Code::CheckpointDamaged, format!("checkpoint {number} cannot be restored: {why}"))
                .hint("fermatactl checkpoint verify tells which checkpoints are good")
                .into()
        };
        match backup::check(&file, &project) {
            Ok(None) => Ok(()),
            Ok(Some(problem)) => Err(damaged(problem)),
            Err(error) => Err(damaged(crate::errors::chain(&error))),
        }
    })
    .await
}

/// What a restore that was carried out leads to.
pub struct Applied {
    /// The phase at the checkpoint.
    pub phase: Phase,
    /// The tasks at the checkpoint.
    pub tasks: Vec<TaskView>,
    /// The rows to put back.
    pub rows: Arc<RestoredRows>,
    /// How many paths were written.
    pub written: u64,
    /// How many were removed.
    pub removed: u64,
    /// What changed.
    pub changes: Vec<ChangedPath>,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// How long the plan took, milliseconds.
    pub prepare_ms: f64,
    /// How long carrying it out took, milliseconds.
    pub apply_ms: f64,
}

/// Carries out the plan, from the start or again.
///
/// # Errors
/// When it could not be finished; then it may be tried again.
pub async fn apply(site: &Site, operation: &OperationId, number: CheckpointNumber) -> Result<Applied, Failure> {
    let start = Instant::now();
    super::failpoint("restore.apply")?;
    let path = site.dirs().restore_plan(operation);
    let file = blocking("read the plan", move || {
        let bytes = std::fs::read(&path).map_err(|e| Failure::fault(&format!("read {}", path.display()), &e))?;
        serde_json::from_slice::<PlanFile>(&bytes)
            .map_err(|e| Failure::fault(&format!("understand {}", path.display()), &e))
    })
    .await?;
    let PlanFile { plan, changes, prepare_ms, mut warnings } = file;
    let report = site
        .with_history(Some(operation), "restore the workspace", move |history, progress, _| {
            history.apply_restore(&plan, progress)
        })
        .await?;
    super::failpoint("restore.applied")?;
    for mismatch in &report.mismatches {
        warnings.push(format!("{mismatch:?} is not as it should be"));
    }
    let (file, project) = (site.dirs().checkpoint(number).join(checkpoint::DATABASE), site.project.name.clone());
    let (backed, rows) = blocking("read the backup", move || {
        let failed = |e| Failure::fault("read the backup", &e);
        Ok((backup::open(&file, &project).map_err(failed)?, backup::read_rows(&file, &project).map_err(failed)?))
    })
    .await?;
    Ok(Applied {
        phase: backed.phase,
        tasks: backed.tasks,
        rows: Arc::new(rows),
        written: report.written,
        removed: report.removed,
        changes,
        warnings,
        prepare_ms,
        apply_ms: ms_since(start),
    })
}

/// Forgets the plan of a restore that has ended.
pub fn forget(site: &Site, operation: &OperationId) {
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
pub async fn diff(site: &Site, from: CheckpointNumber, to: Option<CheckpointNumber>) -> Result<Diff, Failure> {
    let to = match to {
        Some(number) => Point::Checkpoint(number),
        None => Point::Workspace(PathBuf::from(&site.project.facts.workspace), site.rules()),
    };
    site.with_history(None, "compare", move |history, progress, cancel: &AtomicBool| {
        history.diff(&Point::Checkpoint(from), &to, progress, cancel)
    })
    .await
}

/// Turns a difference round: what leads from the later point back to the earlier one.
pub fn reverse(diff: &mut Diff) {
    for entry in &mut diff.entries {
        std::mem::swap(&mut entry.old_size, &mut entry.new_size);
        std::mem::swap(&mut entry.old_mode, &mut entry.new_mode);
        entry.change = match entry.change {
            Change::Added => Change::Removed,
            Change::Removed => Change::Added,
            same @ (Change::Modified | Change::TypeChanged | Change::ModeChanged) => same,
        };
    }
}

/// Shows a difference on the wire.
pub fn changed_paths(diff: &Diff) -> Vec<ChangedPath> {
    diff.entries
        .iter()
        .map(|entry| ChangedPath {
            path: String::from_utf8_lossy(entry.path.bytes()).into_owned(),
            change: match entry.change {
                Change::Added => ChangeKind::Added,
                Change::Removed => ChangeKind::Removed,
                Change::Modified => ChangeKind::Modified,
                Change::TypeChanged => ChangeKind::TypeChanged,
                Change::ModeChanged => ChangeKind::ModeChanged,
            },
            old_bytes: entry.old_size,
            new_bytes: entry.new_size,
        })
        .collect()
}
