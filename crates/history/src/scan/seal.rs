//! Builds the directories of a new workspace state, with their trees, from the result of a scan.

use std::borrow::Cow;
use std::iter;
use std::sync::Arc;

use rayon::prelude::*;

use crate::errors::Result;
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{ContentRead, FileContent, NewDir, ScanEntry, ScanResult, ScannedNode, Unread};
use crate::scan::workspace_state::{Child, DirState, FileState, Node, ScanRemarks, total};
use crate::store::oid::ObjectKind;
use crate::tree::confined_dir::{FileKind, Time};
use crate::tree::fingerprint::FileFingerprint;
use crate::tree::metadata::{self, MetaKind, MetaLine};
use crate::tree::skipped::SkipReason;
use crate::tree::trees::{MODE_EXECUTABLE, MODE_FILE, MODE_LINK, MODE_TREE, ObjectSink, TreeLine, encode};

/// Builds the trees of a directory and of everything below it, after its contents were read. If `many` files
/// were read, subdirectories are processed in parallel.
pub(crate) fn seal(
    result: ScanResult,
    started_ns: i128,
    urgency: Urgency,
    many: bool,
    sink: &ObjectSink<'_>,
) -> Result<Arc<DirState>> {
    Sealing { started_ns, urgency, many, sink }.dir(result, 0)
}

struct Sealing<'a> {
    /// When the scan began, in nanoseconds since 1970.
    started_ns: i128,
    urgency: Urgency,
    many: bool,
    sink: &'a ObjectSink<'a>,
}

impl Sealing<'_> {
    fn dir(&self, result: ScanResult, depth: usize) -> Result<Arc<DirState>> {
        match result {
            ScanResult::Same(dir) => Ok(dir),
            ScanResult::New(new) if depth == pool::DEEP => pool::on(self.urgency, || self.new_dir(*new, depth)),
            ScanResult::New(new) => self.new_dir(*new, depth),
        }
    }

    fn new_dir(&self, new: NewDir, depth: usize) -> Result<Arc<DirState>> {
        let sink = self.sink;
        let child = |entry: ScanEntry| -> Result<Option<Arc<Child>>> {
            let (name, scanned) = match entry {
                ScanEntry::Same(child) => return Ok(Some(child)),
                ScanEntry::New(name, scanned) => (name, scanned),
            };
            let node = match scanned {
                ScannedNode::Complete(node) => Some(node),
                ScannedNode::Dir(result) => Some(Node::Dir(self.dir(result, depth + 1)?)),
                ScannedNode::Unread(unread) => read_node(*unread, self.started_ns),
            };
            Ok(node.map(|node| Arc::new(Child { name, node })))
        };
        let below = new
            .entries
            .iter()
            .filter(|entry| matches!(entry, ScanEntry::New(_, ScannedNode::Dir(ScanResult::New(_)))))
            .count();
        let children: Vec<Option<Arc<Child>>> = if self.many && below > 1 {
            pool::on(self.urgency, || new.entries.into_par_iter().map(child).collect::<Result<_>>())?
        } else {
            // For a single directory, waking other threads takes longer than the work.
            new.entries.into_iter().map(child).collect::<Result<_>>()?
        };
        let vanished = children.iter().any(Option::is_none);
        let children: Box<[Arc<Child>]> = children.into_iter().flatten().collect();
        let mut properties = new.properties;
        let (mode, mtime) = (properties.fingerprint.permissions(), properties.fingerprint.mtime);
        let xattrs = Cow::Borrowed(&*properties.xattrs);
        let itself = MetaLine { kind: MetaKind::Itself, mode, mtime, size: 0, xattrs, name: Cow::default() };
        let lines = iter::once(itself).chain(children.iter().filter_map(|child| meta_line(child)));
        let text = metadata::encode(children.len() + 1, lines);
        let entries = sink.put(ObjectKind::Blob, text.as_bytes())?;
        let entries = TreeLine { prefix: b"", name: b"entries", mode: MODE_FILE, oid: &entries };
        let mut below: Vec<TreeLine<'_>> = Vec::with_capacity(children.len() + 1);
        below.extend(children.iter().filter_map(|child| match &child.node {
            Node::Dir(dir) if dir.is_bare() => None,
            Node::Dir(dir) => Some(TreeLine { prefix: b"d.", name: &child.name, mode: MODE_TREE, oid: &dir.meta }),
            Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::StagedFile => None,
        }));
        below.push(entries);
        let meta = sink.put(ObjectKind::Tree, &encode(below))?;
        let mut files: Vec<TreeLine<'_>> = Vec::with_capacity(children.len());
        files.extend(children.iter().filter_map(|child| file_line(child)));
        let files = if files.is_empty() { None } else { Some(sink.put(ObjectKind::Tree, &encode(files))?) };
        // An entry that vanished after the listing may return without changing the fingerprint of the directory.
        properties.settled &= !vanished;
        Ok(Arc::new(DirState { totals: total(&children), properties, children, files, meta }))
    }
}

fn read_node(unread: Unread, started_ns: i128) -> Option<Node> {
    match unread.content.into_inner() {
        Some(ContentRead::Stored(FileContent { stat, oid, size, torn, xattrs })) => {
            let fingerprint = FileFingerprint::from(&stat);
            let remarks = ScanRemarks {
                torn,
                sparse: stat.kind() == FileKind::Regular && stat.blocks.saturating_mul(512) < stat.size,
                forced: unread.forced,
                linked: stat.kind() == FileKind::Regular && stat.nlink > 1,
                doubtful: unread.mapped || !fingerprint.is_settled(started_ns),
            };
            Some(Node::File(FileState { fingerprint, oid, size, remarks, xattrs }))
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
                false => MetaKind::File { torn, ino: linked.then_some(file.fingerprint.ino), sparse },
            };
            let (mode, mtime, xattrs) =
                (file.fingerprint.permissions(), file.fingerprint.mtime, Cow::Borrowed(&*file.xattrs));
            Some(MetaLine { kind, mode, mtime, size: file.size, xattrs, name })
        }
        Node::Dir(dir) if dir.properties.unreadable.is_some() && !dir.is_bare() => {
            skipped(SkipReason::Unreadable, name)
        }
        Node::Special { fingerprint, kind } => {
            let kind = MetaKind::Special(Cow::Borrowed(*kind));
            let (mode, mtime) = (fingerprint.permissions(), fingerprint.mtime);
            Some(MetaLine { kind, mode, mtime, size: 0, xattrs: Cow::default(), name })
        }
        Node::Skipped { reason, .. } => skipped(*reason, name),
        Node::Dir(_) | Node::StagedFile => None,
    }
}

/// Returns the entry of a child in the tree of its directory.
fn file_line(child: &Child) -> Option<TreeLine<'_>> {
    let (mode, oid) = match &child.node {
        Node::File(file) if file.is_link() => (MODE_LINK, &file.oid),
        Node::File(file) if file.fingerprint.permissions() & 0o100 != 0 => (MODE_EXECUTABLE, &file.oid),
        Node::File(file) => (MODE_FILE, &file.oid),
        Node::Dir(dir) if !dir.is_bare() => (MODE_TREE, dir.files.as_ref()?),
        Node::Dir(_) | Node::Special { .. } | Node::Skipped { .. } | Node::StagedFile => return None,
    };
    Some(TreeLine { prefix: b"", name: &child.name, mode, oid })
}
