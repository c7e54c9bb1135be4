//! The instants just before and just after a commit, named after what is committed: failpoints for tests.

use fermata_protocol::event::Event;

use crate::errors::Failure;

/// Passes the failpoints after a commit.
pub(super) fn after(events: &[Event]) {
    for event in events {
        match event {
            Event::PauseStarted { .. } => fermata_failpoint::hit("pause.started"),
            Event::ProjectPaused { .. } => fermata_failpoint::hit("pause.committed"),
            Event::OperationUndoing { .. } => fermata_failpoint::hit("pause.undoing"),
            Event::ResumeStarted { .. } => fermata_failpoint::hit("resume.started"),
            Event::CheckpointCreated { .. } => fermata_failpoint::hit("checkpoint.committed"),
            Event::CheckpointRemoved { .. } => fermata_failpoint::hit("retention.committed"),
            Event::RestorePlanned { .. } => fermata_failpoint::hit("restore.announced"),
            Event::ProjectRestored { .. } => fermata_failpoint::hit("restore.committed"),
            Event::RestoreGivenUp { .. } => fermata_failpoint::hit("restore.given_up"),
            _ => {}
        }
    }
}

/// Passes the failpoints before a commit; an armed `error` is a commit that cannot be written.
///
/// # Errors
/// When one is armed with `error`.
pub(super) fn before(events: &[Event]) -> Result<(), Failure> {
    for event in events {
        match event {
            Event::ProjectPaused { .. } => crate::operations::failpoint("pause.commit")?,
            Event::PauseFailed { .. } => crate::operations::failpoint("pause.undone")?,
            Event::ProjectResumed { .. } => crate::operations::failpoint("resume.commit")?,
            Event::CheckpointCreated { .. } => crate::operations::failpoint("checkpoint.commit")?,
            Event::CheckpointRemoved { .. } => crate::operations::failpoint("retention.commit")?,
            Event::RestorePlanned { .. } => crate::operations::failpoint("restore.announce")?,
            Event::ProjectRestored { .. } => crate::operations::failpoint("restore.commit")?,
            Event::RestoreGivenUp { .. } => crate::operations::failpoint("restore.give_up")?,
            _ => {}
        }
    }
    Ok(())
}
