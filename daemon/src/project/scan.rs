//! Checkpoints that nobody asks for: looks whether anything has changed, and begins one where it has.
//!
//! ```text
//!   due ─► a turn ─► look, beside the actor and the agents ─┬─ changed ───► a checkpoint, in the same turn
//!          (few at once)                                    └─ unchanged ─► nothing is written
//! ```
//! The look comes before the operation: where nothing has changed no row is written, no number taken,
//! and nobody stands still. It gives way to whatever a person begins.

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
use super::message::{AutomaticScan, Begin, Label, Message};
use crate::errors::Failure;
use crate::operations::checkpoint::warm_up;
use crate::operations::{Cancel, StepContext, blocking};
use crate::services;

/// When to look again where a checkpoint could not even be begun.
const RETRY: Duration = Duration::from_secs(1);

/// What the actor knows of its looks.
#[derive(Default)]
pub(super) struct AutomaticScans {
    /// The last one that found nothing changed.
    unchanged: UnchangedScan,
    /// How the one that is under way is cut short.
    under_way: Option<Cancel>,
    /// The turn of the checkpoint that followed from one.
    turn: Option<OwnedSemaphorePermit>,
}

impl AutomaticScans {
    /// Cuts a look short: something more important begins.
    pub(super) fn give_way(&self) {
        if let Some(cancel) = &self.under_way {
            cancel.cancel();
        }
    }

    /// Gives the turn back when the checkpoint has ended.
    pub(super) fn end_turn(&mut self) {
        self.turn = None;
    }
}

impl Actor {
    /// Begins to look where a checkpoint is due by itself; returns when one will be due next.
    pub(super) fn scan_if_due(&mut self, now: UnixMillis) -> Option<UnixMillis> {
        let due = automatic::due_trigger(&self.project, &self.scans.unchanged, now).is_some();
        if due && self.scans.under_way.is_none() {
            fermata_failpoint::hit("scan.begun");
            let cancel = Cancel::default();
            self.scans.under_way = Some(cancel.clone());
            let (handle, mailbox, unchanged) = (self.handle(), self.mailbox.clone(), self.scans.unchanged);
            self.services.tracker.spawn(async move {
                let found = scan_in_turn(&handle, cancel, unchanged).await;
                drop(mailbox.send(Message::Scanned(Box::new(found))).await);
            });
        }
        automatic::next(&self.project, &self.scans.unchanged, now)
    }

    /// Takes what a look found.
    pub(super) async fn scanned(&mut self, found: AutomaticScan) {
        self.scans.under_way = None;
        let AutomaticScan { changed: Some(changed), unchanged, turn } = found else { return };
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
        // Nobody has named or cancelled this one.
        self.label = Label::default();
        self.cancel = Cancel::default();
        match self.carry_due(Command::Checkpoint { operation: new_operation(), trigger }).await {
            Ok(()) => self.scans.turn = turn,
            Err(failure) => {
                tracing::error!(project = %self.project.name, %failure, "an automatic checkpoint is tried again");
                self.scans.under_way = Some(Cancel::default());
                let (mailbox, unchanged) = (self.mailbox.clone(), self.scans.unchanged);
                self.services.tracker.spawn(async move {
                    tokio::time::sleep(RETRY).await;
                    let found = AutomaticScan { changed: None, unchanged, turn: None };
                    drop(mailbox.send(Message::Scanned(Box::new(found))).await);
                });
            }
        }
    }
}

/// Waits for a turn, then looks.
async fn scan_in_turn(handle: &ProjectHandle, cancel: Cancel, unchanged: UnchangedScan) -> AutomaticScan {
    let cut_short = AutomaticScan { changed: None, unchanged, turn: None };
    let turn = tokio::select! {
        turn = Arc::clone(&handle.services.automatic).acquire_owned() => turn.ok(),
        () = cancel.cancelled() => None,
        () = handle.services.stopping.cancelled() => None,
    };
    if turn.is_none() {
        return cut_short;
    }
    // The wait may have been long.
    let site = StepContext { cancel: cancel.clone(), ..handle.step_context() };
    let now = services::now();
    if automatic::due_trigger(&site.project, &unchanged, now).is_none() {
        return cut_short;
    }
    let changed = has_changed(&site).await;
    if cancel.is_cancelled() {
        return cut_short;
    }
    AutomaticScan { changed: Some(changed), unchanged: UnchangedScan::at(&site.project, now), turn }
}

/// Says whether anything differs from the newest checkpoint. A look that fails counts as a change: the
/// checkpoint then fails of the same, and that is told.
async fn has_changed(site: &StepContext) -> bool {
    let since = site.project.counters.activity;
    if since.has_changed() {
        return true;
    }
    match is_unchanged(site, since.checkpoint).await {
        Ok(unchanged) => !unchanged,
        Err(failure) => {
            tracing::warn!(project = %site.project.name, %failure, "a look for changes failed");
            true
        }
    }
}

async fn is_unchanged(site: &StepContext, newest: CheckpointNumber) -> Result<bool, Failure> {
    let (workspace, rules) = (PathBuf::from(&site.project.facts.workspace), site.rules());
    let mapped = warm_up::mapped(site, &site.project.runs(site.project.running_agents()));
    let mapped = blocking("look at what agents have mapped", mapped).await?;
    site.with_history(None, "look for changes", move |history, progress, cancel| {
        history.is_unchanged(&workspace, &rules, mapped, newest, progress, cancel)
    })
    .await
}

/// Makes the last checkpoint of a project whose agents go on while the daemon does not; none where
/// nothing has changed.
///
/// # Errors
/// When the checkpoint fails.
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
