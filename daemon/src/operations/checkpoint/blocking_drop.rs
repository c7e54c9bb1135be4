//! Drops a value on a blocking thread, wherever its last owner is dropped.
//!
//! An unpublished snapshot removes its pack when it is dropped; an async thread must not wait for that.

use std::ops::Deref;
use std::sync::Arc;

use tokio::runtime::Handle;

/// A value that is never dropped on an async thread.
pub(super) struct BlockingDrop<T: Send + Sync + 'static> {
    value: Arc<T>,
    /// Dropped after `value`, as fields are dropped in order.
    last: Last<T>,
}

struct Last<T: Send + Sync + 'static>(Option<Arc<T>>);

impl<T: Send + Sync + 'static> BlockingDrop<T> {
    pub fn new(value: T) -> Self {
        let value = Arc::new(value);
        Self { last: Last(Some(Arc::clone(&value))), value }
    }

    /// Shares the value with a blocking thread.
    pub fn share(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    /// Returns the value, for use on a blocking thread; `None` while it is shared.
    pub fn take(self) -> Option<T> {
        let Self { value, mut last } = self;
        drop(value);
        last.0.take().and_then(Arc::into_inner)
    }

    /// Drops the value and waits until it is dropped.
    pub async fn dropped(self) {
        // Fails only when the drop panics; the panic is in the log.
        drop(tokio::task::spawn_blocking(move || drop(self.take())).await);
    }
}

impl<T: Send + Sync + 'static> Deref for BlockingDrop<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Send + Sync + 'static> Drop for Last<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(value))),
            Err(_) => drop(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, ThreadId};

    use super::*;

    struct SendsThread(mpsc::Sender<ThreadId>);

    impl Drop for SendsThread {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).ok();
        }
    }

    #[tokio::test]
    async fn a_value_is_dropped_on_another_thread_than_the_async_one() {
        let (sender, threads) = mpsc::channel();
        drop(BlockingDrop::new(SendsThread(sender.clone())));
        let received = tokio::task::spawn_blocking(move || threads.recv().map(|thread| (thread, threads))).await;
        let (thread, threads) = received.expect("no panic").expect("dropped");
        assert_ne!(thread, thread::current().id());
        BlockingDrop::new(SendsThread(sender)).dropped().await;
        assert_ne!(threads.try_recv().expect("already dropped"), thread::current().id());
    }
}
