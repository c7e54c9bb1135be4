//! Refuses workspaces that must never be covered: the root of the file system and home directories.

use std::path::{Path, PathBuf};

use crate::errors::{HistoryError, Result};

/// Checks a workspace and returns its real path.
pub(crate) fn check_workspace(workspace: &Path) -> Result<PathBuf> {
    let refuse = |reason| HistoryError::WorkspaceRefused { path: workspace.to_owned(), reason };
    if !workspace.is_absolute() {
        return Err(refuse("its path is not absolute"));
    }
    let real = std::fs::canonicalize(workspace).map_err(HistoryError::io("find workspace", workspace))?;
    if real == Path::new("/") {
        return Err(refuse("it is the root of the file system"));
    }
    let meta = std::fs::metadata(&real).map_err(HistoryError::io("find workspace", workspace))?;
    if !meta.is_dir() {
        return Err(refuse("it is not a directory"));
    }
    let owner = nix::unistd::Uid::from_raw(std::os::unix::fs::MetadataExt::uid(&meta));
    let mut homes: Vec<PathBuf> = std::env::var_os("HOME").map(PathBuf::from).into_iter().collect();
    for uid in [owner, nix::unistd::geteuid()] {
        homes.extend(nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.dir));
    }
    if homes.iter().any(|home| std::fs::canonicalize(home).is_ok_and(|home| home == real)) {
        return Err(refuse("it is a home directory"));
    }
    Ok(real)
}
