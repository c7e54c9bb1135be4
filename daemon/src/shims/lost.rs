//! What to do about a tree whose shim is gone without a record of the exit.
//!
//! That takes a `kill -9` of the shim itself, or a crash. Its children then belong to init, so
//! ancestry alone finds nothing: the control group, the session and the run's id in the
//! environment do. Where the shim was killed before it recorded who runs, the last of these and the
//! name of the group are all there is. Blocking: for a blocking thread.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fermata_os::cgroup::{CgroupError, Group};
use fermata_os::process::{self, ProcScan, ProcessId, RunState, Stat};
use fermata_protocol::error_chain;
use fermata_shim::log_recovery::LogRecovery;
use fermata_shim::record::RunRecord;
use fermata_shim::spec::{LaunchSpec, RUN_ID_VARIABLE, SpecError};

/// Why a lost tree could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum LostTreeError {
    /// The shim lives: ask it instead.
    #[error("end the tree of run {run_id}: its shim {shim} is alive")]
    ShimAlive {
        /// The run.
        run_id: String,
        /// The shim.
        shim: ProcessId,
    },
    /// The control group refused.
    #[error("end the control group of run {run_id}")]
    Cgroup {
        /// The run.
        run_id: String,
        /// The cause.
        #[source]
        source: CgroupError,
    },
    /// Processes could not be read or signalled.
    #[error("end the processes of run {run_id}")]
    Processes {
        /// The run.
        run_id: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Nothing says what was to be started.
    #[error("read what a run was to be")]
    Spec(#[source] SpecError),
    /// Some are still there.
    #[error("end the tree of run {run_id}: {remaining} processes remain")]
    Remaining {
        /// The run.
        run_id: String,
        /// How many.
        remaining: usize,
    },
}

/// What is known of a run whose shim is gone.
struct Sought<'a> {
    run_id: &'a str,
    /// Its shim and its main process, where somebody has recorded them.
    known: Option<(ProcessId, ProcessId)>,
    group: Option<Group>,
    socket: &'a Path,
}

/// How long the tree may take to stand still before it is killed: one that waits for a dead disk
/// never does.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Ends whatever is left of a run whose shim is gone and keeps what its pipes still hold in its
/// log; returns how many processes that were.
///
/// # Errors
/// When something may be left.
pub fn end_lost_run(
    run_dir: &Path,
    run: &RunRecord,
    boot_id: &str,
    patience: Duration,
) -> Result<usize, LostTreeError> {
    let mut recovery = LogRecovery::default();
    let ended = end(run, boot_id, patience, |holders| recovery = LogRecovery::open(run, holders));
    match recovery.keep(run_dir) {
        Ok(0) => {}
        Ok(bytes) => tracing::info!(run = run.run_id, bytes, "output that a lost shim had not read was kept"),
        Err(error) => tracing::warn!(run = run.run_id, %error, "output that a lost shim had not read is lost"),
    }
    ended
}

/// Ends whatever is left of a run whose shim is gone; returns how many processes that were.
/// `boot_id` is the present boot's: after a reboot the record's pids mean nothing.
///
/// # Errors
/// When something may be left.
pub fn end_lost_tree(run: &RunRecord, boot_id: &str, patience: Duration) -> Result<usize, LostTreeError> {
    end(run, boot_id, patience, |_| {})
}

/// Ends whatever is left of a launch that was given up (see [`fermata_shim::record::abandon`]) and has no
/// record: its shim was killed when the agent was there and nobody had written down who it is. A shim
/// that is still on its way ends by itself. Returns how many processes that were.
///
/// # Errors
/// When something may be left.
pub fn end_unrecorded_run(run_dir: &Path, patience: Duration) -> Result<usize, LostTreeError> {
    let spec = match LaunchSpec::read(run_dir) {
        Ok(spec) => spec,
        // Without it no shim has got anywhere.
        Err(SpecError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error @ SpecError::Unreadable { .. }) => return Err(LostTreeError::Spec(error)),
        // That never changes: the agent's next start must not fail for it.
        Err(error) => {
            tracing::warn!(run_dir = %run_dir.display(), error = error_chain(&error), "a launch without a record is left as it is");
            return Ok(0);
        }
    };
    // Where there are no control groups, none was made.
    let group = Group::path_of(spec.cgroup_parent.as_deref(), &spec.cgroup_name).ok();
    let group = group.and_then(|path: PathBuf| Group::open(&path).ok());
    let sought = Sought { run_id: &spec.run_id, known: None, group, socket: &spec.socket };
    end_sought(&sought, patience, |_| {})
}

