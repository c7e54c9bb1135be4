//! Caches the compiled ignore rules of directories between walks.
//!
//! Compiling patterns costs more than reading the metadata of the files that they concern. The rules of a
//! directory are valid as long as its `.gitignore` and the rules above it are unchanged.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::rules::bounded_read::read_small;
use crate::rules::coverage::IgnoreChain;
use crate::rules::user_repository::Location;
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::fingerprint::{FileFingerprint, RuleSource, with_fingerprint};
use crate::tree::names::RelPath;

const MAX_IGNORE_FILE: u64 = 4 * 1024 * 1024;

/// The rules that apply in a directory.
#[derive(Clone)]
pub(crate) enum CompiledRules {
    /// The ignore files decide.
    Rules(IgnoreChain),
    /// Everything is covered.
    Everything,
    /// The directory is ignored; only entries that `include` names or that are tracked are covered.
    OnlyIncluded,
}

struct Compiled {
    /// The fingerprint of the directory's ignore file.
    ignore_file: Option<FileFingerprint>,
    /// Whether the fingerprints prove that the contents of the files are unchanged.
    settled: bool,
    /// The rules above, on which `chain` is built.
    up: IgnoreChain,
    chain: IgnoreChain,
    warnings: Vec<String>,
    source: Option<RuleSource>,
}

impl Compiled {
    /// Says whether [`RuleCache::sources`] reports something about the directory.
    fn is_reported(&self) -> bool {
        self.source.is_some() || !self.warnings.is_empty()
    }
}

/// The compiled rules of the directories that have ignore files.
#[derive(Default)]
pub(crate) struct RuleCache {
    above: Mutex<Option<Above>>,
    compiled: Mutex<HashMap<RelPath, Compiled>>,
}

#[derive(Clone)]
struct Above {
    sources: Vec<RuleSource>,
    chain: IgnoreChain,
    warnings: Vec<String>,
}

impl RuleCache {
    /// Returns the rules that apply at the top of the workspace, except its own `.gitignore`.
    pub fn above(&self, workspace: &Path, location: Option<&Location>) -> IgnoreChain {
        let sources: Vec<RuleSource> =
            IgnoreChain::sources_above(workspace, location).into_iter().map(with_fingerprint).collect();
        let mut above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = &*above
            && cached.sources == sources
        {
            return cached.chain.clone();
        }
        let mut warnings = Vec::new();
        let chain = IgnoreChain::above(workspace, location, &mut warnings);
        *above = Some(Above { sources, chain: chain.clone(), warnings });
        chain
    }

    /// Returns the rules within a directory, given those outside of it.
    pub fn within(
        &self,
        dir: &RelPath,
        outside: &CompiledRules,
        root: &Root,
        ignore_file: Option<FileFingerprint>,
        nested: bool,
        started_ns: i128,
    ) -> CompiledRules {
        let CompiledRules::Rules(up) = outside else {
            return outside.clone();
        };
        if ignore_file.is_none() && !nested {
            return outside.clone();
        }
        let source = nested.then(|| with_fingerprint(exclude_of(root, dir)));
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = compiled.get(dir)
            && (cached.ignore_file, cached.settled) == (ignore_file, true)
            && cached.source == source
            && cached.up.is(up)
        {
            return CompiledRules::Rules(cached.chain.clone());
        }
        drop(compiled);
        let (mut chain, mut warnings) = (up.clone(), Vec::new());
        if let Some((exclude, _)) = &source {
            // A nested repository: as for git, the rules above do not apply to it.
            chain = above_nested(exclude, dir, &mut warnings);
        }
        let mut settled = [ignore_file, source.as_ref().and_then(|(_, fingerprint)| *fingerprint)]
            .iter()
            .flatten()
            .all(|fingerprint| fingerprint.is_settled(started_ns));
        if ignore_file.is_some() {
            let path = dir.join(b".gitignore");
            match read_ignore_file(root, &path) {
                Ok(text) => chain = chain.below(dir, &text, &mut warnings),
                Err(why) => {
                    settled = false;
                    warnings.push(format!("{path} has no effect: {why}"));
                }
            }
        }
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Compiled { ignore_file, settled, up: up.clone(), chain: chain.clone(), warnings, source };
        compiled.insert(dir.clone(), entry);
        CompiledRules::Rules(chain)
    }

    /// Returns the ignore files above the workspace, those of nested repositories, and all warnings.
    pub fn sources(&self) -> (Vec<RuleSource>, Vec<RuleSource>, Vec<String>) {
        let above = self.above.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (above, mut warnings) = above.map(|above| (above.sources, above.warnings)).unwrap_or_default();
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut by_path: Vec<_> = compiled.iter().filter(|(_, entry)| entry.is_reported()).collect();
        by_path.sort_by_key(|(path, _)| *path);
        let mut nested = Vec::new();
        for (_, entry) in by_path {
            nested.extend(entry.source.clone());
            warnings.extend(entry.warnings.iter().cloned());
        }
        (above, nested, warnings)
    }

    /// Removes the rules of directories for which `keep` returns `false`.
    pub fn retain(&self, keep: impl Fn(&RelPath) -> bool) {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).retain(|path, _| keep(path));
    }

    /// As [`RuleCache::retain`], but only for directories about which [`RuleCache::sources`] reports something.
    pub fn retain_reporting(&self, keep: impl Fn(&RelPath) -> bool) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.retain(|path, entry| !entry.is_reported() || keep(path));
    }
}

/// Returns the path of `info/exclude` of the repository whose top is a directory.
pub(crate) fn exclude_of(root: &Root, dir: &RelPath) -> PathBuf {
    let full = root.show(dir);
    let exclude = Location::at(&full, &full).map(|found| found.common_dir.join("info/exclude"));
    exclude.unwrap_or_else(|| full.join(".git/info/exclude"))
}

/// Returns the rules that apply at the top of a nested repository, except its own `.gitignore`.
pub(crate) fn above_nested(exclude: &Path, dir: &RelPath, warnings: &mut Vec<String>) -> IgnoreChain {
    match read_small(exclude) {
        Some(text) => IgnoreChain::default().below(dir, &text, warnings),
        None => IgnoreChain::default(),
    }
}

fn read_ignore_file(root: &Root, path: &RelPath) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let stat = root.stat(path).map_err(|errno| errno.desc().to_owned())?;
    if stat.kind() != FileKind::Regular || stat.size > MAX_IGNORE_FILE {
        return Err(format!("it has {} bytes", stat.size));
    }
    let file = root.open_file(path).map_err(|errno| errno.desc().to_owned())?;
    let mut text = Vec::new();
    file.take(MAX_IGNORE_FILE).read_to_end(&mut text).map_err(|error| error.to_string())?;
    Ok(text)
}
