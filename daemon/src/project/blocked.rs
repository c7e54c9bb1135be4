//! Answers those who wait for an operation that cannot be brought to its end for now, since a disk is full or cannot be
//! written to.
//!
//! Ends nothing: what was begun is tried until it works, with or without anybody who waits for it.

use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{Code, Refusal};

use super::actor::Actor;
use super::message::reply;
use super::retry::PATIENT_TRIES;
use crate::errors::Failure;

impl Actor {
    /// Counts reports that could not be persisted; after several in a row whoever waits is told.
    pub(super) fn note_blocked(&mut self, failure: &Failure) {
        self.unwritten += 1;
        if self.unwritten >= PATIENT_TRIES {
            self.tell_waiters(failure);
        }
    }

    /// Tells everybody who waits for an operation of this project what keeps it from its end.
    pub(super) fn tell_waiters(&mut self, failure: &Failure) {
        let code = match self.project.state.status() {
            ProjectStatus::Pausing => Code::PauseFailed,
            ProjectStatus::Restoring => Code::RestoreFailed,
            _ if self.project.checkpointing.is_some() => Code::CheckpointFailed,
            _ => Code::InternalError,
        };
        let error = failure.clone().into_error(code);
        for (operation, answers) in std::mem::take(&mut self.waiters) {
            let refusal = Refusal::new(error.data.code, error.message.clone()).hint(format!(
                "make sure that the state directory can be written to; what was begun is then brought to its end by \
                 itself: fermatactl op show {operation}"
            ));
            for answer in answers {
                reply(answer, Err(refusal.clone().into()));
            }
        }
    }
}
