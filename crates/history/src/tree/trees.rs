//! Encodes, stores and decodes the trees of a checkpoint.
//!
//! Trees are encoded here rather than by libgit2, since names such as `git~1` must be stored unchanged. Only
//! objects that the store does not have are written. A directory without covered files is in the metadata
//! alone.

use std::cmp::Ordering;
use std::sync::{Mutex, PoisonError};

use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::store::pack::{PackWriter, Packed};

/// The mode of a subtree in a git tree.
pub(crate) const MODE_TREE: u32 = 0o040_000;
/// The mode of a symbolic link in a git tree.
pub(crate) const MODE_LINK: u32 = 0o120_000;
/// The mode of a file in a git tree.
pub(crate) const MODE_FILE: u32 = 0o100_644;
/// The mode of an executable file in a git tree.
pub(crate) const MODE_EXECUTABLE: u32 = 0o100_755;

/// One entry of a git tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TreeEntry {
    pub name: Vec<u8>,
    /// The mode in git's notation.
    pub mode: u32,
    pub oid: Oid,
}

impl TreeEntry {
    pub fn is_tree(&self) -> bool {
        self.mode == MODE_TREE
    }
}

/// Encodes a tree in git's order.
pub(crate) fn encode_tree(entries: &[TreeEntry]) -> Vec<u8> {
    encode(
        entries
            .iter()
            .map(|entry| TreeLine { prefix: b"", name: &entry.name, mode: entry.mode, oid: &entry.oid })
            .collect(),
    )
}

/// An entry of a tree that is being encoded.
pub(crate) struct TreeLine<'a> {
    /// The text before the name.
    pub prefix: &'static [u8],
    pub name: &'a [u8],
    pub mode: u32,
    pub oid: &'a Oid,
}

impl TreeLine<'_> {
    /// Compares as git does: a directory sorts as if its name ended with a slash.
    fn compare(&self, other: &TreeLine<'_>) -> Ordering {
        let slash = |line: &TreeLine<'_>| (line.mode == MODE_TREE).then_some(b'/');
        if self.prefix != other.prefix {
            let key = |line: &TreeLine<'_>| [line.prefix, line.name].concat();
            return (key(self), slash(self)).cmp(&(key(other), slash(other)));
        }
        let common = self.name.len().min(other.name.len());
        let next = |line: &TreeLine<'_>| line.name.get(common).copied().or(slash(line));
        self.name[..common].cmp(&other.name[..common]).then_with(|| next(self).cmp(&next(other)))
    }
}

/// Encodes a tree in git's order.
pub(crate) fn encode(mut lines: Vec<TreeLine<'_>>) -> Vec<u8> {
    // The lines are almost sorted already.
    lines.sort_by(TreeLine::compare);
    let size = |line: &TreeLine<'_>| 28 + line.prefix.len() + line.name.len();
    let mut bytes = Vec::with_capacity(lines.iter().map(size).sum());
    for line in lines {
        let mode: &[u8] = match line.mode {
            MODE_TREE => b"40000 ",
            MODE_LINK => b"120000 ",
            MODE_EXECUTABLE => b"100755 ",
            _ => b"100644 ",
        };
        for part in [mode, line.prefix, line.name, b"\0", line.oid.raw()] {
            bytes.extend_from_slice(part);
        }
    }
    bytes
}

pub(crate) fn decode_tree(oid: &Oid, bytes: &[u8]) -> Result<Vec<TreeEntry>> {
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

/// The destination of trees, metadata and commits.
pub(crate) struct ObjectSink<'a> {
    /// The published objects.
    pub store: &'a ObjectStore,
    /// The pack of this snapshot; `None` to compute ids only.
    pub pack: Option<&'a Mutex<PackWriter>>,
}

impl ObjectSink<'_> {
    /// Stores an object unless it is stored already.
    pub fn put(&self, kind: ObjectKind, content: &[u8]) -> Result<Oid> {
        let oid = Oid::of(kind, content);
        let Some(pack) = self.pack else { return Ok(oid) };
        let pack = || pack.lock().unwrap_or_else(PoisonError::into_inner);
        if self.store.contains(&oid) || pack().holds(&oid) {
            return Ok(oid);
        }
        let dir = self.store.pack_dir();
        let uncompressed = kind != ObjectKind::Tree && pack().store_uncompressed(content.len());
        // Compression takes most of the time, so it runs outside the lock.
        let packed = match uncompressed {
            true => Packed::uncompressed(oid, kind, content),
            false => Packed::new(oid, kind, content).map_err(HistoryError::io("compress for", &dir))?,
        };
        pack().append(&packed).map_err(HistoryError::io("write a pack for", &dir))?;
        Ok(oid)
    }
}

/// The two trees of a workspace.
pub(crate) struct Trees {
    pub files: Oid,
    pub meta: Oid,
}

/// Stores the root tree of a checkpoint.
pub(crate) fn build_root(trees: &Trees, manifest: &[u8], sink: &ObjectSink<'_>) -> Result<Oid> {
    let manifest = sink.put(ObjectKind::Blob, manifest)?;
    let root = [
        TreeEntry { name: b"files".to_vec(), mode: MODE_TREE, oid: trees.files },
        TreeEntry { name: b"meta".to_vec(), mode: MODE_TREE, oid: trees.meta },
        TreeEntry { name: b"manifest".to_vec(), mode: MODE_FILE, oid: manifest },
    ];
    sink.put(ObjectKind::Tree, &encode_tree(&root))
}
