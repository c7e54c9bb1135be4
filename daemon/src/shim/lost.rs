//! What to do about a tree whose shim is gone without a record of the exit.
//!
//! That takes a `kill -9` of the shim itself, or a crash. Its children then belong to init, so
//! ancestry alone finds nothing: the control group, the session and the run's id in the
//! environment do. Blocking: for a blocking thread.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use super::record::RunRecord;
use super::spec::RUN_ID_VARIABLE;
use crate::os::cgroup::{CgroupError, Group};
use crate::os::process::{self, Look, ProcessId, RunState};

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

/// Ends whatever is left of a run whose shim is gone; returns how many processes that were.
/// `boot_id` is the present boot's: after a reboot the record's pids mean nothing.
pub fn end_lost_tree(run: &RunRecord, boot_id: &str, patience: Duration) -> Result<usize, LostTreeError> {
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
    if let Some(group) = &group {
        let failed = |source| LostTreeError::Cgroup { run_id: run_id(), source };
        for pid in group.procs().map_err(failed)? {
            killed.extend(process::identify(pid).map_err(processes)?);
        }
        group.kill().map_err(failed)?;
    }
    loop {
        let members = members(run).map_err(processes)?;
        // Children first, see `os::tree`.
        for id in members.iter().rev() {
            process::signal(*id, libc::SIGKILL).map_err(processes)?;
            killed.insert(*id);
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
        let failed = |source| LostTreeError::Cgroup { run_id: run_id(), source };
        let left = patience.saturating_sub(started.elapsed());
        group.wait_empty(left).map_err(failed)?;
        group.remove(left.max(Duration::from_millis(100))).map_err(failed)?;
    }
    remove_socket(run);
    Ok(killed.len())
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
fn members(run: &RunRecord) -> io::Result<Vec<ProcessId>> {
    let everyone = process::all()?;
    // As long as a session has members its id is not given to another process. But if all of them
    // ended, the number may lead a new session: then its leader is not the shim.
    let session_is_ours = !everyone.iter().any(|stat| stat.id.pid == run.shim.pid && stat.id != run.shim);
    let variable = format!("{RUN_ID_VARIABLE}={}", run.run_id);
    let mut found: Vec<ProcessId> = Vec::new();
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
            found.push(stat.id);
        }
    }
    // Their descendants too, even those that cleaned their environment and left the session.
    for id in found.clone() {
        for stat in process::descendants(id.pid, Look::Quick)? {
            if stat.state() != RunState::Dead && known.insert(stat.id) {
                found.push(stat.id);
            }
        }
    }
    // Later-born last: a child is never older than its parent.
    found.sort_by_key(|id| id.start_time_ticks);
    Ok(found)
}
