//! Walks from checkpoints to every object that they need, in the order of their numbers.
//!
//! Beside each object stands the one that had its place before: the version of the same path in an earlier checkpoint,
//! which is the natural base of a delta. A subtree that was seen is not entered again, so that a walk costs one
//! checkpoint and the changes of all others. Reads trees and commits only; that a blob is there is not checked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::listing::root_tree_of;
use crate::tree::trees::{TreeEntry, decode_tree};

/// One object that is needed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReachableObject {
    /// The object.
    pub oid: Oid,
    /// What it is.
    pub kind: ObjectKind,
    /// The number of the node that had its place before; it is lower than this one's.
    pub before: Option<u32>,
    /// How many versions there were before.
    pub version: u32,
    /// What its first name ends with, as a number: files of one kind resemble each other.
    pub likeness: u64,
}

/// Everything that was reached.
#[derive(Default)]
pub(crate) struct Reachability {
    nodes: Vec<ReachableObject>,
    numbers: HashMap<Oid, u32>,
}

impl Reachability {
    /// Returns the number of an object, `None` when nobody needs it.
    pub fn number(&self, oid: &Oid) -> Option<u32> {
        self.numbers.get(oid).copied()
    }

    /// Says whether the object is needed.
    pub fn needs(&self, oid: &Oid) -> bool {
        self.numbers.contains_key(oid)
    }

    /// Returns all nodes, by number.
    pub fn nodes(&self) -> &[ReachableObject] {
        &self.nodes
    }

    fn enter(&mut self, oid: Oid, kind: ObjectKind, before: Option<Oid>, name: &[u8]) -> bool {
        if self.needs(&oid) {
            return false;
        }
        let before = before.and_then(|oid| self.number(&oid)).filter(|n| self.nodes[*n as usize].kind == kind);
        let version = before.map_or(0, |n| self.nodes[n as usize].version + 1);
        self.numbers.insert(oid, self.nodes.len() as u32);
        self.nodes.push(ReachableObject { oid, kind, before, version, likeness: likeness(name) });
        true
    }

    /// Walks from commits, past what is `known` already.
    ///
    /// # Errors
    /// Fails when a tree cannot be read, or when cancelled.
    pub fn of(
        store: &ObjectStore,
        commits: &[Oid],
        known: &[&Reachability],
        cancel: &AtomicBool,
    ) -> Result<Reachability> {
        let mut walk = Walk { reach: Reachability::default(), store, known, cancel };
        let mut before = None;
        for commit in commits {
            let tree = root_tree_of(store, commit)?;
            if !walk.is_known(commit)
                && walk.reach.enter(*commit, ObjectKind::Commit, before.map(|(commit, _)| commit), b"")
            {
                walk.tree(tree, before.map(|(_, tree)| tree))?;
            }
            before = Some((*commit, tree));
        }
        Ok(walk.reach)
    }
}

/// Makes a number of a name whose highest bits come from its last bytes, so that sorting by it brings the same names
/// together, and beside them those with the same ending.
fn likeness(name: &[u8]) -> u64 {
    name.iter().fold(0, |number: u64, byte| (number >> 8) | (u64::from(*byte) << 56))
}

struct Walk<'a> {
    reach: Reachability,
    store: &'a ObjectStore,
    known: &'a [&'a Reachability],
    cancel: &'a AtomicBool,
}

impl Walk<'_> {
    fn is_known(&self, oid: &Oid) -> bool {
        self.known.iter().any(|known| known.needs(oid))
    }

    fn read(&self, tree: &Oid) -> Result<Vec<TreeEntry>> {
        decode_tree(tree, &self.store.share(tree, ObjectKind::Tree)?)
    }

    fn tree(&mut self, tree: Oid, before: Option<Oid>) -> Result<()> {
        let mut open = vec![(tree, before)];
        while let Some((tree, before)) = open.pop() {
            if self.is_known(&tree) || !self.reach.enter(tree, ObjectKind::Tree, before, b"") {
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
                } else if !self.is_known(&entry.oid) {
                    self.reach.enter(entry.oid, ObjectKind::Blob, before, &entry.name);
                }
            }
        }
        Ok(())
    }
}
