//! The consolidations that are requested of one project and the one that runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fermata_history::Extent;

use crate::operations::cancel::Cancel;

/// The consolidations of one project; clones share them.
#[derive(Clone, Default)]
pub struct ConsolidationQueue(Arc<Mutex<State>>);

#[derive(Default)]
pub(super) struct State {
    pub(super) wanted: BTreeSet<Extent>,
    /// What the run that is under way does.
    pub(super) current: Option<Extent>,
    /// Ends the run that is under way.
    pub(super) running: Option<Cancel>,
    /// Until when nothing is tried, after a failure that was told.
    pub(super) failed: Option<Instant>,
}

impl ConsolidationQueue {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the largest wish, if there is one; otherwise, or when it is told to end, the run is over.
    pub(super) fn next(&self, cancel: &Cancel) -> Option<Extent> {
        let mut state = self.lock();
        if cancel.is_cancelled() {
            return None;
        }
        state.current = state.wanted.pop_last();
        if state.current.is_none() {
            state.running = None;
        }
        state.current
    }

    /// Ends the run that is under way; what it did becomes a wish again.
    pub(super) fn hold_off(&self) {
        let mut state = self.lock();
        let current = state.current.take();
        state.wanted.extend(current);
        if let Some(cancel) = state.running.take() {
            cancel.cancel();
        }
    }

    /// Ends a run that found somebody else at work; its wish waits for the next one.
    pub(super) fn put_off(&self, extent: Extent, cancel: &Cancel) {
        let mut state = self.lock();
        if !cancel.is_cancelled() {
            state.wanted.insert(extent);
            (state.current, state.running) = (None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_wishes(wanted: &[Extent]) -> (ConsolidationQueue, Cancel) {
        let (queue, cancel) = (ConsolidationQueue::default(), Cancel::default());
        queue.lock().wanted.extend(wanted);
        queue.lock().running = Some(cancel.clone());
        (queue, cancel)
    }

    #[test]
    fn what_a_pause_interrupts_is_still_wished_for_afterwards() {
        let (queue, cancel) = with_wishes(&[Extent::Waste, Extent::Due]);
        assert_eq!(queue.next(&cancel), Some(Extent::Due));
        queue.hold_off();
        assert!(cancel.is_cancelled());
        assert_eq!(queue.next(&cancel), None, "the run ends and takes no wish with it");
        let next = Cancel::default();
        assert_eq!(queue.next(&next), Some(Extent::Due));
        assert_eq!(queue.next(&next), Some(Extent::Waste), "a look that costs nothing is no substitute");
        assert_eq!(queue.next(&next), None);
        queue.hold_off();
        assert_eq!(queue.next(&next), None, "what was done is not done again");
    }

    #[test]
    fn a_run_that_finds_others_at_work_ends_and_leaves_its_wish() {
        let (queue, cancel) = with_wishes(&[Extent::Waste]);
        assert_eq!(queue.next(&cancel), Some(Extent::Waste));
        queue.put_off(Extent::Waste, &cancel);
        assert!(queue.lock().running.is_none(), "the next wish starts a run");
        assert_eq!(queue.next(&Cancel::default()), Some(Extent::Waste));
    }
}
