//! The lock that ensures one daemon per state directory.
//!
//! It is an flock, which the kernel releases when its holder ends in any way. The first line of the file describes the
//! holder to people, the second line identifies it to programs by boot id, pid and start time. The second line
//! distinguishes a live holder from one that has ended but whose files the kernel has not closed yet.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::process::{self, ProcessId};

/// The description of a holder that has not written one.
const UNNAMED: &str = "an unnamed process";

/// Why the lock could not be acquired.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("lock {}: held by {holder}", path.display())]
    Held {
        path: PathBuf,
        /// The holder's description of itself.
        holder: String,
        /// Whether an immediate retry may succeed: the file names a process that has ended, or no process yet.
        passing: bool,
    },
    /// The lock file cannot be used.
    #[error("use the lock file {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// An exclusive lock, held for the lifetime of this value.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
    path: PathBuf,
}

impl StateLock {
    /// Acquires the lock without waiting. `holder` describes the caller in one line.
    ///
    /// # Errors
    /// If another process holds the lock, or the file cannot be used.
    pub fn acquire(path: &Path, holder: &str) -> Result<Self, LockError> {
        let io_error = |source| LockError::Io { path: path.to_path_buf(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io_error)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut text = String::new();
                // The description is only informative: without it the lock is refused all the same.
                if file.read_to_string(&mut text).is_err() {
                    UNNAMED.clone_into(&mut text);
                }
                return Err(held_by(path, &text));
            }
            Err((_, errno)) => return Err(io_error(errno.into())),
        };
        let text = format!("{holder}\n{}\n", own_identity().map_err(io_error)?);
        file.set_len(0).map_err(io_error)?;
        file.rewind().map_err(io_error)?;
        file.write_all(text.as_bytes()).map_err(io_error)?;
        Ok(Self { _file: file, path: path.to_path_buf() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Returns the second line for this process.
fn own_identity() -> io::Result<String> {
    let id = process::identify(std::process::id().cast_signed())?
        .ok_or_else(|| io::Error::other("this process has no entry in /proc"))?;
    Ok(format!("{} {} {}", process::boot_id()?, id.pid, id.start_time_ticks))
}

fn held_by(path: &Path, text: &str) -> LockError {
    let mut lines = text.lines();
    let name = lines.next().map(str::trim).filter(|name| !name.is_empty());
    let passing = name.is_none() || lines.next().is_some_and(|line| is_gone(line).unwrap_or(false));
    let holder = name.unwrap_or(UNNAMED).to_owned();
    LockError::Held { path: path.to_path_buf(), holder, passing }
}

/// Returns whether a second line names a process that has ended; `None` if that cannot be determined.
fn is_gone(line: &str) -> Option<bool> {
    let mut words = line.split_whitespace();
    let boot = words.next()?;
    let id = ProcessId { pid: words.next()?.parse().ok()?, start_time_ticks: words.next()?.parse().ok()? };
    let this_boot = process::boot_id().ok()?;
    Some(boot != this_boot || !process::is_alive(id).ok()? || is_dying(id.pid))
}

/// Returns whether a process has released its memory. It does so before it closes its files (do_exit in kernel/exit.c),
/// and from then on `/proc/PID/exe` leads nowhere, though its threads may exist for a while.
fn is_dying(pid: i32) -> bool {
    process::program(pid).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Acquires a lock that another process holds; returns the holder and whether a retry may succeed.
    fn refusal(path: &Path) -> (String, bool) {
        match StateLock::acquire(path, "other") {
            Err(LockError::Held { holder, passing, .. }) => (holder, passing),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_second_holder_is_refused_with_the_name_of_the_first_until_that_releases_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = StateLock::acquire(&path, "fermatad, pid 1").unwrap();
        assert_eq!(refusal(&path), ("fermatad, pid 1".to_owned(), false));
        drop(first);
        assert_eq!(StateLock::acquire(&path, "other").unwrap().path(), path);
    }

    #[test]
    fn a_process_that_is_ending_is_distinguished_from_one_that_works() {
        assert!(!is_dying(std::process::id().cast_signed()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        // It has ended and is not reaped yet; its memory has been released.
        let start = std::time::Instant::now();
        while !is_dying(pid) && start.elapsed() < std::time::Duration::from_secs(10) {
            std::thread::yield_now();
        }
        assert!(is_dying(pid));
        child.wait().unwrap();
    }

    #[test]
    fn a_lock_whose_holder_has_ended_or_is_unnamed_is_worth_a_retry() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let _first = StateLock::acquire(&path, "fermatad").unwrap();
        let own = own_identity().unwrap();
        let (boot, process) = own.split_once(' ').unwrap();
        for (text, passing) in [
            (String::new(), true),
            (format!("old\n{own}\n"), false),
            (format!("old\n{boot} {} 1\n", std::process::id()), true),
            (format!("old\nanother-boot {process}\n"), true),
            ("old\n".to_owned(), false),
            ("old\nnonsense\n".to_owned(), false),
        ] {
            std::fs::write(&path, &text).unwrap();
            assert_eq!(refusal(&path).1, passing, "{text:?}");
        }
    }
}
