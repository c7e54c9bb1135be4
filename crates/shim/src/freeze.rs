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
//!   ├───────────────────────  Frozen ─ commit ─> Frozen (committed) │
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

mod refreeze;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fermata_protocol::error_chain;
use fermata_protocol::pause::FreezerKind;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::connection::ConnectionId;
use super::guard::Guard;
use super::wire::{FreezeBroken, FreezeReply, QuiesceOutcome, Quiesced, RefusalCode, TreeState};
use fermata_os::cgroup::{CgroupError, Freezer, Group, GroupWatch};
use fermata_os::process::{self, ProcScan, ProcessId, RunState};
use fermata_os::tree::{self, StopWork, TreeProgress};

/// How long a freeze may take. A process that waits for an unreachable network file system cannot be frozen.
const FREEZE_PATIENCE: Duration = Duration::from_secs(2);

/// How often to check a leader that was asked to stop.
const QUIESCE_TICK: Duration = Duration::from_millis(10);

/// A request that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub connection: ConnectionId,
    /// The id of the request on this connection.
    pub id: u64,
}

/// A refusal and its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub code: RefusalCode,
    /// A sentence for people.
    pub message: String,
}

impl Refused {
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The result of a request, or a refusal.
pub type Answer = Result<Value, Refused>;

/// An event for the supervisor.
#[derive(Debug, PartialEq)]
pub enum FreezeEvent {
    /// A request can be answered.
    Answer(Caller, Answer),
    /// The lease has expired and everything has been undone.
    LeaseExpired,
    /// Another process has let processes of the tree run.
    Broken(FreezeBroken),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lease {
    Until(Instant),
    Committed,
}

/// What has been done and must be undone.
#[derive(Debug, Default)]
struct Undo {
    /// Processes that got SIGTSTP while they ran.
    quiesced: Vec<ProcessId>,
    /// Members of the group that had been stopped by another process.
    stopped_before: HashSet<ProcessId>,
    /// Processes that were stopped by SIGSTOP, parents first.
    stopped: Vec<ProcessId>,
}

#[derive(Debug)]
enum FreezeWork {
    /// Waiting for the kernel to report `frozen 1`.
    Group { watch: GroupWatch },
    /// Stopping by signals; the processes `inside` are frozen by the group already.
    Tree { work: StopWork, inside: HashSet<i32> },
}

#[derive(Debug)]
enum Phase {
    Running,
    Quiescing { undo: Undo, caller: Caller, started: Instant, until: Instant, lease: Duration },
    Quiesced { undo: Undo, until: Instant },
    Freezing { undo: Undo, work: FreezeWork, caller: Caller, started: Instant, lease: Duration },
    Frozen { undo: Undo, frozen: FreezeReply, lease: Lease, guard: Guard, broken: Broken },
}

/// The state of a freeze that other processes have broken.
#[derive(Debug, Default)]
struct Broken {
    /// The work of freezing the tree again, and when it started.
    again: Option<(FreezeWork, Instant)>,
    /// How often the freeze was broken, and how many processes have run, since the last report.
    times: u64,
    processes: u64,
    reported_at: Option<Instant>,
    /// Whether a process may have run since the freeze was requested, while it was not committed.
    disproved: bool,
}

/// Freezes the tree of one agent.
#[derive(Debug)]
pub struct FreezeController {
    root: i32,
    agent: ProcessId,
    freezer: Freezer,
    phase: Phase,
}

impl FreezeController {
    /// `root` is the shim, the ancestor of every process of the agent.
    pub fn new(root: i32, agent: ProcessId, freezer: Freezer) -> Self {
        Self { root, agent, freezer, phase: Phase::Running }
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
        if matches!(self.phase, Phase::Frozen { .. }) {
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
        matches!(self.phase, Phase::Running)
    }

    /// Returns the milliseconds until the shim undoes everything by itself, and whether the freeze is committed.
    pub fn lease(&self, now: Instant) -> (Option<u64>, bool) {
        match &self.phase {
            Phase::Quiesced { until, .. } | Phase::Frozen { lease: Lease::Until(until), .. } => {
                (Some(millis(until.saturating_duration_since(now))), false)
            }
            Phase::Frozen { lease: Lease::Committed, .. } => (None, true),
            Phase::Running | Phase::Quiescing { .. } | Phase::Freezing { .. } => (None, false),
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
    pub fn quiesce(&mut self, caller: Caller, grace: Duration, lease: Duration, now: Instant) -> Vec<FreezeEvent> {
        let refused = match &self.phase {
            Phase::Running => None,
            // A repeated request: stopped processes stay stopped, and the undo list must be kept.
            Phase::Quiesced { .. } => None,
            Phase::Quiescing { .. } | Phase::Freezing { .. } => Some(busy()),
            Phase::Frozen { .. } => Some(Refused::new(RefusalCode::AlreadyFrozen, "the tree is frozen already")),
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
            self.phase = Phase::Quiesced { undo, until: now + lease };
            return vec![FreezeEvent::Answer(caller, encode(&Quiesced { outcome, waited_ms: 0 }))];
        }
        self.phase = Phase::Quiescing { undo, caller, started: now, until: now + grace, lease };
        self.tick(now)
    }

    /// Starts a freeze. The answer is a [`FreezeEvent`] returned from here or from a later [`FreezeController::tick`].
    pub fn freeze(&mut self, caller: Caller, lease: Duration, now: Instant) -> Vec<FreezeEvent> {
        match &mut self.phase {
            Phase::Quiescing { .. } | Phase::Freezing { .. } => {
                return vec![FreezeEvent::Answer(caller, Err(busy()))];
            }
            Phase::Frozen { frozen, lease: current, broken, .. } if !broken.disproved => {
                // A repeated request gets the same answer. A committed freeze does not get a lease again.
                if let Lease::Until(until) = current {
                    *until = now + lease;
                }
                let again = FreezeReply { took_us: 0, ..frozen.clone() };
                return vec![FreezeEvent::Answer(caller, encode(&again))];
            }
            Phase::Running | Phase::Quiesced { .. } | Phase::Frozen { .. } => {}
        }
        let undo = self.take_undo();
        match self.begin_to_freeze() {
            Ok(work) => {
                self.phase = Phase::Freezing { undo, work, caller, started: now, lease };
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
    pub fn renew(&mut self, lease: Duration, now: Instant) -> Answer {
        self.check_guard(now);
        match &mut self.phase {
            Phase::Frozen { broken, .. } if broken.disproved => Err(refreeze::disproved()),
            Phase::Frozen { lease: Lease::Committed, .. } => Ok(Value::Object(Default::default())),
            Phase::Quiesced { until, .. } | Phase::Frozen { lease: Lease::Until(until), .. } => {
                *until = now + lease;
                Ok(Value::Object(Default::default()))
            }
            Phase::Running | Phase::Quiescing { .. } | Phase::Freezing { .. } => Err(not_frozen()),
        }
    }

    /// Makes the freeze permanent.
    pub fn commit(&mut self, now: Instant) -> Answer {
        self.check_guard(now);
        match &mut self.phase {
            Phase::Frozen { broken, .. } if broken.disproved => Err(refreeze::disproved()),
            Phase::Frozen { lease, .. } => {
                *lease = Lease::Committed;
                Ok(Value::Object(Default::default()))
            }
            Phase::Running | Phase::Quiesced { .. } | Phase::Quiescing { .. } | Phase::Freezing { .. } => {
                Err(not_frozen())
            }
        }
    }

    /// Undoes everything; a waiting request is cancelled.
    pub fn thaw(&mut self) -> (Answer, Vec<FreezeEvent>) {
        let waiting = match &self.phase {
            Phase::Quiescing { caller, .. } | Phase::Freezing { caller, .. } => Some(*caller),
            Phase::Running | Phase::Quiesced { .. } | Phase::Frozen { .. } => None,
        };
        let events = waiting
            .map(|caller| {
                let refused = Refused::new(RefusalCode::Cancelled, "a thaw, stop or kill has superseded the request");
                FreezeEvent::Answer(caller, Err(refused))
            })
            .into_iter()
            .collect();
        let undo = self.take_undo();
        (self.undo(undo).map(|()| Value::Object(Default::default())), events)
    }

    /// Ends the work because the agent has ended or is to be killed: answers a waiting request and thaws nothing.
    pub fn abandon(&mut self, agent_ended: bool, now: Instant) -> Vec<FreezeEvent> {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Quiescing { caller, started, .. } if agent_ended => {
                let waited_ms = millis(now - started);
                let exited = Quiesced { outcome: QuiesceOutcome::Exited, waited_ms };
                vec![FreezeEvent::Answer(caller, encode(&exited))]
            }
            Phase::Quiescing { caller, .. } | Phase::Freezing { caller, .. } => {
                let refused = Refused::new(RefusalCode::Ending, "the agent is ending");
                vec![FreezeEvent::Answer(caller, Err(refused))]
            }
            Phase::Running | Phase::Quiesced { .. } | Phase::Frozen { .. } => Vec::new(),
        }
    }

    /// When [`FreezeController::tick`] must be called at the latest.
    pub fn next_tick(&self, now: Instant) -> Option<Instant> {
        match &self.phase {
            Phase::Running => None,
            // A leader that stops causes a SIGCHLD, but one that is blocked by its stopped child does not.
            Phase::Quiescing { until, .. } => Some((now + QUIESCE_TICK).min(*until)),
            Phase::Quiesced { until, .. } => Some(*until),
            Phase::Frozen { broken: Broken { again: Some((work, began)), .. }, .. } => match work {
                FreezeWork::Group { .. } => Some(*began + FREEZE_PATIENCE),
                FreezeWork::Tree { .. } => Some(now),
            },
            Phase::Frozen { lease, guard, broken, .. } => {
                let until = match lease {
                    Lease::Until(until) => Some(*until),
                    Lease::Committed => None,
                };
                until.into_iter().chain(guard.next()).chain(broken.next()).min()
            }
            Phase::Freezing { work: FreezeWork::Group { .. }, started, .. } => Some(*started + FREEZE_PATIENCE),
            Phase::Freezing { work: FreezeWork::Tree { .. }, .. } => Some(now),
        }
    }

    /// The event file that reports that the group has been frozen or thawed, to be polled for POLLPRI.
    pub fn watch(&self) -> Option<&GroupWatch> {
        match &self.phase {
            Phase::Freezing { work: FreezeWork::Group { watch }, .. }
            | Phase::Frozen { broken: Broken { again: Some((FreezeWork::Group { watch }, _)), .. }, .. } => Some(watch),
            Phase::Frozen { guard, .. } => guard.watch(),
            Phase::Running | Phase::Quiescing { .. } | Phase::Quiesced { .. } | Phase::Freezing { .. } => None,
        }
    }

    /// Continues the work. Must be called after every wake-up.
    pub fn tick(&mut self, now: Instant) -> Vec<FreezeEvent> {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Quiescing { undo, caller, started, until, lease } => {
                let outcome = match self.leader() {
                    RunState::Dead => QuiesceOutcome::Exited,
                    RunState::Stopped => QuiesceOutcome::Stopped,
                    RunState::Live if now >= until => QuiesceOutcome::Ignored,
                    RunState::Live => {
                        self.phase = Phase::Quiescing { undo, caller, started, until, lease };
                        return Vec::new();
                    }
                };
                self.phase = Phase::Quiesced { undo, until: now + lease };
                let answer = encode(&Quiesced { outcome, waited_ms: millis(now - started) });
                vec![FreezeEvent::Answer(caller, answer)]
            }
            Phase::Freezing { undo, work, caller, started, lease } => {
                self.go_on_freezing(undo, work, caller, started, lease, now)
            }
            phase @ (Phase::Quiesced { until, .. } | Phase::Frozen { lease: Lease::Until(until), .. })
                if now >= until =>
            {
                self.phase = phase;
                let undo = self.take_undo();
                if let Err(refused) = self.undo(undo) {
                    eprintln!("fermata-shim: failed to thaw after the lease: {}", refused.message);
                }
                vec![FreezeEvent::LeaseExpired]
            }
            Phase::Frozen { undo, frozen, lease, guard, broken } => {
                self.phase = Phase::Frozen { undo, frozen, lease, guard, broken };
                self.keep_frozen(now)
            }
            other => {
                self.phase = other;
                Vec::new()
            }
        }
    }

    fn go_on_freezing(
        &mut self,
        mut undo: Undo,
        work: FreezeWork,
        caller: Caller,
        started: Instant,
        lease: Duration,
        now: Instant,
    ) -> Vec<FreezeEvent> {
        let late = now - started >= FREEZE_PATIENCE;
        let problem = match self.freeze_step(work) {
            Ok(Step::Done { stopped, inside, watch }) => {
                undo.stopped.extend(stopped);
                let guard = Guard::new(self.root, watch, &inside, Instant::now());
                let frozen = FreezeReply {
                    mechanism: self.mechanism(),
                    processes: inside.len() as u64 + self.count_outside_group(),
                    took_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
                };
                let answer = encode(&frozen);
                let lease = Lease::Until(Instant::now() + lease);
                self.phase = Phase::Frozen { undo, frozen, lease, guard, broken: Broken::default() };
                return vec![FreezeEvent::Answer(caller, answer)];
            }
            Ok(Step::Working(work)) if !late => {
                self.phase = Phase::Freezing { undo, work, caller, started, lease };
                return Vec::new();
            }
            Ok(Step::Working(work)) => {
                if let FreezeWork::Tree { work, .. } = work {
                    undo.stopped.extend(work.into_stopped());
                }
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

    fn freeze_step(&self, work: FreezeWork) -> Result<Step, (Vec<ProcessId>, Refused)> {
        let failed =
            |error: &(dyn std::error::Error + 'static)| Refused::new(RefusalCode::FreezeFailed, failed_to(error));
        match (work, self.group()) {
            (FreezeWork::Group { mut watch }, Some(group)) => {
                let events = watch.read().map_err(|error| (Vec::new(), failed(&error)))?;
                if !events.frozen {
                    return Ok(Step::Working(FreezeWork::Group { watch }));
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
                Ok(Step::Done { stopped: Vec::new(), inside, watch: Some(watch) })
            }
            (FreezeWork::Tree { mut work, inside }, _) => match work.step(&inside) {
                Ok(TreeProgress::Done) => {
                    let watch = self.group().and_then(|group| group.watch().ok());
                    Ok(Step::Done { stopped: work.into_stopped(), inside, watch })
                }
                Ok(TreeProgress::Working(_)) => Ok(Step::Working(FreezeWork::Tree { work, inside })),
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
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Running => Undo::default(),
            Phase::Quiescing { undo, .. }
            | Phase::Quiesced { undo, .. }
            | Phase::Frozen { undo, broken: Broken { again: None, .. }, .. } => undo,
            Phase::Freezing { mut undo, work, .. }
            | Phase::Frozen { mut undo, broken: Broken { again: Some((work, _)), .. }, .. } => {
                if let FreezeWork::Tree { work, .. } = work {
                    undo.stopped.extend(work.into_stopped());
                }
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

enum Step {
    Working(FreezeWork),
    Done { stopped: Vec<ProcessId>, inside: HashSet<i32>, watch: Option<GroupWatch> },
}

fn busy() -> Refused {
    Refused::new(RefusalCode::Busy, "another quiesce or freeze is under way")
}

fn not_frozen() -> Refused {
    Refused::new(RefusalCode::NotFrozen, "the tree is not frozen (the lease may have expired)")
}

/// Serialises a result.
pub fn encode(result: &impl serde::Serialize) -> Answer {
    serde_json::to_value(result).map_err(|error| Refused::new(RefusalCode::Other, error.to_string()))
}

/// Formats an error and its causes as one line: "failed to …: …".
pub fn failed_to(error: &(dyn std::error::Error + 'static)) -> String {
    format!("failed to {}", error_chain(error))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
