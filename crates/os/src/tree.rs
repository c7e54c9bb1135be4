//! Whole process trees by signals: stop until nothing changes, continue, kill children first.
//!
//! The work comes in short steps, so that a caller with an event loop stays responsive; the
//! blocking functions below are for callers without one. Only what descends from the root is
//! touched, never the root itself.
//!
//! Orders matter. Stopping goes parents first (a stopped parent forks no more). Continuing goes
//! children first, so that a shell that waits for stopped jobs never sees one. Killing goes
//! children first, because the death of a stopped process group's last outside parent makes the
//! kernel send SIGHUP + SIGCONT to that group: the children must already be dying by then.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use super::process::{self, ProcScan, ProcessId, RunState};

/// Why a tree could not be stopped or killed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A process belongs to another user, and we may not signal it.
    #[error("signal process {id}")]
    Denied {
        /// Which one.
        id: ProcessId,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The process table could not be read.
    #[error("read the processes below {root}")]
    Unreadable {
        /// The root of the tree.
        root: i32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It took too long: for instance a process waits for a dead network drive.
    #[error("reach every process below {root} in {waited_ms} ms: {remaining} remain")]
    Timeout {
        /// The root of the tree.
        root: i32,
        /// How long it was tried.
        waited_ms: u64,
        /// How many still run.
        remaining: usize,
    },
}

/// Whether a piece of work is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many processes still run, or the picture still changes.
    Working(usize),
    /// Two passes in a row saw everybody still.
    Done,
}

/// How long one step may loop before it lets its caller look after other things.
const STEP: Duration = Duration::from_millis(10);

/// Stopping a tree.
#[derive(Debug)]
pub struct StopWork {
    root: i32,
    stopped: Vec<ProcessId>,
    known: HashSet<ProcessId>,
    quiet_passes: u8,
    look: ProcScan,
}

impl StopWork {
    /// Prepares to stop everything below `root`.
    pub fn new(root: i32) -> Self {
        Self { root, stopped: Vec::new(), known: HashSet::new(), quiet_passes: 0, look: ProcScan::Quick }
    }

    /// Goes on for some milliseconds. Processes in `skip` are left alone (somebody else froze them).
    pub fn step(&mut self, skip: &HashSet<i32>) -> Result<Progress, TreeError> {
        let until = Instant::now() + STEP;
        loop {
            let moving = self.pass(skip)?;
            if self.quiet_passes >= 2 {
                return Ok(Progress::Done);
            }
            if Instant::now() >= until {
                return Ok(Progress::Working(moving));
            }
            if moving > 0 {
                // The signals are on their way: let the others run so that they can obey.
                std::thread::yield_now();
            }
        }
    }

    fn pass(&mut self, skip: &HashSet<i32>) -> Result<usize, TreeError> {
        let found = process::descendants(self.root, self.look)
            .map_err(|source| TreeError::Unreadable { root: self.root, source })?;
        let mut moving = 0;
        for stat in &found {
            if skip.contains(&stat.id.pid) || process::waits_for_stopped_child(stat, &found) {
                continue;
            }
            match stat.state() {
                RunState::Live => {}
                // Its first thread obeyed; the others are on their way.
                RunState::Stopped if self.look == ProcScan::Thorough && stat.threads > 1 => {
                    let stand = process::all_threads_stand(stat.id.pid)
                        .map_err(|source| TreeError::Unreadable { root: self.root, source })?;
                    moving += usize::from(!stand);
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
            if self.known.insert(stat.id) {
                self.stopped.push(stat.id);
            }
        }
        // While things move a quick look reaches the most; only a thorough one may call it quiet.
        match (moving, self.look) {
            (0, ProcScan::Thorough) => self.quiet_passes += 1,
            (0, ProcScan::Quick) => self.look = ProcScan::Thorough,
            (_, ProcScan::Quick | ProcScan::Thorough) => {
                self.quiet_passes = 0;
                self.look = ProcScan::Quick;
            }
        }
        Ok(moving)
    }

    /// Those that this work stopped (who was stopped before is not among them), parents first.
    pub fn into_stopped(self) -> Vec<ProcessId> {
        self.stopped
    }

    /// How many this work has stopped so far.
    pub fn count(&self) -> usize {
        self.stopped.len()
    }
}

/// Continues processes, in the reverse order of their stopping. Who is gone is skipped.
pub fn continue_all(stopped: &[ProcessId]) {
    for &id in stopped.iter().rev() {
        // A failure means that it became another user's process meanwhile; nobody could do better.
        process::signal(id, libc::SIGCONT).ok();
    }
}

/// How long the work of killing tries to stop everybody first. One that waits for a dead disk
/// cannot be stopped, and the others must not live on because of it.
const STOP_PATIENCE: Duration = Duration::from_millis(200);

/// Killing a tree: stops everybody first, so that nobody sees another's death and goes on to the
/// next line of its script, and so that nobody forks meanwhile.
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

    /// Sends SIGKILL to all that are left, children first. The caller reaps what becomes its child.
    pub fn step(&mut self) -> Result<Progress, TreeError> {
        if let Some((work, until)) = &mut self.stopping {
            match work.step(&HashSet::new()) {
                Ok(Progress::Working(moving)) if Instant::now() < *until => return Ok(Progress::Working(moving)),
                // Who cannot be stopped can be killed all the same.
                Ok(Progress::Working(_) | Progress::Done) | Err(_) => self.stopping = None,
            }
        }
        let unreadable = |source| TreeError::Unreadable { root: self.root, source };
        let mut found = process::descendants(self.root, ProcScan::Quick).map_err(unreadable)?;
        found.retain(|stat| stat.state() != RunState::Dead);
        if found.is_empty() {
            found = process::descendants(self.root, ProcScan::Thorough).map_err(unreadable)?;
            found.retain(|stat| stat.state() != RunState::Dead);
        }
        let mut denied = None;
        for stat in found.iter().rev() {
            match process::signal(stat.id, libc::SIGKILL) {
                Ok(true) => {
                    self.killed.insert(stat.id);
                }
                Ok(false) => {}
                Err(source) => denied = Some(TreeError::Denied { id: stat.id, source }),
            }
        }
        match denied {
            // The others had their signal first: one foreign process must not save them.
            Some(error) => Err(error),
            None if found.is_empty() => Ok(Progress::Done),
            None => Ok(Progress::Working(found.len())),
        }
    }

    /// Counts somebody in that was killed by other means.
    pub fn note(&mut self, id: ProcessId) {
        self.killed.insert(id);
    }

    /// Those that were killed.
    pub fn killed(&self) -> &HashSet<ProcessId> {
        &self.killed
    }
}

/// Kills everything below `root`, children first, until nothing is left; returns how many.
pub fn kill_tree(root: i32, patience: Duration) -> Result<usize, TreeError> {
    let started = Instant::now();
    let mut work = KillWork::new(root);
    loop {
        match work.step()? {
            Progress::Done => return Ok(work.killed().len()),
            Progress::Working(remaining) if started.elapsed() >= patience => {
                return Err(timeout(root, started, remaining));
            }
            Progress::Working(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn timeout(root: i32, started: Instant, remaining: usize) -> TreeError {
    let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    TreeError::Timeout { root, waited_ms, remaining }
}
