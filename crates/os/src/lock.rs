//! The lock that makes sure that one state directory has one daemon.
//!
//! An flock, so the kernel releases it with its holder, however that ends. The file's first line is
//! for people: it says who holds the lock. The second says it to programs: boot, pid and start time.
//! By it a holder that lives is told from one that is gone and whose files the kernel has yet to close.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::process::{self, ProcessId};

/// What a holder is called that has not said its name.
const NOBODY: &str = "an unnamed process";

/// Why the lock could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Someone else holds it.
    #[error("lock {}: held by {holder}", path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
        /// What its holder wrote about itself.
        holder: String,
        /// Whether it is worth trying again at once: the file names a process that is gone, or nobody yet.
        passing: bool,
    },
    /// The file could not be used.
    #[error("use the lock file {}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// An exclusive lock, held as long as this value lives.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
    path: PathBuf,
}

impl StateLock {
    /// Takes the lock or says who has it; never waits. `holder` describes the caller in one line.
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
                // The text is a courtesy: without it the refusal still stands.
                if file.read_to_string(&mut text).is_err() {
                    NOBODY.clone_into(&mut text);
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

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What the second line says of this process.
fn own_identity() -> io::Result<String> {
    let id = process::identify(std::process::id().cast_signed())?
        .ok_or_else(|| io::Error::other("this process has no entry in /proc"))?;
    Ok(format!("{} {} {}", process::boot_id()?, id.pid, id.start_time_ticks))
}

fn held_by(path: &Path, text: &str) -> LockError {
    let mut lines = text.lines();
    let name = lines.next().map(str::trim).filter(|name| !name.is_empty());
    let passing = name.is_none() || lines.next().is_some_and(|line| is_gone(line).unwrap_or(false));
    let holder = name.unwrap_or(NOBODY).to_owned();
    LockError::Held { path: path.to_path_buf(), holder, passing }
}

/// Whether a second line names a process that is no more; `None` where it cannot be told.
fn is_gone(line: &str) -> Option<bool> {
    let mut words = line.split_whitespace();
    let boot = words.next()?;
    let id = ProcessId { pid: words.next()?.parse().ok()?, start_time_ticks: words.next()?.parse().ok()? };
    let this_boot = process::boot_id().ok()?;
    Some(boot != this_boot || !process::is_alive(id).ok()? || is_dying(id.pid))
}

/// Whether a process has given up its memory, as it does before it closes its files (do_exit in kernel/exit.c): its
/// program is not told any more, though its threads may live for a while yet.
fn is_dying(pid: i32) -> bool {
    process::program(pid).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a lock that someone has: who that is, and whether it is worth trying again.
    fn refusal(path: &Path) -> (String, bool) {
        match StateLock::acquire(path, "other") {
            Err(LockError::Held { holder, passing, .. }) => (holder, passing),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn a_second_holder_is_refused_and_told_who_has_it_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = StateLock::acquire(&path, "fermatad, pid 1").unwrap();
        assert_eq!(refusal(&path), ("fermatad, pid 1".to_owned(), false));
        drop(first);
        assert_eq!(StateLock::acquire(&path, "other").unwrap().path(), path);
    }

    #[test]
    fn a_process_that_is_ending_is_told_from_one_that_works() {
        assert!(!is_dying(std::process::id().cast_signed()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        // It has ended and was not yet reaped: what it had is given up.
        let start = std::time::Instant::now();
        while !is_dying(pid) && start.elapsed() < std::time::Duration::from_secs(10) {
            std::thread::yield_now();
        }
        assert!(is_dying(pid));
        child.wait().unwrap();
    }

    #[test]
    fn a_lock_whose_holder_is_gone_or_has_not_said_its_name_is_worth_another_try() {
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
