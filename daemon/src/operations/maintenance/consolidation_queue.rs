//! The requested consolidations of one project, and the one that runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fermata_history::Extent;
use tokio::sync::Notify;

use crate::operations::cancel::Cancel;

/// The consolidations of one project; clones share them.
#[derive(Clone, Default)]
pub struct ConsolidationQueue(Arc<SharedQueue>);

#[derive(Default)]
struct SharedQueue {
    state: Mutex<QueueState>,
    /// Wakes those who wait for the task to end.
    ended: Notify,
}

#[derive(Default)]
pub(super) struct QueueState {
    pub(super) requested: BTreeSet<Extent>,
    /// Whether there was a request since the running consolidation began.
    pub(super) renewed: bool,
    /// The extent of the consolidation that runs.
    pub(super) current: Option<Extent>,
    /// Cancels the task that consolidates.
    pub(super) running: Option<Cancel>,
    /// After a failure: until when requests are ignored.
    pub(super) failed: Option<Instant>,
}

impl ConsolidationQueue {
    pub(super) fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the request of the largest extent. `None`, when there is none or the task is cancelled, ends the task.
    pub(super) fn next(&self, cancel: &Cancel) -> Option<Extent> {
        let mut state = self.lock();
        if cancel.is_cancelled() {
            return None;
        }
        state.current = state.requested.pop_last();
        state.renewed = false;
        if state.current.is_none() {
            state.running = None;
            self.0.ended.notify_waiters();
        }
        state.current
    }

    /// Cancels the task; the consolidation that it was making is requested again.
    pub(super) fn interrupt(&self) {
        let mut state = self.lock();
        let current = state.current.take();
        state.requested.extend(current);
        if let Some(cancel) = state.running.take() {
            cancel.cancel();
            self.0.ended.notify_waiters();
        }
    }

    /// Requests again the extent for which the task has found the store busy. Returns whether the task goes on: it does
    /// if there was a request meanwhile, which started no task of its own; else the next request starts one.
    pub(super) fn postpone(&self, extent: Extent, cancel: &Cancel) -> bool {
        let mut state = self.lock();
        if cancel.is_cancelled() {
            return false;
        }
        state.requested.insert(extent);
        if !state.renewed {
            (state.current, state.running) = (None, None);
            self.0.ended.notify_waiters();
        }
        state.renewed
    }

    /// Waits until no task consolidates. Returns whether everything that was requested is done: a pause may have
    /// interrupted it, or the store was busy.
    pub(super) async fn idle(&self) -> bool {
        loop {
            let ended = self.0.ended.notified();
            {
                let state = self.lock();
                if state.running.is_none() {
                    return state.requested.is_empty();
                }
            }
            ended.await;
        }
    }

    /// Notes that the task of `cancel` has ended, whatever ended it.
    pub(super) fn end(&self, cancel: &Cancel) {
        let mut state = self.lock();
        if state.running.as_ref().is_some_and(|running| Arc::ptr_eq(&running.flag, &cancel.flag)) {
            (state.current, state.running) = (None, None);
            self.0.ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_requests(requested: &[Extent]) -> (ConsolidationQueue, Cancel) {
        let (queue, cancel) = (ConsolidationQueue::default(), Cancel::default());
        queue.lock().requested.extend(requested);
        queue.lock().running = Some(cancel.clone());
        (queue, cancel)
    }

    #[test]
    fn a_consolidation_that_a_pause_interrupts_is_requested_again() {
        let (queue, cancel) = with_requests(&[Extent::Waste, Extent::ManyFresh]);
        assert_eq!(queue.next(&cancel), Some(Extent::ManyFresh));
        queue.interrupt();
        assert!(cancel.is_cancelled());
        assert_eq!(queue.next(&cancel), None, "the cancelled task takes no request");
        let next = Cancel::default();
        assert_eq!(queue.next(&next), Some(Extent::ManyFresh));
        assert_eq!(queue.next(&next), Some(Extent::Waste), "the other request is still there");
        assert_eq!(queue.next(&next), None);
        queue.interrupt();
        assert_eq!(queue.next(&next), None, "a completed consolidation is not requested again");
    }

    #[test]
    fn a_task_that_finds_the_store_busy_ends_and_leaves_its_request() {
        let (queue, cancel) = with_requests(&[Extent::Waste]);
        assert_eq!(queue.next(&cancel), Some(Extent::Waste));
        assert!(!queue.postpone(Extent::Waste, &cancel));
        assert!(queue.lock().running.is_none(), "the next request starts a task");
        assert_eq!(queue.next(&Cancel::default()), Some(Extent::Waste));
    }

    #[test]
    fn a_request_that_arrives_while_the_store_is_busy_is_not_forgotten() {
        let (queue, cancel) = with_requests(&[Extent::Waste]);
        assert_eq!(queue.next(&cancel), Some(Extent::Waste));
        queue.lock().renewed = true;
        assert!(queue.postpone(Extent::Waste, &cancel), "the task that runs answers the request");
        assert_eq!(queue.next(&cancel), Some(Extent::Waste));
        assert!(!queue.postpone(Extent::Waste, &cancel), "each further attempt needs a request");
    }
}
