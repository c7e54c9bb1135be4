//! Keeping a frozen tree frozen when somebody else lets it run.
//!
//! Whoever asked for the freeze must know: under a lease the freeze counts as *disproved* from then
//! on, so that it can be neither renewed nor held, and the pause that relies on it fails. One that
//! is held already is made good again and reported.

use std::time::{Duration, Instant};

use super::{
    Broken, FREEZE_PATIENCE, FreezeController, FreezeEvent, FreezeWork, Lease, Phase, Refused, Step, failed_to,
};
use crate::guard::{Guard, GuardReading};
use crate::wire::{FreezeBroken, RefusalCode};

/// At most so often it is told that a freeze was broken: whoever continues a tree in a loop must
/// not fill the database. Nothing is lost, what is told next counts on.
const BETWEEN_NEWS: Duration = Duration::from_secs(1);

impl FreezeController {
    /// Looks at the next tick, since a child has stopped or gone on.
    pub fn check_soon(&mut self, now: Instant) {
        if let Phase::Frozen { guard, .. } = &mut self.phase {
            guard.check_soon(now);
        }
    }

    /// Looks whether anybody has run, and begins to freeze again if so.
    pub(super) fn check_guard(&mut self, now: Instant) {
        let Phase::Frozen { guard, lease, broken: Broken { again: None, .. }, .. } = &mut self.phase else { return };
        let held = *lease == Lease::Committed;
        let GuardReading::Ran(count) = guard.check(held, now) else { return };
        let work = self.begin_to_freeze();
        let Phase::Frozen { broken, .. } = &mut self.phase else { return };
        broken.processes += count;
        broken.disproved |= !held;
        broken.times += 1;
        match work {
            Ok(work) => broken.again = Some((work, now)),
            // The guard still sees them run at its next look.
            Err(error) => eprintln!("fermata-shim: {}", failed_to(&error)),
        }
    }

    /// Looks when it is time to, and goes on freezing again.
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
        let mut standing = again.is_none();
        if let Some((work, began)) = again {
            let step = self.freeze_step(work);
            let Phase::Frozen { undo, guard, broken, .. } = &mut self.phase else { return Vec::new() };
            let stopped = match step {
                Ok(Step::Done { stopped, inside, watch }) => {
                    *guard = Guard::new(self.root, watch, &inside, Instant::now());
                    standing = true;
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
        self.news_of_breaks(standing, now)
    }

    fn news_of_breaks(&mut self, frozen_again: bool, now: Instant) -> Vec<FreezeEvent> {
        let Phase::Frozen { lease, broken, .. } = &mut self.phase else { return Vec::new() };
        if broken.times == 0 || broken.told_at.is_some_and(|at| now < at + BETWEEN_NEWS) {
            return Vec::new();
        }
        broken.told_at = Some(now);
        let (times, processes) = (std::mem::take(&mut broken.times), std::mem::take(&mut broken.processes));
        let held = *lease == Lease::Committed;
        vec![FreezeEvent::Broken(FreezeBroken { times, processes, held, frozen_again })]
    }
}

impl Broken {
    /// When there is something to tell.
    pub(super) fn next(&self) -> Option<Instant> {
        self.told_at.filter(|_| self.times > 0).map(|at| at + BETWEEN_NEWS)
    }
}

pub(super) fn disproved() -> Refused {
    let message = "the tree did not stand still: somebody else has continued it since it was frozen";
    Refused::new(RefusalCode::FreezeBroken, message)
}
