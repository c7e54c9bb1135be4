//! Builds a checkpoint's trees, from the leaves up, and reads trees back.
//!
//! Trees are serialised here, since names such as `git~1` or with a newline must be stored as they are. Only objects
//! that neither the previous checkpoint nor the store has are written. A directory without covered files is in the
//! metadata alone.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::beneath::{FileKind, Stat};
use super::cache::StatCache;
use super::content::Hashed;
use super::errors::{HistoryError, Result};
use super::meta::{self, MetaKind, MetaLine};
use super::names::RelPath;
use super::objects::ObjectStore;
use super::oid::{ObjectKind, Oid};
use super::pack::{PackWriter, Packed};
use super::scan::{ScanEntry, Skipped};

/// The mode of a subtree in a git tree.
pub(super) const MODE_TREE: u32 = 0o040_000;
/// The mode of a symbolic link in a git tree.
pub(super) const MODE_LINK: u32 = 0o120_000;
const MODE_FILE: u32 = 0o100_644;
const MODE_EXECUTABLE: u32 = 0o100_755;

/// One line of a git tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TreeEntry {
    /// The name within the directory.
    pub name: Vec<u8>,
    /// Git's mode.
    pub mode: u32,
    /// The object.
    pub oid: Oid,
}

impl TreeEntry {
    /// Says whether it is a subtree.
    pub fn is_tree(&self) -> bool {
        self.mode == MODE_TREE
    }
}

/// Serialises a tree in git's order, in which a directory sorts as if its name ended with a slash.
pub(super) fn encode_tree(entries: &mut [TreeEntry]) -> Vec<u8> {
    let key = |entry: &TreeEntry| {
        let slash: &[u8] = if entry.is_tree() { b"/" } else { b"" };
        [&entry.name[..], slash].concat()
    };
    entries.sort_by_cached_key(key);
    let mut bytes = Vec::with_capacity(entries.len() * 40);
    for entry in entries {
        bytes.extend_from_slice(format!("{:o} ", entry.mode).as_bytes());
        bytes.extend_from_slice(&entry.name);
        bytes.push(0);
        bytes.extend_from_slice(entry.oid.raw());
    }
    bytes
}

/// Parses a tree.
pub(super) fn decode_tree(oid: &Oid, bytes: &[u8]) -> Result<Vec<TreeEntry>> {
    let bad = || HistoryError::DamagedObject { oid: *oid, problem: "it is not a tree".to_owned() };
    let mut entries = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest.iter().position(|b| *b == b' ').ok_or_else(bad)?;
        let mode = std::str::from_utf8(&rest[..space]).ok().and_then(|text| u32::from_str_radix(text, 8).ok());
        rest = &rest[space + 1..];
        let nul = rest.iter().position(|b| *b == 0).ok_or_else(bad)?;
        let raw = rest.get(nul + 1..nul + 21).and_then(|raw| raw.try_into().ok()).ok_or_else(bad)?;
        let name = rest[..nul].to_vec();
        entries.push(TreeEntry { name, mode: mode.ok_or_else(bad)?, oid: Oid::from_raw(raw) });
        rest = &rest[nul + 21..];
    }
    Ok(entries)
}

/// Where trees, metadata and the commit go.
pub(super) struct ObjectSink<'a> {
    /// What the previous checkpoint knew.
    pub before: &'a StatCache,
    /// What this checkpoint knows.
    pub now: &'a mut StatCache,
    /// The published objects.
    pub store: &'a ObjectStore,
    /// The pack of this checkpoint.
    pub pack: &'a Mutex<PackWriter>,
    /// Whether what `before` knows is still in the store.
    pub trust_before: bool,
}

impl ObjectSink<'_> {
    /// Stores an object unless it is there already.
    pub fn put(&mut self, kind: ObjectKind, content: &[u8]) -> Result<Oid> {
        let oid = Oid::of(kind, content);
        self.now.note(oid);
        let old = (self.trust_before && self.before.knows(&oid)) || self.store.contains(&oid);
        if !old {
            let mut pack = self.pack.lock().unwrap_or_else(PoisonError::into_inner);
            if !pack.holds(&oid) {
                let dir = self.store.pack_dir();
                let packed = Packed::new(oid, kind, content).map_err(HistoryError::io("compress for", &dir))?;
                pack.append(&packed).map_err(HistoryError::io("write a pack for", &dir))?;
            }
        }
        Ok(oid)
    }
}

#[derive(Default)]
struct Directory {
    files: Vec<TreeEntry>,
    meta: Vec<MetaLine>,
    meta_below: Vec<TreeEntry>,
}

/// The two trees of a workspace.
pub(super) struct Trees {
    /// The files.
    pub files: Oid,
    /// The metadata.
    pub meta: Oid,
}

