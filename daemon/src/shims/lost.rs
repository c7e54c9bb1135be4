//! Ends the process tree of a run whose shim has died without a record of the exit.
//!
//! A shim dies like that by `kill -9` or a crash. Its children then belong to init, so that ancestry does not find them;
//! the control group, the session and the run's id in the environment do. Where the shim was killed before it wrote the
//! record of the run, only the environment and the name of the group are known. All functions block.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fermata_os::cgroup::{CgroupError, Group};
use fermata_os::process::{self, ProcScan, ProcessId, ProcessStat, RunState};
use fermata_protocol::error_chain;
use fermata_shim::log_recovery::LogRecovery;
use fermata_shim::record::RunRecord;
use fermata_shim::spec::{LaunchSpec, RUN_ID_VARIABLE, SpecError};

/// Why a lost tree could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum LostTreeError {
    /// Only the shim itself may end its tree.
    #[error("end the tree of run {run_id}: its shim {shim} is alive")]
    ShimAlive { run_id: String, shim: ProcessId },
    #[error("end the control group of run {run_id}")]
    Cgroup {
        run_id: String,
        #[source]
        source: CgroupError,
    },
    /// Processes could not be listed or signalled.
    #[error("end the processes of run {run_id}")]
    Processes {
        run_id: String,
        #[source]
        source: io::Error,
    },
    #[error("read the launch spec of a run")]
    Spec(#[source] SpecError),
    #[error("end the tree of run {run_id}: {remaining} processes remain")]
    Remaining { run_id: String, remaining: usize },
}

/// The marks by which the processes of a run are found without its shim.
struct LostRun<'a> {
    run_id: &'a str,
    /// The shim and the main process, where the run has a record.
    recorded: Option<(ProcessId, ProcessId)>,
    group: Option<Group>,
    socket: &'a Path,
}

/// How long to wait until the tree is frozen or stopped before it is killed: a process that waits for a dead disk never
/// stops.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// Ends the remaining processes of a run whose shim is dead, and saves the bytes in its output pipes to its log. Returns
/// the number of processes ended.
///
/// # Errors
/// When processes may remain.
pub fn end_lost_run(
    run_dir: &Path,
    run: &RunRecord,
    boot_id: &str,
    patience: Duration,
) -> Result<usize, LostTreeError> {
    let mut recovery = LogRecovery::default();
    let ended = end(run, boot_id, patience, |holders| recovery = LogRecovery::open(run, holders));
    match recovery.write_to_log(run_dir) {
        Ok(0) => {}
        Ok(bytes) => tracing::info!(run = run.run_id, bytes, "output that a dead shim had not read was saved"),
        Err(error) => tracing::warn!(run = run.run_id, %error, "output that a dead shim had not read is lost"),
    }
    ended
}

/// Ends the remaining processes of a run whose shim is dead; returns their number. `boot_id` is that of the current boot:
/// the pids in a record of an earlier one are meaningless.
///
/// # Errors
/// When processes may remain.
pub fn end_lost_tree(run: &RunRecord, boot_id: &str, patience: Duration) -> Result<usize, LostTreeError> {
    end(run, boot_id, patience, |_| {})
}

/// Ends the remaining processes of a launch that was abandoned (see [`fermata_shim::record::abandon`]) and has no record:
/// its shim was killed after it had started the agent and before it wrote the record. A shim that is still starting ends by
/// itself. Returns the number of processes ended.
///
/// # Errors
/// When processes may remain.
pub fn end_unrecorded_run(run_dir: &Path, patience: Duration) -> Result<usize, LostTreeError> {
    let spec = match LaunchSpec::read(run_dir) {
        Ok(spec) => spec,
        // No shim starts an agent without a spec.
        Err(SpecError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error @ SpecError::Unreadable { .. }) => return Err(LostTreeError::Spec(error)),
        // A damaged spec stays damaged; it must not prevent the agent's next start.
        Err(error) => {
            tracing::warn!(
                run_dir = %run_dir.display(), error = error_chain(&error),
                "the launch spec of a run without a record is damaged; its processes are not searched for"
            );
            return Ok(0);
        }
    };
    // Without control groups on this machine the shim has created none.
    let group = Group::path_of(spec.cgroup_parent.as_deref(), &spec.cgroup_name).ok();
    let group = group.and_then(|path: PathBuf| Group::open(&path).ok());
    end_processes(&LostRun { run_id: &spec.run_id, recorded: None, group, socket: &spec.socket }, patience, |_| {})
}

