//! The database part of a pause's checkpoint, staged before the freeze; see
//! [`crate::operations::checkpoint::database`].

use tokio::task::JoinHandle;

use crate::errors::Failure;
use crate::operations::checkpoint::database::StagedDatabase;

/// The state of the staged database part.
#[derive(Default)]
pub(super) enum DatabaseStaging {
    #[default]
    No,
    Writing(JoinHandle<Result<StagedDatabase, Failure>>),
    Written(Box<StagedDatabase>),
}

impl DatabaseStaging {
    /// Waits until the writer has ended. Safe to cancel and to repeat. A part that could not be staged is not an error:
    /// the checkpoint then writes it completely, and reports what is wrong.
    pub(super) async fn settle(&mut self) {
        let Self::Writing(task) = self else { return };
        *self = match task.await {
            Ok(Ok(staged)) => Self::Written(Box::new(staged)),
            Ok(Err(failure)) => {
                tracing::warn!(%failure, "failed to stage the database part");
                Self::No
            }
            // The panic hook has logged the panic.
            Err(_) => Self::No,
        };
    }

    /// Waits until the writer has ended, and takes what it has written.
    pub(super) async fn take(&mut self) -> Option<StagedDatabase> {
        self.settle().await;
        match std::mem::take(self) {
            Self::Written(staged) => Some(*staged),
            Self::No | Self::Writing(_) => None,
        }
    }
}
