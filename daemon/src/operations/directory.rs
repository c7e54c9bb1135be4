//! Creates, lists and removes directories below a project's state directory. All functions block.

use std::fs::{self, DirBuilder, DirEntry};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// Creates a directory, and those above it, for the daemon's user only. Succeeds when it exists.
///
/// # Errors
/// When it cannot be created.
pub(super) fn create(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Returns the entries of a directory, none when it does not exist.
///
/// # Errors
/// When it cannot be opened.
pub(super) fn entries(path: &Path) -> io::Result<impl Iterator<Item = io::Result<DirEntry>> + use<>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries?),
    };
    Ok(entries.into_iter().flatten())
}

/// Removes a directory with all files below it. Succeeds when it does not exist.
///
/// # Errors
/// When a file cannot be removed.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
