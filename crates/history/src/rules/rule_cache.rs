//! How the ignore rules stand in a directory, remembered from one walk to the next.
//!
//! Compiling patterns costs more than looking at the files that they are about, so that the rules of a directory are
//! kept for as long as its `.gitignore` and everything above it are what they were.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::rules::coverage::IgnoreChain;
use crate::rules::user_repository::{Location, read_small};
use crate::scan::workspace_state::{FileFingerprint, Source};
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::names::RelPath;

const MAX_IGNORE_FILE: u64 = 4 * 1024 * 1024;

/// How the rules stand in one directory.
#[derive(Clone)]
pub(crate) enum CompiledRules {
    /// The ignore files decide.
    Rules(IgnoreChain),
    /// All of it is covered.
    Everything,
    /// The directory is ignored; only what `include` names, or what is tracked, is covered.
    OnlyIncluded,
}

struct Compiled {
    /// The state of the directory's ignore file.
    ignore_file: Option<FileFingerprint>,
    /// Whether the states vouch for what the files said.
    settled: bool,
    /// What the chain was built on.
    up: IgnoreChain,
    chain: IgnoreChain,
    warnings: Vec<String>,
    source: Option<Source>,
}

impl Compiled {
    /// Says whether there is more to tell of it than its rules.
    fn tells(&self) -> bool {
        self.source.is_some() || !self.warnings.is_empty()
    }
}

/// The rules of the directories that have some of their own.
#[derive(Default)]
pub(crate) struct RuleCache {
    above: Mutex<Option<Above>>,
    compiled: Mutex<HashMap<RelPath, Compiled>>,
}

#[derive(Clone)]
struct Above {
    sources: Vec<Source>,
    chain: IgnoreChain,
    warnings: Vec<String>,
}

impl RuleCache {
    /// Returns what counts at the top of the workspace, without the workspace's own `.gitignore`.
    pub fn above(&self, workspace: &Path, location: Option<&Location>) -> IgnoreChain {
        let sources: Vec<Source> =
            IgnoreChain::sources_above(workspace, location).into_iter().map(with_state).collect();
        let mut above = self.above.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*above
            && known.sources == sources
        {
            return known.chain.clone();
        }
        let mut warnings = Vec::new();
        let chain = IgnoreChain::above(workspace, location, &mut warnings);
        *above = Some(Above { sources, chain: chain.clone(), warnings });
        chain
    }

    /// Returns how the rules stand inside a directory, given how they stand where it lies.
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
        let source = nested.then(|| with_state(exclude_of(root, dir)));
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = compiled.get(dir)
            && (known.ignore_file, known.settled) == (ignore_file, true)
            && known.source == source
            && known.up.is(up)
        {
            return CompiledRules::Rules(known.chain.clone());
        }
        drop(compiled);
        let (mut chain, mut warnings) = (up.clone(), Vec::new());
        if let Some((exclude, _)) = &source {
            // A repository of its own: what stands above it does not count, as for git itself.
            chain = above_nested(exclude, dir, &mut warnings);
        }
        let mut settled = [ignore_file, source.as_ref().and_then(|(_, seen)| *seen)]
            .iter()
            .flatten()
            .all(|seen| seen.is_settled(started_ns));
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

    /// Lists the files above the workspace and those of nested repositories that decided, and what the user should know
    /// of all.
    pub fn sources(&self) -> (Vec<Source>, Vec<Source>, Vec<String>) {
        let above = self.above.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (above, mut warnings) = above.map(|above| (above.sources, above.warnings)).unwrap_or_default();
        let compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut by_path: Vec<_> = compiled.iter().filter(|(_, entry)| entry.tells()).collect();
        by_path.sort_by_key(|(path, _)| *path);
        let mut nested = Vec::new();
        for (_, entry) in by_path {
            nested.extend(entry.source.clone());
            warnings.extend(entry.warnings.iter().cloned());
        }
        (above, nested, warnings)
    }

    /// Forgets the rules of directories that `keep` does not know any more.
    pub fn retain(&self, keep: impl Fn(&RelPath) -> bool) {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).retain(|path, _| keep(path));
    }

    /// The same for those only of which [`RuleCache::sources`] tells; the others cost no more than their room.
    pub fn retain_telling(&self, keep: impl Fn(&RelPath) -> bool) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.retain(|path, entry| !entry.tells() || keep(path));
    }
}

/// Returns where the excludes of the repository are whose top is a directory.
pub(crate) fn exclude_of(root: &Root, dir: &RelPath) -> PathBuf {
    let full = root.show(dir);
    let exclude = Location::at(&full, &full).map(|found| found.common_dir.join("info/exclude"));
    exclude.unwrap_or_else(|| full.join(".git/info/exclude"))
}

/// Returns what counts at the top of a nested repository beside its own ignore file.
pub(crate) fn above_nested(exclude: &Path, dir: &RelPath, warnings: &mut Vec<String>) -> IgnoreChain {
    match read_small(exclude) {
        Some(text) => IgnoreChain::default().below(dir, &text, warnings),
        None => IgnoreChain::default(),
    }
}

/// Adds the state of a file.
pub(crate) fn with_state(path: std::path::PathBuf) -> Source {
    let state = nix::sys::stat::lstat(&path)
        .ok()
        .map(|stat| FileFingerprint::from(&crate::tree::confined_dir::Stat::from(stat)));
    (path, state)
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
