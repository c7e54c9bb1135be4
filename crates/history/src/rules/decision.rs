//! Decides about each name: covered, left out, or a directory that is searched for covered entries.
//!
//! `exclude` has precedence over the ignore files, which only `include` and the user's index override.

use std::collections::BTreeSet;

use crate::rules::coverage::{OwnPatterns, Rules};
use crate::rules::rule_cache::CompiledRules;
use crate::rules::tracked::Tracked;
use crate::tree::names::RelPath;

/// The decision about a name.
pub(crate) enum MatchDecision {
    NotCovered,
    /// Covered; within a directory these rules apply.
    Covered(CompiledRules),
    /// An ignored directory in which entries may be covered.
    Search,
    /// Ignored but covered, since it is tracked.
    Forced,
}

/// The part of the rules that is the same for all directories.
pub(crate) struct CoverageMatcher<'a> {
    pub rules: &'a Rules,
    /// The compiled patterns of `rules`.
    pub own: OwnPatterns,
    /// Tracked paths that the rules ignore, if they are known.
    pub forced: &'a BTreeSet<RelPath>,
    /// The whole index, if it is not known which of its paths the rules ignore.
    pub tracked: Option<&'a Tracked>,
}

impl CoverageMatcher<'_> {
    /// Decides about a path; `compiled` are the rules of its directory.
    pub fn decide(&self, path: &RelPath, is_dir: bool, compiled: &CompiledRules) -> MatchDecision {
        if self.own.excludes(path, is_dir) {
            return MatchDecision::NotCovered;
        }
        match compiled {
            CompiledRules::Everything => MatchDecision::Covered(CompiledRules::Everything),
            CompiledRules::Rules(chain) if !chain.ignores(path, is_dir) => MatchDecision::Covered(compiled.clone()),
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded => {
                if self.own.includes(path, is_dir) {
                    MatchDecision::Covered(CompiledRules::Everything)
                } else if is_dir && (self.own.has_includes() || self.forces_below(path)) {
                    MatchDecision::Search
                } else if !is_dir && self.forces(path) {
                    MatchDecision::Forced
                } else {
                    MatchDecision::NotCovered
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
}