/// Calls `before_kill` with the pids of the remaining processes when they are stopped.
fn end(
    run: &RunRecord,
    boot_id: &str,
    patience: Duration,
    before_kill: impl FnOnce(Vec<i32>),
) -> Result<usize, LostTreeError> {
    if run.boot_id != boot_id {
        remove_socket(&run.socket);
        return Ok(0);
    }
    let run_id = || run.run_id.clone();
    if process::is_alive(run.shim).map_err(|source| LostTreeError::Processes { run_id: run_id(), source })? {
        return Err(LostTreeError::ShimAlive { run_id: run_id(), shim: run.shim });
    }
    // A missing group was removed after its last process had exited, by the shim or by an earlier call.
    let group = run.cgroup.as_deref().and_then(|path| Group::open(path).ok());
    let lost = LostRun { run_id: &run.run_id, recorded: Some((run.shim, run.agent)), group, socket: &run.socket };
    end_processes(&lost, patience, before_kill)
}

fn end_processes(
    run: &LostRun<'_>,
    patience: Duration,
    before_kill: impl FnOnce(Vec<i32>),
) -> Result<usize, LostTreeError> {
    let run_id = || run.run_id.to_owned();
    let processes = |source| LostTreeError::Processes { run_id: run_id(), source };
    let started = Instant::now();
    let mut killed = HashSet::new();
    let group = &run.group;
    let failed = |source| LostTreeError::Cgroup { run_id: run_id(), source };
    let mut inside = HashSet::new();
    if let Some(group) = group {
        // An error is ignored: processes that cannot be frozen can still be killed.
        group.freeze(STOP_TIMEOUT).ok();
        inside = group.procs().map_err(failed)?;
    }
    let outside = stop(run, &inside).map_err(processes)?;
    before_kill(outside.iter().map(|id| id.pid).chain(inside.iter().copied()).collect());
    if let Some(group) = group {
        for pid in inside {
            killed.extend(process::identify(pid).map_err(processes)?);
        }
        group.kill().map_err(failed)?;
    }
    loop {
        let members = members(run).map_err(processes)?;
        // Children first, see `fermata_os::tree`.
        for stat in members.iter().rev() {
            process::signal(stat.id, libc::SIGKILL).map_err(processes)?;
            killed.insert(stat.id);
        }
        if members.is_empty() {
            break;
        }
        if started.elapsed() >= patience {
            return Err(LostTreeError::Remaining { run_id: run_id(), remaining: members.len() });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Some(group) = group {
        let left = patience.saturating_sub(started.elapsed());
        group.wait_empty(left).map_err(failed)?;
        group.remove(left.max(Duration::from_millis(100))).map_err(failed)?;
    }
    remove_socket(run.socket);
    Ok(killed.len())
}

/// Stops the processes that are not in the control group, so that no shell sees the death of another process and
/// continues its script. Returns them.
fn stop(run: &LostRun<'_>, inside: &HashSet<i32>) -> io::Result<Vec<ProcessId>> {
    let started = Instant::now();
    loop {
        let mut outside = members(run)?;
        outside.retain(|stat| !inside.contains(&stat.id.pid));
        let mut any_running = false;
        for stat in outside.iter().filter(|stat| stat.state() == RunState::Live) {
            // A process of another user cannot be stopped; the kill reports the error.
            any_running |= process::signal(stat.id, libc::SIGSTOP).unwrap_or(false);
        }
        if !any_running || started.elapsed() >= STOP_TIMEOUT {
            return Ok(outside.into_iter().map(|stat| stat.id).collect());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Removes the socket of a dead shim.
fn remove_socket(socket: &Path) {
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        // It was removed by the shim, by an earlier call, or by a reboot.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(socket = %socket.display(), %error, "the socket of a dead shim stays"),
    }
}

/// Returns the living processes of the run, parents before children.
fn members(run: &LostRun<'_>) -> io::Result<Vec<ProcessStat>> {
    let all = process::all()?;
    // The kernel does not reuse the id of a session that has members. If all of them have exited, a process with the
    // shim's pid may lead a new session: it is not the shim.
    let session = run
        .recorded
        .map(|(shim, _)| shim)
        .filter(|shim| !all.iter().any(|stat| stat.id.pid == shim.pid && stat.id != *shim));
    let variable = format!("{RUN_ID_VARIABLE}={}", run.run_id);
    let mut members: Vec<ProcessStat> = Vec::new();
    let mut ids = HashSet::new();
    for stat in &all {
        // No process of the run is older than its shim.
        let older = run.recorded.is_some_and(|(shim, _)| stat.id.start_time_ticks < shim.start_time_ticks);
        if stat.state() == RunState::Dead || older {
            continue;
        }
        let belongs = run.recorded.is_some_and(|(_, agent)| stat.id == agent)
            || session.is_some_and(|shim| stat.session == shim.pid)
            || process::started_with(stat.id.pid, variable.as_bytes());
        if belongs && ids.insert(stat.id) {
            members.push(stat.clone());
        }
    }
    // And their descendants, also those that have cleared their environment and left the session.
    for root in members.clone() {
        for stat in process::descendants(root.id.pid, ProcScan::Quick)? {
            if stat.state() != RunState::Dead && ids.insert(stat.id) {
                members.push(stat);
            }
        }
    }
    // A child is never older than its parent.
    members.sort_by_key(|stat| stat.id.start_time_ticks);
    Ok(members)
}
