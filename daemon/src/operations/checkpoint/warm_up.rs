//! Warm-up scan: scans a workspace while its agents run, so that under the freeze only later changes are read.

use std::path::{Path, PathBuf};

use fermata_core::agent::RunKey;
use fermata_protocol::OperationId;

use crate::errors::Failure;
use crate::operations::maintenance::storage;
use crate::operations::{Cancel, StepContext};
use fermata_history::{Mapped, RelPath, SnapshotRequest, WarmUp};
use fermata_os::{mappings, process};

/// Returns the request of a scan that does not become a checkpoint.
fn request(step: &StepContext) -> SnapshotRequest {
    SnapshotRequest {
        workspace: PathBuf::from(&step.project.facts.workspace),
        number: 0,
        message: format!("warm-up scan of {}\n", step.project.name),
        parent: None,
        rules: step.rules(),
        mapped: Mapped::default(),
        full_scan_after: step.services.settings().checkpoints.whole_after(),
    }
}

/// Scans the workspace unless its state is in memory already. `status` shows the progress.
///
/// # Errors
/// When the workspace cannot be read or the store cannot be written.
pub async fn run(step: &StepContext, operation: Option<&OperationId>) -> Result<(), Failure> {
    let runs = step.project.runs(step.project.running_agents());
    let (mut request, now) = (request(step), crate::services::now());
    let mapped = mapped(step, &runs);
    let cell = step.history.clone();
    let primed = step
        .with_history(operation, "scan the workspace", move |history, progress, cancel| {
            if history.is_warm(&request) {
                return Ok(Ok(WarmUp::UpToDate));
            }
            request.mapped = match mapped() {
                Ok(mapped) => mapped,
                Err(failure) => return Ok(Err(failure)),
            };
            // Begun only here: a call that finds nothing to do must not end the progress of a scan that runs.
            let scan = cell.begin_scan();
            let report = |state| {
                scan.report(state);
                progress(state);
            };
            history.warm_up(&request, now.0, &report, cancel).map(Ok)
        })
        .await??;
    if let WarmUp::Scanned { read, files } = primed {
        tracing::debug!(project = %step.project.name, read, files, "the workspace was scanned");
    }
    Ok(())
}

/// Runs the scan in a tracked task. An error is only logged: the operation that needs the scan reports its own.
pub fn in_background(mut step: StepContext) {
    let (services, cancel) = (std::sync::Arc::clone(&step.services), Cancel::default());
    step.cancel = cancel.clone();
    services.tracker.clone().spawn(async move {
        let stopping = services.stopping.clone();
        let scan = async {
            // One project at a time.
            let _permit = services.background.acquire().await;
            if stopping.is_cancelled() {
                return;
            }
            let scanned = match run(&step, None).await {
                // The scan has written objects.
                Ok(()) => storage::measure(&step).await.map(drop),
                Err(failure) => Err(failure),
            };
            if let Err(failure) = scanned {
                tracing::debug!(project = %step.project.name, %failure, "the warm-up scan failed");
            }
        };
        tokio::pin!(scan);
        tokio::select! {
            () = &mut scan => return,
            () = stopping.cancelled() => cancel.cancel(),
        }
        // Its blocking part ends soon after the cancellation.
        scan.await;
    });
}

/// Returns a function that finds the files of the workspace that processes of these runs have mapped shared and writable
/// or open for writing. The function blocks, and fails when the processes cannot be listed.
pub fn mapped(step: &StepContext, runs: &[RunKey]) -> impl FnOnce() -> Result<Mapped, Failure> + Send + use<> {
    let shims: Vec<i32> = runs
        .iter()
        .filter_map(|(agent, _)| step.project.agents.get(agent)?.processes())
        .map(|processes| processes.shim_pid)
        .collect();
    let workspace = PathBuf::from(&step.project.facts.workspace);
    move || {
        if shims.is_empty() {
            return Ok(Mapped::default());
        }
        let workspace = workspace.canonicalize().unwrap_or(workspace);
        let mut mapped = Mapped::default();
        for shim in shims {
            let failed = |e| Failure::fault("list the agents' processes", &e);
            for stat in process::descendants(shim, process::ProcScan::Quick).map_err(failed)? {
                let pid = stat.id.pid;
                let open_files = mappings::writable_shared(pid).and_then(|mapped_files| {
                    mapped_files.into_iter().for_each(|mapping| add_mapping(&mut mapped, mapping, &workspace));
                    mappings::open_for_writing(pid, &workspace)
                });
                match open_files {
                    Ok(files) => files.into_iter().for_each(|file| add_open_file(&mut mapped, &file, &workspace)),
                    Err(error) => {
                        tracing::debug!(pid, %error, "the files that a process writes to cannot be listed");
                        mapped.unreadable_processes += 1;
                    }
                }
            }
        }
        Ok(mapped)
    }
}

fn relative_to(workspace: &Path, path: &Path) -> Option<RelPath> {
    use std::os::unix::ffi::OsStrExt;
    RelPath::new(path.strip_prefix(workspace).ok()?.as_os_str().as_bytes()).ok()
}

fn add_open_file(mapped: &mut Mapped, file: &mappings::OpenFile, workspace: &Path) {
    match relative_to(workspace, &file.path).filter(|_| file.at_path) {
        Some(path) => drop(mapped.open.insert(path)),
        // Its path is stale: it was renamed, or has no name.
        None => drop(mapped.inodes.insert(file.ino)),
    }
}

fn add_mapping(mapped: &mut Mapped, mapping: mappings::Mapping, workspace: &Path) {
    match relative_to(workspace, &mapping.path) {
        Some(path) => drop(mapped.paths.insert(path, mapping.ino)),
        // In a container the same file has another path.
        None => drop(mapped.inodes.insert(mapping.ino)),
    }
}
