//! Quiesces, freezes and thaws one agent's tree: a state machine that never waits.
//!
//! ```text
//!            quiesce            leader stopped | grace over
//!  Running ──────────> Quiescing ──────────────────────────> Quiesced
//!   ^  ^  └──────────────────────┐ freeze            freeze    │   │
//!   │  │ failed, too late        v                             │   │ lease over, thaw
//!   │  └──────────────────── Freezing <────────────────────────┘   │
//!   │                            │ all processes are frozen        │
//!   │ lease over, thaw           v                                 │
//!   ├──────────────────────  Frozen ─ commit ─> Frozen (committed) │
//!   └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! A freeze that is not committed has a lease, so that a daemon that dies during a pause never leaves an agent frozen.
//! Leases are measured by `CLOCK_MONOTONIC` (`Instant`), which does not advance while the machine is suspended:
//! otherwise a lease could expire at the moment daemon and shim wake up, before the daemon can renew it.
//!
//! A frozen tree that another process continues is frozen again, see `refreeze`.
//!
//! The undo applies only to what was done here: a process that was stopped by another one stays stopped.

mod phase;
mod refreeze;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fermata_protocol::pause::FreezerKind;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

pub use self::phase::FreezeEvent;
use self::phase::{Breaks, FREEZE_PATIENCE, FreezePhase, FreezeStep, FreezeWork, Lease, Undo};
use super::guard::Guard;
use super::reply::{PendingCall, Refused, ShimReply, done, encode, failed_to};
use super::wire::{FreezeReply, QuiesceOutcome, Quiesced, RefusalCode, TreeState};
use fermata_os::cgroup::{CgroupError, Freezer, Group, GroupWatch};
use fermata_os::process::{self, ProcScan, ProcessId, RunState};
use fermata_os::tree::{self, StopWork, TreeProgress};

/// How often to check a leader that was asked to stop.
const QUIESCE_TICK: Duration = Duration::from_millis(10);

/// Freezes the tree of one agent.
#[derive(Debug)]
pub struct FreezeController {
    root: i32,
    agent: ProcessId,
    freezer: Freezer,
    phase: FreezePhase,
}

impl FreezeController {
    /// `root` is the shim, the ancestor of every process of the agent.
    pub fn new(root: i32, agent: ProcessId, freezer: Freezer) -> Self {
        Self { root, agent, freezer, phase: FreezePhase::Running }
    }

    /// The agent's control group.
    pub fn group(&self) -> Option<&Group> {
        match &self.freezer {
            Freezer::Cgroup(group) => Some(group),
            Freezer::Signals { .. } => None,
        }
    }

    /// How the tree is frozen.
    pub fn mechanism(&self) -> FreezerKind {
        match &self.freezer {
            Freezer::Cgroup(_) => FreezerKind::Cgroup,
            Freezer::Signals { .. } => FreezerKind::Signals,
        }
    }

    pub fn state(&self) -> TreeState {
        if matches!(self.phase, FreezePhase::Frozen { .. }) {
            return TreeState::Frozen;
        }
        match self.leader() {
            RunState::Live => TreeState::Running,
            RunState::Stopped => TreeState::Stopped,
            RunState::Dead => TreeState::Ending,
        }
    }

    /// The state of the main process. One that is blocked in vfork by a stopped child counts as stopped.
    fn leader(&self) -> RunState {
        match process::stat_of(self.agent) {
            Ok(Some(stat)) if stat.letter == b'D' => {
                let below = process::descendants(self.agent.pid, ProcScan::Quick).unwrap_or_default();
                if process::waits_for_stopped_child(&stat, &below) { RunState::Stopped } else { RunState::Live }
            }
            Ok(Some(stat)) => stat.state(),
            Ok(None) => RunState::Dead,
            // If the state cannot be read, the process is assumed to run, since its end has not been reported.
            Err(_) => RunState::Live,
        }
    }

