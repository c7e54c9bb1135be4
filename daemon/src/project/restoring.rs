//! The effects of a restore: plan, carry out, and look through the whole workspace afterwards.
//!
//! Each try is one task that reports once; whether there is another one is `fermata_core`'s decision.

use std::sync::Arc;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::command::Command;
use fermata_protocol::event::Event;
use fermata_protocol::{CheckpointNumber, Code, OperationId, Refusal};
use serde_json::json;
use tokio::sync::watch;

use super::actor::Actor;
use super::message::{CommandReport, Message, reply};
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
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
        let task = async move {
            let planned = match make_room(&site, &mailbox).await {
                Ok(()) => restore::plan(&site, &operation, number, safety, &paths).await,
                Err(failure) => Err(failure),
            };
            let outcome = match planned {
                Ok(made) => {
                    let writes = vec![Write::Checkpoint(Box::new(made.view.clone()))];
                    let command = Command::RestorePlanned { operation, outcome: Ok(Box::new(made.view)) };
                    CommandReport { command, writes, reply: None, tokens: Vec::new() }
                }
                Err(failure) => {
                    discard(&site, safety, &mailbox).await;
                    let outcome = Err(failure.into_error(Code::RestoreFailed));
                    Command::RestorePlanned { operation, outcome }.into()
                }
            };
            drop(mailbox.send(Message::CommandReport(Box::new(outcome))).await);
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
        let (mut site, mailbox, state) = (self.step_context(), self.mailbox.clone(), self.handle().watch());
        // From here on the restore only rolls forward.
        site.cancel = Default::default();
        self.services.tracker.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(after) => {}
                // The next daemon goes on.
                () = site.services.stopping.cancelled() => return,
            }
            let applied = match restore::apply(&site, &operation, number).await {
                Ok(applied) => applied,
                Err(failure) => {
                    tracing::error!(project = %site.project.name, %operation, %failure, "a restore cannot go on");
                    let error = failure.into_error(Code::RestoreFailed);
                    let settings = &site.services.settings().restore;
                    let patience_ms = match error.data.code {
                        Code::DiskFull => settings.full_disk_patience_ms.max(settings.patience_ms),
                        _ => settings.patience_ms,
                    };
                    let command = Command::RestoreFailing { operation, error, patience_ms };
                    drop(mailbox.send(Message::CommandReport(Box::new(command.into()))).await);
                    return;
                }
            };
            let reply = applied.reply(&site, &operation, number, safety);
            let restore::AppliedRestore { rows, workspace, .. } = applied;
            let (rewound, writes) = match rows {
                Some((rewound, rows)) => (Some(rewound), vec![Write::RestoreRows(rows)]),
                None => (None, Vec::new()),
            };
            let (written, removed) = (reply.written, reply.removed);
            let command = Command::Restored { operation: operation.clone(), rows: rewound, written, removed };
            let outcome = CommandReport { command, writes, reply: Some(json!(reply)), tokens: Vec::new() };
            drop(mailbox.send(Message::CommandReport(Box::new(outcome))).await);

            if let Some(check) = restore::check(&site, workspace, moved_on(state, &operation)).await {
                let command = Command::RestoreChecked {
                    operation,
                    checkpoint: number,
                    paths: check.paths,
                    differing: check.differing,
                    examples: check.examples,
                };
                drop(mailbox.send(Message::CommandReport(Box::new(command.into()))).await);
            }
        });
    }
}

/// After so many tries whoever waits for a restore is told that it goes on without them, should a disk be full.
const PATIENT_TRIES: u32 = 5;

impl Actor {
    /// Whoever waits for a restore that a full disk keeps from going on is not kept waiting for as long as it may take.
    pub(super) fn tell_of_trouble(&mut self, events: &[Event]) {
        for event in events {
            let Event::RestoreRetried { operation, tries: PATIENT_TRIES, error, .. } = event else { continue };
            if error.data.code != Code::DiskFull {
                continue;
            }
            let refusal = Refusal::new(Code::DiskFull, error.message.clone())
                .hint(format!("make room: the restore goes on by itself; fermatactl op show {operation}"));
            for answer in self.waiters.remove(operation).unwrap_or_default() {
                reply(answer, Err(refusal.clone().into()));
            }
        }
    }
}

/// Waits until agents, or another operation, may change the workspace.
async fn moved_on(mut state: watch::Receiver<Arc<Project>>, operation: &OperationId) {
    let busy = |project: &Arc<Project>| {
        project.operation().is_some_and(|other| other != operation) || project.running_agents().next().is_some()
    };
    // An error means that the project is gone.
    drop(state.wait_for(busy).await);
}
