//! Removes leftovers: files and refs of checkpoints without a row, plans of ended restores, deferred removals.
//!
//! A deferred removal renames a directory first and removes it later: the rename is quick and cannot stop half-way.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fermata_core::project::{ProjectState, RestoreStage};
use fermata_protocol::CheckpointNumber;

use crate::errors::Failure;
use crate::operations::{StepContext, blocking, directory, failpoint};
use crate::store::checkpoints;

/// Removes all files and the ref of one checkpoint, unless it has a row.
///
/// # Errors
/// When a file cannot be removed. May be tried again.
pub async fn discard(step: &StepContext, number: CheckpointNumber) -> Result<(), Failure> {
    if rows(step).await?.contains(&number) {
        return Ok(());
    }
    let dirs = step.dirs();
    let (partial, place) = (dirs.partial_checkpoint(number), dirs.checkpoint(number));
    blocking("discard the checkpoint", move || {
        for path in [&partial, &place] {
            directory::remove(path).map_err(Failure::io("remove", path))?;
        }
        Ok(())
    })
    .await?;
    step.with_history(None, "discard the snapshot", move |history, _, _| {
        if history.list()?.contains(&number) {
            history.remove(number)?;
        }
        // Its pack may be published already, and a full disk needs the space. The reply to the client waits for this,
        // so that an error only leaves the pack to the next sweep.
        if let Err(error) = history.sweep() {
            tracing::warn!(checkpoint = number, %error, "the pack of a discarded checkpoint stays until the next sweep");
        }
        Ok(())
    })
    .await
}

/// Removes the directories and refs of those of these checkpoints that have no row, and the packs that no other
/// checkpoint needs.
///
/// # Errors
/// When a file cannot be removed. May be tried again.
pub async fn remove_rowless(step: &StepContext, numbers: &[CheckpointNumber]) -> Result<(), Failure> {
    let with_row = rows(step).await?;
    let rowless: Vec<CheckpointNumber> = numbers.iter().copied().filter(|number| !with_row.contains(number)).collect();
    let (dirs, numbers) = (step.dirs(), rowless.clone());
    blocking("remove checkpoints", move || {
        for path in numbers.into_iter().map(|number| dirs.checkpoint(number)) {
            directory::remove(&path).map_err(Failure::io("remove", &path))?;
            failpoint("retention.directory")?;
        }
        Ok(())
    })
    .await?;
    step.with_history(None, "remove snapshots", move |history, _, _| {
        let published = history.list()?;
        for number in rowless.into_iter().filter(|number| published.contains(number)) {
            history.remove(number)?;
            fermata_failpoint::hit("retention.ref");
        }
        history.sweep().map(drop)
    })
    .await?;
    failpoint("retention.swept")
}

/// Removes everything that crashes have left of checkpoints, and the plans of restores that have ended. Must not run
/// while a checkpoint or a plan is being made.
///
/// # Errors
/// When a file cannot be removed; the next start of the daemon tries again.
pub async fn sweep(step: &StepContext) -> Result<(), Failure> {
    sweep_plans(step).await?;
    let with_row: HashSet<CheckpointNumber> = rows(step).await?.into_iter().collect();
    let (dir, numbers) = (step.dirs().checkpoints(), with_row.clone());
    blocking("remove unfinished checkpoints", move || {
        for entry in directory::entries(&dir).map_err(Failure::io("list", &dir))?.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse::<CheckpointNumber>().ok());
            if number.is_none_or(|number| !numbers.contains(&number)) {
                let path = entry.path();
                directory::remove(&path).map_err(Failure::io("remove", &path))?;
            }
        }
        Ok(())
    })
    .await?;
    if !step.dirs().history().exists() {
        return Ok(());
    }
    step.with_history(None, "sweep the history", move |history, _, _| {
        for number in history.list()?.into_iter().filter(|number| !with_row.contains(number)) {
            history.remove(number)?;
        }
        history.sweep().map(drop)
    })
    .await
}

/// Removes plans of restores and their temporary files, except the plan that is still being carried out.
async fn sweep_plans(step: &StepContext) -> Result<(), Failure> {
    let needed = match &*step.project.state {
        ProjectState::Restoring(run) if run.stage == RestoreStage::Applying => {
            Some(step.dirs().restore_plan(&run.operation))
        }
        ProjectState::Restoring(_)
        | ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Paused(_)
        | ProjectState::Resuming(_)
        | ProjectState::Broken(_) => None,
    };
    let dir = step.dirs().root;
    blocking("remove plans of restores", move || {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let is_plan = name.to_str().is_some_and(|name| name.trim_start_matches('.').starts_with("restore-"));
            if is_plan && Some(&path) != needed.as_ref() {
                fs::remove_file(&path).map_err(Failure::io("remove", &path))?;
            }
        }
        Ok(())
    })
    .await
}

/// The prefix of the name of a directory whose removal is deferred. No name of a project, agent or checkpoint begins with
/// a dot.
const DEFERRED: &str = ".removed-";

/// Renames a directory for a deferred removal and returns its new path; `None` when it does not exist.
///
/// # Errors
/// When it cannot be renamed.
pub fn defer_removal(path: &Path) -> io::Result<Option<PathBuf>> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    let stamp = fermata_os::clock::unix_ns();
    let deferred = parent.join(format!("{DEFERRED}{}-{stamp}", name.to_string_lossy()));
    match fs::rename(path, &deferred) {
        Ok(()) => Ok(Some(deferred)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a directory that [`defer_removal`] has renamed; after an error the next start of the daemon tries again.
pub fn remove_deferred(deferred: Option<PathBuf>) {
    if let Some(path) = deferred
        && let Err(error) = directory::remove(&path)
    {
        tracing::warn!(path = %path.display(), %error, "a removed directory stays until the next start of the daemon");
    }
}

/// Removes the directories in `dir` whose removal was deferred before a crash.
pub fn sweep_deferred(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(DEFERRED) {
            remove_deferred(Some(entry.path()));
        }
    }
}

/// Returns the numbers of the checkpoints that have a row.
async fn rows(step: &StepContext) -> Result<Vec<CheckpointNumber>, Failure> {
    let project = step.project.name.clone();
    step.services
        .store
        .read(move |connection| checkpoints::numbers(connection, &project))
        .await
        .map_err(|error| Failure::fault("read checkpoints", &error))
}
