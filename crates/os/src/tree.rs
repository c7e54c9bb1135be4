//! Whole process trees by signals: stopping, continuing and killing all descendants of a process, but not the process
//! itself.
//!
//! Work is done in short steps, so that a caller with an event loop stays responsive; blocking functions serve callers
//! without one.
//!
//! Order matters. Stopping goes parents first, since a stopped parent does not fork. Continuing goes children first, so
//! that a shell that waits for stopped jobs sees none. Killing goes children first: when the last outside parent of a
//! stopped process group dies, the kernel sends SIGHUP and SIGCONT to that group, whose members must be dying by then.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use super::process::{self, ProcScan, ProcessId, RunState};

/// Why a tree could not be stopped or killed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A process belongs to another user and cannot be signalled.
    #[error("signal process {id}")]
    Denied {
        id: ProcessId,
        #[source]
        source: io::Error,
    },
    /// The process table could not be read.
    #[error("read the processes below {root}")]
    Unreadable {
        root: i32,
        #[source]
        source: io::Error,
    },
    /// The work did not finish in time, for instance because a process waits for an unreachable network file system.
    #[error("reach every process below {root} in {waited_ms} ms: {remaining} remain")]
    Timeout {
        root: i32,
        waited_ms: u64,
        /// The number of processes that are still alive.
        remaining: usize,
    },
}

/// The progress of stopping or killing a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeProgress {
    /// This many processes still run, or the set of processes still changes.
    Working(usize),
    /// All processes are stopped or dead; when stopping, two passes in a row have confirmed it.
    Done,
}

/// How long one step may take before it returns to its caller.
const STEP: Duration = Duration::from_millis(10);

/// Stops a tree.
#[derive(Debug)]
pub struct StopWork {
    root: i32,
    stopped: Vec<ProcessId>,
    signalled: HashSet<ProcessId>,
    quiet_passes: u8,
    scan: ProcScan,
}

impl StopWork {
    /// Prepares to stop everything below `root`.
    pub fn new(root: i32) -> Self {
        Self { root, stopped: Vec::new(), signalled: HashSet::new(), quiet_passes: 0, scan: ProcScan::Quick }
    }

    /// Works for some milliseconds. Processes in `skip`, which are frozen by other means, are left alone.
    pub fn step(&mut self, skip: &HashSet<i32>) -> Result<TreeProgress, TreeError> {
        let until = Instant::now() + STEP;
        loop {
            let moving = self.pass(skip)?;
            if self.quiet_passes >= 2 {
                return Ok(TreeProgress::Done);
            }
            if Instant::now() >= until {
                return Ok(TreeProgress::Working(moving));
            }
            if moving > 0 {
                // Let the signalled processes run, so that they can stop.
                std::thread::yield_now();
            }
        }
    }

    fn pass(&mut self, skip: &HashSet<i32>) -> Result<usize, TreeError> {
        let descendants = process::descendants(self.root, self.scan)
            .map_err(|source| TreeError::Unreadable { root: self.root, source })?;
        let mut moving = 0;
        for stat in &descendants {
            if skip.contains(&stat.id.pid) || process::waits_for_stopped_child(stat, &descendants) {
                continue;
            }
            match stat.state() {
                RunState::Live => {}
                // Its first thread has stopped; the others may still be running.
                RunState::Stopped if self.scan == ProcScan::Thorough && stat.threads > 1 => {
                    let stopped = process::all_threads_stopped(stat.id.pid)
                        .map_err(|source| TreeError::Unreadable { root: self.root, source })?;
                    moving += usize::from(!stopped);
                    continue;
                }
                RunState::Stopped | RunState::Dead => continue,
            }
            match process::signal(stat.id, libc::SIGSTOP) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(source) => {
                    return Err(TreeError::Denied { id: stat.id, source });
                }
            }
            moving += 1;
            if self.signalled.insert(stat.id) {
                self.stopped.push(stat.id);
            }
        }
        // While processes still run, a quick scan reaches the most of them; only a thorough scan can confirm that all
        // are stopped.
        match (moving, self.scan) {
            (0, ProcScan::Thorough) => self.quiet_passes += 1,
            (0, ProcScan::Quick) => self.scan = ProcScan::Thorough,
            (_, ProcScan::Quick | ProcScan::Thorough) => {
                self.quiet_passes = 0;
                self.scan = ProcScan::Quick;
            }
        }
        Ok(moving)
    }

    /// Returns the processes that this work has stopped, parents first; those stopped before are not included.
    pub fn into_stopped(self) -> Vec<ProcessId> {
        self.stopped
    }

    /// Returns how many processes this work has stopped so far.
    pub fn count(&self) -> usize {
        self.stopped.len()
    }
}

