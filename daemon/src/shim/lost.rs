//! What to do about a tree whose shim is gone without a record of the exit.
//!
//! That takes a `kill -9` of the shim itself, or a crash. Its children then belong to init, so
//! ancestry alone finds nothing: the control group, the session and the run's id in the
//! environment do. Blocking: for a blocking thread.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::record::RunRecord;
use super::salvage::Salvage;
use super::spec::RUN_ID_VARIABLE;
use crate::os::cgroup::{CgroupError, Group};
use crate::os::process::{self, Look, ProcessId, RunState, Stat};

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
    /// Some are still there.
    #[error("end the tree of run {run_id}: {remaining} processes remain")]
    Remaining {
        /// The run.
        run_id: String,
        /// How many.
        remaining: usize,
    },
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
    let mut salvage = Salvage::default();
    let ended = end(run, boot_id, patience, |holders| salvage = Salvage::open(run, holders));
    match salvage.keep(run_dir) {
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

/// `before` is told who is still there, when all of them stand still and before they are killed.
fn end(
    run: &RunRecord,
    boot_id: &str,
    patience: Duration,
    before: impl FnOnce(Vec<i32>),
) -> Result<usize, LostTreeError> {
    if run.boot_id != boot_id {
        remove_socket(run);
        return Ok(0);
    }
    let run_id = || run.run_id.clone();
    let processes = |source| LostTreeError::Processes { run_id: run_id(), source };
    if process::is_alive(run.shim).map_err(processes)? {
        return Err(LostTreeError::ShimAlive { run_id: run_id(), shim: run.shim });
    }
    let started = Instant::now();
    let mut killed = HashSet::new();
    // An absent group was removed with its last member, by the shim or by an earlier call.
    let group = run.cgroup.as_deref().and_then(|path| Group::open(path).ok());
    let failed = |source| LostTreeError::Cgroup { run_id: run_id(), source };
    let mut inside = HashSet::new();
    if let Some(group) = &group {
        // As good as it goes: who cannot be frozen can be killed all the same.
        group.freeze(STOP_PATIENCE).ok();
        inside = group.procs().map_err(failed)?;
    }
    let outside = stop(run, &inside).map_err(processes)?;
    before(outside.iter().map(|id| id.pid).chain(inside.iter().copied()).collect());
    if let Some(group) = &group {
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
    if let Some(group) = &group {
        let left = patience.saturating_sub(started.elapsed());
        group.wait_empty(left).map_err(failed)?;
        group.remove(left.max(Duration::from_millis(100))).map_err(failed)?;
    }
    remove_socket(run);
    Ok(killed.len())
}

/// Stops everybody whom no group holds, so that nobody sees another's death and goes on to the
/// next line of its script; returns who they are.
fn stop(run: &RunRecord, inside: &HashSet<i32>) -> io::Result<Vec<ProcessId>> {
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
fn remove_socket(run: &RunRecord) {
    match std::fs::remove_file(&run.socket) {
        Ok(()) => {}
        // Without it nothing is wrong: it was removed by the shim, by an earlier call, or by a reboot.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(socket = %run.socket.display(), %error, "the socket of a lost shim stays"),
    }
}

/// The living processes that belong to the run, parents before children.
fn members(run: &RunRecord) -> io::Result<Vec<Stat>> {
    let everyone = process::all()?;
    // As long as a session has members its id is not given to another process. But if all of them
    // ended, the number may lead a new session: then its leader is not the shim.
    let session_is_ours = !everyone.iter().any(|stat| stat.id.pid == run.shim.pid && stat.id != run.shim);
    let variable = format!("{RUN_ID_VARIABLE}={}", run.run_id);
    let mut found: Vec<Stat> = Vec::new();
    let mut known = HashSet::new();
    for stat in &everyone {
        // Nothing of the run is older than its shim.
        if stat.state() == RunState::Dead || stat.id.start_time_ticks < run.shim.start_time_ticks {
            continue;
        }
        let ours = stat.id == run.agent
            || (session_is_ours && stat.session == run.shim.pid)
            || process::started_with(stat.id.pid, variable.as_bytes());
        if ours && known.insert(stat.id) {
            found.push(stat.clone());
        }
    }
    // Their descendants too, even those that cleaned their environment and left the session.
    for root in found.clone() {
        for stat in process::descendants(root.id.pid, Look::Quick)? {
            if stat.state() != RunState::Dead && known.insert(stat.id) {
                found.push(stat);
            }
        }
    }
    // Later-born last: a child is never older than its parent.
    found.sort_by_key(|stat| stat.id.start_time_ticks);
    Ok(found)
}
