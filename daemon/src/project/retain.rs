//! Removing checkpoints: the rows in one transaction of the actor, then, beside it, what is left of them.
//!
//! ```text
//!   choose (rows as they are now) -> one transaction: rows and events -> directories, refs, packs -> measure
//! ```
//! A crash before the transaction leaves whole checkpoints, one after it leaves files without a row, which
//! the next start sweeps. The actor reads the rows itself: nobody else changes them, so that nothing can be
//! pinned or restored between the choice and the transaction.

use std::time::Duration;

use fermata_core::command::Command;
use fermata_core::retention::{self, Removal, RemovalRequest, RetentionCandidate};
use fermata_protocol::CheckpointNumber;
use fermata_protocol::event::Event;
use fermata_protocol::project::ScanProgress;
use fermata_protocol::retention::{CheckpointRemoveResult, RemovalReason, RemovedCheckpoint};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::actor::Actor;
use super::handle::ProjectHandle;
use super::message::{Answer, Message, Retain, Tell};
use super::retry::retry;
use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::{consolidation, removal, storage};
use crate::operations::pause::validate;
use crate::store::checkpoints;

/// How long whoever asks for a removal waits for the room to be given back; it goes on without them.
const PATIENCE: Duration = Duration::from_secs(20);

impl ProjectHandle {
    /// Removes checkpoints and waits until their room is given back.
    ///
    /// # Errors
    /// A refusal or a fault; then none was removed.
    pub async fn retain(&self, retain: Retain) -> Result<Value, Failure> {
        self.ask(|answer| Message::Retain(Box::new(retain), answer)).await
    }

    /// Says what would be removed now.
    ///
    /// # Errors
    /// A refusal, or when the rows cannot be read.
    pub async fn would_remove(&self, ask: &RemovalRequest) -> Result<CheckpointRemoveResult, Failure> {
        let site = self.step_context();
        let points = points(&site).await?;
        let going = choose(&site, &points, ask)?;
        Ok(CheckpointRemoveResult { disk_bytes: Some(self.disk_bytes()), ..result(&points, &going) })
    }

    /// Returns what all checkpoints of the project take on disk, bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.history.used_bytes()
    }

    /// Returns how far a look at the workspace has come that is under way while agents run.
    pub fn scan_under_way(&self) -> Option<ScanProgress> {
        self.history.scan_under_way()
    }
}

async fn points(site: &StepContext) -> Result<Vec<RetentionCandidate>, Failure> {
    let name = site.project.name.clone();
    let read = site.services.store.read(move |c| checkpoints::points(c, &name)).await;
    read.map_err(|e| Failure::fault("list checkpoints", &e))
}

fn choose(site: &StepContext, points: &[RetentionCandidate], ask: &RemovalRequest) -> Result<Vec<Removal>, Failure> {
    let used = site.history.needed_bytes();
    Ok(retention::choose(&site.project, points, ask, used, crate::services::now())?)
}

fn result(points: &[RetentionCandidate], going: &[Removal]) -> CheckpointRemoveResult {
    let removed = going.iter().map(|removal| RemovedCheckpoint {
        checkpoint_id: removal.checkpoint.number,
        trigger: removal.checkpoint.trigger,
        reason: removal.reason,
        size_bytes: removal.checkpoint.bytes,
    });
    CheckpointRemoveResult { removed: removed.collect(), kept: (points.len() - going.len()) as u64, disk_bytes: None }
}

impl Actor {
    /// Removes checkpoints; the answer comes when their room is given back.
    pub(super) async fn retain(&mut self, retain: Retain, answer: Answer) {
        let removed = self.remove_rows(retain).await;
        let discarding = self.discarding.take();
        let history = self.history.clone();
        self.services.tracker.spawn(async move {
            let Ok(mut reply) = removed else { return drop(answer.send(removed)) };
            if let Some(task) = discarding {
                // One that takes longer, or fails and is tried again, is in the log.
                drop(tokio::time::timeout(PATIENCE, task).await);
            }
            reply["disk_bytes"] = json!(history.used_bytes());
            // Whoever no longer waits has lost interest, not the fact.
            drop(answer.send(Ok(reply)));
        });
    }

