//! Removes what an unfinished checkpoint has left: files and refs without a row.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fermata_core::project::{ProjectState, RestoreStage};
use fermata_protocol::CheckpointNumber;

use crate::errors::Failure;
use crate::operations::{StepContext, blocking};
use crate::store::checkpoints;

/// Removes everything of one checkpoint that has no row.
///
/// # Errors
/// When something cannot be removed; it may be tried again.
pub async fn discard(site: &StepContext, number: CheckpointNumber) -> Result<(), Failure> {
    if rows(site).await?.contains(&number) {
        return Ok(());
    }
    let dirs = site.dirs();
    let (partial, place) = (dirs.partial_checkpoint(number), dirs.checkpoint(number));
    blocking("discard the checkpoint", move || {
        for path in [&partial, &place] {
            remove(path).map_err(|e| Failure::fault(&format!("remove {}", path.display()), &e))?;
        }
        Ok(())
    })
    .await?;
    site.with_history(None, "discard the snapshot", move |history, _, _| {
        if history.list()?.contains(&number) {
            history.remove(number)?;
        }
        // Its pack may have its place already, and a disk that is full wants it back now. Whoever asked for the
        // checkpoint is told only after this, so that a pack that cannot go is left to the next sweep.
        if let Err(error) = history.sweep() {
            tracing::warn!(checkpoint = number, %error, "what is left of the snapshot stays until the next sweep");
        }
        Ok(())
    })
    .await
}

/// Removes what is left of checkpoints whose rows are gone: their directories, their refs, and the packs that
/// no other checkpoint needs.
///
/// # Errors
/// When something cannot be removed; it may be tried again.
pub async fn remove_rowless(site: &StepContext, numbers: &[CheckpointNumber]) -> Result<(), Failure> {
    let known = rows(site).await?;
    let going: Vec<CheckpointNumber> = numbers.iter().copied().filter(|number| !known.contains(number)).collect();
    let (dirs, numbers) = (site.dirs(), going.clone());
    blocking("remove checkpoints", move || {
        for path in numbers.into_iter().map(|number| dirs.checkpoint(number)) {
            remove(&path).map_err(|e| Failure::fault(&format!("remove {}", path.display()), &e))?;
            crate::operations::failpoint("retention.directory")?;
        }
        Ok(())
    })
    .await?;
    site.with_history(None, "remove snapshots", move |history, _, _| {
        let published = history.list()?;
        for number in going.into_iter().filter(|number| published.contains(number)) {
            history.remove(number)?;
            fermata_failpoint::hit("retention.ref");
        }
        history.sweep().map(drop)
    })
    .await?;
    crate::operations::failpoint("retention.swept")
}

/// Removes what earlier crashes have left of any checkpoint, and plans of restores that have ended.
/// Only while nothing of that is being made.
///
/// # Errors
/// When something cannot be removed; the next start tries again.
pub async fn sweep(site: &StepContext) -> Result<(), Failure> {
    sweep_plans(site).await?;
    let known: HashSet<CheckpointNumber> = rows(site).await?.into_iter().collect();
    let (dir, numbers) = (site.dirs().checkpoints(), known.clone());
    blocking("sweep unfinished checkpoints", move || {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Failure::fault(&format!("list {}", dir.display()), &error)),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse::<CheckpointNumber>().ok());
            if number.is_none_or(|number| !numbers.contains(&number)) {
                let path = entry.path();
                remove(&path).map_err(|e| Failure::fault(&format!("remove {}", path.display()), &e))?;
            }
        }
        Ok(())
    })
    .await?;
    if !site.dirs().history().exists() {
        return Ok(());
    }
    site.with_history(None, "sweep the history", move |history, _, _| {
        for number in history.list()?.into_iter().filter(|number| !known.contains(number)) {
            history.remove(number)?;
        }
        history.sweep().map(drop)
    })
    .await
}

/// Removes plans, drafts of them included; all but the one that is still being carried out.
async fn sweep_plans(site: &StepContext) -> Result<(), Failure> {
    let needed = match &*site.project.state {
        ProjectState::Restoring(run) if run.stage == RestoreStage::Applying => {
            Some(site.dirs().restore_plan(&run.operation))
        }
        _ => None,
    };
    let dir = site.dirs().root;
    blocking("sweep plans of restores", move || {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let is_plan = name.to_str().is_some_and(|name| name.trim_start_matches('.').starts_with("restore-"));
            if is_plan && Some(&path) != needed.as_ref() {
                fs::remove_file(&path).map_err(|e| Failure::fault(&format!("remove {}", path.display()), &e))?;
            }
        }
        Ok(())
    })
    .await
}

/// What a directory's name begins with once what it belonged to was removed. No project, agent or
/// checkpoint has a name that begins with a dot.
const ASIDE: &str = ".removed-";

/// Puts a directory aside under a name of its own, to be removed without hurry; `None` when there
/// is none.
///
/// # Errors
/// When it cannot be renamed.
pub fn put_aside(path: &Path) -> io::Result<Option<PathBuf>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    let stamp = fermata_os::clock::unix_ns();
    let aside = parent.join(format!("{ASIDE}{}-{stamp}", name.to_string_lossy()));
    match fs::rename(path, &aside) {
        Ok(()) => Ok(Some(aside)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes what was put aside; what cannot be removed now is swept at the next start.
pub fn remove_aside(aside: Option<PathBuf>) {
    if let Some(aside) = aside
        && let Err(error) = remove(&aside)
    {
        tracing::warn!(path = %aside.display(), %error, "what was removed stays until the next start");
    }
}

/// Removes everything in a directory that was put aside before a crash.
pub fn sweep_aside(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(ASIDE) {
            remove_aside(Some(entry.path()));
        }
    }
}

async fn rows(site: &StepContext) -> Result<Vec<CheckpointNumber>, Failure> {
    let project = site.project.name.clone();
    site.services
        .store
        .read(move |connection| checkpoints::numbers(connection, &project))
        .await
        .map_err(|error| Failure::fault("read checkpoints", &error))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
