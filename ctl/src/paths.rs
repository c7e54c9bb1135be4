//! Paths as the protocol carries them: absolute, without symbolic links, UTF-8.

use std::path::{Path, PathBuf};

use crate::errors::CommandError;

/// Makes a path absolute and resolves its symbolic links.
///
/// # Errors
/// When the path does not exist.
pub fn canonical(path: &Path) -> Result<PathBuf, CommandError> {
    path.canonicalize().map_err(|e| CommandError::io(format!("find {}", path.display()), &e))
}

/// Makes a path absolute without reading the file system.
///
/// # Errors
/// When the path is empty, or the current directory is gone.
pub fn absolute(path: PathBuf) -> Result<PathBuf, CommandError> {
    std::path::absolute(&path).map_err(|e| CommandError::io(format!("resolve {}", path.display()), &e))
}

/// Returns a path as text.
///
/// # Errors
/// When the path is not valid UTF-8, which the protocol cannot carry.
pub fn to_utf8(path: &Path) -> Result<String, CommandError> {
    match path.to_str() {
        Some(text) => Ok(text.into()),
        None => Err(CommandError::usage(format!("the path {} is not valid UTF-8", path.display()))),
    }
}
