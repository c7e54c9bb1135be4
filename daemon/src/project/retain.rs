//! Removes checkpoints: their rows in one transaction of the actor, then their files beside it.
//!
//! ```text
//!   choose (rows as they are now) -> one transaction: rows and events -> directories, refs, packs -> measure
//! ```
//! A crash before the transaction leaves the checkpoints complete; a crash after it leaves files without a row, which
//! the next start removes. The actor chooses and commits within one message, so that no checkpoint can be pinned or
//! restored in between.

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
use super::message::{ActorMessage, ReplySender, Retain, Tell};
use super::retry::retry;
use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::{consolidation, removal, storage};
use crate::operations::pause::validate;
use crate::store::checkpoints;

/// How long the reply of a removal waits for the space to be freed; the removal itself continues after it.
const PATIENCE: Duration = Duration::from_secs(20);

impl ProjectHandle {
    /// Removes checkpoints and waits until their space is freed, 20 s at most.
    ///
    /// # Errors
    /// The request is refused, or the rows cannot be read or removed; then no checkpoint was removed.
    pub async fn retain(&self, retain: Retain) -> Result<Value, Failure> {
        self.ask(|answer| ActorMessage::Retain(Box::new(retain), answer)).await
    }

    /// Returns which checkpoints [`Self::retain`] would remove now.
    ///
    /// # Errors
    /// The request is refused, or the rows cannot be read.
    pub async fn would_remove(&self, ask: &RemovalRequest) -> Result<CheckpointRemoveResult, Failure> {
        let step = self.step_context();
        let candidates = candidates(&step).await?;
        let removals = choose(&step, &candidates, ask)?;
        Ok(CheckpointRemoveResult { disk_bytes: Some(self.disk_bytes()), ..result(&candidates, &removals) })
    }

    /// Returns the size of all checkpoints of the project on disk, in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.history.used_bytes()
    }

    /// Returns the progress of a scan of the workspace that runs beside the agents; none while there is none.
    pub fn scan_under_way(&self) -> Option<ScanProgress> {
        self.history.scan_under_way()
    }
}

async fn candidates(step: &StepContext) -> Result<Vec<RetentionCandidate>, Failure> {
    let name = step.project.name.clone();
    let read = step.services.store.read(move |c| checkpoints::points(c, &name)).await;
    read.map_err(|e| Failure::fault("list checkpoints", &e))
}

fn choose(
    step: &StepContext,
    candidates: &[RetentionCandidate],
    ask: &RemovalRequest,
) -> Result<Vec<Removal>, Failure> {
    let used = step.history.needed_bytes();
    Ok(retention::choose(&step.project, candidates, ask, used, crate::services::now())?)
}

fn result(candidates: &[RetentionCandidate], removals: &[Removal]) -> CheckpointRemoveResult {
    let removed = removals.iter().map(|removal| RemovedCheckpoint {
        checkpoint_id: removal.checkpoint.number,
        trigger: removal.checkpoint.trigger,
        reason: removal.reason,
        size_bytes: removal.checkpoint.bytes,
    });
    let kept = (candidates.len() - removals.len()) as u64;
    CheckpointRemoveResult { removed: removed.collect(), kept, disk_bytes: None }
}

impl Actor {
    /// Removes checkpoints; replies when their space is freed, or after [`PATIENCE`].
    pub(super) async fn retain(&mut self, retain: Retain, answer: ReplySender) {
        let removed = self.remove_rows(retain).await;
        let discarding = self.discarding.take();
        let history = self.history.clone();
        self.services.tracker.spawn(async move {
            let Ok(mut reply) = removed else { return drop(answer.send(removed)) };
            if let Some(task) = discarding {
                // The task logs its failures, and continues after the timeout.
                drop(tokio::time::timeout(PATIENCE, task).await);
            }
            reply["disk_bytes"] = json!(history.used_bytes());
            // The caller may have gone; what was removed stays removed.
            drop(answer.send(Ok(reply)));
        });
    }

