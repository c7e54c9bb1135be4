//! Durable small files: a reader sees either the old or the new content, even after a power failure.
//!
//! Not suited to logs or large data: every call costs two fsyncs.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a durable write failed. The file at `path` is unchanged.
#[derive(Debug, thiserror::Error)]
#[error("{step} for {}", path.display())]
pub struct DurableWriteError {
    /// The file that was to be written.
    pub path: PathBuf,
    /// The failed operation, as a verb phrase.
    pub step: &'static str,
    #[source]
    pub source: io::Error,
}

impl DurableWriteError {
    fn at<'a>(path: &'a Path, step: &'static str) -> impl Fn(io::Error) -> Self + use<'a> {
        move |source| Self { path: path.to_path_buf(), step, source }
    }
}

/// Replaces the file at `path` with `bytes`: writes and syncs a temporary file in the same directory, renames it, and
/// syncs the directory. The file gets exactly `mode`, whatever the umask.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DurableWriteError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let at = |step| DurableWriteError::at(path, step);
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
        .map_err(at("name the temporary file"))?;
    let mut temp_name = std::ffi::OsString::from(".");
    temp_name.push(name);
    temp_name.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let temp = path.with_file_name(temp_name);
    let written = write_new(&temp, bytes, mode)
        .map_err(at("write the temporary file"))
        .and_then(|()| std::fs::rename(&temp, path).map_err(at("rename the temporary file")));
    if let Err(error) = written {
        // No other process uses the temporary file. If its removal fails too, the first error is the one to report.
        std::fs::remove_file(&temp).ok();
        return Err(error);
    }
    sync_parent(path).map_err(at("sync the directory"))
}

/// Creates or overwrites a file and syncs its content. The caller syncs the directory where the name must be durable.
///
/// # Errors
/// If the file cannot be created, written or synced.
pub fn write_new(temp: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_unsynced(temp, bytes, mode)?.sync_all()
}

/// Creates or overwrites a file without syncing it.
///
/// # Errors
/// If the file cannot be created or written.
pub fn write_unsynced(path: &Path, bytes: &[u8], mode: u32) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    set_mode(&file, mode)?;
    file.write_all(bytes)?;
    Ok(file)
}

/// The number of concurrent syncs in [`sync_together`]. The first sync makes the file system write its journal, for
/// which all the others wait. More threads do not help, and starting one takes as long as a small write.
const LANES: usize = 2;

/// Syncs files and directories concurrently: a disk flushes all of them in the time of one.
///
/// # Errors
/// The error of one file that could not be synced; the other files are synced nevertheless.
pub fn sync_together(files: &[&File]) -> io::Result<()> {
    files.iter().for_each(|file| begin_to_write(file));
    let lane = |first: usize| {
        let synced: Vec<io::Result<()>> = files.iter().skip(first).step_by(LANES).map(|file| file.sync_all()).collect();
        synced.into_iter().collect::<io::Result<()>>()
    };
    std::thread::scope(|scope| {
        let begin = |first| (first, std::thread::Builder::new().spawn_scoped(scope, move || lane(first)));
        let others: Vec<_> = (1..LANES.min(files.len())).map(begin).collect();
        let own = lane(0);
        let ended = others.into_iter().map(|(first, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))),
            // No thread can be started: sync these files in this thread.
            Err(_) => lane(first),
        });
        ended.fold(own, |so_far, one| so_far.and(one))
    })
}

/// Starts writing a file's content to the disk without waiting, so that the blocks of all files are allocated and under
/// way before the first sync writes the journal that refers to them.
pub fn begin_to_write(file: &File) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor is borrowed and so open; the call takes numbers only. The result is irrelevant: a
    // directory has no content to write, and the sync that follows reports every error.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

/// Syncs the directory that contains `path`, so that a rename in it survives a power failure.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

/// Disk blocks allocated in advance for one later record, which can then be written on a full disk.
#[derive(Debug)]
pub struct Reserve {
    file: File,
    temp: PathBuf,
    path: PathBuf,
}

/// The capacity of a [`Reserve`] in bytes. A record must be shorter than this.
pub const RESERVE_BYTES: usize = 4096;

impl Reserve {
    /// Allocates the blocks in a file next to `path`, the future path of the record.
    pub fn create(path: &Path, mode: u32) -> Result<Self, DurableWriteError> {
        let at = |step| DurableWriteError::at(path, step);
        let mut temp_name = path.file_name().unwrap_or_default().to_os_string();
        temp_name.push(".reserve");
        let temp = path.with_file_name(temp_name);
        write_new(&temp, &[b' '; RESERVE_BYTES], mode).map_err(at("reserve the blocks"))?;
        let file = OpenOptions::new().write(true).open(&temp).map_err(at("open the reserve"))?;
        Ok(Self { file, temp, path: path.to_path_buf() })
    }

    /// Writes the record into the reserved blocks, padded with blanks, and renames the file to its path. May be retried
    /// after an error.
    pub fn commit(&self, record: &[u8]) -> Result<(), DurableWriteError> {
        let at = |step| DurableWriteError::at(&self.path, step);
        if record.len() >= RESERVE_BYTES {
            return Err(at("fit the record into the reserve")(io::ErrorKind::InvalidInput.into()));
        }
        let mut padded = record.to_vec();
        padded.resize(RESERVE_BYTES - 1, b' ');
        padded.push(b'\n');
        self.file.write_all_at(&padded, 0).map_err(at("write the reserve"))?;
        self.file.sync_all().map_err(at("sync the reserve"))?;
        std::fs::rename(&self.temp, &self.path).map_err(at("rename the reserve"))?;
        sync_parent(&self.path).map_err(at("sync the directory"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_has_the_new_bytes_and_the_exact_mode_and_no_temporary_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one", 0o600).unwrap();
        write_atomic(&path, b"two", 0o640).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_names_the_file_and_leaves_the_old_one() {
        let error = write_atomic(Path::new("/nonexistent-folder/x"), b"", 0o600).unwrap_err();
        assert!(error.to_string().contains("/nonexistent-folder/x"), "{error}");
    }

    #[test]
    fn a_reserved_record_appears_only_when_it_is_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        let reserve = Reserve::create(&path, 0o600).unwrap();
        assert!(!path.exists());
        reserve.commit(b"{\"a\":1}").unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["a"], 1);
        let error = reserve.commit(&[b'x'; RESERVE_BYTES]).unwrap_err();
        assert_eq!((error.step, error.source.kind()), ("fit the record into the reserve", io::ErrorKind::InvalidInput));
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["a"], 1, "the record that was committed stays");
    }
}
