//! The guard of a frozen tree: detects that a process of the tree has run.
//!
//! Any process with the permission can continue a tree that was stopped by signals (SIGCONT), or thaw a frozen group.
//! There are three sources of detection, which cost nothing while nothing happens: SIGCHLD for the shim's own children,
//! the group's event file, and for all other processes a periodic check, less frequent the longer the tree has been
//! frozen.
//!
//! A check compares the execution counters of each process with those at the time it was stopped. It therefore also
//! finds a process that was continued and stopped again between two checks, and *proves* that a tree without such a
//! process has not run.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fermata_os::cgroup::GroupWatch;
use fermata_os::process::{self, ProcScan, ProcessId, Ran, RunState};

/// The interval of checks under a lease: a pause is under way and needs the result soon.
const LEASED_PACE: Duration = Duration::from_millis(100);

/// The first and the longest interval of checks of a tree with a committed freeze. A check takes some 10 microseconds
/// per process, so that a thousand trees of two processes use about one percent of a processor.
const FIRST_PACE: Duration = Duration::from_millis(250);
const LAST_PACE: Duration = Duration::from_secs(2);

/// A process that is shown as stopped may still be executing its last instructions in the kernel. If its counters have
/// grown by no more than this, this soon after the freeze, it has not run.
const SETTLING: Duration = Duration::from_millis(100);
const SETTLING_NS: u64 = 50_000;

/// A process that must not run.
#[derive(Debug)]
struct GuardedProcess {
    id: ProcessId,
    /// `None` if the kernel does not count; then only the process's state is checked.
    ran: Option<Ran>,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardReading {
    /// No process has run.
    Still,
    /// The number of processes that have run; 0 for a group that was thawed as a whole.
    Ran(u64),
}

/// Guards one frozen tree.
#[derive(Debug)]
pub struct Guard {
    group: Option<GroupWatch>,
    watched: Vec<GuardedProcess>,
    /// Whether all processes are children of the shim, so that SIGCHLD reports every continuation.
    notified: bool,
    since: Instant,
    next: Instant,
    pace: Duration,
}

impl Guard {
    /// Starts guarding a tree that has just been frozen. `inside` is frozen by the group, all other descendants of
    /// `root` are stopped by signals.
    pub fn new(root: i32, group: Option<GroupWatch>, inside: &HashSet<i32>, now: Instant) -> Self {
        let mut notified = true;
        let mut watched = Vec::new();
        for stat in process::descendants(root, ProcScan::Quick).unwrap_or_default() {
            if stat.state() == RunState::Dead || inside.contains(&stat.id.pid) {
                continue;
            }
            notified &= stat.ppid == root;
            watched.push(GuardedProcess { id: stat.id, ran: process::ran(stat.id.pid).ok().flatten() });
        }
        Self { group, watched, notified, since: now, next: now + LEASED_PACE, pace: FIRST_PACE }
    }

    /// The event file of the group, to be polled for POLLPRI.
    pub fn watch(&self) -> Option<&GroupWatch> {
        self.group.as_ref()
    }

    /// When the next check is due; `None` if every continuation is reported.
    pub fn next(&self) -> Option<Instant> {
        (!self.notified).then_some(self.next)
    }

    /// Makes a check due at the next tick, since a process of the tree has changed.
    pub fn check_soon(&mut self, now: Instant) {
        self.next = now;
    }

