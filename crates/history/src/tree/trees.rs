//! Builds the trees of a checkpoint, from the leaves up, and reads trees.
//!
//! Trees are encoded here rather than by libgit2, since names such as `git~1` must be stored unchanged. Only
//! objects that the store does not have are written. A directory without covered files is in the metadata
//! alone.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::iter;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::errors::{HistoryError, Result};
use crate::scan::content::{Content, ContentRead};
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{Entry, NewDir, ScanResult, ScannedNode, SkipReason, Unread};
use crate::scan::workspace_state::{Child, Dir, File, FileFingerprint, Node, ScanRemarks, total};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::store::pack::{PackWriter, Packed};
use crate::tree::confined_dir::{FileKind, Time};
use crate::tree::metadata::{self, MetaKind, MetaLine};

/// The mode of a subtree in a git tree.
pub(crate) const MODE_TREE: u32 = 0o040_000;
/// The mode of a symbolic link in a git tree.
pub(crate) const MODE_LINK: u32 = 0o120_000;
const MODE_FILE: u32 = 0o100_644;
const MODE_EXECUTABLE: u32 = 0o100_755;

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
            .map(|entry| Line { prefix: b"", name: &entry.name, mode: entry.mode, oid: &entry.oid })
            .collect(),
    )
}

/// An entry of a tree that is being encoded.
struct Line<'a> {
    /// The text before the name.
    prefix: &'static [u8],
    name: &'a [u8],
    mode: u32,
    oid: &'a Oid,
}

impl Line<'_> {
    /// Compares as git does: a directory sorts as if its name ended with a slash.
    fn compare(&self, other: &Line<'_>) -> Ordering {
        let slash = |line: &Line<'_>| (line.mode == MODE_TREE).then_some(b'/');
        if self.prefix != other.prefix {
            let key = |line: &Line<'_>| [line.prefix, line.name].concat();
            return (key(self), slash(self)).cmp(&(key(other), slash(other)));
        }
        let common = self.name.len().min(other.name.len());
        let next = |line: &Line<'_>| line.name.get(common).copied().or(slash(line));
        self.name[..common].cmp(&other.name[..common]).then_with(|| next(self).cmp(&next(other)))
    }
}

