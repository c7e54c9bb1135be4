//! The failpoints around a commit, by what it records.

use fermata_protocol::event::Event;

use crate::errors::Failure;

/// Failpoints before a commit; an armed `error` is a commit that cannot be written.
pub(super) fn hit_before(events: &[Event]) -> Result<(), Failure> {
    for event in events {
        match event {
            Event::ProjectPaused { .. } => crate::steps::failpoint("pause.commit")?,
            Event::PauseFailed { .. } => crate::steps::failpoint("pause.undone")?,
            Event::ProjectResumed { .. } => crate::steps::failpoint("resume.commit")?,
            Event::CheckpointCreated { .. } => crate::steps::failpoint("checkpoint.commit")?,
            Event::RestorePlanned { .. } => crate::steps::failpoint("restore.announce")?,
            Event::ProjectRestored { .. } => crate::steps::failpoint("restore.commit")?,
            Event::RestoreGivenUp { .. } => crate::steps::failpoint("restore.give_up")?,
            _ => {}
        }
    }
    Ok(())
}

/// Failpoints after a commit.
pub(super) fn hit_after(events: &[Event]) {
    for event in events {
        match event {
            Event::PauseStarted { .. } => crate::failpoint::hit("pause.started"),
            Event::ProjectPaused { .. } => crate::failpoint::hit("pause.committed"),
            Event::OperationUndoing { .. } => crate::failpoint::hit("pause.undoing"),
            Event::ResumeStarted { .. } => crate::failpoint::hit("resume.started"),
            Event::CheckpointCreated { .. } => crate::failpoint::hit("checkpoint.committed"),
            Event::RestorePlanned { .. } => crate::failpoint::hit("restore.announced"),
            Event::ProjectRestored { .. } => crate::failpoint::hit("restore.committed"),
            Event::RestoreGivenUp { .. } => crate::failpoint::hit("restore.given_up"),
            _ => {}
        }
    }
}
