//! Pauses that nobody asked for: begun like any other, with the cause that brought them about.

use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::Command;
use fermata_core::{Project, budget};
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::ProjectStatus;
use serde_json::Value;

use super::handle::ProjectHandle;
use super::ids::new_operation;
use super::message::{Begin, Label, Tell};
use crate::errors::Failure;

/// How often a pause for a budget is tried while something is in its way, for instance an agent that
/// is just being started. The next report of usage asks anew.
const TRIES: u32 = 8;

/// The first wait between two tries; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Pauses a project and waits until it is paused.
///
/// # Errors
/// When the pause is refused or fails.
pub async fn pause(handle: &ProjectHandle, cause: PauseCause, reason: &str, mode: PauseMode) -> Result<Value, Failure> {
    tracing::warn!(project = %handle.name(), cause = cause.as_str(), reason, "pausing automatically");
    let operation = new_operation();
    let reason = Some(reason.to_owned());
    let command = Command::Pause { operation: operation.clone(), cause, reason, mode, grace_ms: None };
    handle.begin(Begin { command, operation, label: Label::default(), tokens: Vec::new(), keyed: None }).await
}

/// Waits until no operation moves the project; `false` when it, or the daemon, has come to its end.
async fn at_rest(handle: &ProjectHandle) -> bool {
    let mut state = handle.watch();
    let moving = |project: &Arc<Project>| match project.state.status() {
        ProjectStatus::Pausing | ProjectStatus::Resuming | ProjectStatus::Restoring => true,
        ProjectStatus::Init
        | ProjectStatus::Planning
        | ProjectStatus::Active
        | ProjectStatus::Paused
        | ProjectStatus::Stopped
        | ProjectStatus::Completed
        | ProjectStatus::Failed => false,
    };
    tokio::select! {
        rested = state.wait_for(|project| !moving(project)) => rested.is_ok(),
        () = handle.services.stopping.cancelled() => false,
    }
}

/// Pauses an active project whose budget is reached; does nothing to any other.
pub async fn pause_for_budget(handle: ProjectHandle) {
    let mut wait = FIRST_WAIT;
    for _ in 0..TRIES {
        // A pause that is under way may be undone yet: after a crash it is.
        if !at_rest(&handle).await {
            return;
        }
        let project = handle.project();
        let Some(reached) = budget::reached(&project) else { return };
        if project.state.status() != ProjectStatus::Active {
            return;
        }
        match pause(&handle, reached.cause, &reached.reason, PauseMode::Freeze).await {
            Ok(_) => return,
            Err(failure) => tracing::warn!(project = %project.name, %failure, "not paused for its budget yet"),
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait *= 2,
            () = handle.services.stopping.cancelled() => return,
        }
    }
    if let Some(reached) = budget::reached(&handle.project()) {
        let because = format!("the pause could not be made in {TRIES} tries; the log says why");
        withhold(&handle, reached.cause, &reached.reason, &because).await;
    }
}

/// Tells that a project was not paused although there was a cause.
pub async fn withhold(handle: &ProjectHandle, cause: PauseCause, reason: &str, because: &str) {
    tracing::warn!(project = %handle.name(), cause = cause.as_str(), reason, because, "not paused automatically");
    let command = Command::Withhold { cause, reason: reason.to_owned(), because: because.to_owned() };
    let tell =
        Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed: None, view: Box::new(|_, _| Value::Null) };
    if let Err(failure) = handle.tell(tell).await {
        tracing::error!(project = %handle.name(), %failure, "an event could not be written");
    }
}
