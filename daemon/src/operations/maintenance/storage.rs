//! Measures the disk usage of a project's checkpoints.
//!
//! It is measured whenever it may have changed (start of the daemon, checkpoint, removal, consolidation) and kept in
//! memory, not in the database, so that reading it costs nothing. A measurement lists directories; the size of a file that
//! never changes under its name is read once.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::errors::Failure;
use crate::operations::directory;
use crate::operations::history_cell::Sizes;
use crate::operations::{StepContext, blocking};

/// The unit of `st_blocks` in bytes, on every file system.
const BLOCK: u64 = 512;

/// The directory of staged packs, exports and packs that are about to be removed, below the history. These files are
/// short-lived, and removing a checkpoint frees none of them.
const STAGING: &str = "history.git/pending";

/// The directory of published packs, below the history.
const PACKS: &str = "history.git/objects/pack";

/// The directory of the checkpoints' refs, below the history.
const REFS: &str = "history.git/refs/fermata/checkpoints";

/// The age from which on the size of a file with its final name is taken to be final.
const SETTLED: Duration = Duration::from_secs(60);

/// Measures the disk usage of all checkpoints of the project, in allocated blocks, and stores it in the history cell.
/// Every change of the store of snapshots has to be followed by a call.
///
/// # Errors
/// When a directory cannot be listed.
pub async fn measure(step: &StepContext) -> Result<u64, Failure> {
    let (dirs, cell) = (step.dirs(), step.history.clone());
    let history = dirs.history();
    let staging = history.join(STAGING);
    let directories = vec![dirs.checkpoints(), history.clone()];
    let constant = [dirs.checkpoints(), history.join(PACKS), history.join(REFS)];
    blocking("measure the checkpoints", move || {
        // Held over the measurement, so that the one that began last is stored last.
        let mut sizes = cell.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |e: io::Error| Failure::fault("measure the checkpoints", &e);
        let measurement = Measurement {
            excluded: &staging,
            constant: &constant,
            old_sizes: &sizes,
            new_sizes: Sizes::new(),
            settled_after: SETTLED,
        };
        let (bytes, new_sizes) = measurement.of(directories).map_err(failed)?;
        *sizes = new_sizes;
        cell.used_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    })
    .await
}

struct Measurement<'a> {
    /// A directory that does not count.
    excluded: &'a Path,
    /// The directories in which an entry with its final name has its final content: checkpoints, packs, refs.
    constant: &'a [PathBuf],
    old_sizes: &'a Sizes,
    new_sizes: Sizes,
    settled_after: Duration,
}

impl Measurement<'_> {
    /// Returns the disk usage of directories, and the sizes that the next measurement need not read.
    fn of(mut self, directories: Vec<PathBuf>) -> io::Result<(u64, Sizes)> {
        let mut bytes = 0;
        let mut unvisited = directories;
        while let Some(dir) = unvisited.pop() {
            if !self.constant.contains(&dir) {
                bytes += bytes_in(&dir, |below| unvisited.extend((below != self.excluded).then_some(below)))?;
                continue;
            }
            for entry in directory::entries(&dir)? {
                let entry = entry?;
                let path = entry.path();
                let old_size = self.old_sizes.get(&path).copied();
                let size = old_size.map_or_else(|| bytes_of(&path), Ok)?;
                // A partial checkpoint grows. Some file systems allocate or release blocks long after a file was
                // written.
                let partial = path.extension().is_some_and(|end| end == "partial");
                if old_size.is_some() || (!partial && self.is_settled(&entry)) {
                    self.new_sizes.insert(path, size);
                }
                bytes += size;
            }
        }
        Ok((bytes, self.new_sizes))
    }

    fn is_settled(&self, entry: &fs::DirEntry) -> bool {
        let modified = entry.metadata().and_then(|meta| meta.modified());
        modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= self.settled_after))
    }
}