/// `before` is told who is still there, when all of them stand still and before they are killed.
fn end(
    run: &RunRecord,
    boot_id: &str,
    patience: Duration,
    before: impl FnOnce(Vec<i32>),
) -> Result<usize, LostTreeError> {
    if run.boot_id != boot_id {
        remove_socket(&run.socket);
        return Ok(0);
    }
    let run_id = || run.run_id.clone();
    if process::is_alive(run.shim).map_err(|source| LostTreeError::Processes { run_id: run_id(), source })? {
        return Err(LostTreeError::ShimAlive { run_id: run_id(), shim: run.shim });
    }
    // An absent group was removed with its last member, by the shim or by an earlier call.
    let group = run.cgroup.as_deref().and_then(|path| Group::open(path).ok());
    let sought = Sought { run_id: &run.run_id, known: Some((run.shim, run.agent)), group, socket: &run.socket };
    end_sought(&sought, patience, before)
}

fn end_sought(run: &Sought<'_>, patience: Duration, before: impl FnOnce(Vec<i32>)) -> Result<usize, LostTreeError> {
    let run_id = || run.run_id.to_owned();
    let processes = |source| LostTreeError::Processes { run_id: run_id(), source };
    let started = Instant::now();
    let mut killed = HashSet::new();
    let group = &run.group;
    let failed = |source| LostTreeError::Cgroup { run_id: run_id(), source };
    let mut inside = HashSet::new();
    if let Some(group) = group {
        // As good as it goes: who cannot be frozen can be killed all the same.
        group.freeze(STOP_PATIENCE).ok();
        inside = group.procs().map_err(failed)?;
    }
    let outside = stop(run, &inside).map_err(processes)?;
    before(outside.iter().map(|id| id.pid).chain(inside.iter().copied()).collect());
    if let Some(group) = group {
        for pid in inside {
            killed.extend(process::identify(pid).map_err(processes)?);
        }
        group.kill().map_err(failed)?;
    }
    loop {
        let members = members(run).map_err(processes)?;
        // Children first, see `os::tree`.
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

/// Stops everybody whom no group holds, so that nobody sees another's death and goes on to the
/// next line of its script; returns who they are.
fn stop(run: &Sought<'_>, inside: &HashSet<i32>) -> io::Result<Vec<ProcessId>> {
    let started = Instant::now();
    loop {
        let mut outside = members(run)?;
        outside.retain(|stat| !inside.contains(&stat.id.pid));
        let mut moving = false;
        for stat in outside.iter().filter(|stat| stat.state() == RunState::Live) {
            // One of another user cannot be stopped; the kill says so.
            moving |= process::signal(stat.id, libc::SIGSTOP).unwrap_or(false);
        }
        if !moving || started.elapsed() >= STOP_PATIENCE {
            return Ok(outside.into_iter().map(|stat| stat.id).collect());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Removes the socket that a shim would have removed at its end; nobody listens on it any more.
fn remove_socket(socket: &Path) {
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        // Without it nothing is wrong: it was removed by the shim, by an earlier call, or by a reboot.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(socket = %socket.display(), %error, "the socket of a lost shim stays"),
    }
}

/// The living processes that belong to the run, parents before children.
fn members(run: &Sought<'_>) -> io::Result<Vec<Stat>> {
    let everyone = process::all()?;
    // As long as a session has members its id is not given to another process. But if all of them
    // ended, the number may lead a new session: then its leader is not the shim.
    let session = run
        .known
        .map(|(shim, _)| shim)
        .filter(|shim| !everyone.iter().any(|stat| stat.id.pid == shim.pid && stat.id != *shim));
    let variable = format!("{RUN_ID_VARIABLE}={}", run.run_id);
    let mut found: Vec<Stat> = Vec::new();
    let mut known = HashSet::new();
    for stat in &everyone {
        // Nothing of the run is older than its shim.
        let older = run.known.is_some_and(|(shim, _)| stat.id.start_time_ticks < shim.start_time_ticks);
        if stat.state() == RunState::Dead || older {
            continue;
        }
        let ours = run.known.is_some_and(|(_, agent)| stat.id == agent)
            || session.is_some_and(|shim| stat.session == shim.pid)
            || process::started_with(stat.id.pid, variable.as_bytes());
        if ours && known.insert(stat.id) {
            found.push(stat.clone());
        }
    }
    // Their descendants too, even those that cleaned their environment and left the session.
    for root in found.clone() {
        for stat in process::descendants(root.id.pid, ProcScan::Quick)? {
            if stat.state() != RunState::Dead && known.insert(stat.id) {
                found.push(stat);
            }
        }
    }
    // Later-born last: a child is never older than its parent.
    found.sort_by_key(|stat| stat.id.start_time_ticks);
    Ok(found)
}
