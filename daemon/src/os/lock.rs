//! The lock that makes sure that one state directory has one daemon.
//!
//! An flock, so the kernel releases it with its holder, however that ends. The file's text is only
//! for people: it says who holds the lock.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

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
                let holder = match file.read_to_string(&mut text) {
                    Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
                    _ => "an unnamed process".to_owned(),
                };
                return Err(LockError::Held { path: path.to_path_buf(), holder });
            }
            Err((_, errno)) => return Err(io_error(errno.into())),
        };
        file.set_len(0).map_err(io_error)?;
        file.rewind().map_err(io_error)?;
        writeln!(file, "{holder}").map_err(io_error)?;
        Ok(Self { _file: file, path: path.to_path_buf() })
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_told_who_has_it_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = StateLock::acquire(&path, "fermatad, pid 1").unwrap();
        match StateLock::acquire(&path, "other") {
            Err(LockError::Held { holder, .. }) => assert_eq!(holder, "fermatad, pid 1"),
            other => panic!("expected a refusal, got {other:?}"),
        }
        drop(first);
        assert_eq!(StateLock::acquire(&path, "other").unwrap().path(), path);
    }
}
