//! Which paths a checkpoint covers: the ignore rules of git, and the project's own `include` and `exclude`.
//!
//! The patterns are git's; the order is git's too: the deepest `.gitignore` speaks first, `info/exclude` last. Nobody's
//! global excludes count. Files are only read here, by the walk that asks.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::errors::{HistoryError, Result};
use crate::rules::ignore_file::IgnoreFile;
use crate::rules::user_repository::{Location, read_small};
use crate::tree::names::RelPath;

/// A project's rules for what its checkpoints cover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// Patterns (in the manner of `.gitignore`) for what is covered although the repository ignores it.
    pub include: Vec<String>,
    /// Patterns for what is never covered, not even when it is tracked; stronger than `include`.
    pub exclude: Vec<String>,
    /// Files larger than this are skipped and reported.
    pub max_file_bytes: u64,
    /// Whether `.gitignore` and `info/exclude` count.
    pub use_gitignore: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Rules { include: Vec::new(), exclude: Vec::new(), max_file_bytes: 256 * 1024 * 1024, use_gitignore: true }
    }
}

/// The project's own patterns, compiled.
pub(crate) struct OwnPatterns {
    include: Option<IgnoreFile>,
    exclude: IgnoreFile,
}

impl OwnPatterns {
    /// Compiles the patterns.
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

    /// Says whether anything is included against the ignore rules.
    pub fn has_includes(&self) -> bool {
        self.include.is_some()
    }

    /// Says whether the path itself is included; the walk asks about each directory on the way.
    pub fn includes(&self, path: &RelPath, is_dir: bool) -> bool {
        self.include.as_ref().is_some_and(|patterns| patterns.says(path.bytes(), is_dir) == Some(true))
    }

    /// Says whether the path itself is excluded; the walk asks about each directory on the way.
    pub fn excludes(&self, path: &RelPath, is_dir: bool) -> bool {
        self.exclude.says(path.bytes(), is_dir) == Some(true)
    }
}

/// The ignore files that count in one directory, the deepest first.
#[derive(Clone, Default)]
pub(crate) struct IgnoreChain(Option<Arc<Level>>);

struct Level {
    patterns: IgnoreFile,
    /// How many bytes of a workspace path lie above this file's directory.
    strip: usize,
    /// For a file above the workspace: the way from its directory to the workspace, with a slash at the end.
    prepend: Vec<u8>,
    up: IgnoreChain,
}

impl IgnoreChain {
    /// Lists the files that count at the top of the workspace, beside the workspace's own `.gitignore`.
    pub fn sources_above(workspace: &Path, repository: Option<&Location>) -> Vec<PathBuf> {
        let Some(repository) = repository else {
            return Vec::new();
        };
        let above = workspace.ancestors().skip(1).filter(|dir| dir.starts_with(&repository.top));
        let mut files = vec![repository.common_dir.join("info/exclude")];
        files.extend(above.map(|dir| dir.join(".gitignore")));
        files
    }

    /// Says whether both are the very same rules.
    pub fn is(&self, other: &IgnoreChain) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, Some(_)) | (Some(_), None) => false,
        }
    }

    /// Gathers what counts at the top of the workspace, without the workspace's own `.gitignore`.
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
            warnings.push(format!("{name}: a pattern is not understood and has no effect"));
        }
        match patterns.is_empty() {
            true => self,
            false => IgnoreChain(Some(Arc::new(Level { patterns, strip, prepend, up: self }))),
        }
    }

    /// Says whether the path itself is ignored.
    pub fn ignores(&self, path: &RelPath, is_dir: bool) -> bool {
        let mut next = &self.0;
        while let Some(level) = next {
            let below = path.bytes().get(level.strip..).unwrap_or_default();
            let said = match level.prepend.is_empty() {
                true => level.patterns.says(below, is_dir),
                false => level.patterns.says(&[&level.prepend[..], below].concat(), is_dir),
            };
            if let Some(ignored) = said {
                return ignored;
            }
            next = &level.up.0;
        }
        false
    }
}
