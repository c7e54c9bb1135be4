//! Waits for the end of a process that need not be a child, without polling.

use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::process::{Pidfd, ProcessId};

/// The end of one process.
#[derive(Debug)]
pub struct Death(Option<AsyncFd<Pidfd>>);

impl Death {
    /// Starts watching a process; one that has ended already counts as ended. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If no descriptor can be opened or registered.
    pub fn of(id: ProcessId) -> io::Result<Self> {
        let Some(fd) = Pidfd::open(id)? else { return Ok(Self(None)) };
        // SAFETY: a Pidfd owns one descriptor, which it neither closes nor replaces before it is dropped, and
        // `as_raw_fd` always returns that descriptor.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self(Some(fd)))
    }

    /// Returns once the process has ended, reaped or not.
    pub async fn wait(&self) {
        if let Some(fd) = &self.0 {
            // The descriptor stays readable. An error means that the runtime is shutting down.
            drop(fd.readable().await);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed_and_stays_so() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let id = process::identify(child.id() as i32).unwrap().unwrap();
        let death = Death::of(id).unwrap();
        let none = tokio::time::timeout(std::time::Duration::from_millis(50), death.wait()).await;
        assert!(none.is_err(), "the process lives");
        child.kill().unwrap();
        death.wait().await;
        child.wait().unwrap();
        death.wait().await;
        Death::of(id).unwrap().wait().await;
    }
}
