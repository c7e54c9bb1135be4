//! Builds a checkpoint's trees, from the leaves up, and reads trees back.
//!
//! Trees are serialised here, since names such as `git~1` or with a newline must be stored as they are. Only objects
//! that neither the previous checkpoint nor the store has are written. A directory without covered files is in the
//! metadata alone.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::beneath::{FileKind, Time};
use super::content::{Content, Outcome};
use super::errors::{HistoryError, Result};
use super::found::{Entry, Found, SkipReason, Unread, What};
use super::meta::{self, MetaKind, MetaLine, Xattrs};
use super::objects::ObjectStore;
use super::oid::{ObjectKind, Oid};
use super::pack::{PackWriter, Packed};
use super::picture::{Child, Dir, File, Node, Remarks, Seen, total};

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
    /// The published objects.
    pub store: &'a ObjectStore,
    /// The pack of this checkpoint; none to compute ids only.
    pub pack: Option<&'a Mutex<PackWriter>>,
}

impl ObjectSink<'_> {
    /// Stores an object unless it is there already.
    pub fn put(&self, kind: ObjectKind, content: &[u8]) -> Result<Oid> {
        let oid = Oid::of(kind, content);
        let Some(pack) = self.pack else { return Ok(oid) };
        let pack = || pack.lock().unwrap_or_else(PoisonError::into_inner);
        if self.store.contains(&oid) || pack().holds(&oid) {
            return Ok(oid);
        }
        let dir = self.store.pack_dir();
        // Compressed outside the lock: this is where the time goes.
        let packed = Packed::new(oid, kind, content).map_err(HistoryError::io("compress for", &dir))?;
        pack().append(&packed).map_err(HistoryError::io("write a pack for", &dir))?;
        Ok(oid)
    }
}

/// The two trees of a workspace.
pub(super) struct Trees {
    /// The files.
    pub files: Oid,
    /// The metadata.
    pub meta: Oid,
}

/// Makes the trees of a directory that a walk has sketched and a reading completed, and of all below it.
pub(super) fn seal(found: Found, started_ns: i128, sink: &ObjectSink<'_>) -> Result<Arc<Dir>> {
    let new = match found {
        Found::Same(dir) => return Ok(dir),
        Found::New(new) => *new,
    };
    let child = |entry: Entry| -> Result<Option<Child>> {
        let node = match entry.what {
            What::Known(node) => Some(node),
            What::Below(found) => Some(Node::Dir(seal(found, started_ns, sink)?)),
            What::Unread(unread) => read_node(*unread, started_ns),
        };
        Ok(node.map(|node| Child { name: entry.name, node }))
    };
    let below = new.entries.iter().filter(|entry| matches!(entry.what, What::Below(Found::New(_)))).count();
    let children: Vec<Option<Child>> = if below > 1 {
        new.entries.into_par_iter().map(child).collect::<Result<_>>()?
    } else {
        // Waking other threads takes longer than one directory does.
        new.entries.into_iter().map(child).collect::<Result<_>>()?
    };
    let vanished = children.iter().any(Option::is_none);
    let children: Box<[Child]> = children.into_iter().flatten().collect();
    let mut shape = Shape::default();
    let (mode, mtime, xattrs) = (new.seen.permissions(), new.seen.mtime, new.xattrs.clone());
    shape.lines.push(MetaLine { kind: MetaKind::Itself, mode, mtime, size: 0, xattrs, name: Vec::new() });
    children.iter().for_each(|child| shape.add(child));
    let text = meta::encode(&mut shape.lines);
    let blob = sink.put(ObjectKind::Blob, text.as_bytes())?;
    shape.meta.push(TreeEntry { name: b"entries".to_vec(), mode: MODE_FILE, oid: blob });
    let meta = sink.put(ObjectKind::Tree, &encode_tree(&mut shape.meta))?;
    let files = match shape.files.is_empty() {
        true => None,
        false => Some(sink.put(ObjectKind::Tree, &encode_tree(&mut shape.files))?),
    };
    Ok(Arc::new(Dir {
        seen: new.seen,
        xattrs: new.xattrs,
        covered: new.covered,
        // What was listed and is not there any more may come back without a trace.
        settled: new.settled && !vanished,
        ignore_settled: new.ignore_settled,
        unreadable: new.unreadable,
        ignore_file: new.ignore_file,
        nested: new.nested,
        totals: total(&children),
        children,
        files,
        meta,
    }))
}

