//! Repeats steps that have to succeed, and reports that could not be persisted.

use std::time::Duration;

use fermata_core::command::Command;
use fermata_protocol::{CheckpointNumber, Code};
use tokio::sync::mpsc;

use super::message::{ActorMessage, CommandReport};
use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::leftovers;

/// The longest delay between two tries.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// After this many failed tries the callers that wait for the operation are answered with the failure.
pub(super) const PATIENT_TRIES: u32 = 5;

/// Discards an unfinished checkpoint, and tries again until that has succeeded.
pub(super) async fn discard(step: &StepContext, number: CheckpointNumber, mailbox: &mpsc::Sender<ActorMessage>) {
    let attempt = |step| async move { leftovers::discard(&step, number).await };
    retry("discard the checkpoint", step, Some(mailbox), attempt).await;
}

/// Runs `attempt` until it succeeds or the daemon shuts down. From [`PATIENT_TRIES`] failures on, each further one is
/// sent to the mailbox, so that the actor answers the callers that wait for the operation.
pub(super) async fn retry<F>(
    doing: &str,
    step: &StepContext,
    mailbox: Option<&mpsc::Sender<ActorMessage>>,
    mut attempt: impl FnMut(StepContext) -> F,
) where
    F: Future<Output = Result<(), Failure>>,
{
    let mut tries = 0;
    while let Err(failure) = attempt(step.clone()).await {
        tries += 1;
        tracing::error!(project = %step.project.name, %failure, tries, "failed to {doing}; trying again");
        if tries >= PATIENT_TRIES
            && let Some(mailbox) = mailbox
        {
            drop(mailbox.send(ActorMessage::Blocked(Box::new(failure))).await);
        }
        if step.services.stopping.is_cancelled() {
            return;
        }
        tokio::time::sleep(backoff(tries)).await;
    }
}

/// A report to be sent again, since it could not be persisted.
pub(super) struct ReportRetry {
    pub report: CommandReport,
    /// The checkpoint that the report would have committed: it has no row, and no undo discards it.
    pub orphan: Option<CheckpointNumber>,
}

impl ReportRetry {
    /// Turns a step that has succeeded, and whose result cannot be persisted, into one that has failed. Other reports
    /// are repeated as they are.
    pub(super) fn of(report: CommandReport, failure: Failure) -> Self {
        let (command, orphan) = match report.command {
            // The undo of the pause discards its checkpoint.
            Command::PauseStepped { operation, step, took_ms, outcome: Ok(_) } => {
                let error = failure.into_error(Code::PauseFailed);
                (Command::PauseStepped { operation, step, took_ms, outcome: Err(error) }, None)
            }
            Command::Checkpointed { operation, outcome: Ok((checkpoint, _)), imported } => {
                let error = failure.into_error(Code::CheckpointFailed);
                (Command::Checkpointed { operation, outcome: Err(error), imported }, Some(checkpoint.id))
            }
            Command::RestorePlanned { operation, outcome: Ok(safety) } => {
                let error = failure.into_error(Code::RestoreFailed);
                (Command::RestorePlanned { operation, outcome: Err(error) }, Some(safety.id))
            }
            command @ (Command::PauseStepped { outcome: Err(_), .. }
            | Command::Checkpointed { outcome: Err(_), .. }
            | Command::RestorePlanned { outcome: Err(_), .. }
            | Command::Set { .. }
            | Command::Remove { .. }
            | Command::Run { .. }
            | Command::Stop { .. }
            | Command::Kill { .. }
            | Command::Restart { .. }
            | Command::Start { .. }
            | Command::Due { .. }
            | Command::Ready { .. }
            | Command::RemoveAgent { .. }
            | Command::Launched { .. }
            | Command::RunEnded { .. }
            | Command::RunLost { .. }
            | Command::Suspended { .. }
            | Command::Typed { .. }
            | Command::Unreachable { .. }
            | Command::FreezeBroken { .. }
            | Command::Progress { .. }
            | Command::Use { .. }
            | Command::SaveState { .. }
            | Command::PutTask { .. }
            | Command::Ask { .. }
            | Command::Answer { .. }
            | Command::AddContext { .. }
            | Command::FlashSave { .. }
            | Command::PinContext { .. }
            | Command::RecallContext { .. }
            | Command::Withhold { .. }
            | Command::Pause { .. }
            | Command::Undone { .. }
            | Command::Cancel { .. }
            | Command::Resume { .. }
            | Command::Resumed { .. }
            | Command::Parked { .. }
            | Command::Checkpoint { .. }
            | Command::PinCheckpoint { .. }
            | Command::RemoveCheckpoints { .. }
            | Command::Restore { .. }
            | Command::RestoreFailing { .. }
            | Command::RestoreChecked { .. }
            | Command::Restored { .. }
            | Command::Recover { .. }) => {
                return Self { report: CommandReport { command, ..report }, orphan: None };
            }
        };
        Self { report: command.into(), orphan }
    }
}

fn backoff(tries: u32) -> Duration {
    (Duration::from_millis(50) * 2_u32.saturating_pow(tries.min(10))).min(MAX_BACKOFF)
}
