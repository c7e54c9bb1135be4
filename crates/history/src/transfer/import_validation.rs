//! Import validation: checks that an imported checkpoint describes a tree that a workspace can hold, so that
//! listing and restoring it are bounded and cannot fail half-way.
//!
//! Equal directories are checked once, whatever their number of paths; paths are counted, not listed. Requires
//! that the hashes of all objects were verified. Changes nothing.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::Oid;
use crate::tree::listing::{CheckpointRoot, Directory, ItemContent, Listing};
use crate::tree::names::RelPath;

/// The largest tree, metadata blob or delta of an import in memory, in bytes: about a million names in one
/// directory.
pub(crate) const MAX_IN_MEMORY: u64 = 256 << 20;
/// The largest number of paths.
const MAX_PATHS: u64 = 10_000_000;
/// The longest path that the kernel accepts, and the longest target of a link, in bytes.
const MAX_PATH: usize = 4095;

/// The size of a directory and everything below it.
#[derive(Clone, Copy, Default)]
struct ImportedSize {
    paths: u64,
    /// The length of the longest path below the directory in bytes.
    length: usize,
}

/// A directory that is being measured.
struct OpenImportDir {
    path: RelPath,
    directory: Directory,
    size: ImportedSize,
    below: std::vec::IntoIter<(Vec<u8>, Directory)>,
}

/// Checks that the paths and links of a checkpoint are valid for the kernel and not too many.
///
/// # Errors
/// Fails when a limit is exceeded, when an object cannot be read, or when cancelled.
pub(crate) fn validate_import(store: &ObjectStore, commit: &Oid, cancel: &AtomicBool) -> Result<()> {
    let mut measured: HashMap<Directory, ImportedSize> = HashMap::new();
    let mut open = vec![enter(store, RelPath::root(), CheckpointRoot::read(store, commit)?.top())?];
    while let Some(here) = open.last_mut() {
        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        if let Some((name, directory)) = here.below.next() {
            let path = here.path.join(&name);
            match measured.get(&directory) {
                Some(inner) => here.add(commit, &path, *inner)?,
                None => {
                    within_bounds(commit, path.bytes().len(), 0)?;
                    let next = enter(store, path, directory)?;
                    open.push(next);
                }
            }
        } else if let Some(done) = open.pop() {
            within_bounds(commit, done.path.bytes().len() + done.size.length, done.size.paths)?;
            measured.insert(done.directory, done.size);
            if let Some(above) = open.last_mut() {
                above.add(commit, &done.path, done.size)?;
            }
        }
    }
    Ok(())
}

impl OpenImportDir {
    fn add(&mut self, commit: &Oid, path: &RelPath, inner: ImportedSize) -> Result<()> {
        let length = path.bytes().len() - self.path.bytes().len() + inner.length;
        self.size.length = self.size.length.max(length);
        self.size.paths = self.size.paths.saturating_add(inner.paths);
        within_bounds(commit, self.path.bytes().len() + self.size.length, self.size.paths)
    }
}

fn within_bounds(commit: &Oid, length: usize, paths: u64) -> Result<()> {
    let refused = |problem: String| Err(HistoryError::DamagedObject { oid: *commit, problem });
    if length > MAX_PATH {
        return refused(format!("it has a path of more than {MAX_PATH} bytes"));
    }
    if paths > MAX_PATHS {
        return refused(format!("it has more than {MAX_PATHS} paths"));
    }
    Ok(())
}

fn enter(store: &ObjectStore, path: RelPath, directory: Directory) -> Result<OpenImportDir> {
    let mut listing = Listing::default();
    let below = directory.read(store, &path, &mut listing)?;
    let mut size = ImportedSize { paths: (listing.items.len() + listing.skipped.len()) as u64, length: 0 };
    for (at, item) in &listing.items {
        size.length = size.length.max(at.bytes().len() - path.bytes().len());
        if let ItemContent::Symlink(oid) = &item.content {
            check_target(store, oid)?;
        }
    }
    Ok(OpenImportDir { path, directory, size, below: below.into_iter() })
}

fn check_target(store: &ObjectStore, oid: &Oid) -> Result<()> {
    let refused = |problem: &str| HistoryError::DamagedObject { oid: *oid, problem: problem.to_owned() };
    let object = store.open_object(oid)?;
    if object.size == 0 || object.size > MAX_PATH as u64 {
        return Err(refused("it is not a valid target of a symbolic link"));
    }
    let mut target = Vec::new();
    object.take(MAX_PATH as u64 + 1).read_to_end(&mut target).map_err(|error| refused(&error.to_string()))?;
    if target.contains(&0) { Err(refused("it is not a valid target of a symbolic link")) } else { Ok(()) }
}
