//! Answers the callers of an operation that cannot end for now, because a disk is full or cannot be written to.
//!
//! The operation itself continues: its steps are tried again until they succeed.

use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{Code, Refusal};

use super::actor::Actor;
use super::message::reply;
use super::retry::PATIENT_TRIES;
use crate::errors::Failure;

impl Actor {
    /// Counts a report that could not be persisted; from [`PATIENT_TRIES`] in a row on the callers are answered.
    pub(super) fn note_blocked(&mut self, failure: &Failure) {
        self.unwritten += 1;
        if self.unwritten >= PATIENT_TRIES {
            self.answer_blocked_waiters(failure);
        }
    }

    /// Answers all callers that wait for an operation of this project with what blocks it.
    pub(super) fn answer_blocked_waiters(&mut self, failure: &Failure) {
        let code = match self.project.state.status() {
            ProjectStatus::Pausing => Code::PauseFailed,
            ProjectStatus::Restoring => Code::RestoreFailed,
            ProjectStatus::Init
            | ProjectStatus::Planning
            | ProjectStatus::Active
            | ProjectStatus::Paused
            | ProjectStatus::Resuming
            | ProjectStatus::Stopped
            | ProjectStatus::Completed
            | ProjectStatus::Failed => match self.project.checkpointing {
                Some(_) => Code::CheckpointFailed,
                None => Code::InternalError,
            },
        };
        let error = failure.clone().into_error(code);
        for (operation, answers) in std::mem::take(&mut self.waiters) {
            let refusal = Refusal::new(error.data.code, error.message.clone()).hint(format!(
                "make sure that the state directory can be written to; the operation then ends by itself: fermatactl op \
                 show {operation}"
            ));
            for answer in answers {
                reply(answer, Err(refusal.clone().into()));
            }
        }
    }
}
