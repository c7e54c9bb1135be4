//! Freezes a tree again that another process has let run.
//!
//! The daemon must learn of it. A freeze under a lease is *disproved* from then on: it can be neither renewed nor
//! committed, and the pause that relies on it fails. A committed freeze is restored and reported.

use std::time::{Duration, Instant};

use super::{
    Broken, FREEZE_PATIENCE, FreezeController, FreezeEvent, FreezeWork, Lease, Phase, Refused, Step, failed_to,
};
use crate::guard::{Guard, GuardReading};
use crate::wire::{FreezeBroken, RefusalCode};

/// The minimum interval between two reports of a broken freeze, so that a process that continues the tree in a loop
/// cannot fill the database. Later breaks are counted in the next report.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

impl FreezeController {
    /// Checks the guard at the next tick, since a child has stopped or continued.
    pub fn check_soon(&mut self, now: Instant) {
        if let Phase::Frozen { guard, .. } = &mut self.phase {
            guard.check_soon(now);
        }
    }

    /// Checks whether a process has run, and starts to freeze again if so.
    pub(super) fn check_guard(&mut self, now: Instant) {
        let Phase::Frozen { guard, lease, broken: Broken { again: None, .. }, .. } = &mut self.phase else { return };
        let committed = *lease == Lease::Committed;
        let GuardReading::Ran(count) = guard.check(committed, now) else { return };
        let work = self.begin_to_freeze();
        let Phase::Frozen { broken, .. } = &mut self.phase else { return };
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
        if let Phase::Frozen { guard, .. } = &mut self.phase
            && (guard.is_due(now) || guard.is_thawed())
        {
            self.check_guard(now);
        }
        let again = match &mut self.phase {
            Phase::Frozen { broken, .. } => broken.again.take(),
            _ => None,
        };
        let mut frozen = again.is_none();
        if let Some((work, began)) = again {
            let step = self.freeze_step(work);
            let Phase::Frozen { undo, guard, broken, .. } = &mut self.phase else { return Vec::new() };
            let stopped = match step {
                Ok(Step::Done { stopped, inside, watch }) => {
                    *guard = Guard::new(self.root, watch, &inside, Instant::now());
                    frozen = true;
                    stopped
                }
                Ok(Step::Working(work)) if now - began < FREEZE_PATIENCE => {
                    broken.again = Some((work, began));
                    return Vec::new();
                }
                Ok(Step::Working(FreezeWork::Tree { work, .. })) => work.into_stopped(),
                Ok(Step::Working(FreezeWork::Group { .. })) => Vec::new(),
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
        self.report_breaks(frozen, now)
    }

    fn report_breaks(&mut self, frozen_again: bool, now: Instant) -> Vec<FreezeEvent> {
        let Phase::Frozen { lease, broken, .. } = &mut self.phase else { return Vec::new() };
        if broken.times == 0 || broken.reported_at.is_some_and(|at| now < at + REPORT_INTERVAL) {
            return Vec::new();
        }
        broken.reported_at = Some(now);
        let (times, processes) = (std::mem::take(&mut broken.times), std::mem::take(&mut broken.processes));
        let committed = *lease == Lease::Committed;
        vec![FreezeEvent::Broken(FreezeBroken { times, processes, committed, frozen_again })]
    }
}

impl Broken {
    /// When the next report is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.reported_at.filter(|_| self.times > 0).map(|at| at + REPORT_INTERVAL)
    }
}

pub(super) fn disproved() -> Refused {
    let message = "another process has continued the tree since it was frozen";
    Refused::new(RefusalCode::FreezeBroken, message)
}
