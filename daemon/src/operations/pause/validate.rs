//! The first step of whatever makes a checkpoint: is the workspace there, is there room.

use std::path::Path;

use fermata_protocol::retention::RemovalReason;
use fermata_protocol::{Code, Refusal};
use serde_json::json;

use crate::errors::Failure;
use crate::operations::maintenance::storage;
use crate::operations::{StepContext, blocking};

/// Why there is no room for a checkpoint.
#[derive(Debug)]
pub struct Shortage {
    /// How many bytes have to go.
    pub bytes: u64,
    /// What there is no room in.
    pub reason: RemovalReason,
    /// What is said when nothing can go.
    pub refusal: Refusal,
}

/// Checks that the workspace can be read and that there is room.
///
/// # Errors
/// A refusal that says what is missing.
pub async fn run(site: &StepContext) -> Result<(), Failure> {
    crate::operations::failpoint("pause.validate")?;
    match shortage(site).await? {
        None => Ok(()),
        Some(shortage) => Err(shortage.refusal.into()),
    }
}

/// Checks the workspace, and looks for room; returns what is short.
///
/// # Errors
/// A refusal of the workspace.
pub async fn shortage(site: &StepContext) -> Result<Option<Shortage>, Failure> {
    let workspace = site.project.facts.workspace.clone();
    let state = site.services.paths.state.clone();
    let floor = site.services.settings().pause.disk_floor_bytes;
    let short = blocking("check the workspace", move || {
        workspace_is_usable(Path::new(&workspace))?;
        room(&state, floor)
    })
    .await?;
    match (short, site.retention().quota()) {
        (None, Some(quota)) => {
            storage::measure(site).await?;
            // What is about to be given back is no reason to let more checkpoints go.
            Ok(over_quota(site, site.history.needed_bytes(), quota))
        }
        (short, _) => Ok(short),
    }
}

/// Refuses what would bring so many bytes, where the project's checkpoints would take more than they may then.
///
/// # Errors
/// `quota_exceeded`.
pub fn keeps_quota(site: &StepContext, bytes: u64) -> Result<(), Failure> {
    let used = site.history.needed_bytes();
    match site.retention().quota() {
        Some(quota) if used.saturating_add(bytes) > quota => {
            let text = format!(
                "with the {} MiB of the file, the checkpoints of project '{}' would take more than the {} MiB that they may",
                bytes.div_ceil(1 << 20),
                site.project.name,
                quota >> 20
            );
            Err(quota_refusal(site, text, used, quota).into())
        }
        _ => Ok(()),
    }
}

fn quota_refusal(site: &StepContext, text: String, used: u64, quota: u64) -> Refusal {
    Refusal::new(Code::QuotaExceeded, text)
        .hint(format!(
            "unpin or remove checkpoints (fermatactl checkpoint ls {0}), or raise the quota: \
             fermatactl project set {0} --max-checkpoint-bytes SIZE",
            site.project.name
        ))
        .details(json!({ "used_bytes": used, "max_bytes": quota }))
}

fn over_quota(site: &StepContext, used: u64, quota: u64) -> Option<Shortage> {
    (used >= quota).then(|| {
        let text = format!(
            "the checkpoints of project '{0}' take {1} MiB, of {2} MiB that they may, and none of them may go",
            site.project.name,
            used.div_ceil(1 << 20),
            quota >> 20
        );
        let refusal = quota_refusal(site, text, used, quota);
        Shortage { bytes: used - quota + 1, reason: RemovalReason::Quota, refusal }
    })
}

/// Refuses a workspace that is missing, unreadable, or no directory of its own.
///
/// # Errors
/// `workspace_refused`.
pub fn workspace_is_usable(workspace: &Path) -> Result<(), Failure> {
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

/// Refuses a workspace that holds, or lies in, one of Fermata's own directories: a checkpoint would
/// hold itself, and a restore would write over the database.
///
/// # Errors
/// `workspace_refused`.
pub fn lies_apart(workspace: &Path, own: &[&Path]) -> Result<(), Failure> {
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

/// Refuses to write so many bytes where less than the floor would be left free.
///
/// # Errors
/// `disk_full`.
pub fn leaves_room(state: &Path, floor: u64, bytes: u64) -> Result<(), Failure> {
    match room(state, floor.saturating_add(bytes))? {
        None => Ok(()),
        Some(shortage) => Err(shortage.refusal.into()),
    }
}

/// Writes a size so that two that differ look different.
fn in_words(bytes: u64) -> String {
    match bytes {
        0..0x2800 => format!("{bytes} bytes"),
        0x2800..0xa0_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Says what is short when the file system of the state directory is nearly full.
fn room(state: &Path, floor: u64) -> Result<Option<Shortage>, Failure> {
    let stat = nix::sys::statvfs::statvfs(state)
        .map_err(|errno| Failure::fault("look for free space", &std::io::Error::from(errno)))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok((free < floor).then(|| Shortage {
        bytes: floor - free,
        reason: RemovalReason::DiskFloor,
        refusal: Refusal::new(
            Code::DiskFull,
            format!(
                "the file system of {} has {} free, less than the {} that checkpoints must leave",
                state.display(),
                in_words(free),
                in_words(floor)
            ),
        )
        .hint("free some space, or lower pause.disk_floor_bytes in fermata.toml"),
    }))
}
