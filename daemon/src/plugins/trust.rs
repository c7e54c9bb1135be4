//! Decides whether a file may be used with the daemon's privileges: only root and the daemon's user may be able to change
//! or replace it.
//!
//! The host calls it before it loads a plugin, the daemon before it reads a plugin's settings, which can name programs to
//! run. Reads metadata only.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why a file is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("{path} cannot be examined")]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("{path} belongs to user {owner}: only files of root and of user {expected} are trusted")]
    Owner {
        /// The file, or a directory above it.
        path: PathBuf,
        owner: u32,
        /// The daemon's user.
        expected: u32,
    },
    #[error("{path} can be written by others (mode {mode:04o}): chmod go-w it")]
    Writable {
        /// The file, or a directory above it.
        path: PathBuf,
        mode: u32,
    },
}

/// Checks a file and every directory above it, and returns its real path (symbolic links resolved).
///
/// A directory with the sticky bit, such as `/tmp`, may be writable by all, except the file's own directory: users cannot
/// replace the files of others in it.
pub fn trusted_file(path: &Path) -> Result<PathBuf, TrustError> {
    let unreadable = |path: &Path, source| TrustError::Unreadable { path: path.to_owned(), source };
    // A symbolic link can be replaced by every user who may write to its directory.
    let given = std::path::absolute(path).map_err(|source| unreadable(path, source))?;
    if let Some(parent) = given.parent() {
        let parent = fs::canonicalize(parent).map_err(|source| unreadable(parent, source))?;
        check_directories(&parent)?;
    }
    let real = fs::canonicalize(path).map_err(|source| unreadable(path, source))?;
    let metadata = fs::symlink_metadata(&real).map_err(|source| unreadable(&real, source))?;
    if !metadata.is_file() {
        return Err(TrustError::NotAFile { path: real });
    }
    check(&real, &metadata, false)?;
    if let Some(parent) = real.parent() {
        check_directories(parent)?;
    }
    Ok(real)
}

fn check_directories(nearest: &Path) -> Result<(), TrustError> {
    for (height, directory) in nearest.ancestors().enumerate() {
        let metadata = fs::symlink_metadata(directory)
            .map_err(|source| TrustError::Unreadable { path: directory.to_owned(), source })?;
        check(directory, &metadata, height > 0)?;
    }
    Ok(())
}

fn check(path: &Path, metadata: &fs::Metadata, sticky_suffices: bool) -> Result<(), TrustError> {
    let expected = nix::unistd::geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != 0 && owner != expected {
        return Err(TrustError::Owner { path: path.to_owned(), owner, expected });
    }
    // The group bits show the mask of an ACL, so that this covers ACLs too.
    let sticky = mode & 0o1000 != 0 && sticky_suffices;
    if mode & 0o022 != 0 && !sticky {
        return Err(TrustError::Writable { path: path.to_owned(), mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_is_trusted_only_while_no_other_user_can_change_or_replace_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("plugins");
        fs::create_dir(&folder).unwrap();
        mode(&folder, 0o755);
        let file = folder.join("a.so");
        fs::write(&file, "x").unwrap();
        mode(&file, 0o644);
        trusted_file(&file).unwrap();

        mode(&file, 0o664);
        let error = trusted_file(&file).unwrap_err().to_string();
        assert!(error.contains("a.so can be written by others (mode 0664)"), "{error}");
        mode(&file, 0o644);

        for open in [0o777, 0o775, 0o1777] {
            mode(&folder, open);
            let error = trusted_file(&file).unwrap_err().to_string();
            assert!(error.contains("plugins can be written by others"), "{error}");
        }
        mode(&folder, 0o755);

        mode(dir.path(), 0o777);
        assert!(matches!(trusted_file(&file), Err(TrustError::Writable { .. })));
        mode(dir.path(), 0o1777);
        trusted_file(&file).unwrap();
    }

    #[test]
    fn a_symlink_is_judged_by_its_own_directory_and_by_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
        for folder in [&good, &bad] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("a.so"), "x").unwrap();
            mode(&folder.join("a.so"), 0o644);
        }
        symlink(good.join("a.so"), bad.join("link.so")).unwrap();
        symlink(bad.join("a.so"), good.join("link.so")).unwrap();
        mode(&good, 0o755);
        mode(&bad, 0o777);
        trusted_file(&good.join("a.so")).unwrap();
        for link in [bad.join("link.so"), good.join("link.so")] {
            let refused = trusted_file(&link);
            let Err(TrustError::Writable { path, mode: 0o777 }) = refused else { panic!("{refused:?}") };
            assert_eq!(path, bad, "{}", link.display());
        }
        assert!(matches!(trusted_file(&good), Err(TrustError::NotAFile { .. })));
    }
}
