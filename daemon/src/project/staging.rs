//! The draft of a pause's database part: being written, or written; see [`crate::operations::checkpoint::database`].

use tokio::task::JoinHandle;

use crate::errors::Failure;
use crate::operations::checkpoint::database::StagedDatabase;

/// The database part, written before anybody is frozen.
#[derive(Default)]
pub(super) enum DatabaseStaging {
    /// There is none.
    #[default]
    No,
    /// It is being written.
    Writing(JoinHandle<Result<StagedDatabase, Failure>>),
    /// It is written.
    Written(Box<StagedDatabase>),
}

impl DatabaseStaging {
    /// Waits until nobody writes any more; whoever gives up waiting may do so again. A draft that could not
    /// be made is only missed: what is wrong is told when all is written anew.
    pub(super) async fn settle(&mut self) {
        let Self::Writing(task) = self else { return };
        *self = match task.await {
            Ok(Ok(draft)) => Self::Written(Box::new(draft)),
            Ok(Err(failure)) => {
                tracing::warn!(%failure, "no draft of the database part");
                Self::No
            }
            // Its panic is in the log.
            Err(_) => Self::No,
        };
    }

    /// Waits for the draft and takes it.
    pub(super) async fn take(&mut self) -> Option<StagedDatabase> {
        self.settle().await;
        match std::mem::take(self) {
            Self::Written(draft) => Some(*draft),
            Self::No | Self::Writing(_) => None,
        }
    }
}
