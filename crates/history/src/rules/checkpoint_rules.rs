//! What a checkpoint's own rules say of a path that it does not have.
//!
//! What they left out was neither saved nor found absent, so that a restore has no reason to remove it, whatever the
//! rules of today say. The ignore files are those of the checkpoint; of those outside of the workspace's tree only
//! today's are known.

use std::collections::HashMap;
use std::rc::Rc;

use crate::errors::Result;
use crate::rules::coverage::{IgnoreChain, OwnPatterns};
use crate::rules::rule_cache::{CompiledRules, above_nested, exclude_of};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::confined_dir::Root;
use crate::tree::listing::CheckpointRoot;
use crate::tree::metadata::Manifest;
use crate::tree::names::RelPath;
use crate::tree::trees::{MODE_LINK, TreeEntry, decode_tree};

/// A directory of the checkpoint, or where one would be.
#[derive(Clone)]
struct Place {
    /// What it holds; nothing where the checkpoint has no such directory.
    entries: Rc<[TreeEntry]>,
    standing: CompiledRules,
    covered: bool,
}

/// The rules of one checkpoint.
pub(crate) struct CheckpointRules<'a> {
    store: &'a ObjectStore,
    root: &'a Root,
    own: OwnPatterns,
    places: HashMap<RelPath, Place>,
}

impl<'a> CheckpointRules<'a> {
    /// Reads the rules of a checkpoint; `above` is what counts at the top of the workspace beside its own ignore file.
    pub fn of(
        store: &'a ObjectStore,
        root: &'a Root,
        checkpoint: &CheckpointRoot,
        manifest: &Manifest,
        above: IgnoreChain,
    ) -> Result<Self> {
        let entries = read_tree(store, Some(&checkpoint.files))?;
        let standing = match manifest.rules.use_gitignore {
            true => CompiledRules::Rules(with_file(store, above, &RelPath::root(), &entries)?),
            false => CompiledRules::Everything,
        };
        let top = Place { entries: entries.into(), standing, covered: true };
        let places = HashMap::from([(RelPath::root(), top)]);
        Ok(Self { store, root, own: OwnPatterns::compile(&manifest.rules)?, places })
    }

    /// Says whether the rules cover a path, had it been there. Tracked files, which they cover against the ignore
    /// files, are in the checkpoint itself.
    pub fn covers(&mut self, path: &RelPath, is_dir: bool) -> Result<bool> {
        let Some(parent) = path.parent() else { return Ok(true) };
        let place = self.place(&parent)?;
        Ok(self.below(&place, path, is_dir).is_some())
    }

    /// Returns how the rules stand inside of what lies in a place; none where they leave it out.
    fn below(&self, place: &Place, path: &RelPath, is_dir: bool) -> Option<CompiledRules> {
        if !place.covered || self.own.excludes(path, is_dir) {
            return None;
        }
        match &place.standing {
            CompiledRules::Everything => Some(CompiledRules::Everything),
            CompiledRules::Rules(chain) if !chain.ignores(path, is_dir) => Some(place.standing.clone()),
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded if self.own.includes(path, is_dir) => {
                Some(CompiledRules::Everything)
            }
            // Something in it may be included by a pattern of its own.
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded if is_dir && self.own.has_includes() => {
                Some(CompiledRules::OnlyIncluded)
            }
            CompiledRules::Rules(_) | CompiledRules::OnlyIncluded => None,
        }
    }

    fn place(&mut self, dir: &RelPath) -> Result<Place> {
        if let Some(known) = self.places.get(dir) {
            return Ok(known.clone());
        }
        let (Some(parent), Some((_, name))) = (dir.parent(), dir.split()) else {
            return Ok(self.places[&RelPath::root()].clone());
        };
        let above = self.place(&parent)?;
        let tree = above.entries.iter().find(|entry| entry.is_tree() && entry.name == name).map(|entry| entry.oid);
        let entries = read_tree(self.store, tree.as_ref())?;
        let (standing, covered) = match self.below(&above, dir, true) {
            Some(CompiledRules::Rules(chain)) => {
                // A repository of its own: what stands above it does not count, as for git itself.
                let nested = self.root.stat_if_there(&dir.join(b".git")).is_ok_and(|stat| stat.is_some());
                let chain = match nested {
                    true => above_nested(&exclude_of(self.root, dir), dir, &mut Vec::new()),
                    false => chain,
                };
                (CompiledRules::Rules(with_file(self.store, chain, dir, &entries)?), true)
            }
            Some(standing) => (standing, true),
            None => (CompiledRules::OnlyIncluded, false),
        };
        let place = Place { entries: entries.into(), standing, covered };
        self.places.insert(dir.clone(), place.clone());
        Ok(place)
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
