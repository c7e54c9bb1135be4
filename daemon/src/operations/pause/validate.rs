//! The first step of every operation that makes a checkpoint: checks the workspace and the free space.

use std::path::Path;

use fermata_protocol::retention::RemovalReason;
use fermata_protocol::{Code, Refusal};
use serde_json::json;

use crate::errors::Failure;
use crate::operations::maintenance::storage;
use crate::operations::{StepContext, blocking, failpoint};

/// Not enough space for a checkpoint.
#[derive(Debug)]
pub struct Shortage {
    /// The bytes that have to be freed.
    pub bytes: u64,
    /// The limit that is exceeded.
    pub reason: RemovalReason,
    /// For the case that no checkpoint can be removed.
    pub refusal: Refusal,
}

/// Checks that the workspace can be read and that there is room for a checkpoint.
///
/// # Errors
/// `workspace_refused`, `disk_full` or `quota_exceeded`.
pub async fn run(step: &StepContext) -> Result<(), Failure> {
    failpoint("pause.validate")?;
    match shortage(step).await? {
        None => Ok(()),
        Some(shortage) => Err(shortage.refusal.into()),
    }
}

/// Checks the workspace and measures the free space; returns the shortage if there is one.
///
/// # Errors
/// `workspace_refused`; a fault when the space cannot be measured.
pub async fn shortage(step: &StepContext) -> Result<Option<Shortage>, Failure> {
    let workspace = step.project.facts.workspace.clone();
    let state = step.services.paths.state.clone();
    let floor = step.services.settings().pause.disk_floor_bytes;
    let short = blocking("check the workspace", move || {
        check_workspace(Path::new(&workspace))?;
        free_space_shortage(&state, floor)
    })
    .await?;
    match (short, step.retention().quota()) {
        (None, Some(quota)) => {
            storage::measure(step).await?;
            // Bytes that are about to be freed are no reason to remove more checkpoints.
            Ok(over_quota(step, step.history.needed_bytes(), quota))
        }
        (short, _) => Ok(short),
    }
}

/// Refuses to add `bytes` to the project's checkpoints where that would exceed their quota.
///
/// # Errors
/// `quota_exceeded`.
pub fn check_quota(step: &StepContext, bytes: u64) -> Result<(), Failure> {
    let used = step.history.needed_bytes();
    match step.retention().quota() {
        Some(quota) if used.saturating_add(bytes) > quota => {
            let text = format!(
                "with the {} MiB of the file, the checkpoints of project '{}' would exceed their quota of {} MiB",
                bytes.div_ceil(1 << 20),
                step.project.name,
                quota >> 20
            );
            Err(quota_refusal(step, text, used, quota).into())
        }
        _ => Ok(()),
    }
}

fn quota_refusal(step: &StepContext, text: String, used: u64, quota: u64) -> Refusal {
    Refusal::new(Code::QuotaExceeded, text)
        .hint(format!(
            "unpin or remove checkpoints (fermatactl checkpoint ls {0}), or raise the quota: \
             fermatactl project set {0} --max-checkpoint-bytes SIZE",
            step.project.name
        ))
        .details(json!({ "used_bytes": used, "max_bytes": quota }))
}

fn over_quota(step: &StepContext, used: u64, quota: u64) -> Option<Shortage> {
    (used >= quota).then(|| {
        let text = format!(
            "the checkpoints of project '{0}' use {1} MiB of their quota of {2} MiB, and none of them can be removed",
            step.project.name,
            used.div_ceil(1 << 20),
            quota >> 20
        );
        let refusal = quota_refusal(step, text, used, quota);
        Shortage { bytes: used - quota + 1, reason: RemovalReason::Quota, refusal }
    })
}

/// Refuses a workspace that is missing, unreadable, the root or the home directory.
///
/// # Errors
/// `workspace_refused`.
pub fn check_workspace(workspace: &Path) -> Result<(), Failure> {
    let refuse = |why: String| {
        Err(Refusal::new(Code::WorkspaceRefused, format!("the workspace {} {why}", workspace.display())).into())
    };
    if !workspace.is_absolute() {
        return refuse("is not an absolute path".into());
    }
    match std::fs::read_dir(workspace) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return refuse("does not exist".into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            return refuse("is not a directory".into());
        }
        Err(error) => return refuse(format!("cannot be read: {error}")),
    }
    let resolved = workspace.canonicalize().unwrap_or_else(|_| workspace.to_owned());
    if resolved == Path::new("/") {
        return refuse("is the root of the file system; choose a directory of its own".into());
    }
    if std::env::var_os("HOME").is_some_and(|home| Path::new(&home).canonicalize().is_ok_and(|h| h == resolved)) {
        return refuse("is the home directory; choose a directory of its own".into());
    }
    Ok(())
}

/// Refuses a workspace that contains one of Fermata's own directories or is inside one: a checkpoint would contain
/// itself, and a restore would overwrite the database.
///
/// # Errors
/// `workspace_refused`.
pub fn check_overlap(workspace: &Path, own: &[&Path]) -> Result<(), Failure> {
    let resolve = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let workspace = resolve(workspace);
    for dir in own.iter().map(|dir| resolve(dir)) {
        if dir.starts_with(&workspace) || workspace.starts_with(&dir) {
            let message =
                format!("the workspace {} and Fermata's own directory {} overlap", workspace.display(), dir.display());
            return Err(Refusal::new(Code::WorkspaceRefused, message)
                .hint("choose a directory of its own as the workspace")
                .into());
        }
    }
    Ok(())
}

/// Refuses to write `bytes` where fewer than `floor` bytes would stay free.
///
/// # Errors
/// `disk_full`.
pub fn check_free_space(state: &Path, floor: u64, bytes: u64) -> Result<(), Failure> {
    match free_space_shortage(state, floor.saturating_add(bytes))? {
        None => Ok(()),
        Some(shortage) => Err(shortage.refusal.into()),
    }
}

/// Formats a size with enough digits that two different sizes differ in the message.
fn size_text(bytes: u64) -> String {
    match bytes {
        0..0x2800 => format!("{bytes} bytes"),
        0x2800..0xa0_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Returns the shortage when the file system of the state directory has fewer than `floor` bytes free.
fn free_space_shortage(state: &Path, floor: u64) -> Result<Option<Shortage>, Failure> {
    let stat = nix::sys::statvfs::statvfs(state)
        .map_err(|errno| Failure::fault("read the free space", &std::io::Error::from(errno)))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok((free < floor).then(|| Shortage {
        bytes: floor - free,
        reason: RemovalReason::DiskFloor,
        refusal: Refusal::new(
            Code::DiskFull,
            format!(
                "the file system of {} has {} free, less than the {} that checkpoints must leave",
                state.display(),
                size_text(free),
                size_text(floor)
            ),
        )
        .hint("free some space, or lower pause.disk_floor_bytes in fermata.toml"),
    }))
}
