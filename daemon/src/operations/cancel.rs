//! The cancellation of one operation, in tasks and in blocking work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

/// Ends an operation early: tasks wait for the token, blocking work polls the flag. Clones share both.
#[derive(Clone, Default)]
pub struct Cancel {
    token: CancellationToken,
    pub(super) flag: Arc<AtomicBool>,
}

impl Cancel {
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.token.cancel();
    }

    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }
}
