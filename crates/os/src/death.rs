//! Waiting for the end of a process that is not our child, without asking again and again.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::process::{Pidfd, ProcessId};
use super::socket_child::pidfd;

/// Waits for the end of one process.
#[derive(Debug)]
pub struct Death(Option<AsyncFd<Pidfd>>);

impl Death {
    /// Begins to watch; a process that is gone already has died. To be called inside the runtime.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn of(id: ProcessId) -> io::Result<Self> {
        let Some(fd) = Pidfd::open(id)? else { return Ok(Self(None)) };
        // SAFETY: a Pidfd owns one descriptor, which it neither closes nor exchanges before it is
        // dropped, and `as_raw_fd` returns that one every time.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self(Some(fd)))
    }

    /// Returns when it has ended.
    pub async fn wait(&self) {
        if let Some(fd) = &self.0 {
            // It stays readable; an error means that the runtime ends.
            drop(fd.readable().await);
        }
    }
}

/// Registers a pidfd with the current runtime: it becomes readable once the process has ended,
/// reaped or not. To be called within a tokio runtime.
pub fn watch_exit(pid: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let pidfd = pidfd(pid)?;
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, which is
    // only after the registration has been removed.
    let watch = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    Ok(watch?)
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
        assert!(none.is_err(), "it lives");
        child.kill().unwrap();
        death.wait().await;
        child.wait().unwrap();
        death.wait().await;
        Death::of(id).unwrap().wait().await;
    }
}
