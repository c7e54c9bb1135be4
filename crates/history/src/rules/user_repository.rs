//! Reads the state of the repository that the workspace belongs to, without writing to it.
//!
//! `HEAD` and refs are read as plain files; `user_index` parses the index. libgit2 never opens the repository,
//! since it could refresh the index, read a user's configuration, or refuse a repository of another user.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::rules::bounded_read::{read_at_most, read_small};
use crate::rules::user_index::{self, IndexError};
use crate::tree::names::RelPath;

const MAX_PACKED_REFS: u64 = 256 * 1024 * 1024;

/// The state of the user's repository at the time of a scan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRepository {
    /// The top of the working tree, escaped.
    pub top: String,
    /// Whether the workspace is a linked worktree or a submodule (`.git` is a file).
    pub linked: bool,
    /// The ref that `HEAD` names; `None` if it is detached.
    pub head_ref: Option<String>,
    /// The branch, if `HEAD` names one.
    pub branch: Option<String>,
    /// The commit of `HEAD`; `None` before the first commit, or if it is not found in plain files.
    pub head: Option<String>,
    /// The operation in progress: `rebase`, `merge`, `cherry_pick`, `revert` or `bisect`.
    pub in_progress: Option<String>,
}

/// The directories of a repository.
#[derive(Clone, Debug)]
pub struct Location {
    /// The top of the working tree.
    pub top: PathBuf,
    /// The directory of the worktree itself: `HEAD`, `index`.
    pub git_dir: PathBuf,
    /// The directory that all worktrees share: refs, `info/exclude`.
    pub common_dir: PathBuf,
    /// The path of the workspace below the top; empty if they are the same.
    pub prefix: RelPath,
    linked: bool,
}

impl Location {
    /// Finds the repository that a directory belongs to.
    pub fn find(workspace: &Path) -> Option<Location> {
        workspace.ancestors().find_map(|top| Location::at(top, workspace))
    }

    /// Returns the repository whose working tree has the top `top`; `None` if there is none.
    pub fn at(top: &Path, workspace: &Path) -> Option<Location> {
        let dot_git = top.join(".git");
        let meta = fs::metadata(&dot_git).ok()?;
        let (git_dir, linked) = if meta.is_dir() {
            (dot_git, false)
        } else {
            let text = read_small(&dot_git)?;
            let target = text.strip_prefix(b"gitdir:")?.trim_ascii();
            (top.join(std::ffi::OsStr::from_bytes(target)), true)
        };
        if !fs::metadata(git_dir.join("HEAD")).ok()?.is_file() {
            return None;
        }
        let common_dir = match read_small(&git_dir.join("commondir")) {
            Some(text) => git_dir.join(std::ffi::OsStr::from_bytes(text.trim_ascii())),
            None => git_dir.clone(),
        };
        let prefix = workspace.strip_prefix(top).ok()?;
        let prefix = RelPath::new(prefix.as_os_str().as_bytes()).ok()?;
        Some(Location { top: top.to_owned(), git_dir, common_dir, prefix, linked })
    }

    pub fn describe(&self) -> UserRepository {
        let head = read_small(&self.git_dir.join("HEAD")).unwrap_or_default();
        let head = String::from_utf8_lossy(&head).trim().to_owned();
        let head_ref = head.strip_prefix("ref:").map(|name| name.trim().to_owned());
        let commit = match &head_ref {
            Some(name) => self.resolve(name),
            None => as_commit(&head),
        };
        let progress = [
            ("rebase-merge", "rebase"),
            ("rebase-apply", "rebase"),
            ("MERGE_HEAD", "merge"),
            ("CHERRY_PICK_HEAD", "cherry_pick"),
            ("REVERT_HEAD", "revert"),
            ("BISECT_LOG", "bisect"),
        ];
        let in_progress = progress.iter().find(|(file, _)| self.git_dir.join(file).exists());
        UserRepository {
            top: fermata_protocol::paths::escape(self.top.as_os_str().as_bytes()),
            linked: self.linked,
            branch: head_ref.as_deref().and_then(|name| name.strip_prefix("refs/heads/")).map(str::to_owned),
            head_ref,
            head: commit,
            in_progress: in_progress.map(|(_, name)| (*name).to_owned()),
        }
    }

