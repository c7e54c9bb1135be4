//! Finds every object that checkpoints need, in the order of their numbers.
//!
//! Each object is paired with its predecessor: the version of the same path in an earlier checkpoint, which is
//! the natural base of a delta. A subtree is visited once, so that a walk costs one checkpoint and the changes
//! of all others. Only trees and commits are read; whether a blob exists is not checked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::listing::root_tree_of;
use crate::tree::trees::{TreeEntry, decode_tree};

/// An object that a checkpoint needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReachableObject {
    pub oid: Oid,
    pub kind: ObjectKind,
    /// The number of the predecessor's node, which is lower than that of this node.
    pub before: Option<u32>,
    /// The number of earlier versions.
    pub version: u32,
    /// A number made of the end of its first name: files with the same extension resemble each other.
    pub likeness: u64,
}

/// The set of all needed objects.
#[derive(Default)]
pub(crate) struct Reachability {
    nodes: Vec<ReachableObject>,
    numbers: HashMap<Oid, u32>,
}

impl Reachability {
    /// Returns the number of an object's node; `None` if it is not needed.
    pub fn number(&self, oid: &Oid) -> Option<u32> {
        self.numbers.get(oid).copied()
    }

    pub fn contains(&self, oid: &Oid) -> bool {
        self.numbers.contains_key(oid)
    }

    /// Returns all nodes, by number.
    pub fn nodes(&self) -> &[ReachableObject] {
        &self.nodes
    }

    fn enter(&mut self, oid: Oid, kind: ObjectKind, before: Option<Oid>, name: &[u8]) -> bool {
        if self.contains(&oid) {
            return false;
        }
        let before = before.and_then(|oid| self.number(&oid)).filter(|n| self.nodes[*n as usize].kind == kind);
        let version = before.map_or(0, |n| self.nodes[n as usize].version + 1);
        self.numbers.insert(oid, self.nodes.len() as u32);
        self.nodes.push(ReachableObject { oid, kind, before, version, likeness: likeness(name) });
        true
    }

    /// Finds the objects that commits need, except those in `except`.
    ///
    /// # Errors
    /// Fails when a tree cannot be read, or when cancelled.
    pub fn of(
        store: &ObjectStore,
        commits: &[Oid],
        except: &[&Reachability],
        cancel: &AtomicBool,
    ) -> Result<Reachability> {
        let mut walk = ReachabilityWalk { needed: Reachability::default(), store, except, cancel };
        let mut before = None;
        for commit in commits {
            let tree = root_tree_of(store, commit)?;
            if !walk.is_excluded(commit)
                && walk.needed.enter(*commit, ObjectKind::Commit, before.map(|(commit, _)| commit), b"")
            {
                walk.tree(tree, before.map(|(_, tree)| tree))?;
            }
            before = Some((*commit, tree));
        }
        Ok(walk.needed)
    }
}

/// Returns a number whose highest bits are the last bytes of a name: sorting by it puts equal names, and then
/// names with equal endings, side by side.
fn likeness(name: &[u8]) -> u64 {
    name.iter().fold(0, |number: u64, byte| (number >> 8) | (u64::from(*byte) << 56))
}

struct ReachabilityWalk<'a> {
    needed: Reachability,
    store: &'a ObjectStore,
    except: &'a [&'a Reachability],
    cancel: &'a AtomicBool,
}

impl ReachabilityWalk<'_> {
    fn is_excluded(&self, oid: &Oid) -> bool {
        self.except.iter().any(|except| except.contains(oid))
    }

    fn read(&self, tree: &Oid) -> Result<Vec<TreeEntry>> {
        decode_tree(tree, &self.store.read_shared(tree, ObjectKind::Tree)?)
    }

    fn tree(&mut self, tree: Oid, before: Option<Oid>) -> Result<()> {
        let mut open = vec![(tree, before)];
        while let Some((tree, before)) = open.pop() {
            if self.is_excluded(&tree) || !self.needed.enter(tree, ObjectKind::Tree, before, b"") {
                continue;
            }
            if self.cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            let earlier: HashMap<Vec<u8>, TreeEntry> = match before {
                Some(before) => self.read(&before)?.into_iter().map(|entry| (entry.name.clone(), entry)).collect(),
                None => HashMap::new(),
            };
            for entry in self.read(&tree)? {
                let before = earlier.get(&entry.name).filter(|old| old.is_tree() == entry.is_tree());
                let before = before.map(|old| old.oid);
                if entry.is_tree() {
                    open.push((entry.oid, before));
                } else if !self.is_excluded(&entry.oid) {
                    self.needed.enter(entry.oid, ObjectKind::Blob, before, &entry.name);
                }
            }
        }
        Ok(())
    }
}
