//! Lists the regular files that a program has written to its artifact directory.

use fermata_plugin_api::{Artifact, CallError};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// More files than this are taken for a configuration error.
const MAX_ARTIFACTS: usize = 10_000;

/// Lists all regular files below `directory`, sorted by path, without symbolic links and special files. `program` is
/// named in the descriptions.
pub fn list(directory: &Path, program: &str) -> Result<Vec<Artifact>, CallError> {
    let mut files = Vec::new();
    collect(directory, Path::new(""), &mut files).map_err(|error| {
        let message = format!("{} cannot be listed: {error}", directory.display());
        CallError::new("artifacts_unreadable", message)
    })?;
    if files.len() > MAX_ARTIFACTS {
        let message = format!("{program} wrote more than {MAX_ARTIFACTS} files");
        return Err(CallError::new("too_many_artifacts", message));
    }
    files.sort();
    let describe = |path| Artifact { path, media_type: None, description: Some(format!("written by {program}")) };
    Ok(files.into_iter().map(describe).collect())
}

fn collect(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(root, &path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
        if files.len() > MAX_ARTIFACTS {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_artifacts() {
        let dir = std::env::temp_dir().join(format!("fermata-exec-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/b"), "").unwrap();
        fs::write(dir.join("a"), "").unwrap();
        std::os::unix::fs::symlink("a", dir.join("link")).unwrap();
        let artifacts = list(&dir, "dump").unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let paths: Vec<_> = artifacts.iter().map(|artifact| artifact.path.as_path()).collect();
        assert_eq!(paths, [Path::new("a"), Path::new("sub/b")]);
    }
}
