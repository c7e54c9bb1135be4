//! Gets to know a workspace while its agents run, so that they stand still only for what changes later.

use std::path::{Path, PathBuf};

use fermata_core::agent::RunKey;
use fermata_protocol::OperationId;

use crate::errors::Failure;
use crate::operations::maintenance::storage;
use crate::operations::{Cancel, StepContext};
use fermata_history::{Mapped, Primed, RelPath, SnapshotRequest};
use fermata_os::{mappings, process};

/// Describes a snapshot that becomes no checkpoint.
fn request(site: &StepContext) -> SnapshotRequest {
    SnapshotRequest {
        workspace: PathBuf::from(&site.project.facts.workspace),
        number: 0,
        message: format!("what is known of {}\n", site.project.name),
        parent: None,
        rules: site.rules(),
        mapped: Mapped::default(),
        whole_after: site.services.settings().checkpoints.whole_after(),
    }
}

/// Makes sure that the workspace is known, before anybody is made to stand still for it.
///
/// # Errors
/// When the workspace cannot be read or the store not be written.
pub async fn run(site: &StepContext, operation: Option<&OperationId>) -> Result<(), Failure> {
    let runs = site.project.runs(site.project.running_agents());
    let (mut request, now) = (request(site), crate::services::now());
    let mapped = mapped(site, &runs);
    let cell = site.history.clone();
    let primed = site
        .with_history(operation, "look at the workspace", move |history, progress, cancel| {
            if history.is_primed(&request) {
                return Ok(Ok(Primed::Already));
            }
            request.mapped = match mapped() {
                Ok(mapped) => mapped,
                Err(failure) => return Ok(Err(failure)),
            };
            // Only who looks tells of it: whoever finds nothing to do must not end what another one tells.
            let looking = cell.begin_scan();
            let tell = |now| {
                looking.tell(now);
                progress(now);
            };
            history.warm_up(&request, now.0, &tell, cancel).map(Ok)
        })
        .await??;
    if let Primed::Looked { read, files } = primed {
        tracing::debug!(project = %site.project.name, read, files, "the workspace is known");
    }
    Ok(())
}

/// The same in the background; what goes wrong will be told by the operation that needs it.
pub fn in_background(mut site: StepContext) {
    let (services, cancel) = (std::sync::Arc::clone(&site.services), Cancel::default());
    site.cancel = cancel.clone();
    services.tracker.clone().spawn(async move {
        let stopping = services.stopping.clone();
        let look = async {
            // One project after the other: this is nobody's hurry.
            let _turn = services.background.acquire().await;
            if stopping.is_cancelled() {
                return;
            }
            let known = match run(&site, None).await {
                // What is known already takes room on the disk.
                Ok(()) => storage::measure(&site).await.map(drop),
                Err(failure) => Err(failure),
            };
            if let Err(failure) = known {
                tracing::debug!(project = %site.project.name, %failure, "the workspace is not known yet");
            }
        };
        tokio::pin!(look);
        tokio::select! {
            () = &mut look => return,
            () = stopping.cancelled() => cancel.cancel(),
        }
        // The blocking part ends soon.
        look.await;
    });
}

/// Returns what finds the files of the workspace that agents can write to through memory. It blocks, and fails when
/// that cannot be found out.
pub fn mapped(site: &StepContext, runs: &[RunKey]) -> impl FnOnce() -> Result<Mapped, Failure> + Send + use<> {
    let shims: Vec<i32> = runs
        .iter()
        .filter_map(|(agent, _)| site.project.agents.get(agent)?.processes())
        .map(|processes| processes.shim_pid)
        .collect();
    let workspace = PathBuf::from(&site.project.facts.workspace);
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
                let found = mappings::writable_shared(pid).and_then(|found| {
                    found.into_iter().for_each(|mapping| note(&mut mapped, mapping, &workspace));
                    mappings::open_for_writing(pid, &workspace)
                });
                match found {
                    Ok(found) => found.into_iter().for_each(|open| note_open(&mut mapped, &open, &workspace)),
                    Err(error) => {
                        tracing::debug!(pid, %error, "what it writes to is not told");
                        mapped.untold += 1;
                    }
                }
            }
        }
        Ok(mapped)
    }
}

fn note_open(mapped: &mut Mapped, open: &mappings::Open, workspace: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let path = open.path.strip_prefix(workspace).ok().and_then(|path| RelPath::new(path.as_os_str().as_bytes()).ok());
    match path.filter(|_| open.there) {
        Some(path) => drop(mapped.open.insert(path)),
        // It was renamed by another name of its own, or has none.
        None => drop(mapped.inodes.insert(open.ino)),
    }
}

fn note(mapped: &mut Mapped, mapping: mappings::Mapping, workspace: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let below =
        mapping.path.strip_prefix(workspace).ok().and_then(|path| RelPath::new(path.as_os_str().as_bytes()).ok());
    match below {
        Some(path) => drop(mapped.paths.insert(path, mapping.ino)),
        // In a container the same file has another path.
        None => drop(mapped.inodes.insert(mapping.ino)),
    }
}
