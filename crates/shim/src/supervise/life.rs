//! The states of the supervisor, from the running agent to the recorded exit, and the data of each of them.

use std::time::{Duration, Instant};

use super::killing::Killing;
use crate::record::ExitRecord;
use fermata_os::prelude::Prelude;
use fermata_os::process::ProcessId;

/// How long killed processes may take to end (one may wait for a failed disk).
pub(super) const CLEAR_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for the end of the pipes if a process outside the tree holds them open.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_millis(500);
/// The interval of retries if the exit cannot be recorded.
pub(super) const RECORD_RETRY: Duration = Duration::from_millis(200);
/// How long recording the exit is retried.
pub(super) const RECORD_PATIENCE: Duration = Duration::from_secs(30);

/// How the main process has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct MainEnd {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) core_dumped: bool,
    /// Unix milliseconds.
    pub(super) at_ms: i64,
}

#[derive(Debug)]
pub(super) enum Life {
    Running,
    /// SIGTERM was sent; the tree is killed at `kill_at`.
    Stopping {
        kill_at: Instant,
    },
    /// The whole tree is being killed, the main process included.
    Killing {
        work: Killing,
    },
    /// The main process has ended; the rest of the tree is being killed.
    Clearing {
        end: MainEnd,
        work: Killing,
        until: Instant,
    },
    /// The last output is being read.
    Draining {
        end: MainEnd,
        leftovers: u64,
        until: Instant,
    },
    /// The post-stop command.
    After(PostStopStage),
    /// The exit record is being written.
    Recording {
        record: ExitRecord,
        next: Instant,
        until: Instant,
    },
    Over {
        record: ExitRecord,
    },
}

impl Life {
    /// When the state must be examined at the latest; `None` if only an event can change it.
    pub(super) fn next_tick(&self, now: Instant) -> Option<Instant> {
        match self {
            Self::Running => None,
            Self::Stopping { kill_at } => Some(*kill_at),
            Self::Killing { work } | Self::Clearing { work, .. } => Some(now + work.tick(now)),
            Self::Draining { until, .. } => Some(*until),
            Self::After(stage) => Some(stage.next_tick(now)),
            Self::Recording { next, .. } => Some(*next),
            Self::Over { .. } => Some(now),
        }
    }

    /// Returns whether the main process has ended.
    pub(super) fn has_ended(&self) -> bool {
        match self {
            Self::Running | Self::Stopping { .. } | Self::Killing { .. } => false,
            Self::Clearing { .. }
            | Self::Draining { .. }
            | Self::After(_)
            | Self::Recording { .. }
            | Self::Over { .. } => true,
        }
    }
}

/// The stages of the post-stop command.
#[derive(Debug)]
pub(super) enum PostStopStage {
    /// The preliminary exit record is being written.
    Noting { record: ExitRecord, next: Instant, until: Instant },
    /// The command runs.
    Running { record: ExitRecord, hook: ProcessId, until: Instant },
    /// The processes that it has left are being killed.
    Clearing { record: ExitRecord, work: Killing, until: Instant },
    /// Its last output is being read.
    Draining { record: ExitRecord, until: Instant },
}

impl PostStopStage {
    fn next_tick(&self, now: Instant) -> Instant {
        match self {
            Self::Noting { next, .. } => *next,
            Self::Running { until, .. } | Self::Draining { until, .. } => *until,
            Self::Clearing { work, .. } => now + work.tick(now),
        }
    }
}

/// The pre-start command, until the agent's program executes.
#[derive(Debug)]
pub(super) struct PreStart {
    pub(super) prelude: Prelude,
    /// How long it may still run; `None` once it has ended.
    pub(super) left: Option<Duration>,
    pub(super) checked_at: Instant,
    /// Whether its time has been running since the last check, because it was not frozen.
    pub(super) clock_runs: bool,
}

/// Whether to continue with the next state at once.
pub(super) enum Flow {
    /// Continue.
    On(Life),
    /// Wait for an event.
    Wait(Life),
}