    /// Returns whether stops and continues of the main process are caused by other processes.
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, FreezePhase::Running)
    }

    /// Returns the milliseconds until the shim undoes everything by itself, and whether the freeze is committed.
    pub fn lease(&self, now: Instant) -> (Option<u64>, bool) {
        match &self.phase {
            FreezePhase::Quiesced { until, .. } | FreezePhase::Frozen { lease: Lease::Until(until), .. } => {
                (Some(millis(until.saturating_duration_since(now))), false)
            }
            FreezePhase::Frozen { lease: Lease::Committed, .. } => (None, true),
            FreezePhase::Running | FreezePhase::Quiescing { .. } | FreezePhase::Freezing { .. } => (None, false),
        }
    }

    /// Returns the number of processes of the tree.
    pub fn count(&self) -> u64 {
        let inside = self.group().and_then(|group| group.procs().ok()).unwrap_or_default();
        let below = process::descendants(self.root, ProcScan::Quick).unwrap_or_default();
        let outside =
            below.iter().filter(|stat| stat.state() != RunState::Dead && !inside.contains(&stat.id.pid)).count();
        (inside.len() + outside) as u64
    }

    /// Starts a quiesce. The answer is a [`FreezeEvent`] returned from here or from a later [`FreezeController::tick`].
    pub fn quiesce(&mut self, caller: PendingCall, grace: Duration, lease: Duration, now: Instant) -> Vec<FreezeEvent> {
        let refused = match &self.phase {
            FreezePhase::Running => None,
            // A repeated request: stopped processes stay stopped, and the undo list must be kept.
            FreezePhase::Quiesced { .. } => None,
            FreezePhase::Quiescing { .. } | FreezePhase::Freezing { .. } => Some(busy()),
            FreezePhase::Frozen { .. } => Some(Refused::new(RefusalCode::AlreadyFrozen, "the tree is frozen already")),
        };
        if let Some(refused) = refused {
            return vec![FreezeEvent::Answer(caller, Err(refused))];
        }
        let mut undo = self.take_undo();
        let leader = self.leader();
        let outcome = match leader {
            RunState::Dead => Some(QuiesceOutcome::Exited),
            RunState::Stopped if undo.quiesced.contains(&self.agent) => Some(QuiesceOutcome::Stopped),
            RunState::Stopped => Some(QuiesceOutcome::AlreadyStopped),
            RunState::Live => None,
        };
        for stat in process::descendants(self.root, ProcScan::Quick).unwrap_or_default() {
            if stat.pgid != self.agent.pid || undo.quiesced.contains(&stat.id) {
                continue;
            }
            match stat.state() {
                RunState::Live => undo.quiesced.push(stat.id),
                RunState::Stopped => {
                    undo.stopped_before.insert(stat.id);
                }
                RunState::Dead => {}
            }
        }
        // Processes that are stopped already discard it at their next SIGCONT. Fails (ESRCH) if the group has just
        // ended.
        killpg(Pid::from_raw(self.agent.pid), Signal::SIGTSTP).ok();
        if let Some(outcome) = outcome {
            self.phase = FreezePhase::Quiesced { undo, until: now + lease };
            return vec![FreezeEvent::Answer(caller, encode(&Quiesced { outcome, waited_ms: 0 }))];
        }
        self.phase = FreezePhase::Quiescing { undo, caller, started: now, until: now + grace, lease };
        self.tick(now)
    }

    /// Starts a freeze. The answer is a [`FreezeEvent`] returned from here or from a later [`FreezeController::tick`].
    pub fn freeze(&mut self, caller: PendingCall, lease: Duration, now: Instant) -> Vec<FreezeEvent> {
        match &mut self.phase {
            FreezePhase::Quiescing { .. } | FreezePhase::Freezing { .. } => {
                return vec![FreezeEvent::Answer(caller, Err(busy()))];
            }
            FreezePhase::Frozen { frozen, lease: current, broken, .. } if !broken.disproved => {
                // A repeated request gets the same answer. A committed freeze does not get a lease again.
                if let Lease::Until(until) = current {
                    *until = now + lease;
                }
                let again = FreezeReply { took_us: 0, ..frozen.clone() };
                return vec![FreezeEvent::Answer(caller, encode(&again))];
            }
            FreezePhase::Running | FreezePhase::Quiesced { .. } | FreezePhase::Frozen { .. } => {}
        }
        let undo = self.take_undo();
        match self.begin_to_freeze() {
            Ok(work) => {
                self.phase = FreezePhase::Freezing { undo, work, caller, started: now, lease };
                self.tick(now)
            }
            Err(error) => {
                let refused = Refused::new(RefusalCode::FreezeFailed, failed_to(&error));
                self.undo(undo).ok();
                vec![FreezeEvent::Answer(caller, Err(refused))]
            }
        }
    }

    fn begin_to_freeze(&self) -> Result<FreezeWork, CgroupError> {
        match &self.freezer {
            Freezer::Signals { .. } => Ok(FreezeWork::Tree { work: StopWork::new(self.root), inside: HashSet::new() }),
            Freezer::Cgroup(group) => {
                group.begin_freeze().and_then(|()| group.watch()).map(|watch| FreezeWork::Group { watch })
            }
        }
    }

    /// Extends the lease. Success proves that no process has run since the freeze.
    pub fn renew(&mut self, lease: Duration, now: Instant) -> ShimReply {
        self.check_guard(now);
        match &mut self.phase {
            FreezePhase::Frozen { broken, .. } if broken.disproved => Err(disproved()),
            FreezePhase::Frozen { lease: Lease::Committed, .. } => done(),
            FreezePhase::Quiesced { until, .. } | FreezePhase::Frozen { lease: Lease::Until(until), .. } => {
                *until = now + lease;
                done()
            }
            FreezePhase::Running | FreezePhase::Quiescing { .. } | FreezePhase::Freezing { .. } => Err(not_frozen()),
        }
    }

    /// Makes the freeze permanent.
    pub fn commit(&mut self, now: Instant) -> ShimReply {
        self.check_guard(now);
        match &mut self.phase {
            FreezePhase::Frozen { broken, .. } if broken.disproved => Err(disproved()),
            FreezePhase::Frozen { lease, .. } => {
                *lease = Lease::Committed;
                done()
            }
            FreezePhase::Running
            | FreezePhase::Quiesced { .. }
            | FreezePhase::Quiescing { .. }
            | FreezePhase::Freezing { .. } => Err(not_frozen()),
        }
    }

    /// Undoes everything; a waiting request is cancelled.
    pub fn thaw(&mut self) -> (ShimReply, Vec<FreezeEvent>) {
        let waiting = match &self.phase {
            FreezePhase::Quiescing { caller, .. } | FreezePhase::Freezing { caller, .. } => Some(*caller),
            FreezePhase::Running | FreezePhase::Quiesced { .. } | FreezePhase::Frozen { .. } => None,
        };
        let events = waiting
            .map(|caller| {
                let refused = Refused::new(RefusalCode::Cancelled, "a thaw, stop or kill has superseded the request");
                FreezeEvent::Answer(caller, Err(refused))
            })
            .into_iter()
            .collect();
        let undo = self.take_undo();
        (self.undo(undo).and_then(|()| done()), events)
    }

    /// Ends the work because the agent has ended or is to be killed: answers a waiting request and thaws nothing.
    pub fn abandon(&mut self, agent_ended: bool, now: Instant) -> Vec<FreezeEvent> {
        match std::mem::replace(&mut self.phase, FreezePhase::Running) {
            FreezePhase::Quiescing { caller, started, .. } if agent_ended => {
                let waited_ms = millis(now - started);
                let exited = Quiesced { outcome: QuiesceOutcome::Exited, waited_ms };
                vec![FreezeEvent::Answer(caller, encode(&exited))]
            }
            FreezePhase::Quiescing { caller, .. } | FreezePhase::Freezing { caller, .. } => {
                let refused = Refused::new(RefusalCode::Ending, "the agent is ending");
                vec![FreezeEvent::Answer(caller, Err(refused))]
            }
            FreezePhase::Running | FreezePhase::Quiesced { .. } | FreezePhase::Frozen { .. } => Vec::new(),
        }
    }

    /// When [`FreezeController::tick`] must be called at the latest.
    pub fn next_tick(&self, now: Instant) -> Option<Instant> {
        match &self.phase {
            FreezePhase::Running => None,
            // A leader that stops causes a SIGCHLD, but one that is blocked by its stopped child does not.
            FreezePhase::Quiescing { until, .. } => Some((now + QUIESCE_TICK).min(*until)),
            FreezePhase::Quiesced { until, .. } => Some(*until),
            FreezePhase::Frozen { broken: Breaks { again: Some((work, began)), .. }, .. } => match work {
                FreezeWork::Group { .. } => Some(*began + FREEZE_PATIENCE),
                FreezeWork::Tree { .. } => Some(now),
            },
            FreezePhase::Frozen { lease, guard, broken, .. } => {
                let until = match lease {
                    Lease::Until(until) => Some(*until),
                    Lease::Committed => None,
                };
                until.into_iter().chain(guard.next()).chain(broken.next()).min()
            }
            FreezePhase::Freezing { work: FreezeWork::Group { .. }, started, .. } => Some(*started + FREEZE_PATIENCE),
            FreezePhase::Freezing { work: FreezeWork::Tree { .. }, .. } => Some(now),
        }
    }

    /// The event file that reports that the group has been frozen or thawed, to be polled for POLLPRI.
    pub fn watch(&self) -> Option<&GroupWatch> {
        match &self.phase {
            FreezePhase::Freezing { work: FreezeWork::Group { watch }, .. }
            | FreezePhase::Frozen { broken: Breaks { again: Some((FreezeWork::Group { watch }, _)), .. }, .. } => {
                Some(watch)
            }
            FreezePhase::Frozen { guard, .. } => guard.watch(),
            FreezePhase::Running
            | FreezePhase::Quiescing { .. }
            | FreezePhase::Quiesced { .. }
            | FreezePhase::Freezing { .. } => None,
        }
    }

    /// Continues the work. Must be called after every wake-up.
    pub fn tick(&mut self, now: Instant) -> Vec<FreezeEvent> {
        match std::mem::replace(&mut self.phase, FreezePhase::Running) {
            FreezePhase::Quiescing { undo, caller, started, until, lease } => {
                let outcome = match self.leader() {
                    RunState::Dead => QuiesceOutcome::Exited,
                    RunState::Stopped => QuiesceOutcome::Stopped,
                    RunState::Live if now >= until => QuiesceOutcome::Ignored,
                    RunState::Live => {
                        self.phase = FreezePhase::Quiescing { undo, caller, started, until, lease };
                        return Vec::new();
                    }
                };
                self.phase = FreezePhase::Quiesced { undo, until: now + lease };
                let answer = encode(&Quiesced { outcome, waited_ms: millis(now - started) });
                vec![FreezeEvent::Answer(caller, answer)]
            }
            FreezePhase::Freezing { undo, work, caller, started, lease } => {
                self.go_on_freezing(undo, work, caller, started, lease, now)
            }
            phase @ (FreezePhase::Quiesced { until, .. } | FreezePhase::Frozen { lease: Lease::Until(until), .. })
                if now >= until =>
            {
                self.phase = phase;
                let undo = self.take_undo();
                if let Err(refused) = self.undo(undo) {
                    eprintln!("fermata-shim: failed to thaw after the lease: {}", refused.message);
                }
                vec![FreezeEvent::LeaseExpired]
            }
            FreezePhase::Frozen { undo, frozen, lease, guard, broken } => {
                self.phase = FreezePhase::Frozen { undo, frozen, lease, guard, broken };
                self.keep_frozen(now)
            }
            phase @ (FreezePhase::Running | FreezePhase::Quiesced { .. }) => {
                self.phase = phase;
                Vec::new()
            }
        }
    }

    fn go_on_freezing(
        &mut self,
        mut undo: Undo,
        work: FreezeWork,
        caller: PendingCall,
        started: Instant,
        lease: Duration,
        now: Instant,
    ) -> Vec<FreezeEvent> {
        let late = now - started >= FREEZE_PATIENCE;
        let problem = match self.freeze_step(work) {
            Ok(FreezeStep::Done { stopped, inside, watch }) => {
                undo.stopped.extend(stopped);
                let guard = Guard::new(self.root, watch, &inside, Instant::now());
                let frozen = FreezeReply {
                    mechanism: self.mechanism(),
                    processes: inside.len() as u64 + self.count_outside_group(),
                    took_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
                };
                let answer = encode(&frozen);
                let lease = Lease::Until(Instant::now() + lease);
                self.phase = FreezePhase::Frozen { undo, frozen, lease, guard, broken: Breaks::default() };
                return vec![FreezeEvent::Answer(caller, answer)];
            }
            Ok(FreezeStep::Working(work)) if !late => {
                self.phase = FreezePhase::Freezing { undo, work, caller, started, lease };
                return Vec::new();
            }
            Ok(FreezeStep::Working(work)) => {
                undo.stopped.extend(work.into_stopped());
                let message = format!("some processes were not frozen within {} ms", FREEZE_PATIENCE.as_millis());
                Refused::new(RefusalCode::FreezeTimeout, message)
            }
            Err((stopped, refused)) => {
                undo.stopped.extend(stopped);
                refused
            }
        };
        self.undo(undo).ok();
        vec![FreezeEvent::Answer(caller, Err(problem))]
    }

    fn freeze_step(&self, work: FreezeWork) -> Result<FreezeStep, (Vec<ProcessId>, Refused)> {
        let failed =
            |error: &(dyn std::error::Error + 'static)| Refused::new(RefusalCode::FreezeFailed, failed_to(error));
        match (work, self.group()) {
            (FreezeWork::Group { mut watch }, Some(group)) => {
                let events = watch.read().map_err(|error| (Vec::new(), failed(&error)))?;
                if !events.frozen {
                    return Ok(FreezeStep::Working(FreezeWork::Group { watch }));
                }
                let inside = group.procs().map_err(|error| (Vec::new(), failed(&error)))?;
                // A descendant may have been moved out of the group (by a job runner of an agent with root privileges,
                // for instance). It is stopped by signals. A quick scan is reliable, since the processes of the group
                // are frozen.
                let escaped = process::descendants(self.root, ProcScan::Quick)
                    .unwrap_or_default()
                    .iter()
                    .any(|stat| stat.state() == RunState::Live && !inside.contains(&stat.id.pid));
                if escaped {
                    let work = StopWork::new(self.root);
                    return self.freeze_step(FreezeWork::Tree { work, inside });
                }
                Ok(FreezeStep::Done { stopped: Vec::new(), inside, watch: Some(watch) })
            }
            (FreezeWork::Tree { mut work, inside }, _) => match work.step(&inside) {
                Ok(TreeProgress::Done) => {
                    let watch = self.group().and_then(|group| group.watch().ok());
                    Ok(FreezeStep::Done { stopped: work.into_stopped(), inside, watch })
                }
                Ok(TreeProgress::Working(_)) => Ok(FreezeStep::Working(FreezeWork::Tree { work, inside })),
                Err(error) => Err((work.into_stopped(), failed(&error))),
            },
            (FreezeWork::Group { .. }, None) => {
                Err((Vec::new(), Refused::new(RefusalCode::FreezeFailed, "the agent has no control group")))
            }
        }
    }

    /// Returns the number of live processes outside the group; all if there is no group.
    fn count_outside_group(&self) -> u64 {
        let inside = self.group().and_then(|group| group.procs().ok()).unwrap_or_default();
        process::descendants(self.root, ProcScan::Quick)
            .unwrap_or_default()
            .iter()
            .filter(|stat| stat.state() != RunState::Dead && !inside.contains(&stat.id.pid))
            .count() as u64
    }

    /// Leaves the phase and returns what must be undone.
    fn take_undo(&mut self) -> Undo {
        match std::mem::replace(&mut self.phase, FreezePhase::Running) {
            FreezePhase::Running => Undo::default(),
            FreezePhase::Quiescing { undo, .. }
            | FreezePhase::Quiesced { undo, .. }
            | FreezePhase::Frozen { undo, broken: Breaks { again: None, .. }, .. } => undo,
            FreezePhase::Freezing { mut undo, work, .. }
            | FreezePhase::Frozen { mut undo, broken: Breaks { again: Some((work, _)), .. }, .. } => {
                undo.stopped.extend(work.into_stopped());
                undo
            }
        }
    }

    fn undo(&self, undo: Undo) -> Result<(), Refused> {
        let thawed = match self.group() {
            // Also if the shim did not freeze the group, which no other program should use.
            Some(group) => group.thaw().map_err(|error| Refused::new(RefusalCode::ThawFailed, failed_to(&error))),
            None => Ok(()),
        };
        tree::continue_all(&undo.stopped);
        if !undo.quiesced.is_empty() {
            tree::continue_all(&undo.quiesced);
            // Processes that were created after the scan and stopped by the same signal.
            for stat in process::descendants(self.root, ProcScan::Quick).unwrap_or_default() {
                if stat.pgid == self.agent.pid
                    && stat.state() == RunState::Stopped
                    && !undo.stopped_before.contains(&stat.id)
                {
                    process::signal(stat.id, libc::SIGCONT).ok();
                }
            }
        }
        thawed
    }
}

fn busy() -> Refused {
    Refused::new(RefusalCode::Busy, "another quiesce or freeze is under way")
}

fn not_frozen() -> Refused {
    Refused::new(RefusalCode::NotFrozen, "the tree is not frozen (the lease may have expired)")
}

fn disproved() -> Refused {
    Refused::new(RefusalCode::FreezeBroken, "another process has continued the tree since it was frozen")
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
