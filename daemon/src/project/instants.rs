//! Failpoints immediately before and after the commit of an event.

use fermata_protocol::event::Event;

use crate::errors::Failure;

#[derive(Clone, Copy)]
enum Side {
    Before,
    After,
}

/// Passes the failpoints before a commit.
///
/// # Errors
/// When one is armed with `error`: the commit then counts as one that cannot be written.
pub(super) fn before(events: &[Event]) -> Result<(), Failure> {
    events.iter().try_for_each(|event| pass(event, Side::Before))
}

/// Passes the failpoints after a commit; an armed `error` has no effect.
pub(super) fn after(events: &[Event]) {
    // `pass` returns no error on this side.
    drop(events.iter().try_for_each(|event| pass(event, Side::After)));
}

fn pass(event: &Event, side: Side) -> Result<(), Failure> {
    let failpoint = |before: Option<&'static str>, after: Option<&'static str>| match side {
        Side::Before => before.map_or(Ok(()), crate::operations::failpoint),
        Side::After => {
            after.into_iter().for_each(fermata_failpoint::hit);
            Ok(())
        }
    };
    match event {
        Event::OperationUndoing { .. } => failpoint(None, Some("pause.undoing")),
        Event::PauseStarted { .. } => failpoint(None, Some("pause.started")),
        Event::ProjectPaused { .. } => failpoint(Some("pause.commit"), Some("pause.committed")),
        Event::PauseFailed { .. } => failpoint(Some("pause.undone"), None),
        Event::ResumeStarted { .. } => failpoint(None, Some("resume.started")),
        Event::ProjectResumed { .. } => failpoint(Some("resume.commit"), None),
        Event::CheckpointCreated { .. } => failpoint(Some("checkpoint.commit"), Some("checkpoint.committed")),
        Event::CheckpointRemoved { .. } => failpoint(Some("retention.commit"), Some("retention.committed")),
        Event::RestorePlanned { .. } => failpoint(Some("restore.announce"), Some("restore.announced")),
        Event::RestoreGivenUp { .. } => failpoint(Some("restore.give_up"), Some("restore.given_up")),
        Event::ProjectRestored { .. } => failpoint(Some("restore.commit"), Some("restore.committed")),
        Event::ProjectCreated { .. }
        | Event::ProjectChanged { .. }
        | Event::PhaseChanged { .. }
        | Event::ProjectRemoved { .. }
        | Event::AgentCreated { .. }
        | Event::AgentStarting { .. }
        | Event::AgentStarted { .. }
        | Event::AgentLaunchFailed { .. }
        | Event::AgentAdopted { .. }
        | Event::AgentUnreachable { .. }
        | Event::AgentFreezeBroken { .. }
        | Event::AgentStopping { .. }
        | Event::AgentWaiting { .. }
        | Event::AgentReady { .. }
        | Event::AgentTimeUp { .. }
        | Event::AgentStale { .. }
        | Event::AgentBackoff { .. }
        | Event::AgentGivenUp { .. }
        | Event::AgentExited { .. }
        | Event::AgentInterrupted { .. }
        | Event::AgentParked { .. }
        | Event::AgentRemoved { .. }
        | Event::AgentSuspended { .. }
        | Event::AgentContinued { .. }
        | Event::AgentTyped { .. }
        | Event::AgentSessionFound { .. }
        | Event::AgentProgressed { .. }
        | Event::AgentUsed { .. }
        | Event::AgentStateSaved { .. }
        | Event::TaskChanged { .. }
        | Event::QuestionAsked { .. }
        | Event::QuestionAnswered { .. }
        | Event::ContextAdded { .. }
        | Event::FlashSaved { .. }
        | Event::ContextPinned { .. }
        | Event::ContextRecalled { .. }
        | Event::OperationStepped { .. }
        | Event::PauseWithheld { .. }
        | Event::CheckpointStarted { .. }
        | Event::CheckpointFailed { .. }
        | Event::CheckpointPinned { .. }
        | Event::RestoreStarted { .. }
        | Event::RestoreRetried { .. }
        | Event::RestoreChecked { .. }
        | Event::RestoreFailed { .. } => Ok(()),
    }
}
