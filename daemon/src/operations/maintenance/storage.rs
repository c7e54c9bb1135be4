//! Measures what the checkpoints of a project take on disk.
//!
//! It is measured whenever it may have changed (a start, a checkpoint, a removal, packs that were joined) and
//! kept in memory, so that looking at it costs nothing. The database knows nothing of it. Measuring lists names; the size
//! of what never changes under its name is asked for once.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::errors::Failure;
use crate::operations::history_cell::Sizes;
use crate::operations::{StepContext, blocking};

/// The unit of `st_blocks`, bytes, whatever the file system's own blocks are.
const BLOCK: u64 = 512;

/// Where drafts, exports and packs that are about to be freed lie, below the history. They are gone soon, and no removal
/// of a checkpoint frees any of them.
const DRAFTS: &str = "history.git/pending";

/// Where published packs lie, below the history.
const PACKS: &str = "history.git/objects/pack";

/// Where the names of the checkpoints lie, below the history.
const REFS: &str = "history.git/refs/fermata/checkpoints";

/// How old a file is whose size is taken to be the last one.
const SETTLED: Duration = Duration::from_secs(60);

/// Measures what all checkpoints of the project take on disk, as the file system counts it, and remembers it.
/// Whoever changes the store of snapshots calls this afterwards.
///
/// # Errors
/// When a directory cannot be listed.
pub async fn measure(site: &StepContext) -> Result<u64, Failure> {
    let (dirs, cell) = (site.dirs(), site.history.clone());
    let history = dirs.history();
    let drafts = history.join(DRAFTS);
    let places = vec![dirs.checkpoints(), history.clone()];
    let constant = [dirs.checkpoints(), history.join(PACKS), history.join(REFS)];
    blocking("measure the checkpoints", move || {
        // One at a time: what is counted last is what is kept.
        let mut sizes = cell.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |e: io::Error| Failure::fault("measure the checkpoints", &e);
        let counted =
            Count { without: &drafts, constant: &constant, before: &sizes, now: Sizes::new(), settled_after: SETTLED };
        let (bytes, now) = counted.below(places).map_err(failed)?;
        *sizes = now;
        cell.used_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    })
    .await
}

/// A measurement.
struct Count<'a> {
    /// A directory that does not count.
    without: &'a Path,
    /// The directories in which whatever has its final name has its final content: numbers, packs, refs.
    constant: &'a [PathBuf],
    before: &'a Sizes,
    now: Sizes,
    /// From which age on a size is taken to be the last one.
    settled_after: Duration,
}

impl Count<'_> {
    /// Adds up what everything in directories takes; returns it with what need not be asked for again.
    fn below(mut self, places: Vec<PathBuf>) -> io::Result<(u64, Sizes)> {
        let mut bytes = 0;
        let mut open = places;
        while let Some(dir) = open.pop() {
            if !self.constant.contains(&dir) {
                bytes += bytes_in(&dir, |below| open.extend((below != self.without).then_some(below)))?;
                continue;
            }
            for entry in entries_of(&dir)? {
                let entry = entry?;
                let path = entry.path();
                let known = self.before.get(&path).copied();
                let size = known.map_or_else(|| bytes_of(&path), Ok)?;
                // What is being made has another kind of name, and grows. Some file systems give a file its blocks, or
                // take back what it does not need, long after it was written.
                let partial = path.extension().is_some_and(|end| end == "partial");
                if known.is_some() || (!partial && self.is_old(&entry)) {
                    self.now.insert(path, size);
                }
                bytes += size;
            }
        }
        Ok((bytes, self.now))
    }
}

impl Count<'_> {
    fn is_old(&self, entry: &fs::DirEntry) -> bool {
        let modified = entry.metadata().and_then(|meta| meta.modified());
        modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= self.settled_after))
    }
}

/// Adds up what something takes with all that is below it. What goes meanwhile takes nothing.
fn bytes_of(path: &Path) -> io::Result<u64> {
    let meta = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        meta => meta?,
    };
    let mut bytes = meta.blocks() * BLOCK;
    let mut open = if meta.is_dir() { vec![path.to_owned()] } else { Vec::new() };
    while let Some(dir) = open.pop() {
        bytes += bytes_in(&dir, |below| open.push(below))?;
    }
    Ok(bytes)
}

fn entries_of(dir: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>> + use<>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries?),
    };
    Ok(entries.into_iter().flatten())
}

/// Adds up what is directly in a directory, and names the directories among it.
fn bytes_in(dir: &Path, mut found: impl FnMut(PathBuf)) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in entries_of(dir)? {
        let entry = entry?;
        match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(meta) => {
                bytes += meta.blocks() * BLOCK;
                if meta.is_dir() {
                    found(entry.path());
                }
            }
        }
    }
    Ok(bytes)
}
#[cfg(test)]
mod tests {
    use super::*;

    /// A store of snapshots, and what is known of it.
    struct Bed {
        dir: tempfile::TempDir,
        sizes: Sizes,
        settled_after: Duration,
    }

    impl Bed {
        fn new() -> Bed {
            let dir = tempfile::tempdir().unwrap();
            for below in [DRAFTS, PACKS, REFS, "checkpoints"] {
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

        /// How many whole MiB there are.
        fn measured(&mut self) -> u64 {
            let constant = [self.path("checkpoints"), self.path(PACKS), self.path(REFS)];
            let without = self.path(DRAFTS);
            let (before, settled_after) = (&self.sizes, self.settled_after);
            let count = Count { without: &without, constant: &constant, before, now: Sizes::new(), settled_after };
            let (bytes, sizes) = count.below(vec![self.path("checkpoints"), self.path("history.git")]).unwrap();
            self.sizes = sizes;
            bytes >> 20
        }
    }

    #[test]
    fn drafts_do_not_count_as_checkpoints() {
        let mut bed = Bed::new();
        assert_eq!(bed.measured(), 0);
        bed.write(&format!("{DRAFTS}/consolidation/pack-1.pack"), 1);
        bed.write(&format!("{DRAFTS}/pack-2.gone"), 1);
        assert_eq!(bed.measured(), 0);
        bed.write(&format!("{PACKS}/pack-3.pack"), 1);
        assert_eq!(bed.measured(), 1);
    }

    #[test]
    fn what_comes_grows_and_goes_is_seen_and_what_cannot_change_is_remembered() {
        let mut bed = Bed::new();
        bed.write("checkpoints/7.partial/database.sqlite", 1);
        bed.write("history.git/picture", 1);
        assert_eq!(bed.measured(), 2);
        bed.write("checkpoints/7.partial/transcripts/a", 2);
        bed.write("history.git/picture", 3);
        assert_eq!(bed.measured(), 6);
        fs::rename(bed.path("checkpoints/7.partial"), bed.path("checkpoints/7")).unwrap();
        bed.write(&format!("{PACKS}/pack-1.pack"), 2);
        assert_eq!(bed.measured(), 8);
        assert_eq!(bed.sizes.len(), 2, "{:?}", bed.sizes);
        assert_eq!(bed.measured(), 8);
        fs::remove_dir_all(bed.path("checkpoints/7")).unwrap();
        assert_eq!(bed.measured(), 5);
        assert_eq!(bed.sizes.len(), 1);
        // What is fresh is asked for again.
        bed.settled_after = SETTLED;
        bed.write(&format!("{PACKS}/pack-2.pack"), 1);
        assert_eq!(bed.measured(), 6);
        bed.write(&format!("{PACKS}/pack-2.pack"), 2);
        assert_eq!(bed.measured(), 7);
    }
}
