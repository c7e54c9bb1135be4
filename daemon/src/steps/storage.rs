//! What the checkpoints of a project take on disk, and giving it back.
//!
//! It is measured whenever it may have changed (a start, a checkpoint, a removal, packs that were joined) and
//! kept in memory, so that looking at it costs nothing. The database knows nothing of it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use fermata_protocol::CheckpointNumber;

use super::{Site, blocking, leftovers, upkeep};
use crate::errors::Failure;
use crate::history::Extent;

/// The unit of `st_blocks`, bytes, whatever the file system's own blocks are.
const BLOCK: u64 = 512;

/// Where drafts, exports and packs that are about to be freed lie, below the history. They are gone soon, and no removal
/// of a checkpoint frees any of them.
const DRAFTS: &str = "history.git/pending";

/// Measures what all checkpoints of the project take on disk, as the file system counts it, and remembers it.
/// Whoever changes the store of snapshots calls this afterwards.
///
/// # Errors
/// When a directory cannot be listed.
pub async fn measure(site: &Site) -> Result<u64, Failure> {
    let (dirs, cell) = (site.dirs(), site.history.clone());
    let places = vec![dirs.checkpoints(), dirs.history()];
    let drafts = dirs.history().join(DRAFTS);
    blocking("measure the checkpoints", move || {
        let bytes = bytes_below(places, &drafts).map_err(|e| Failure::fault("measure the checkpoints", &e))?;
        cell.used_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    })
    .await
}

/// Adds up what everything in directories takes, `without` one of them. What goes meanwhile takes nothing.
fn bytes_below(mut open: Vec<PathBuf>, without: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    while let Some(dir) = open.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(meta) => {
                    bytes += meta.blocks() * BLOCK;
                    if meta.is_dir() && entry.path() != without {
                        open.push(entry.path());
                    }
                }
            }
        }
    }
    Ok(bytes)
}

/// Removes the files and snapshots of checkpoints that have no row any more, and gives the room back that
/// nobody else needs.
///
/// # Errors
/// When something cannot be removed; it may be tried again, and the next start sweeps it.
pub async fn discard(site: &Site, numbers: &[CheckpointNumber]) -> Result<(), Failure> {
    let before = site.history.used_bytes();
    leftovers::remove_rowless(site, numbers).await?;
    let after = measure(site).await?;
    site.history.reclaimed(before.saturating_sub(after));
    // Packs in which others have contents stay; what nobody needs in them goes with time.
    upkeep::wish(site, Extent::Waste);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_do_not_count_as_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let drafts = dir.path().join(DRAFTS);
        let pack = dir.path().join("history.git/objects/pack");
        fs::create_dir_all(drafts.join("consolidation")).unwrap();
        fs::create_dir_all(&pack).unwrap();
        let measured = || bytes_below(vec![dir.path().to_owned()], &drafts).unwrap();
        let empty = measured();
        fs::write(drafts.join("consolidation/pack-1.pack"), vec![1; 1 << 20]).unwrap();
        fs::write(drafts.join("pack-2.gone"), vec![1; 1 << 20]).unwrap();
        assert!(measured() < empty + (1 << 18));
        fs::write(pack.join("pack-3.pack"), vec![1; 1 << 20]).unwrap();
        assert!(measured() >= empty + (1 << 20));
    }
}
