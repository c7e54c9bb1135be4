//! Workspaces for projects: a directory with files, with or without git, and its fingerprint.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest as _, Sha256};

/// The directory of a project.
#[derive(Debug, Clone)]
pub struct Workspace {
    path: PathBuf,
}

/// The content of a directory tree: for each relative path the modification time and a hash of the content.
pub type Fingerprint = BTreeMap<PathBuf, (i64, i64, String)>;

impl Workspace {
    /// Creates an empty directory, unless it exists.
    ///
    /// # Panics
    /// When the directory cannot be created, like all functions here: the test cannot continue.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("create {}: {e}", path.display()));
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path as text, as the protocol requires it.
    pub fn text(&self) -> &str {
        self.path.to_str().expect("the sandbox has a UTF-8 path")
    }

    /// Writes a file and creates its parent directories.
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path.join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).unwrap_or_else(|e| panic!("create {}: {e}", parent.display()));
        }
        fs::write(&path, content).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        self
    }

    /// Reads a text file; a missing file reads as empty.
    pub fn read(&self, relative: &str) -> String {
        fs::read_to_string(self.path.join(relative)).unwrap_or_default()
    }

    /// Says whether a file or directory of that name exists.
    pub fn has(&self, relative: &str) -> bool {
        self.path.join(relative).symlink_metadata().is_ok()
    }

    pub fn remove(&self, relative: &str) -> &Self {
        let path = self.path.join(relative);
        fs::remove_file(&path).unwrap_or_else(|e| panic!("remove {}: {e}", path.display()));
        self
    }

    /// Creates a git repository with all files committed.
    pub fn git_init(&self) -> &Self {
        self.git(&["init", "--quiet", "--initial-branch=main"]);
        self.git_commit("first")
    }

    /// Commits all files.
    pub fn git_commit(&self, message: &str) -> &Self {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message", message]);
        self
    }

    /// Runs git with only the workspace's own configuration and returns its output.
    pub fn git(&self, args: &[&str]) -> String {
        let output = Command::new("git")
            .args(args)
            .current_dir(&self.path)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .envs([("GIT_AUTHOR_NAME", "Test"), ("GIT_AUTHOR_EMAIL", "test@localhost")])
            .envs([("GIT_COMMITTER_NAME", "Test"), ("GIT_COMMITTER_EMAIL", "test@localhost")])
            .output()
            .unwrap_or_else(|e| panic!("run git: {e}"));
        assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Returns the fingerprint of the workspace.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.path)
    }
}

/// Returns the fingerprint of a directory tree, with links by their target; a missing directory has an empty one.
pub fn fingerprint(root: &Path) -> Fingerprint {
    let mut found = Fingerprint::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(metadata) = path.symlink_metadata() else { continue };
            let content = if metadata.is_dir() {
                directories.push(path.clone());
                Vec::new()
            } else if metadata.is_symlink() {
                fs::read_link(&path).map(|target| target.into_os_string().into_encoded_bytes()).unwrap_or_default()
            } else if metadata.is_file() {
                fs::read(&path).unwrap_or_default()
            } else {
                Vec::new()
            };
            let hash = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
            let relative = path.strip_prefix(root).unwrap_or(&path).to_owned();
            found.insert(relative, (metadata.mtime(), metadata.mtime_nsec(), hash));
        }
    }
    found
}