    fn resolve(&self, name: &str) -> Option<String> {
        // The name of the ref becomes a path, so it must lie below `refs`.
        if !name.starts_with("refs/") || RelPath::new(name).is_err() {
            return None;
        }
        let loose = [&self.git_dir, &self.common_dir].into_iter().find_map(|dir| read_small(&dir.join(name)));
        if let Some(text) = loose {
            return as_commit(String::from_utf8_lossy(&text).trim());
        }
        let packed = read_at_most(&self.common_dir.join("packed-refs"), MAX_PACKED_REFS)?;
        packed.split(|b| *b == b'\n').find_map(|line| {
            let line = std::str::from_utf8(line).ok()?;
            let (commit, line_name) = line.split_once(' ')?;
            (line_name == name).then(|| as_commit(commit))?
        })
    }

    pub fn index(&self) -> PathBuf {
        self.git_dir.join("index")
    }

    /// Lists the tracked paths below the workspace, except files that a sparse checkout leaves out and that do
    /// not exist.
    ///
    /// # Errors
    /// Fails when the index exists but cannot be read.
    pub(crate) fn tracked(&self) -> Result<Indexed, IndexError> {
        let (path, mut indexed) = (self.index(), Indexed::default());
        if fs::metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(indexed);
        }
        let content = user_index::read(&path).ok_or(IndexError::Unreadable("index"))?;
        let mut existing = ExistingPaths { top: &self.top, last_dir: None };
        let start = if self.prefix.is_root() { 0 } else { self.prefix.bytes().len() + 1 };
        for entry in user_index::tracked(&self.git_dir, &content)? {
            let into = if entry.is_module() { &mut indexed.modules } else { &mut indexed.files };
            let Ok(path) = RelPath::new(entry.path) else { continue };
            if path.is_within(&self.prefix) && path.bytes().len() > start && (!entry.skipped || existing.has(&path)) {
                into.extend(RelPath::new(&path.bytes()[start..]));
            }
        }
        Ok(indexed)
    }
}

/// The tracked paths of an index, relative to the workspace.
#[derive(Debug, Default)]
pub(crate) struct Indexed {
    /// Files and symbolic links.
    pub files: Vec<RelPath>,
    pub modules: Vec<RelPath>,
}

/// Says which paths exist. Consecutive paths are in one directory, and a sparse checkout leaves out whole
/// trees; one check then suffices for all of them.
struct ExistingPaths<'a> {
    top: &'a Path,
    /// The last directory that was checked.
    last_dir: Option<(RelPath, bool)>,
}

impl ExistingPaths<'_> {
    fn has(&mut self, path: &RelPath) -> bool {
        path.parent().is_none_or(|dir| self.has_dir(&dir)) && self.metadata(path).is_some()
    }

    fn has_dir(&mut self, dir: &RelPath) -> bool {
        match &self.last_dir {
            Some((last, exists)) if dir == last || (!exists && dir.is_within(last)) => return *exists,
            _ => {}
        }
        let Some(above) = dir.parent() else { return true };
        // If a directory above is missing, that one is remembered.
        if !self.has_dir(&above) {
            return false;
        }
        let exists = self.metadata(dir).is_some_and(|meta| meta.is_dir());
        self.last_dir = Some((dir.clone(), exists));
        exists
    }

    fn metadata(&self, path: &RelPath) -> Option<fs::Metadata> {
        fs::symlink_metadata(self.top.join(path.as_path())).ok()
    }
}

fn as_commit(text: &str) -> Option<String> {
    let is_hash = matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit());
    is_hash.then(|| text.to_owned())
}
