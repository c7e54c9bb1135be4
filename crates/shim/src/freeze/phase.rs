//! The phases of a freeze, and the data that each of them carries.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::guard::Guard;
use crate::reply::{PendingCall, ShimReply};
use crate::wire::{FreezeBroken, FreezeReply};
use fermata_os::cgroup::GroupWatch;
use fermata_os::process::ProcessId;
use fermata_os::tree::StopWork;

/// How long a freeze may take. A process that waits for an unreachable network file system cannot be frozen.
pub(super) const FREEZE_PATIENCE: Duration = Duration::from_secs(2);

/// The minimum interval between two reports of a broken freeze, so that a process that continues the tree in a loop
/// cannot fill the database. Later breaks are counted in the next report.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// An event for the supervisor.
#[derive(Debug, PartialEq)]
pub enum FreezeEvent {
    /// A request can be answered.
    Answer(PendingCall, ShimReply),
    /// The lease has expired and everything has been undone.
    LeaseExpired,
    /// Another process has let processes of the tree run.
    Broken(FreezeBroken),
}

#[derive(Debug)]
pub(super) enum FreezePhase {
    Running,
    Quiescing { undo: Undo, caller: PendingCall, started: Instant, until: Instant, lease: Duration },
    Quiesced { undo: Undo, until: Instant },
    Freezing { undo: Undo, work: FreezeWork, caller: PendingCall, started: Instant, lease: Duration },
    Frozen { undo: Undo, frozen: FreezeReply, lease: Lease, guard: Guard, broken: Breaks },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lease {
    Until(Instant),
    Committed,
}

/// What has been done and must be undone.
#[derive(Debug, Default)]
pub(super) struct Undo {
    /// Processes that got SIGTSTP while they ran.
    pub(super) quiesced: Vec<ProcessId>,
    /// Members of the process group that had been stopped by another process.
    pub(super) stopped_before: HashSet<ProcessId>,
    /// Processes that were stopped by SIGSTOP, parents first.
    pub(super) stopped: Vec<ProcessId>,
}

#[derive(Debug)]
pub(super) enum FreezeWork {
    /// Waiting for the kernel to report `frozen 1`.
    Group { watch: GroupWatch },
    /// Stopping by signals; the processes `inside` are frozen by the group already.
    Tree { work: StopWork, inside: HashSet<i32> },
}

impl FreezeWork {
    /// Ends the work; returns the processes that it has stopped, parents first.
    pub(super) fn into_stopped(self) -> Vec<ProcessId> {
        match self {
            Self::Group { .. } => Vec::new(),
            Self::Tree { work, .. } => work.into_stopped(),
        }
    }
}

/// The result of a step of [`FreezeWork`].
pub(super) enum FreezeStep {
    Working(FreezeWork),
    Done { stopped: Vec<ProcessId>, inside: HashSet<i32>, watch: Option<GroupWatch> },
}

/// How other processes have broken a freeze.
#[derive(Debug, Default)]
pub(super) struct Breaks {
    /// The work of freezing the tree again, and when it started.
    pub(super) again: Option<(FreezeWork, Instant)>,
    /// How often the freeze was broken since the last report.
    pub(super) times: u64,
    /// How many processes have run since the last report.
    pub(super) processes: u64,
    pub(super) reported_at: Option<Instant>,
    /// Whether a process may have run since the freeze was requested, while it was not committed.
    pub(super) disproved: bool,
}

impl Breaks {
    /// When the next report is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.reported_at.filter(|_| self.times > 0).map(|at| at + REPORT_INTERVAL)
    }

    /// Returns a report if there is something to report and one is due.
    pub(super) fn report(&mut self, committed: bool, frozen_again: bool, now: Instant) -> Option<FreezeBroken> {
        if self.times == 0 || self.reported_at.is_some_and(|at| now < at + REPORT_INTERVAL) {
            return None;
        }
        self.reported_at = Some(now);
        let (times, processes) = (std::mem::take(&mut self.times), std::mem::take(&mut self.processes));
        Some(FreezeBroken { times, processes, committed, frozen_again })
    }
}
