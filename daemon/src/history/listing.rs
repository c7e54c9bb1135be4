//! A flat list of what a checkpoint, or the workspace as it is now, consists of.
//!
//! Comparing and restoring both work on such lists, so that they mean the same by "the same".

use std::collections::{BTreeMap, BTreeSet};

use super::beneath::Time;
use super::errors::{HistoryError, Result};
use super::meta::{self, Manifest, MetaKind};
use super::names::{RelPath, is_safe_name};
use super::objects::ObjectStore;
use super::oid::{ObjectKind, Oid};
use super::picture::{Dir, Node};
use super::scan::SkipReason;
use super::tree::{MODE_LINK, TreeEntry, decode_tree};

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A file with this content.
    File(Oid),
    /// A link with this target.
    Symlink(Oid),
    /// A directory.
    Directory,
    /// A special file of this kind, whose content is nobody's business.
    Special(String),
}

/// One path of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// What stands there.
    pub what: What,
    /// Permission bits.
    pub mode: u32,
    /// Last change.
    pub mtime: Time,
    /// Bytes of content.
    pub size: u64,
}

impl Item {
    /// Says whether kind and content are equal, whatever mode and time are.
    pub fn same_content(&self, other: &Item) -> bool {
        self.what == other.what
    }
}

/// All paths, the workspace itself included.
#[derive(Clone, Debug, Default)]
pub(super) struct Listing {
    /// By path.
    pub items: BTreeMap<RelPath, Item>,
    /// What is covered but not stored.
    pub skipped: BTreeMap<RelPath, SkipReason>,
    /// Files that changed while they were read.
    pub torn: Vec<RelPath>,
    /// Files that had several names when the checkpoint was taken; not known of a workspace.
    pub linked: BTreeSet<RelPath>,
    /// What restores that were given up have left behind; nothing in a checkpoint.
    pub drafts: Vec<RelPath>,
}

impl Listing {
    /// Says whether the path, or a directory above it, was skipped: then nothing is known about it.
    pub fn is_unknown(&self, path: &RelPath) -> bool {
        if self.skipped.is_empty() {
            return false;
        }
        let mut at = Some(path.clone());
        while let Some(path) = at {
            if self.skipped.contains_key(&path) {
                return true;
            }
            at = path.parent();
        }
        false
    }

    /// Lists what a look at the workspace has seen.
    pub fn of_workspace(root: &Dir) -> Listing {
        let mut listing = Listing::default();
        listing.add_dir(&RelPath::root(), root);
        listing
    }

    fn add_dir(&mut self, path: &RelPath, dir: &Dir) {
        if dir.is_bare() {
            return;
        }
        let (mode, mtime) = (dir.seen.permissions(), dir.seen.mtime);
        self.items.insert(path.clone(), Item { what: What::Directory, mode, mtime, size: 0 });
        if dir.unreadable.is_some() {
            self.skipped.insert(path.clone(), SkipReason::Unreadable);
        }
        for child in &dir.children {
            let path = path.join(&child.name);
            match &child.node {
                Node::Dir(dir) => self.add_dir(&path, dir),
                Node::File(file) => {
                    let what = if file.is_link() { What::Symlink(file.oid) } else { What::File(file.oid) };
                    let (mode, mtime, size) = (file.seen.permissions(), file.seen.mtime, file.size);
                    self.torn.extend(file.remarks.torn.then(|| path.clone()));
                    self.items.insert(path, Item { what, mode, mtime, size });
                }
                Node::Special { seen, kind } => {
                    let what = What::Special((*kind).to_owned());
                    self.items.insert(path, Item { what, mode: seen.permissions(), mtime: seen.mtime, size: 0 });
                }
                Node::Skipped { reason, .. } => drop(self.skipped.insert(path, *reason)),
                Node::Draft => self.drafts.push(path),
            }
        }
    }

    /// Lists what a checkpoint holds.
    pub fn of_checkpoint(store: &ObjectStore, commit: &Oid) -> Result<Listing> {
        let root = CheckpointRoot::read(store, commit)?;
        let mut listing = Listing::default();
        let mut open = vec![(RelPath::root(), Some(root.files), root.meta)];
        while let Some((path, files, meta)) = open.pop() {
            read_directory(store, &path, files, meta, &mut listing, &mut open)?;
        }
        Ok(listing)
    }
}

/// The three parts of a checkpoint's root tree.
pub(super) struct CheckpointRoot {
    /// The tree of the files.
    pub files: Oid,
    /// The tree of the metadata.
    pub meta: Oid,
    /// The manifest.
    pub manifest: Oid,
}

