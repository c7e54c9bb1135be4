//! The rules for what a checkpoint covers: git's ignore files, and the caller's own `include` and `exclude`
//! patterns.
//!
//! Syntax and order are git's: the deepest `.gitignore` has precedence, `info/exclude` comes last. Global
//! excludes of a user are not read.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::errors::{HistoryError, Result};
use crate::rules::bounded_read::read_small;
use crate::rules::ignore_file::IgnoreFile;
use crate::rules::user_repository::Location;
use crate::tree::names::RelPath;

/// The rules for what the checkpoints of a workspace cover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Patterns, as in `.gitignore`, for paths that are covered although the repository ignores them.
    pub include: Vec<String>,
    /// Patterns for paths that are never covered, even if tracked; they override `include`.
    pub exclude: Vec<String>,
    /// Larger files are skipped and reported.
    pub max_file_bytes: u64,
    /// Whether `.gitignore` and `info/exclude` apply.
    pub use_gitignore: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Rules { include: Vec::new(), exclude: Vec::new(), max_file_bytes: 256 * 1024 * 1024, use_gitignore: true }
    }
}

pub(crate) struct OwnPatterns {
    include: Option<IgnoreFile>,
    exclude: IgnoreFile,
}

impl OwnPatterns {
    /// Fails when a pattern is invalid.
    pub fn compile(rules: &Rules) -> Result<OwnPatterns> {
        let compile = |patterns: &[String]| -> Result<IgnoreFile> {
            let useless = |pattern: &&String| IgnoreFile::parse(pattern.as_bytes()).1 > 0;
            match patterns.iter().find(useless) {
                Some(pattern) => Err(HistoryError::BadRule { pattern: pattern.clone() }),
                None => Ok(IgnoreFile::parse(patterns.join("\n").as_bytes()).0),
            }
        };
        let include = if rules.include.is_empty() { None } else { Some(compile(&rules.include)?) };
        Ok(OwnPatterns { include, exclude: compile(&rules.exclude)? })
    }

    pub fn has_includes(&self) -> bool {
        self.include.is_some()
    }

    /// Says whether a pattern includes the path itself; the walk asks for each directory above it separately.
    pub fn includes(&self, path: &RelPath, is_dir: bool) -> bool {
        self.include.as_ref().is_some_and(|patterns| patterns.match_path(path.bytes(), is_dir) == Some(true))
    }

    /// Says whether a pattern excludes the path itself; the walk asks for each directory above it separately.
    pub fn excludes(&self, path: &RelPath, is_dir: bool) -> bool {
        self.exclude.match_path(path.bytes(), is_dir) == Some(true)
    }
}

/// The ignore files that apply in a directory, the deepest first.
#[derive(Clone, Default)]
pub(crate) struct IgnoreChain(Option<Arc<Level>>);

struct Level {
    patterns: IgnoreFile,
    /// The length of the path of the file's directory, including the slash, which is cut off before matching.
    strip: usize,
    /// For a file above the workspace: the path from its directory to the workspace, with a slash at the end.
    prepend: Vec<u8>,
    up: IgnoreChain,
}

impl IgnoreChain {
    /// Lists the ignore files that apply at the top of the workspace, except its own `.gitignore`.
    pub fn sources_above(workspace: &Path, repository: Option<&Location>) -> Vec<PathBuf> {
        let Some(repository) = repository else {
            return Vec::new();
        };
        let above = workspace.ancestors().skip(1).filter(|dir| dir.starts_with(&repository.top));
        let mut files = vec![repository.common_dir.join("info/exclude")];
        files.extend(above.map(|dir| dir.join(".gitignore")));
        files
    }

    /// Says whether both are the same object.
    pub fn is(&self, other: &IgnoreChain) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }

    /// Reads the ignore files that apply at the top of the workspace, except its own `.gitignore`.
    pub fn above(workspace: &Path, repository: Option<&Location>, warnings: &mut Vec<String>) -> IgnoreChain {
        let Some(repository) = repository else {
            return IgnoreChain::default();
        };
        let way = |dir: &Path| match workspace.strip_prefix(dir) {
            Ok(rest) if !rest.as_os_str().is_empty() => [rest.as_os_str().as_bytes(), b"/"].concat(),
            _ => Vec::new(),
        };
        let mut chain = IgnoreChain::default();
        let exclude = repository.common_dir.join("info/exclude");
        if let Some(text) = read_small(&exclude) {
            chain = chain.push(&text, 0, way(&repository.top), &exclude.to_string_lossy(), warnings);
        }
        let mut dirs: Vec<&Path> = workspace.ancestors().skip(1).collect();
        dirs.reverse();
        for dir in dirs.into_iter().filter(|dir| dir.starts_with(&repository.top)) {
            let file = dir.join(".gitignore");
            if let Some(text) = read_small(&file) {
                chain = chain.push(&text, 0, way(dir), &file.to_string_lossy(), warnings);
            }
        }
        chain
    }

    /// Adds the ignore file of a directory in the workspace.
    pub fn below(&self, dir: &RelPath, text: &[u8], warnings: &mut Vec<String>) -> IgnoreChain {
        let strip = if dir.is_root() { 0 } else { dir.bytes().len() + 1 };
        self.clone().push(text, strip, Vec::new(), &format!("{dir}/.gitignore"), warnings)
    }

    fn push(self, text: &[u8], strip: usize, prepend: Vec<u8>, name: &str, warnings: &mut Vec<String>) -> IgnoreChain {
        let (patterns, useless) = IgnoreFile::parse(text);
        if useless > 0 {
            warnings.push(format!("{name}: a pattern is invalid and has no effect"));
        }
        match patterns.is_empty() {
            true => self,
            false => IgnoreChain(Some(Arc::new(Level { patterns, strip, prepend, up: self }))),
        }
    }

    /// Says whether a pattern ignores the path itself.
    pub fn ignores(&self, path: &RelPath, is_dir: bool) -> bool {
        let mut next = &self.0;
        while let Some(level) = next {
            let below = path.bytes().get(level.strip..).unwrap_or_default();
            let matched = match level.prepend.is_empty() {
                true => level.patterns.match_path(below, is_dir),
                false => level.patterns.match_path(&[&level.prepend[..], below].concat(), is_dir),
            };
            if let Some(ignored) = matched {
                return ignored;
            }
            next = &level.up.0;
        }
        false
    }
}
