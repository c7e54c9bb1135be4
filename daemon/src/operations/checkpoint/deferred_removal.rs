//! Holds what removes files when it goes, so that it goes on a blocking thread, whoever lets go of it.
//!
//! A snapshot that is given up takes its pack with it; an async thread must not wait for that. Must not decide when
//! something goes.

use std::ops::Deref;
use std::sync::Arc;

use tokio::runtime::Handle;

/// A value that is never dropped on an async thread.
pub(super) struct DeferredRemoval<T: Send + Sync + 'static> {
    value: Arc<T>,
    /// Dropped after the one above, as fields are: whoever shares the value has let go of it before.
    last: Last<T>,
}

struct Last<T: Send + Sync + 'static>(Option<Arc<T>>);

impl<T: Send + Sync + 'static> DeferredRemoval<T> {
    /// Takes a value into care.
    pub fn new(value: T) -> Self {
        let value = Arc::new(value);
        Self { last: Last(Some(Arc::clone(&value))), value }
    }

    /// Lends the value to a blocking thread.
    pub fn share(&self) -> Arc<T> {
        Arc::clone(&self.value)
    }

    /// Gives the value away, on a blocking thread; `None` while it is lent.
    pub fn take(self) -> Option<T> {
        let Self { value, mut last } = self;
        drop(value);
        last.0.take().and_then(Arc::into_inner)
    }

    /// Lets the value go and waits until it is gone.
    pub async fn gone(self) {
        // It only panics if the drop does, and then the log has it.
        drop(tokio::task::spawn_blocking(move || drop(self.take())).await);
    }
}

impl<T: Send + Sync + 'static> Deref for DeferredRemoval<T> {
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

    struct Tells(mpsc::Sender<ThreadId>);

    impl Drop for Tells {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).ok();
        }
    }

    #[tokio::test]
    async fn what_an_async_thread_lets_go_of_goes_on_another_one() {
        let (tell, told) = mpsc::channel();
        drop(DeferredRemoval::new(Tells(tell.clone())));
        let elsewhere = tokio::task::spawn_blocking(move || told.recv().map(|on| (on, told))).await;
        let (on, told) = elsewhere.expect("no panic").expect("dropped");
        assert_ne!(on, thread::current().id());
        DeferredRemoval::new(Tells(tell)).gone().await;
        assert_ne!(told.try_recv().expect("gone by now"), thread::current().id());
    }
}