impl CheckpointRoot {
    /// Reads a checkpoint's commit and root tree.
    pub fn read(store: &ObjectStore, commit: &Oid) -> Result<CheckpointRoot> {
        let damaged = |problem: &str| HistoryError::DamagedObject { oid: *commit, problem: problem.to_owned() };
        let tree = root_tree_of(store, commit)?;
        let entries = decode_tree(&tree, &store.read(&tree, ObjectKind::Tree)?)?;
        let part = |name: &str| entries.iter().find(|entry| entry.name == name.as_bytes()).map(|entry| entry.oid);
        Ok(CheckpointRoot {
            files: part("files").ok_or_else(|| damaged("it has no files"))?,
            meta: part("meta").ok_or_else(|| damaged("it has no metadata"))?,
            manifest: part("manifest").ok_or_else(|| damaged("it has no manifest"))?,
        })
    }

    /// Reads the manifest.
    pub fn manifest(&self, store: &ObjectStore) -> Result<Manifest> {
        let bytes = store.read(&self.manifest, ObjectKind::Blob)?;
        let damaged = |problem| HistoryError::DamagedObject { oid: self.manifest, problem };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if manifest.format > meta::FORMAT {
            return Err(damaged(format!("format {} is newer than this program", manifest.format)));
        }
        Ok(manifest)
    }
}

/// Returns the root tree of a commit.
pub(super) fn root_tree_of(store: &ObjectStore, commit: &Oid) -> Result<Oid> {
    let bytes = store.read(commit, ObjectKind::Commit)?;
    let tree = bytes.strip_prefix(b"tree ").and_then(|rest| std::str::from_utf8(rest.get(..40)?).ok()?.parse().ok());
    tree.ok_or_else(|| HistoryError::DamagedObject { oid: *commit, problem: "it names no tree".to_owned() })
}

/// A directory that is still to be read: its path, the tree of its files, the tree of its metadata.
pub(super) type Open = (RelPath, Option<Oid>, Oid);

/// Reads one directory of a checkpoint into a listing, and adds those below to `open`.
pub(super) fn read_directory(
    store: &ObjectStore,
    path: &RelPath,
    files: Option<Oid>,
    meta: Oid,
    listing: &mut Listing,
    open: &mut Vec<Open>,
) -> Result<()> {
    let damaged = |oid: Oid, problem: &str| HistoryError::DamagedObject { oid, problem: problem.to_owned() };
    let files: BTreeMap<Vec<u8>, TreeEntry> = match files {
        Some(oid) => {
            let entries = decode_tree(&oid, &store.read(&oid, ObjectKind::Tree)?)?;
            entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect()
        }
        None => BTreeMap::new(),
    };
    // Each stored file needs its line of metadata: what git can say about it is not enough to restore it.
    let mut described = 0;
    for entry in decode_tree(&meta, &store.read(&meta, ObjectKind::Tree)?)? {
        if let Some(name) = entry.name.strip_prefix(b"d.") {
            if !is_safe_name(name) {
                return Err(HistoryError::UnsafePath { path: path.join(name).to_string() });
            }
            let below = files.get(name).filter(|entry| entry.is_tree()).map(|entry| entry.oid);
            described += usize::from(below.is_some());
            open.push((path.join(name), below, entry.oid));
            continue;
        }
        let lines = meta::decode(&store.read(&entry.oid, ObjectKind::Blob)?);
        for line in lines.map_err(|error| damaged(entry.oid, &error.to_string()))? {
            let at = if line.kind == MetaKind::Itself { path.clone() } else { path.join(&line.name) };
            let what = match line.kind {
                MetaKind::Itself => What::Directory,
                MetaKind::Special(kind) => What::Special(kind),
                MetaKind::Skipped(reason) => {
                    listing.skipped.insert(at, reason);
                    continue;
                }
                MetaKind::File { .. } | MetaKind::Link => {
                    let stored = files.get(&line.name).filter(|entry| !entry.is_tree());
                    let stored = stored.ok_or_else(|| damaged(meta, "it describes a file that is not stored"))?;
                    described += 1;
                    let link = stored.mode == MODE_LINK;
                    if matches!(line.kind, MetaKind::File { ino: Some(_), .. }) {
                        listing.linked.insert(at.clone());
                    }
                    if matches!(line.kind, MetaKind::File { torn: true, .. }) {
                        listing.torn.push(at.clone());
                    }
                    if link { What::Symlink(stored.oid) } else { What::File(stored.oid) }
                }
            };
            listing.items.insert(at, Item { what, mode: line.mode, mtime: line.mtime, size: line.size });
        }
    }
    if described != files.len() {
        return Err(damaged(meta, "it does not describe every file"));
    }
    Ok(())
}
