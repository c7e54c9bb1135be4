//! Automatic checkpoints: scans whether anything has changed, and begins a checkpoint if so.
//!
//! ```text
//!   due ─► permit ─► scan beside the actor and the agents ─┬─ changed ───► a checkpoint under the same permit
//!         (few at once)                                    └─ unchanged ─► nothing is written
//! ```
//! The scan precedes the operation: where nothing has changed, no row is written, no number is used and no process is
//! frozen. It is cancelled when an operation begins.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fermata_core::automatic::{self, UnchangedScan};
use fermata_core::command::Command;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::{CheckpointNumber, UnixMillis};
use tokio::sync::OwnedSemaphorePermit;

use super::actor::Actor;
use super::handle::ProjectHandle;
use super::ids::new_operation;
use super::message::{ActorMessage, AutomaticScan, Begin, Label};
use crate::errors::Failure;
use crate::operations::checkpoint::warm_up;
use crate::operations::{Cancel, StepContext, blocking};
use crate::services;

/// Delay before the next scan after a checkpoint that could not be begun.
const RETRY: Duration = Duration::from_secs(1);

/// The scans of one project.
#[derive(Default)]
pub(super) struct AutomaticScans {
    /// The last scan that found nothing changed.
    unchanged: UnchangedScan,
    /// Cancels the current scan; while it is set no other scan begins.
    under_way: Option<Cancel>,
    /// The permit of the checkpoint that followed from a scan.
    turn: Option<OwnedSemaphorePermit>,
}

impl AutomaticScans {
    /// Cancels the current scan, since an operation begins.
    pub(super) fn give_way(&self) {
        if let Some(cancel) = &self.under_way {
            cancel.cancel();
        }
    }

    /// Returns the permit after the checkpoint has ended.
    pub(super) fn end_turn(&mut self) {
        self.turn = None;
    }
}

impl Actor {
    /// Begins a scan if an automatic checkpoint is due; returns when the next one will be due.
    pub(super) fn scan_if_due(&mut self, now: UnixMillis) -> Option<UnixMillis> {
        let due = automatic::due_trigger(&self.project, &self.scans.unchanged, now).is_some();
        if due && self.scans.under_way.is_none() {
            fermata_failpoint::hit("scan.begun");
            let cancel = Cancel::default();
            self.scans.under_way = Some(cancel.clone());
            let (handle, mailbox, unchanged) = (self.handle(), self.mailbox.clone(), self.scans.unchanged);
            self.services.tracker.spawn(async move {
                let scan = scan_in_turn(&handle, cancel, unchanged).await;
                drop(mailbox.send(ActorMessage::Scanned(Box::new(scan))).await);
            });
        }
        automatic::next(&self.project, &self.scans.unchanged, now)
    }

    /// Begins a checkpoint after a scan that found a change.
    pub(super) async fn scanned(&mut self, scan: AutomaticScan) {
        self.scans.under_way = None;
        let AutomaticScan { changed: Some(changed), unchanged, turn } = scan else { return };
        if self.leaving() {
            return;
        }
        if !changed {
            self.scans.unchanged = unchanged;
            fermata_failpoint::hit("scan.unchanged");
            return;
        }
        let Some(trigger) = automatic::due_trigger(&self.project, &self.scans.unchanged, services::now()) else {
            return;
        };
        // Label and cancellation of an earlier operation do not apply.
        self.label = Label::default();
        self.cancel = Cancel::default();
        match self.carry_due(Command::Checkpoint { operation: new_operation(), trigger }).await {
            Ok(()) => self.scans.turn = turn,
            Err(failure) => {
                tracing::error!(project = %self.project.name, %failure, "failed to begin an automatic checkpoint; trying again");
                self.scans.under_way = Some(Cancel::default());
                let (mailbox, unchanged) = (self.mailbox.clone(), self.scans.unchanged);
                self.services.tracker.spawn(async move {
                    tokio::time::sleep(RETRY).await;
                    let scan = AutomaticScan { changed: None, unchanged, turn: None };
                    drop(mailbox.send(ActorMessage::Scanned(Box::new(scan))).await);
                });
            }
        }
    }
}

/// Waits for a permit, then scans if the checkpoint is still due.
async fn scan_in_turn(handle: &ProjectHandle, cancel: Cancel, unchanged: UnchangedScan) -> AutomaticScan {
    let cancelled = AutomaticScan { changed: None, unchanged, turn: None };
    let turn = tokio::select! {
        turn = Arc::clone(&handle.services.automatic).acquire_owned() => turn.ok(),
        () = cancel.cancelled() => None,
        () = handle.services.stopping.cancelled() => None,
    };
    if turn.is_none() {
        return cancelled;
    }
    let step = StepContext { cancel: cancel.clone(), ..handle.step_context() };
    let now = services::now();
    if automatic::due_trigger(&step.project, &unchanged, now).is_none() {
        return cancelled;
    }
    let changed = has_changed(&step).await;
    if cancel.is_cancelled() {
        return cancelled;
    }
    AutomaticScan { changed: Some(changed), unchanged: UnchangedScan::at(&step.project, now), turn }
}

/// Returns whether anything differs from the newest checkpoint. A scan that fails counts as a change: the checkpoint
/// that follows fails for the same reason, and reports it.
async fn has_changed(step: &StepContext) -> bool {
    let activity = step.project.counters.activity;
    if activity.has_changed() {
        return true;
    }
    match is_unchanged(step, activity.checkpoint).await {
        Ok(unchanged) => !unchanged,
        Err(failure) => {
            tracing::warn!(project = %step.project.name, %failure, "a scan for changes failed");
            true
        }
    }
}

async fn is_unchanged(step: &StepContext, newest: CheckpointNumber) -> Result<bool, Failure> {
    let (workspace, rules) = (PathBuf::from(&step.project.facts.workspace), step.rules());
    let mapped = warm_up::mapped(step, &step.project.runs(step.project.running_agents()));
    let mapped = blocking("read which files agents have mapped", mapped).await?;
    step.with_history(None, "scan for changes", move |history, progress, cancel| {
        history.is_unchanged(&workspace, &rules, mapped, newest, progress, cancel)
    })
    .await
}

/// Makes a checkpoint before the daemon exits, if agents run on and anything has changed.
///
/// # Errors
/// The checkpoint fails.
pub async fn before_shutdown(handle: &ProjectHandle) -> Result<(), Failure> {
    if !automatic::due_before_shutdown(&handle.project()) {
        return Ok(());
    }
    let Ok(_turn) = handle.services.automatic.acquire().await else { return Ok(()) };
    if !automatic::due_before_shutdown(&handle.project()) || !has_changed(&handle.step_context()).await {
        return Ok(());
    }
    let operation = new_operation();
    let command = Command::Checkpoint { operation: operation.clone(), trigger: Trigger::Shutdown };
    let begin = Begin { command, operation, label: Label::default(), tokens: Vec::new(), keyed: None };
    handle.begin(begin).await.map(drop)
}