    async fn remove_rows(&mut self, retain: Retain) -> Result<Value, Failure> {
        let Retain { ask, keyed } = retain;
        let step = self.step_context();
        let candidates = candidates(&step).await?;
        let removals = choose(&step, &candidates, &ask)?;
        let reply = json!(result(&candidates, &removals));
        // Counted as free from the commit on, until the sizes are measured again.
        let bytes = removals.iter().map(|removal| removal.checkpoint.bytes).sum();
        step.history.unreclaimed(bytes);
        let command = Command::RemoveCheckpoints { removals };
        let remembered = reply.clone();
        let view = Box::new(move |_: &fermata_core::Project, _: &crate::store::commit::Written| remembered);
        match self.carry_tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view }).await {
            Ok(_) => Ok(reply),
            Err(failure) => {
                step.history.reclaimed(bytes);
                Err(failure)
            }
        }
    }

    /// Removes the files of checkpoints whose rows are gone, and tries again until that has succeeded.
    pub(super) fn discard_checkpoints(&mut self, checkpoints: Vec<CheckpointNumber>) {
        let step = self.step_context();
        self.discarding = Some(self.services.tracker.spawn(async move {
            retry("remove the files of checkpoints", &step, None, |step| {
                let checkpoints = checkpoints.clone();
                async move { removal::discard(&step, &checkpoints).await }
            })
            .await;
        }));
    }

    /// Requests a consolidation of the packs; after a new checkpoint also measures the sizes and applies the retention
    /// policy.
    pub(super) fn maintain_checkpoints(&self, events: &[Event]) {
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
        self.services.tracker.spawn(maintain(self.step_context(), self.handle()));
    }
}

/// Measures the sizes and applies the retention policy, again after each removal: how much a removal frees is an estimate
/// until the packs are consolidated, and a quota may need another one.
async fn maintain(step: StepContext, handle: ProjectHandle) {
    tokio::time::sleep(consolidation::BREATH).await;
    if let Err(failure) = storage::measure(&step).await {
        tracing::warn!(project = %step.project.name, %failure, "failed to measure the checkpoints");
    }
    loop {
        let retain = Retain { ask: RemovalRequest::Policy(handle.step_context().retention()), keyed: None };
        match handle.retain(retain).await {
            Ok(reply) if has_removed(&reply) => {}
            Ok(_) => return,
            // The project was removed, or the daemon shuts down. The next checkpoint applies the policy again.
            Err(Failure::Refused(refusal)) => {
                return tracing::debug!(project = %handle.name(), %refusal, "the retention policy was not applied");
            }
            Err(failure) => {
                return tracing::warn!(project = %handle.name(), %failure, "failed to apply the retention policy");
            }
        }
        tokio::select! {
            done = consolidation::idle(&step) => {
                if !done {
                    return;
                }
            }
            () = step.services.stopping.cancelled() => return,
        }
    }
}

fn has_removed(reply: &Value) -> bool {
    reply["removed"].as_array().is_some_and(|removed| !removed.is_empty())
}

/// Checks that there is space for a checkpoint. Where there is not, removes the checkpoints that the retention policy
/// no longer keeps, then the oldest ones that are neither pinned nor used.
///
/// # Errors
/// A refusal that says how much space is missing.
pub(super) async fn make_room(step: &StepContext, mailbox: &mpsc::Sender<ActorMessage>) -> Result<(), Failure> {
    crate::operations::failpoint("pause.validate")?;
    let Some(mut shortage) = validate::shortage(step).await? else { return Ok(()) };
    // A full disk may not be this project's doing: it removes only what its policy does not keep, at first.
    let mut ask = match shortage.reason {
        RemovalReason::DiskFloor => RemovalRequest::Policy(step.retention()),
        RemovalReason::Asked
        | RemovalReason::Count
        | RemovalReason::Thinned
        | RemovalReason::Age
        | RemovalReason::Quota => RemovalRequest::Room { bytes: shortage.bytes, reason: shortage.reason },
    };
    loop {
        let by_policy = matches!(ask, RemovalRequest::Policy(_));
        let (answer, answered) = oneshot::channel();
        let retain = Box::new(Retain { ask, keyed: None });
        // When the actor has ended, the send and the receive fail, and nothing is removed.
        drop(mailbox.send(ActorMessage::Retain(retain, answer)).await);
        let removed = match answered.await {
            Ok(reply) => has_removed(&reply?),
            Err(_) => false,
        };
        if !removed && !by_policy {
            return Err(shortage.refusal.into());
        }
        shortage = match validate::shortage(step).await? {
            None => return Ok(()),
            Some(shortage) => shortage,
        };
        if removed {
            // The objects of the removed checkpoints may be in packs that other checkpoints need.
            match consolidation::reclaim(step).await {
                Ok(true) => match validate::shortage(step).await? {
                    None => return Ok(()),
                    Some(still) => shortage = still,
                },
                // Removing more before the freed space can be measured could cost all checkpoints.
                Ok(false) => return Err(shortage.refusal.into()),
                Err(failure) if step.cancel.is_cancelled() => return Err(failure),
                Err(failure) => {
                    tracing::warn!(project = %step.project.name, %failure, "failed to free the space of removed checkpoints");
                    if !by_policy {
                        return Err(shortage.refusal.into());
                    }
                }
            }
        }
        tracing::info!(project = %step.project.name, bytes = shortage.bytes, "a checkpoint needs more space");
        ask = RemovalRequest::Room { bytes: shortage.bytes, reason: shortage.reason };
    }
}
