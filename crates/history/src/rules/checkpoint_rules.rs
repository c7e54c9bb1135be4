//! The rules of a checkpoint, for paths that it does not contain.
//!
//! A path that these rules ignore was neither stored nor found missing, so a restore must not remove it,
//! whatever the current rules are. The ignore files are those of the checkpoint; of files outside the workspace
//! only the current contents are known.

use std::collections::HashMap;
use std::rc::Rc;

use crate::errors::Result;
use crate::rules::coverage::{IgnoreChain, OwnPatterns};
use crate::rules::rule_cache::{CompiledRules, above_nested, exclude_of};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::confined_dir::Root;
use crate::tree::listing::CheckpointRoot;
use crate::tree::manifest::CheckpointManifest;
use crate::tree::names::RelPath;
use crate::tree::trees::{MODE_LINK, TreeEntry, decode_tree};

/// A directory of the checkpoint, or the path of one that it does not contain.
#[derive(Clone)]
struct CheckpointDir {
    /// The tree of the directory; empty if the checkpoint does not contain it.
    entries: Rc<[TreeEntry]>,
    rules: CompiledRules,
    covered: bool,
}

/// The rules of one checkpoint.
pub(crate) struct CheckpointRules<'a> {
    store: &'a ObjectStore,
    root: &'a Root,
    own: OwnPatterns,
    places: HashMap<RelPath, CheckpointDir>,
}

impl<'a> CheckpointRules<'a> {
    /// Reads the rules of a checkpoint; `above` are the ignore files above the workspace.
    pub fn of(
        store: &'a ObjectStore,
        root: &'a Root,
        checkpoint: &CheckpointRoot,
        manifest: &CheckpointManifest,
        above: IgnoreChain,
    ) -> Result<Self> {
        let entries = read_tree(store, Some(&checkpoint.files))?;
        let rules = match manifest.rules.use_gitignore {
            true => CompiledRules::Rules(with_file(store, above, &RelPath::root(), &entries)?),
            false => CompiledRules::Everything,
        };
        let top = CheckpointDir { entries: entries.into(), rules, covered: true };
        let places = HashMap::from([(RelPath::root(), top)]);
        Ok(Self { store, root, own: OwnPatterns::compile(&manifest.rules)?, places })
    }

    /// Says whether the rules would cover a path if it existed. Tracked files, which are covered although they
    /// are ignored, are in the checkpoint itself.
    pub fn covers(&mut self, path: &RelPath, is_dir: bool) -> Result<bool> {
        let Some(parent) = path.parent() else { return Ok(true) };
        let dir_rules = self.dir_rules(&parent)?;
        Ok(self.below(&dir_rules, path, is_dir).is_some())
    }

    /// Returns the rules within an entry of a directory; `None` if the entry is not covered.
    fn below(&self, dir_rules: &CheckpointDir, path: &RelPath, is_dir: bool) -> Option<CompiledRules> {
        if !dir_rules.covered || self.own.excludes(path, is_dir) {
            return None;
        }
        match &dir_rules.rules {
            CompiledRules::Everything => Some(CompiledRules::Everything),
            CompiledRules::Rules(chain) if !chain.ignores(path, is_dir) => Some(dir_rules.rules.clone()),
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded if self.own.includes(path, is_dir) => {
                Some(CompiledRules::Everything)
            }
            // Another pattern may include something in it.
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded if is_dir && self.own.has_includes() => {
                Some(CompiledRules::OnlyIncluded)
            }
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded => None,
        }
    }

    fn dir_rules(&mut self, dir: &RelPath) -> Result<CheckpointDir> {
        if let Some(cached) = self.places.get(dir) {
            return Ok(cached.clone());
        }
        let (Some(parent), Some((_, name))) = (dir.parent(), dir.split()) else {
            return Ok(self.places[&RelPath::root()].clone());
        };
        let above = self.dir_rules(&parent)?;
        let tree = above.entries.iter().find(|entry| entry.is_tree() && entry.name == name).map(|entry| entry.oid);
        let entries = read_tree(self.store, tree.as_ref())?;
        let (rules, covered) = match self.below(&above, dir, true) {
            Some(CompiledRules::Rules(chain)) => {
                // A nested repository: as for git, the rules above do not apply to it.
                let nested = self.root.stat_if_there(&dir.join(b".git")).is_ok_and(|stat| stat.is_some());
                let chain = match nested {
                    true => above_nested(&exclude_of(self.root, dir), dir, &mut Vec::new()),
                    false => chain,
                };
                (CompiledRules::Rules(with_file(self.store, chain, dir, &entries)?), true)
            }
            Some(rules) => (rules, true),
            None => (CompiledRules::OnlyIncluded, false),
        };
        let dir_rules = CheckpointDir { entries: entries.into(), rules, covered };
        self.places.insert(dir.clone(), dir_rules.clone());
        Ok(dir_rules)
    }
}

fn read_tree(store: &ObjectStore, tree: Option<&Oid>) -> Result<Vec<TreeEntry>> {
    match tree {
        Some(tree) => decode_tree(tree, &store.read(tree, ObjectKind::Tree)?),
        None => Ok(Vec::new()),
    }
}

/// Adds the ignore file of a directory of the checkpoint.
fn with_file(store: &ObjectStore, up: IgnoreChain, dir: &RelPath, entries: &[TreeEntry]) -> Result<IgnoreChain> {
    let counts = |entry: &&TreeEntry| entry.name == b".gitignore" && !entry.is_tree() && entry.mode != MODE_LINK;
    match entries.iter().find(counts) {
        Some(file) => Ok(up.below(dir, &store.read(&file.oid, ObjectKind::Blob)?, &mut Vec::new())),
        None => Ok(up),
    }
}
