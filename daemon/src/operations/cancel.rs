//! The cancellation of one operation, for tasks and for blocking work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

/// Ends an operation early: tasks look at the token, blocking work at the flag.
#[derive(Clone, Default)]
pub struct Cancel {
    token: CancellationToken,
    pub(super) flag: Arc<AtomicBool>,
}

impl Cancel {
    /// Asks the operation to end.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.token.cancel();
    }

    /// Says whether it was asked to end.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is asked to end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }
}
