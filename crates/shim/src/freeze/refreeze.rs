//! Freezes a tree again that another process has let run.
//!
//! The daemon must learn of it. A freeze under a lease is *disproved* from then on: it can be neither renewed nor
//! committed, and the pause that relies on it fails. A committed freeze is restored and reported.

use std::time::Instant;

use super::FreezeController;
use super::phase::{Breaks, FREEZE_PATIENCE, FreezeEvent, FreezePhase, FreezeStep, Lease};
use crate::guard::{Guard, GuardReading};
use crate::reply::failed_to;

impl FreezeController {
    /// Checks the guard at the next tick, since a child has stopped or continued.
    pub fn check_soon(&mut self, now: Instant) {
        if let FreezePhase::Frozen { guard, .. } = &mut self.phase {
            guard.check_soon(now);
        }
    }

    /// Checks whether a process has run, and starts to freeze again if so.
    pub(super) fn check_guard(&mut self, now: Instant) {
        let FreezePhase::Frozen { guard, lease, broken: Breaks { again: None, .. }, .. } = &mut self.phase else {
            return;
        };
        let committed = *lease == Lease::Committed;
        let GuardReading::Ran(count) = guard.check(committed, now) else { return };
        let work = self.begin_to_freeze();
        let FreezePhase::Frozen { broken, .. } = &mut self.phase else { return };
        broken.processes += count;
        broken.disproved |= !committed;
        broken.times += 1;
        match work {
            Ok(work) => broken.again = Some((work, now)),
            // The next check of the guard finds the processes running again.
            Err(error) => eprintln!("fermata-shim: {}", failed_to(&error)),
        }
    }

    /// Checks the guard when that is due, and continues freezing again.
    pub(super) fn keep_frozen(&mut self, now: Instant) -> Vec<FreezeEvent> {
        if let FreezePhase::Frozen { guard, .. } = &mut self.phase
            && (guard.is_due(now) || guard.is_thawed())
        {
            self.check_guard(now);
        }
        let FreezePhase::Frozen { broken, .. } = &mut self.phase else { return Vec::new() };
        let again = broken.again.take();
        let mut frozen = again.is_none();
        if let Some((work, began)) = again {
            let step = self.freeze_step(work);
            let FreezePhase::Frozen { undo, guard, broken, .. } = &mut self.phase else { return Vec::new() };
            let stopped = match step {
                Ok(FreezeStep::Done { stopped, inside, watch }) => {
                    *guard = Guard::new(self.root, watch, &inside, Instant::now());
                    frozen = true;
                    stopped
                }
                Ok(FreezeStep::Working(work)) if now - began < FREEZE_PATIENCE => {
                    broken.again = Some((work, began));
                    return Vec::new();
                }
                Ok(FreezeStep::Working(work)) => work.into_stopped(),
                Err((stopped, refused)) => {
                    eprintln!("fermata-shim: {}", refused.message);
                    stopped
                }
            };
            for id in stopped {
                if !undo.stopped.contains(&id) {
                    undo.stopped.push(id);
                }
            }
        }
        let FreezePhase::Frozen { lease, broken, .. } = &mut self.phase else { return Vec::new() };
        let report = broken.report(*lease == Lease::Committed, frozen, now);
        report.map(FreezeEvent::Broken).into_iter().collect()
    }
}
