//! The effects of a restore: plan it, carry the plan out, and compare the whole workspace afterwards.
//!
//! Each try is one task that reports once; `fermata_core` decides whether another one follows.

use std::sync::Arc;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::command::Command;
use fermata_protocol::event::Event;
use fermata_protocol::{CheckpointNumber, Code, OperationId, Refusal};
use serde_json::json;
use tokio::sync::watch;

use super::actor::Actor;
use super::message::{ActorMessage, CommandReport, reply};
use super::retain::make_room;
use super::retry::discard;
use crate::operations::restore;
use crate::store::commit::Write;

impl Actor {
    pub(super) fn plan_restore(
        &mut self,
        operation: OperationId,
        number: CheckpointNumber,
        safety: CheckpointNumber,
        paths: Vec<String>,
    ) {
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        let task = async move {
            let planned = match make_room(&step, &mailbox).await {
                Ok(()) => restore::plan(&step, &operation, number, safety, &paths).await,
                Err(failure) => Err(failure),
            };
            let outcome = match planned {
                Ok(made) => {
                    let writes = vec![Write::Checkpoint(Box::new(made.view.clone()))];
                    let command = Command::RestorePlanned { operation, outcome: Ok(Box::new(made.view)) };
                    CommandReport { command, writes, reply: None, tokens: Vec::new() }
                }
                Err(failure) => {
                    discard(&step, safety, &mailbox).await;
                    let outcome = Err(failure.into_error(Code::RestoreFailed));
                    Command::RestorePlanned { operation, outcome }.into()
                }
            };
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(outcome))).await);
        };
        self.step = Some(self.services.tracker.spawn(task));
    }

    pub(super) fn apply_restore(
        &mut self,
        operation: OperationId,
        number: CheckpointNumber,
        safety: CheckpointNumber,
        after: Duration,
    ) {
        let (mut step, mailbox, state) = (self.step_context(), self.mailbox.clone(), self.handle().watch());
        // From here on the restore only rolls forward.
        step.cancel = Default::default();
        self.services.tracker.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(after) => {}
                // The next daemon carries the plan out.
                () = step.services.stopping.cancelled() => return,
            }
            let applied = match restore::apply(&step, &operation, number).await {
                Ok(applied) => applied,
                Err(failure) => {
                    tracing::error!(project = %step.project.name, %operation, %failure, "carrying out a restore failed");
                    let error = failure.into_error(Code::RestoreFailed);
                    let settings = &step.services.settings().restore;
                    let patience_ms = if error.data.code == Code::DiskFull {
                        settings.full_disk_patience_ms.max(settings.patience_ms)
                    } else {
                        settings.patience_ms
                    };
                    let command = Command::RestoreFailing { operation, error, patience_ms };
                    drop(mailbox.send(ActorMessage::CommandReport(Box::new(command.into()))).await);
                    return;
                }
            };
            let reply = applied.reply(&step, &operation, number, safety);
            let restore::AppliedRestore { rows, workspace, .. } = applied;
            let (rewound, writes) = match rows {
                Some((rewound, rows)) => (Some(rewound), vec![Write::RestoreRows(rows)]),
                None => (None, Vec::new()),
            };
            let (written, removed) = (reply.written, reply.removed);
            let command = Command::Restored { operation: operation.clone(), rows: rewound, written, removed };
            let outcome = CommandReport { command, writes, reply: Some(json!(reply)), tokens: Vec::new() };
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(outcome))).await);

            if let Some(check) = restore::check(&step, workspace, moved_on(state, &operation)).await {
                let command = Command::RestoreChecked {
                    operation,
                    checkpoint: number,
                    paths: check.paths,
                    differing: check.differing,
                    examples: check.examples,
                };
                drop(mailbox.send(ActorMessage::CommandReport(Box::new(command.into()))).await);
            }
        });
    }
}

/// After this many failed tries the callers of a restore are answered if a disk is full; the restore continues.
const PATIENT_TRIES: u32 = 5;

impl Actor {
    /// Answers the callers of a restore that a full disk has blocked [`PATIENT_TRIES`] times.
    pub(super) fn answer_blocked_restores(&mut self, events: &[Event]) {
        for event in events {
            let Event::RestoreRetried { operation, tries: PATIENT_TRIES, error, .. } = event else { continue };
            if error.data.code != Code::DiskFull {
                continue;
            }
            let refusal = Refusal::new(Code::DiskFull, error.message.clone())
                .hint(format!("free disk space; the restore then continues by itself: fermatactl op show {operation}"));
            for answer in self.waiters.remove(operation).unwrap_or_default() {
                reply(answer, Err(refusal.clone().into()));
            }
        }
    }
}

/// Waits until an agent or another operation may change the workspace.
async fn moved_on(mut state: watch::Receiver<Arc<Project>>, operation: &OperationId) {
    let busy = |project: &Arc<Project>| {
        project.operation().is_some_and(|other| other != operation) || project.running_agents().next().is_some()
    };
    // An error means that the project was removed.
    drop(state.wait_for(busy).await);
}
