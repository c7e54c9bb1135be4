//! The guard of a frozen tree: sees that nobody in it runs, and says so when somebody did.
//!
//! A tree that was stopped by signals is thawed by anybody's SIGCONT, a frozen group by anybody
//! who may write to it. Three sources tell of it, and none of them costs anything while nothing
//! happens: SIGCHLD for the shim's own children, the group's event file, and for everybody else a
//! look every now and then, rarer the longer nothing happens.
//!
//! A look compares how much each process has run with what it had run when it was stopped. So one
//! that was continued and stopped again between two looks is found as well, and a tree in which
//! nobody has run since is *proven* to have stood still.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fermata_os::cgroup::Watch;
use fermata_os::process::{self, ProcScan, ProcessId, Ran, RunState};

/// How often to look under a lease: a pause is under way and wants to know soon.
const LEASED_PACE: Duration = Duration::from_millis(100);

/// How often to look at a tree that is held: at first, and at last. A look costs some 10
/// microseconds per process, so that a thousand held trees of two processes take about one
/// percent of a processor.
const FIRST_PACE: Duration = Duration::from_millis(250);
const LAST_PACE: Duration = Duration::from_secs(2);

/// A process that shows as stopped may be on its last few instructions in the kernel: so soon
/// after the freeze, and for so short a time, it has not run.
const SETTLING: Duration = Duration::from_millis(100);
const SETTLING_NS: u64 = 50_000;

/// One process that must not run.
#[derive(Debug)]
struct Watched {
    id: ProcessId,
    /// None where the kernel does not count: then only its state can tell.
    ran: Option<Ran>,
}

/// What a look has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardReading {
    /// Nobody has run.
    Still,
    /// So many processes have run; 0 for a group that was thawed as a whole.
    Ran(u64),
}

/// Watches over one frozen tree.
#[derive(Debug)]
pub struct Guard {
    group: Option<Watch>,
    watched: Vec<Watched>,
    /// Whether SIGCHLD tells of every continuation, because all are children of the shim.
    notified: bool,
    since: Instant,
    next: Instant,
    pace: Duration,
}

impl Guard {
    /// Begins to watch over a tree that has just come to a standstill; `inside` is held by the
    /// group, all other descendants of `root` by signals.
    pub fn new(root: i32, group: Option<Watch>, inside: &HashSet<i32>, now: Instant) -> Self {
        let mut notified = true;
        let mut watched = Vec::new();
        for stat in process::descendants(root, ProcScan::Quick).unwrap_or_default() {
            if stat.state() == RunState::Dead || inside.contains(&stat.id.pid) {
                continue;
            }
            notified &= stat.ppid == root;
            watched.push(Watched { id: stat.id, ran: process::ran(stat.id.pid).ok().flatten() });
        }
        Self { group, watched, notified, since: now, next: now + LEASED_PACE, pace: FIRST_PACE }
    }

    /// What tells that the group was thawed, to be polled for POLLPRI.
    pub fn watch(&self) -> Option<&Watch> {
        self.group.as_ref()
    }

    /// When to look again; never, where every change is told.
    pub fn next(&self) -> Option<Instant> {
        (!self.notified).then_some(self.next)
    }

    /// Looks at once at the next tick: somebody of the tree has changed.
    pub fn check_soon(&mut self, now: Instant) {
        self.next = now;
    }

    /// Whether the group was thawed as a whole. Reading it also arms what announces the next change.
    pub fn is_thawed(&mut self) -> bool {
        let events = self.group.as_mut().and_then(|watch| watch.read().ok());
        events.is_some_and(|events| events.populated && !events.frozen)
    }

    /// Whether it is time to look.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// Looks at everybody. A tree that is `held` is looked at more and more rarely.
    pub fn check(&mut self, held: bool, now: Instant) -> GuardReading {
        self.next = now + if held { self.pace } else { LEASED_PACE };
        if held {
            self.pace = (self.pace * 2).min(LAST_PACE);
        }
        let thawed = self.is_thawed();
        let settling = now.saturating_duration_since(self.since) < SETTLING;
        let mut count = 0;
        let notified = self.notified;
        self.watched.retain_mut(|one| {
            let ran = process::ran(one.id.pid).ok().flatten();
            // Where changes are told there is no later scan to find a process that was continued and has not got a
            // processor yet.
            if ran.is_some() && ran == one.ran && !(notified && is_live(one.id)) {
                return true;
            }
            match process::stat_of(one.id) {
                // Killed, which needs no step of its own.
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
                // Unreadable says nothing.
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
        let watched = vec![Watched { id: looper.1, ran: process::ran(looper.1.pid).unwrap() }];
        let since = now.checked_sub(SETTLING).unwrap();
        Guard { group: None, watched, notified: false, since, next: now, pace: FIRST_PACE }
    }

    #[test]
    fn one_that_was_continued_and_stopped_again_between_two_looks_is_found() {
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
        let watched = vec![Watched { id, ran: process::ran(id.pid).unwrap() }];
        let mut guard = Guard { group: None, watched, notified: true, since: now, next: now, pace: FIRST_PACE };
        assert_eq!(guard.check(false, now), GuardReading::Ran(1));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn one_that_was_killed_has_not_run() {
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
    fn a_held_tree_is_looked_at_more_and_more_rarely() {
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
