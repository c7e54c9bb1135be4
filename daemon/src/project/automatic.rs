//! Pauses that the daemon begins itself, with their cause.

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

/// How often a pause for a budget is tried while it is refused, for instance because an agent is being started. The
/// next report of usage begins a new series.
const TRIES: u32 = 8;

/// The delay before the second try; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Pauses a project; returns once it is paused.
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

/// Waits until no operation changes the status of the project; `false` when the project was removed or the daemon shuts
/// down.
async fn at_rest(handle: &ProjectHandle) -> bool {
    let mut state = handle.watch();
    let is_changing = |project: &Arc<Project>| match project.state.status() {
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
        rested = state.wait_for(|project| !is_changing(project)) => rested.is_ok(),
        () = handle.services.stopping.cancelled() => false,
    }
}

/// Pauses the project if it is active and its budget is reached.
pub async fn pause_for_budget(handle: ProjectHandle) {
    let mut wait = FIRST_WAIT;
    for _ in 0..TRIES {
        // A pause that is under way may still be undone, as it is after a crash.
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
            Err(failure) => {
                tracing::warn!(project = %project.name, %failure, "pausing for a budget failed; trying again")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait *= 2,
            () = handle.services.stopping.cancelled() => return,
        }
    }
    if let Some(reached) = budget::reached(&handle.project()) {
        let because = format!("the pause failed {TRIES} times; the daemon's log has the reasons");
        withhold(&handle, reached.cause, &reached.reason, &because).await;
    }
}

/// Records that a project was not paused although there was a cause.
pub async fn withhold(handle: &ProjectHandle, cause: PauseCause, reason: &str, because: &str) {
    tracing::warn!(project = %handle.name(), cause = cause.as_str(), reason, because, "not paused automatically");
    let command = Command::Withhold { cause, reason: reason.to_owned(), because: because.to_owned() };
    let tell =
        Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed: None, view: Box::new(|_, _| Value::Null) };
    if let Err(failure) = handle.tell(tell).await {
        tracing::error!(project = %handle.name(), %failure, "failed to record that a pause was withheld");
    }
}