/// Continues processes in the reverse order of their stopping. Processes that have ended are skipped.
pub fn continue_all(stopped: &[ProcessId]) {
    for &id in stopped.iter().rev() {
        // Fails if the process belongs to another user by now; nothing can be done about that.
        process::signal(id, libc::SIGCONT).ok();
    }
}

/// How long [`KillWork`] tries to stop all processes first. A process that waits for a failed disk cannot be stopped,
/// and must not delay the end of the others.
const STOP_PATIENCE: Duration = Duration::from_millis(200);

/// Kills a tree. Stops all processes first, so that no process observes the death of another and executes the next line
/// of its script, and so that none forks meanwhile.
#[derive(Debug)]
pub struct KillWork {
    root: i32,
    stopping: Option<(StopWork, Instant)>,
    killed: HashSet<ProcessId>,
}

impl KillWork {
    /// Prepares to kill everything below `root`.
    pub fn new(root: i32) -> Self {
        let stopping = Some((StopWork::new(root), Instant::now() + STOP_PATIENCE));
        Self { root, stopping, killed: HashSet::new() }
    }

    /// Sends SIGKILL to all remaining descendants, children first. The caller reaps those that become its children.
    pub fn step(&mut self) -> Result<TreeProgress, TreeError> {
        if let Some((work, until)) = &mut self.stopping {
            match work.step(&HashSet::new()) {
                Ok(TreeProgress::Working(moving)) if Instant::now() < *until => {
                    return Ok(TreeProgress::Working(moving));
                }
                // A process that cannot be stopped can still be killed.
                Ok(TreeProgress::Working(_) | TreeProgress::Done) | Err(_) => self.stopping = None,
            }
        }
        let unreadable = |source| TreeError::Unreadable { root: self.root, source };
        let mut remaining = process::descendants(self.root, ProcScan::Quick).map_err(unreadable)?;
        remaining.retain(|stat| stat.state() != RunState::Dead);
        if remaining.is_empty() {
            remaining = process::descendants(self.root, ProcScan::Thorough).map_err(unreadable)?;
            remaining.retain(|stat| stat.state() != RunState::Dead);
        }
        let mut denied = None;
        for stat in remaining.iter().rev() {
            match process::signal(stat.id, libc::SIGKILL) {
                Ok(true) => {
                    self.killed.insert(stat.id);
                }
                Ok(false) => {}
                Err(source) => denied = Some(TreeError::Denied { id: stat.id, source }),
            }
        }
        match denied {
            // All others have been signalled before a process of another user causes an error.
            Some(error) => Err(error),
            None if remaining.is_empty() => Ok(TreeProgress::Done),
            None => Ok(TreeProgress::Working(remaining.len())),
        }
    }

    /// Counts a process that was killed by other means.
    pub fn note(&mut self, id: ProcessId) {
        self.killed.insert(id);
    }

    /// The processes that were killed.
    pub fn killed(&self) -> &HashSet<ProcessId> {
        &self.killed
    }
}

/// Kills everything below `root`, children first, until nothing remains; returns the number of killed processes.
pub fn kill_tree(root: i32, patience: Duration) -> Result<usize, TreeError> {
    let started = Instant::now();
    let mut work = KillWork::new(root);
    loop {
        match work.step()? {
            TreeProgress::Done => return Ok(work.killed().len()),
            TreeProgress::Working(remaining) if started.elapsed() >= patience => {
                return Err(timeout(root, started, remaining));
            }
            TreeProgress::Working(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn timeout(root: i32, started: Instant, remaining: usize) -> TreeError {
    let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    TreeError::Timeout { root, waited_ms, remaining }
}
