//! Repeats steps that have to succeed.

use std::time::Duration;

use fermata_protocol::CheckpointNumber;
use tokio::sync::mpsc;

use super::message::Message;
use crate::errors::Failure;
use crate::operations::StepContext;
use crate::operations::maintenance::leftovers;

/// The longest pause between two tries of something that has to succeed.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// After so many tries in vain nobody is kept waiting.
pub(super) const PATIENT_TRIES: u32 = 5;

/// Discards an unfinished checkpoint; its failure must not be hidden by a leftover.
pub(super) async fn discard(site: &StepContext, number: CheckpointNumber, mailbox: &mpsc::Sender<Message>) {
    let attempt = |site| async move { leftovers::discard(&site, number).await };
    retry("discard the checkpoint", site, Some(mailbox), attempt).await;
}

/// Does something until it has worked or the daemon ends; whoever waits for it at the actor of that mailbox is told when
/// that takes long.
pub(super) async fn retry<F>(
    what: &str,
    site: &StepContext,
    mailbox: Option<&mpsc::Sender<Message>>,
    mut attempt: impl FnMut(StepContext) -> F,
) where
    F: Future<Output = Result<(), Failure>>,
{
    let mut tries = 0;
    while let Err(failure) = attempt(site.clone()).await {
        tries += 1;
        tracing::error!(project = %site.project.name, %failure, tries, "{what}: trying again");
        if tries >= PATIENT_TRIES
            && let Some(mailbox) = mailbox
        {
            drop(mailbox.send(Message::Blocked(Box::new(failure))).await);
        }
        if site.services.stopping.is_cancelled() {
            return;
        }
        tokio::time::sleep(backoff(tries)).await;
    }
}

fn backoff(tries: u32) -> Duration {
    (Duration::from_millis(50) * 2_u32.saturating_pow(tries.min(10))).min(MAX_BACKOFF)
}