    async fn remove_rows(&mut self, retain: Retain) -> Result<Value, Failure> {
        let Retain { ask, keyed } = retain;
        let site = self.step_context();
        let points = points(&site).await?;
        let removals = choose(&site, &points, &ask)?;
        let reply = json!(result(&points, &removals));
        // Before they go: what is removed is taken to come back, until it is known what has.
        let bytes = removals.iter().map(|removal| removal.checkpoint.bytes).sum();
        site.history.unreclaimed(bytes);
        let command = Command::RemoveCheckpoints { removals };
        let remembered = reply.clone();
        let view = Box::new(move |_: &fermata_core::Project, _: &crate::store::commit::Written| remembered);
        match self.carry_told(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view }).await {
            Ok(_) => Ok(reply),
            Err(failure) => {
                site.history.reclaimed(bytes);
                Err(failure)
            }
        }
    }

    /// Removes what is left of checkpoints, again and again until it has worked.
    pub(super) fn discard_checkpoints(&mut self, checkpoints: Vec<CheckpointNumber>) {
        let site = self.step_context();
        self.discarding = Some(self.services.tracker.spawn(async move {
            retry("remove what is left of checkpoints", &site, None, |site| {
                let checkpoints = checkpoints.clone();
                async move { removal::discard(&site, &checkpoints).await }
            })
            .await;
        }));
    }

    /// Has packs joined, measures what a new checkpoint takes, and lets go what is kept no longer.
    pub(super) fn look_after_checkpoints(&self, events: &[Event]) {
        consolidation::follow(&self.step_context(), events);
        let made = events.iter().any(|event| {
            matches!(
                event,
                Event::CheckpointCreated { .. } | Event::ProjectPaused { .. } | Event::ProjectRestored { .. }
            )
        });
        if !made {
            return;
        }
        let (site, handle) = (self.step_context(), self.handle());
        self.services.tracker.spawn(async move {
            tokio::time::sleep(consolidation::BREATH).await;
            if let Err(failure) = storage::measure(&site).await {
                tracing::warn!(project = %site.project.name, %failure, "what the checkpoints take is not known");
            }
            let retain = Retain { ask: RemovalRequest::Policy(site.retention()), keyed: None };
            match handle.retain(retain).await {
                Ok(_) => {}
                // The project was removed, or the daemon ends: the next checkpoint asks again.
                Err(Failure::Refused(refusal)) => tracing::debug!(project = %handle.name(), %refusal, "not now"),
                Err(failure) => tracing::warn!(project = %handle.name(), %failure, "old checkpoints stay for now"),
            }
        });
    }
}

/// Checks that a checkpoint can be made. Where there is no room for it, what the retention no longer keeps goes
/// first, then the oldest that nobody needs.
///
/// # Errors
/// A refusal that says what is missing.
pub(super) async fn make_room(site: &StepContext, mailbox: &mpsc::Sender<Message>) -> Result<(), Failure> {
    crate::operations::failpoint("pause.validate")?;
    let Some(mut shortage) = validate::shortage(site).await? else { return Ok(()) };
    // By a quota the policy's answer is the oldest as well; a disk is not the project's alone.
    let mut ask = match shortage.reason {
        RemovalReason::DiskFloor => RemovalRequest::Policy(site.retention()),
        _ => RemovalRequest::Room { bytes: shortage.bytes, reason: shortage.reason },
    };
    loop {
        let by_policy = matches!(ask, RemovalRequest::Policy(_));
        let (answer, answered) = oneshot::channel();
        let retain = Box::new(Retain { ask, keyed: None });
        // An actor that is gone removes nothing.
        drop(mailbox.send(Message::Retain(retain, answer)).await);
        let removed = match answered.await {
            Ok(reply) => reply?["removed"].as_array().is_some_and(|removed| !removed.is_empty()),
            Err(_) => false,
        };
        if !removed && !by_policy {
            return Err(shortage.refusal.into());
        }
        shortage = match validate::shortage(site).await? {
            None => return Ok(()),
            Some(shortage) => shortage,
        };
        if removed {
            // What was removed may lie in packs that others need as well.
            match consolidation::reclaim(site).await {
                Ok(true) => match validate::shortage(site).await? {
                    None => return Ok(()),
                    Some(still) => shortage = still,
                },
                // To remove more before it shows what that has freed could cost all of them.
                Ok(false) => return Err(shortage.refusal.into()),
                Err(failure) if site.cancel.is_cancelled() => return Err(failure),
                Err(failure) => {
                    tracing::warn!(project = %site.project.name, %failure, "room could not be given back");
                    if !by_policy {
                        return Err(shortage.refusal.into());
                    }
                }
            }
        }
        tracing::info!(project = %site.project.name, bytes = shortage.bytes, "more room is needed for a checkpoint");
        ask = RemovalRequest::Room { bytes: shortage.bytes, reason: shortage.reason };
    }
}