fn line(kind: MetaKind, stat: &Stat, size: u64, name: &[u8]) -> MetaLine {
    MetaLine { kind, mode: stat.permissions(), mtime: stat.mtime, size, xattrs: Box::default(), name: name.to_vec() }
}

/// Builds the trees of everything that a scan found and a reading stored.
pub(super) fn build(
    entries: &[ScanEntry],
    files: &[Hashed],
    skipped: &[Skipped],
    sink: &mut ObjectSink<'_>,
) -> Result<Trees> {
    let mut dirs: BTreeMap<RelPath, Directory> = BTreeMap::new();
    for entry in entries {
        match entry.stat.kind() {
            FileKind::Directory => {
                let dir = dirs.entry(entry.path.clone()).or_default();
                dir.meta.push(line(MetaKind::Itself, &entry.stat, 0, b""));
            }
            FileKind::Special(kind) => {
                if let Some((parent, name)) = entry.path.split() {
                    let special = line(MetaKind::Special(kind.to_owned()), &entry.stat, 0, name);
                    dirs.entry(parent).or_default().meta.push(special);
                }
            }
            FileKind::Regular | FileKind::Symlink => {}
        }
    }
    for file in files {
        let Some((parent, name)) = file.path.split() else {
            continue;
        };
        let (mode, kind) = if file.stat.kind() == FileKind::Symlink {
            (MODE_LINK, MetaKind::Link)
        } else {
            let ino = (file.stat.nlink > 1).then_some(file.stat.ino);
            let executable = file.stat.permissions() & 0o100 != 0;
            let mode = if executable { MODE_EXECUTABLE } else { MODE_FILE };
            (mode, MetaKind::File { torn: file.torn, ino, sparse: false })
        };
        let dir = dirs.entry(parent.clone()).or_default();
        dir.meta.push(line(kind, &file.stat, file.size, name));
        dir.files.push(TreeEntry { name: name.to_vec(), mode, oid: file.oid });
    }
    for skip in skipped {
        if let Some((parent, name)) = skip.path.split() {
            let mtime = super::beneath::Time::default();
            let kind = MetaKind::Skipped(skip.reason);
            let about = MetaLine { kind, mode: 0, mtime, size: 0, xattrs: Box::default(), name: name.to_vec() };
            dirs.entry(parent).or_default().meta.push(about);
        }
    }

    // Children sort behind their parents: from the end, each directory comes after all that is in it.
    while let Some((path, mut dir)) = dirs.pop_last() {
        let text = meta::encode(&mut dir.meta);
        let blob = sink.put(ObjectKind::Blob, text.as_bytes())?;
        dir.meta_below.push(TreeEntry { name: b"entries".to_vec(), mode: MODE_FILE, oid: blob });
        let meta = sink.put(ObjectKind::Tree, &encode_tree(&mut dir.meta_below))?;
        let Some((parent, name)) = path.split() else {
            let files = sink.put(ObjectKind::Tree, &encode_tree(&mut dir.files))?;
            return Ok(Trees { files, meta });
        };
        let above = dirs.entry(parent).or_default();
        above.meta_below.push(TreeEntry { name: [b"d.", name].concat(), mode: MODE_TREE, oid: meta });
        if !dir.files.is_empty() {
            let files = sink.put(ObjectKind::Tree, &encode_tree(&mut dir.files))?;
            above.files.push(TreeEntry { name: name.to_vec(), mode: MODE_TREE, oid: files });
        }
    }
    // The loop ends at the workspace itself, which every scan contains; an empty scan has empty trees.
    let files = sink.put(ObjectKind::Tree, &[])?;
    let blob = sink.put(ObjectKind::Blob, meta::encode(&mut []).as_bytes())?;
    let mut only = [TreeEntry { name: b"entries".to_vec(), mode: MODE_FILE, oid: blob }];
    let meta = sink.put(ObjectKind::Tree, &encode_tree(&mut only))?;
    Ok(Trees { files, meta })
}

/// Builds the root tree of a checkpoint.
pub(super) fn build_root(trees: &Trees, manifest: &[u8], sink: &mut ObjectSink<'_>) -> Result<Oid> {
    let manifest = sink.put(ObjectKind::Blob, manifest)?;
    let mut root = [
        TreeEntry { name: b"files".to_vec(), mode: MODE_TREE, oid: trees.files },
        TreeEntry { name: b"meta".to_vec(), mode: MODE_TREE, oid: trees.meta },
        TreeEntry { name: b"manifest".to_vec(), mode: MODE_FILE, oid: manifest },
    ];
    sink.put(ObjectKind::Tree, &encode_tree(&mut root))
}
