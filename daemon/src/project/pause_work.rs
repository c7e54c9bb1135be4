//! The data that the steps of a pause hand on to each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::staging::DatabaseStaging;
use crate::operations::pause::flash_save::Plans;
use crate::operations::pause::freeze::{FrozenAgents, Renewer};
use crate::operations::run::session::FoundSessions;

/// What the steps of one pause hand on to each other.
#[derive(Default)]
pub(super) struct PauseWork {
    pub frozen: Option<FrozenAgents>,
    pub renewer: Option<Renewer>,
    /// Until when the pause may be committed: the end of the lease that was renewed last.
    pub proven_until: Option<Instant>,
    pub database: DatabaseStaging,
    /// The agents' sessions, located before the freeze.
    pub scouted: Option<FoundSessions>,
    pub plans: Plans,
    pub warnings: Vec<String>,
}

/// The work of the current pause, which the actor, its steps and the undo share.
///
/// The lock is never held across an await: a step borrows the whole work until it ends. The actor and the undo use the
/// work only after the task of the step has ended.
#[derive(Clone, Default)]
pub(super) struct SharedPauseWork(Arc<Mutex<PauseWork>>);

impl SharedPauseWork {
    pub(super) fn lock(&self) -> MutexGuard<'_, PauseWork> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the work out until the result is dropped.
    pub(super) fn borrow_for_step(&self) -> BorrowedPauseWork {
        BorrowedPauseWork { work: std::mem::take(&mut *self.lock()), owner: self.clone() }
    }
}

/// Puts the work back when dropped, even if the step panics: the undo has to wait for the writer of the database part.
pub(super) struct BorrowedPauseWork {
    pub work: PauseWork,
    owner: SharedPauseWork,
}

impl Drop for BorrowedPauseWork {
    fn drop(&mut self) {
        *self.owner.lock() = std::mem::take(&mut self.work);
    }
}