fn read_node(unread: Unread, started_ns: i128) -> Option<Node> {
    match unread.outcome.into_inner() {
        Some(Outcome::Stored(Content { stat, oid, size, torn, xattrs })) => {
            let seen = Seen::from(&stat);
            let remarks = Remarks {
                torn,
                sparse: stat.kind() == FileKind::Regular && stat.blocks.saturating_mul(512) < stat.size,
                forced: unread.forced,
                linked: stat.kind() == FileKind::Regular && stat.nlink > 1,
                doubtful: unread.mapped || !seen.is_settled(started_ns),
            };
            Some(Node::File(File { seen, oid, size, remarks, xattrs }))
        }
        Some(Outcome::Skipped(reason, detail)) => Some(Node::Skipped { reason, detail: detail.into() }),
        Some(Outcome::Vanished) | None => None,
    }
}

/// What a directory's objects are made of.
#[derive(Default)]
struct Shape {
    files: Vec<TreeEntry>,
    lines: Vec<MetaLine>,
    meta: Vec<TreeEntry>,
}

impl Shape {
    fn add(&mut self, child: &Child) {
        let name = child.name.to_vec();
        match &child.node {
            Node::File(file) => {
                let permissions = file.seen.permissions();
                let (mode, kind) = if file.is_link() {
                    (MODE_LINK, MetaKind::Link)
                } else {
                    let Remarks { torn, sparse, linked, .. } = file.remarks;
                    let mode = if permissions & 0o100 != 0 { MODE_EXECUTABLE } else { MODE_FILE };
                    (mode, MetaKind::File { torn, ino: linked.then_some(file.seen.ino), sparse })
                };
                self.line(kind, permissions, file.seen.mtime, file.size, file.xattrs.clone(), name.clone());
                self.files.push(TreeEntry { name, mode, oid: file.oid });
            }
            Node::Dir(dir) if dir.is_bare() => {}
            Node::Dir(dir) => {
                if dir.unreadable.is_some() {
                    self.skipped(SkipReason::Unreadable, name.clone());
                }
                self.meta.push(TreeEntry { name: [b"d.", &name[..]].concat(), mode: MODE_TREE, oid: dir.meta });
                self.files.extend(dir.files.map(|oid| TreeEntry { name, mode: MODE_TREE, oid }));
            }
            Node::Special { seen, kind } => {
                let kind = MetaKind::Special((*kind).to_owned());
                self.line(kind, seen.permissions(), seen.mtime, 0, Xattrs::default(), name);
            }
            Node::Skipped { reason, .. } => self.skipped(*reason, name),
            Node::Draft => {}
        }
    }

    fn skipped(&mut self, reason: SkipReason, name: Vec<u8>) {
        self.line(MetaKind::Skipped(reason), 0, Time::default(), 0, Xattrs::default(), name);
    }

    fn line(&mut self, kind: MetaKind, mode: u32, mtime: Time, size: u64, xattrs: Xattrs, name: Vec<u8>) {
        self.lines.push(MetaLine { kind, mode, mtime, size, xattrs, name });
    }
}

/// Builds the root tree of a checkpoint.
pub(super) fn build_root(trees: &Trees, manifest: &[u8], sink: &ObjectSink<'_>) -> Result<Oid> {
    let manifest = sink.put(ObjectKind::Blob, manifest)?;
    let mut root = [
        TreeEntry { name: b"files".to_vec(), mode: MODE_TREE, oid: trees.files },
        TreeEntry { name: b"meta".to_vec(), mode: MODE_TREE, oid: trees.meta },
        TreeEntry { name: b"manifest".to_vec(), mode: MODE_FILE, oid: manifest },
    ];
    sink.put(ObjectKind::Tree, &encode_tree(&mut root))
}
