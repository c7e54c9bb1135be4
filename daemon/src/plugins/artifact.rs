//! The artifacts of a plugin: files that it adds to a checkpoint in a directory of its own, checked and hashed here.
//!
//! The daemon does not trust the paths that a plugin names: they are opened beneath the plugin's directory without
//! following symbolic links, and must be regular files.

use fermata_plugin_api::{Artifact, CallError};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use crate::hashing;

/// A file that a plugin has added to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PluginArtifact {
    pub plugin: String,
    /// Path below the directory of the save request; begins with the plugin's name.
    pub path: PathBuf,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
    pub media_type: Option<String>,
    pub description: Option<String>,
}

/// A plugin's failure to add to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PluginFailure {
    pub plugin: String,
    /// Stable code: `deadline`, `crashed`, `not_running`, `artifact_invalid` or the plugin's own.
    pub code: String,
    /// For the user.
    pub message: String,
}

impl PluginFailure {
    pub(super) fn new(plugin: &str, failure: CallError) -> Self {
        Self { plugin: plugin.to_owned(), code: failure.code, message: failure.message }
    }
}

/// Creates the directory for the artifacts of one plugin; its parent must exist.
pub(super) fn make_directory(directory: &Path) -> Result<(), CallError> {
    fs::DirBuilder::new().mode(0o700).create(directory).map_err(|error| {
        let message = format!("{} cannot be created: {error}", directory.display());
        CallError::new("artifact_directory", message)
    })
}

/// Removes the directory of a failed plugin. An error is only logged: files without a manifest entry do no harm.
pub(super) fn discard(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(directory = %directory.display(), %error, "the directory of a failed plugin cannot be removed");
    }
}

/// Checks, hashes and syncs the artifacts that a plugin has named.
pub(super) fn collect(plugin: &str, directory: &Path, named: Vec<Artifact>) -> Result<Vec<PluginArtifact>, CallError> {
    let invalid = |path: &Path, why: &dyn std::fmt::Display| {
        let message = format!("artifact {} cannot be used: {why}", path.display());
        CallError::new("artifact_invalid", message)
    };
    let root = File::open(directory).map_err(|error| invalid(directory, &error))?;
    let mut paths = BTreeSet::new();
    let mut artifacts = Vec::with_capacity(named.len());
    for artifact in named {
        let path = &artifact.path;
        let plain = |component| matches!(component, Component::Normal(_));
        if path.as_os_str().is_empty() || !path.components().all(plain) {
            return Err(invalid(path, &"only plain relative paths are allowed"));
        }
        // Compared as components: `a//b` is `a/b`.
        if !paths.insert(path.components().collect::<PathBuf>()) {
            return Err(invalid(path, &"it was named twice"));
        }
        let file = open_beneath(&root, path).map_err(|error| invalid(path, &error))?;
        let kind = file.metadata().map_err(|error| invalid(path, &error))?;
        if !kind.is_file() {
            return Err(invalid(path, &"it is not a regular file"));
        }
        let (bytes, sha256) = hashing::hash(&file).map_err(|error| invalid(path, &error))?;
        file.sync_all().map_err(|error| invalid(path, &error))?;
        artifacts.push(PluginArtifact {
            plugin: plugin.to_owned(),
            path: Path::new(plugin).join(path.components().collect::<PathBuf>()),
            bytes,
            sha256,
            media_type: artifact.media_type,
            description: artifact.description,
        });
    }
    sync_directories(directory, &paths).map_err(|error| invalid(directory, &error))?;
    Ok(artifacts)
}

fn open_beneath(root: &File, path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK the open of a FIFO would wait for a writer.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(File::from(openat2(root, path, how)?))
}

/// Makes the names of the files durable.
fn sync_directories(root: &Path, files: &BTreeSet<PathBuf>) -> io::Result<()> {
    let inner = files.iter().flat_map(|file| file.ancestors().skip(1));
    let directories: BTreeSet<PathBuf> = inner.map(|directory| root.join(directory)).collect();
    for directory in directories.iter().rev() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn named(path: &str) -> Artifact {
        Artifact { path: path.into(), media_type: None, description: None }
    }

    #[test]
    fn artifacts_are_hashed_and_named_below_the_plugin() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/a"), "abc").unwrap();
        let found = collect("p", dir.path(), vec![named("sub//a")]).unwrap();
        assert_eq!(found[0].path, Path::new("p/sub/a"));
        assert_eq!(found[0].bytes, 3);
        assert_eq!(found[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn nothing_outside_the_directory_and_nothing_special_is_an_artifact() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("p");
        fs::create_dir(&inner).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        fs::write(inner.join("a"), "x").unwrap();
        symlink("../secret", inner.join("link")).unwrap();
        symlink("..", inner.join("up")).unwrap();
        nix::unistd::mkfifo(&inner.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let outside = dir.path().join("secret");
        for bad in ["../secret", "link", "up/secret", "fifo", "", ".", "missing"] {
            let failure = collect("p", &inner, vec![named(bad)]).unwrap_err();
            assert_eq!(failure.code, "artifact_invalid", "{bad}");
        }
        let absolute = outside.to_str().unwrap();
        for bad in [vec![named(absolute)], vec![named("a"), named("a")]] {
            assert_eq!(collect("p", &inner, bad).unwrap_err().code, "artifact_invalid");
        }
        assert_eq!(collect("p", &inner, vec![named("a")]).unwrap()[0].path, Path::new("p/a"));
    }
}
