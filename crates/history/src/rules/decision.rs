//! Decides about each name: covered, left out, or a directory that is searched for covered entries.
//!
//! `exclude` has precedence over the ignore files, which only `include` and the user's index override.

use std::sync::atomic::Ordering;

use nix::dir::{Dir as Listed, Type};

use crate::rules::rule_cache::CompiledRules;
use crate::scan::walk::Walk;
use crate::tree::names::{RelPath, is_git};

/// Up to this number of covered files, a scan checks whether the rules exclude nearly everything.
const FEW_FILES: u64 = 1_000;

/// The decision about a name.
pub(crate) enum MatchDecision {
    /// Not covered.
    Out,
    /// Covered; within a directory these rules apply.
    Covered(CompiledRules),
    /// An ignored directory in which entries may be covered.
    Through,
    /// Ignored but covered, since it is tracked.
    Forced,
}

impl Walk<'_> {
    pub(crate) fn decide_name(&self, path: &RelPath, is_dir: bool, standing: &CompiledRules) -> MatchDecision {
        if self.own.excludes(path, is_dir) {
            return MatchDecision::Out;
        }
        match standing {
            CompiledRules::Everything => MatchDecision::Covered(CompiledRules::Everything),
            CompiledRules::Rules(chain) if !chain.ignores(path, is_dir) => MatchDecision::Covered(standing.clone()),
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded => {
                if self.own.includes(path, is_dir) {
                    MatchDecision::Covered(CompiledRules::Everything)
                } else if is_dir && (self.own.has_includes() || self.forces_below(path)) {
                    MatchDecision::Through
                } else if !is_dir && self.forces(path) {
                    MatchDecision::Forced
                } else {
                    MatchDecision::Out
                }
            }
        }
    }

    fn forces(&self, path: &RelPath) -> bool {
        self.rules.use_gitignore
            && (self.forced.contains(path) || self.tracked.is_some_and(|tracked| tracked.has(path)))
    }

    fn forces_below(&self, path: &RelPath) -> bool {
        let next = path.join(b"");
        let below = || self.forced.range(next.clone()..).next().is_some_and(|forced| forced.is_within(path));
        self.rules.use_gitignore && (below() || self.tracked.is_some_and(|tracked| tracked.has_below(path)))
    }

    /// Returns a warning if the rules exclude nearly everything.
    pub fn warn_if_nearly_empty(&self, covered: u64) -> Option<String> {
        if covered >= FEW_FILES || self.ignored.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let limit = (covered * 100).max(100) + 1;
        let there = self.count_files(limit);
        let nearly = (covered == 0 && there > 0) || (there > 100 && there > covered * 100);
        let more = if there >= limit { "or more " } else { "" };
        nearly.then(|| {
            format!("the rules exclude nearly the whole workspace: {covered} of {there} {more}files are covered")
        })
    }

    fn count_files(&self, limit: u64) -> u64 {
        let mut dirs = vec![RelPath::root()];
        let mut count = 0;
        while let Some(dir) = dirs.pop() {
            let Ok(mut handle) = self.root.open_dir(&dir).and_then(Listed::from_fd) else {
                continue;
            };
            for entry in handle.iter().filter_map(std::result::Result::ok) {
                let name = entry.file_name().to_bytes();
                if name == b"." || name == b".." || is_git(name) {
                    continue;
                }
                if entry.file_type() == Some(Type::Directory) {
                    dirs.push(dir.join(name));
                } else {
                    count += 1;
                }
                if count >= limit || self.cancel.load(Ordering::Relaxed) {
                    return count;
                }
            }
        }
        count
    }
}
