//! What the checkpoints of a project take on disk, and giving it back.
//!
//! It is measured whenever it may have changed (a start, a checkpoint, a removal, packs that were joined) and
//! kept in memory, so that looking at it costs nothing. The database knows nothing of it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use fermata_protocol::CheckpointNumber;

use super::{Site, blocking, leftovers, upkeep};
use crate::errors::Failure;
use crate::history::Extent;

/// The unit of `st_blocks`, bytes, whatever the file system's own blocks are.
const BLOCK: u64 = 512;

/// Measures what all checkpoints of the project take on disk, as the file system counts it, and remembers it.
/// Whoever changes the store of snapshots calls this afterwards.
///
/// # Errors
/// When a directory cannot be listed.
pub async fn measure(site: &Site) -> Result<u64, Failure> {
    let (dirs, cell) = (site.dirs(), site.history.clone());
    let places = vec![dirs.checkpoints(), dirs.history()];
    blocking("measure the checkpoints", move || {
        let bytes = bytes_below(places).map_err(|e| Failure::fault("measure the checkpoints", &e))?;
        cell.used_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    })
    .await
}

/// Adds up what everything in directories takes. What goes meanwhile takes nothing.
fn bytes_below(mut open: Vec<PathBuf>) -> io::Result<u64> {
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
                    if meta.is_dir() {
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
    leftovers::remove_rowless(site, numbers).await?;
    // Packs in which others have contents stay; what nobody needs in them goes with time.
    upkeep::wish(site, Extent::Waste);
    measure(site).await.map(drop)
}