fn encode(mut lines: Vec<Line<'_>>) -> Vec<u8> {
    // The lines are almost sorted already.
    lines.sort_by(Line::compare);
    let size = |line: &Line<'_>| 28 + line.prefix.len() + line.name.len();
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
        let hastens = kind != ObjectKind::Tree && pack().hastens(content.len());
        // Compression takes most of the time, so it runs outside the lock.
        let packed = match hastens {
            true => Packed::in_haste(oid, kind, content),
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

/// Builds the trees of a directory and of everything below it, after its contents were read. If `many` files
/// were read, subdirectories are processed in parallel.
pub(crate) fn seal(
    found: ScanResult,
    started_ns: i128,
    hurry: Urgency,
    many: bool,
    sink: &ObjectSink<'_>,
) -> Result<Arc<Dir>> {
    Sealing { started_ns, hurry, many, sink }.dir(found, 0)
}

struct Sealing<'a> {
    /// When the scan began, in nanoseconds since 1970.
    started_ns: i128,
    hurry: Urgency,
    many: bool,
    sink: &'a ObjectSink<'a>,
}

impl Sealing<'_> {
    fn dir(&self, found: ScanResult, depth: usize) -> Result<Arc<Dir>> {
        match found {
            ScanResult::Same(dir) => Ok(dir),
            ScanResult::New(new) if depth == pool::DEEP => pool::on(self.hurry, || self.new_dir(*new, depth)),
            ScanResult::New(new) => self.new_dir(*new, depth),
        }
    }

    fn new_dir(&self, new: NewDir, depth: usize) -> Result<Arc<Dir>> {
        let sink = self.sink;
        let child = |entry: Entry| -> Result<Option<Arc<Child>>> {
            let (name, what) = match entry {
                Entry::Kept(child) => return Ok(Some(child)),
                Entry::Anew(name, what) => (name, what),
            };
            let node = match what {
                ScannedNode::Known(node) => Some(node),
                ScannedNode::Below(found) => Some(Node::Dir(self.dir(found, depth + 1)?)),
                ScannedNode::Unread(unread) => read_node(*unread, self.started_ns),
            };
            Ok(node.map(|node| Arc::new(Child { name, node })))
        };
        let below = new
            .entries
            .iter()
            .filter(|entry| matches!(entry, Entry::Anew(_, ScannedNode::Below(ScanResult::New(_)))))
            .count();
        let children: Vec<Option<Arc<Child>>> = if self.many && below > 1 {
            pool::on(self.hurry, || new.entries.into_par_iter().map(child).collect::<Result<_>>())?
        } else {
            // For a single directory, waking other threads takes longer than the work.
            new.entries.into_iter().map(child).collect::<Result<_>>()?
        };
        let vanished = children.iter().any(Option::is_none);
        let children: Box<[Arc<Child>]> = children.into_iter().flatten().collect();
        let (mode, mtime) = (new.seen.permissions(), new.seen.mtime);
        let xattrs = Cow::Borrowed(&*new.xattrs);
        let itself = MetaLine { kind: MetaKind::Itself, mode, mtime, size: 0, xattrs, name: Cow::default() };
        let lines = iter::once(itself).chain(children.iter().filter_map(|child| meta_line(child)));
        let text = metadata::encode(children.len() + 1, lines);
        let entries = sink.put(ObjectKind::Blob, text.as_bytes())?;
        let entries = Line { prefix: b"", name: b"entries", mode: MODE_FILE, oid: &entries };
        let mut below: Vec<Line<'_>> = Vec::with_capacity(children.len() + 1);
        below.extend(children.iter().filter_map(|child| match &child.node {
            Node::Dir(dir) if dir.is_bare() => None,
            Node::Dir(dir) => Some(Line { prefix: b"d.", name: &child.name, mode: MODE_TREE, oid: &dir.meta }),
            Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::Draft => None,
        }));
        below.push(entries);
        let meta = sink.put(ObjectKind::Tree, &encode(below))?;
        let mut files: Vec<Line<'_>> = Vec::with_capacity(children.len());
        files.extend(children.iter().filter_map(|child| file_line(child)));
        let files = if files.is_empty() { None } else { Some(sink.put(ObjectKind::Tree, &encode(files))?) };
        Ok(Arc::new(Dir {
            seen: new.seen,
            xattrs: new.xattrs,
            covered: new.covered,
            // An entry that vanished after the listing may return without changing the fingerprint of the
            // directory.
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
}

fn read_node(unread: Unread, started_ns: i128) -> Option<Node> {
    match unread.outcome.into_inner() {
        Some(ContentRead::Stored(Content { stat, oid, size, torn, xattrs })) => {
            let seen = FileFingerprint::from(&stat);
            let remarks = ScanRemarks {
                torn,
                sparse: stat.kind() == FileKind::Regular && stat.blocks.saturating_mul(512) < stat.size,
                forced: unread.forced,
                linked: stat.kind() == FileKind::Regular && stat.nlink > 1,
                doubtful: unread.mapped || !seen.is_settled(started_ns),
            };
            Some(Node::File(File { seen, oid, size, remarks, xattrs }))
        }
        Some(ContentRead::Skipped(reason, detail)) => Some(Node::Skipped { reason, detail: detail.into() }),
        Some(ContentRead::Vanished) | None => None,
    }
}

/// Returns the metadata line of a child in its directory; `None` for a readable directory, whose own metadata
/// holds its line.
fn meta_line(child: &Child) -> Option<MetaLine<'_>> {
    let name = Cow::Borrowed(&*child.name);
    let skipped = |reason, name| {
        let kind = MetaKind::Skipped(reason);
        Some(MetaLine { kind, mode: 0, mtime: Time::default(), size: 0, xattrs: Cow::default(), name })
    };
    match &child.node {
        Node::File(file) => {
            let ScanRemarks { torn, sparse, linked, .. } = file.remarks;
            let kind = match file.is_link() {
                true => MetaKind::Link,
                false => MetaKind::File { torn, ino: linked.then_some(file.seen.ino), sparse },
            };
            let (mode, mtime, xattrs) = (file.seen.permissions(), file.seen.mtime, Cow::Borrowed(&*file.xattrs));
            Some(MetaLine { kind, mode, mtime, size: file.size, xattrs, name })
        }
        Node::Dir(dir) if dir.unreadable.is_some() && !dir.is_bare() => skipped(SkipReason::Unreadable, name),
        Node::Special { seen, kind } => {
            let kind = MetaKind::Special(Cow::Borrowed(*kind));
            let (mode, mtime) = (seen.permissions(), seen.mtime);
            Some(MetaLine { kind, mode, mtime, size: 0, xattrs: Cow::default(), name })
        }
        Node::Skipped { reason, .. } => skipped(*reason, name),
        Node::Dir(_) | Node::Draft => None,
    }
}

/// Returns the entry of a child in the tree of its directory.
fn file_line(child: &Child) -> Option<Line<'_>> {
    let (mode, oid) = match &child.node {
        Node::File(file) if file.is_link() => (MODE_LINK, &file.oid),
        Node::File(file) if file.seen.permissions() & 0o100 != 0 => (MODE_EXECUTABLE, &file.oid),
        Node::File(file) => (MODE_FILE, &file.oid),
        Node::Dir(dir) if !dir.is_bare() => (MODE_TREE, dir.files.as_ref()?),
        Node::Dir(_) | Node::Special { .. } | Node::Skipped { .. } | Node::Draft => return None,
    };
    Some(Line { prefix: b"", name: &child.name, mode, oid })
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