    /// Returns whether the group was thawed as a whole. Reading the event file also arms it for the next change.
    pub fn is_thawed(&mut self) -> bool {
        let events = self.group.as_mut().and_then(|watch| watch.read().ok());
        events.is_some_and(|events| events.populated && !events.frozen)
    }

    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// Checks all processes. With a `committed` freeze the interval of checks grows.
    pub fn check(&mut self, committed: bool, now: Instant) -> GuardReading {
        self.next = now + if committed { self.pace } else { LEASED_PACE };
        if committed {
            self.pace = (self.pace * 2).min(LAST_PACE);
        }
        let thawed = self.is_thawed();
        let settling = now.saturating_duration_since(self.since) < SETTLING;
        let mut count = 0;
        let notified = self.notified;
        self.watched.retain_mut(|one| {
            let ran = process::ran(one.id.pid).ok().flatten();
            // If continuations are reported there is no later check that would find a process that was continued but
            // has not been scheduled yet.
            if ran.is_some() && ran == one.ran && !(notified && is_live(one.id)) {
                return true;
            }
            match process::stat_of(one.id) {
                // The process was killed, which requires no instruction of its own.
                Ok(None) => return false,
                Ok(Some(stat)) => match (stat.state(), one.ran, ran) {
                    (RunState::Dead, _, _) => return false,
                    (RunState::Stopped, Some(before), Some(after))
                        if settling && after.ns.saturating_sub(before.ns) < SETTLING_NS =>
                    {
                        one.ran = ran;
                    }
                    (RunState::Stopped, None, _) => {}
                    (RunState::Live | RunState::Stopped, _, _) => {
                        one.ran = ran;
                        count += 1;
                    }
                },
                // If the state cannot be read, nothing is known of the process.
                Err(_) => {}
            }
            true
        });
        if thawed || count > 0 { GuardReading::Ran(count) } else { GuardReading::Still }
    }
}

fn is_live(id: ProcessId) -> bool {
    matches!(process::stat_of(id), Ok(Some(stat)) if stat.state() == RunState::Live)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Looper(Child, ProcessId);

    impl Looper {
        fn stopped() -> Self {
            let child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
            let id = process::identify(child.id() as i32).unwrap().unwrap();
            let looper = Self(child, id);
            looper.stop();
            looper
        }

        fn stop(&self) {
            process::signal(self.1, libc::SIGSTOP).unwrap();
            while process::stat_of(self.1).unwrap().unwrap().state() != RunState::Stopped {
                std::thread::yield_now();
            }
        }
    }

    impl Drop for Looper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn guard(looper: &Looper) -> Guard {
        let now = Instant::now();
        let watched = vec![GuardedProcess { id: looper.1, ran: process::ran(looper.1.pid).unwrap() }];
        let since = now.checked_sub(SETTLING).unwrap();
        Guard { group: None, watched, notified: false, since, next: now, pace: FIRST_PACE }
    }

    #[test]
    fn a_process_that_was_continued_and_stopped_again_between_two_checks_is_found() {
        let looper = Looper::stopped();
        // It may be on its way off the processor for a moment.
        std::thread::sleep(SETTLING);
        let mut guard = guard(&looper);
        assert_eq!(guard.check(true, Instant::now()), GuardReading::Still);
        let before = process::ran(looper.1.pid).unwrap();
        process::signal(looper.1, libc::SIGCONT).unwrap();
        while process::ran(looper.1.pid).unwrap() == before {
            std::thread::yield_now();
        }
        looper.stop();
        assert_eq!(guard.check(true, Instant::now()), GuardReading::Ran(1));
    }

    #[test]
    fn a_child_that_was_continued_and_waits_for_a_processor_is_found() {
        // Live, and its account is the one of the freeze: as a stopped process after SIGCONT on a busy machine.
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = process::identify(child.id() as i32).unwrap().unwrap();
        let asleep = || std::fs::read_to_string(format!("/proc/{}/stat", id.pid)).unwrap().contains("(sleep) S ");
        while !asleep() {
            std::thread::yield_now();
        }
        let now = Instant::now();
        let watched = vec![GuardedProcess { id, ran: process::ran(id.pid).unwrap() }];
        let mut guard = Guard { group: None, watched, notified: true, since: now, next: now, pace: FIRST_PACE };
        assert_eq!(guard.check(false, now), GuardReading::Ran(1));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_was_killed_has_not_run() {
        let mut looper = Looper::stopped();
        std::thread::sleep(SETTLING);
        let mut guard = guard(&looper);
        looper.0.kill().unwrap();
        while process::is_alive(looper.1).unwrap() {
            std::thread::yield_now();
        }
        assert_eq!(guard.check(true, Instant::now()), GuardReading::Still);
        looper.0.wait().unwrap();
        assert_eq!(guard.check(true, Instant::now()), GuardReading::Still);
    }

    #[test]
    fn a_tree_with_a_committed_freeze_is_checked_less_and_less_often() {
        let looper = Looper::stopped();
        let mut guard = guard(&looper);
        let now = Instant::now();
        let mut paces = Vec::new();
        for _ in 0..5 {
            guard.check(true, now);
            paces.push((guard.next - now).as_millis());
        }
        assert_eq!(paces, [250, 500, 1000, 2000, 2000]);
        guard.check(false, now);
        assert_eq!(guard.next - now, LEASED_PACE);
    }
}