/// Returns the disk usage of a file or a directory tree. Files that are removed meanwhile do not count.
fn bytes_of(path: &Path) -> io::Result<u64> {
    let meta = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        meta => meta?,
    };
    let mut bytes = meta.blocks() * BLOCK;
    let mut unvisited = if meta.is_dir() { vec![path.to_owned()] } else { Vec::new() };
    while let Some(dir) = unvisited.pop() {
        bytes += bytes_in(&dir, |below| unvisited.push(below))?;
    }
    Ok(bytes)
}

/// Returns the disk usage of a directory's entries without what is below them; passes the subdirectories on.
fn bytes_in(dir: &Path, mut subdirectory: impl FnMut(PathBuf)) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in directory::entries(dir)? {
        let entry = entry?;
        match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(meta) => {
                bytes += meta.blocks() * BLOCK;
                if meta.is_dir() {
                    subdirectory(entry.path());
                }
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store of snapshots and the sizes from its last measurement.
    struct Bed {
        dir: tempfile::TempDir,
        sizes: Sizes,
        settled_after: Duration,
    }

    impl Bed {
        fn new() -> Bed {
            let dir = tempfile::tempdir().unwrap();
            for below in [STAGING, PACKS, REFS, "checkpoints"] {
                fs::create_dir_all(dir.path().join(below)).unwrap();
            }
            Bed { dir, sizes: Sizes::new(), settled_after: Duration::ZERO }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn write(&self, path: &str, mib: usize) {
            fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
            fs::write(self.path(path), vec![1; mib << 20]).unwrap();
        }

        /// In whole MiB.
        fn measured(&mut self) -> u64 {
            let constant = [self.path("checkpoints"), self.path(PACKS), self.path(REFS)];
            let excluded = self.path(STAGING);
            let measurement = Measurement {
                excluded: &excluded,
                constant: &constant,
                old_sizes: &self.sizes,
                new_sizes: Sizes::new(),
                settled_after: self.settled_after,
            };
            let (bytes, sizes) = measurement.of(vec![self.path("checkpoints"), self.path("history.git")]).unwrap();
            self.sizes = sizes;
            bytes >> 20
        }
    }

    #[test]
    fn staged_files_do_not_count_as_checkpoints() {
        let mut bed = Bed::new();
        assert_eq!(bed.measured(), 0);
        bed.write(&format!("{STAGING}/consolidation/pack-1.pack"), 1);
        bed.write(&format!("{STAGING}/pack-2.gone"), 1);
        assert_eq!(bed.measured(), 0);
        bed.write(&format!("{PACKS}/pack-3.pack"), 1);
        assert_eq!(bed.measured(), 1);
    }

    #[test]
    fn every_change_is_measured_and_sizes_that_cannot_change_are_read_once() {
        let mut bed = Bed::new();
        bed.write("checkpoints/7.partial/database.sqlite", 1);
        bed.write("history.git/state", 1);
        assert_eq!(bed.measured(), 2);
        bed.write("checkpoints/7.partial/transcripts/a", 2);
        bed.write("history.git/state", 3);
        assert_eq!(bed.measured(), 6);
        fs::rename(bed.path("checkpoints/7.partial"), bed.path("checkpoints/7")).unwrap();
        bed.write(&format!("{PACKS}/pack-1.pack"), 2);
        assert_eq!(bed.measured(), 8);
        assert_eq!(bed.sizes.len(), 2, "{:?}", bed.sizes);
        assert_eq!(bed.measured(), 8);
        fs::remove_dir_all(bed.path("checkpoints/7")).unwrap();
        assert_eq!(bed.measured(), 5);
        assert_eq!(bed.sizes.len(), 1);
        // The size of a fresh file is read again.
        bed.settled_after = SETTLED;
        bed.write(&format!("{PACKS}/pack-2.pack"), 1);
        assert_eq!(bed.measured(), 6);
        bed.write(&format!("{PACKS}/pack-2.pack"), 2);
        assert_eq!(bed.measured(), 7);
    }
}
