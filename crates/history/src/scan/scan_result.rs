//! The result of a walk: directories that are unchanged since the last scan, and changed ones whose trees are not built
//! yet.
//!
//! Data only: `walk` builds it, `content` reads the unread files in it, `seal` builds the directories.

use std::sync::{Arc, OnceLock};

use crate::scan::workspace_state::{Child, DirProperties, DirState, Node};
use crate::store::oid::Oid;
use crate::tree::confined_dir::FileStat;
use crate::tree::names::RelPath;
use crate::tree::skipped::SkipReason;
use crate::tree::xattrs::Xattrs;

/// A directory in the result of a walk.
#[derive(Debug)]
pub(crate) enum ScanResult {
    /// Nothing in it or below it has changed.
    Same(Arc<DirState>),
    /// It, or an entry below it, has changed or may have.
    New(Box<NewDir>),
}

/// A directory whose trees are not built yet.
#[derive(Debug)]
pub(crate) struct NewDir {
    pub properties: DirProperties,
    /// The covered entries, sorted by name.
    pub entries: Vec<ScanEntry>,
}

/// One name in such a directory.
#[derive(Debug)]
pub(crate) enum ScanEntry {
    /// Unchanged since the last scan.
    Same(Arc<Child>),
    /// A new or changed entry with its name.
    New(Box<[u8]>, ScannedNode),
}

impl ScanEntry {
    pub fn name(&self) -> &[u8] {
        match self {
            ScanEntry::Same(child) => &child.name,
            ScanEntry::New(name, _) => name,
        }
    }
}

/// The entry at a name, as far as a walk can tell without reading its content.
#[derive(Debug)]
pub(crate) enum ScannedNode {
    /// Nothing has to be read.
    Complete(Node),
    Unread(Box<Unread>),
    Dir(ScanResult),
}

/// A file or symbolic link whose content must be read.
#[derive(Debug)]
pub(crate) struct Unread {
    pub path: RelPath,
    /// Its metadata at the time of the walk.
    pub stat: FileStat,
    /// Whether it is tracked although the rules ignore it.
    pub forced: bool,
    /// Whether a process can write to it without changing its fingerprint.
    pub mapped: bool,
    /// The result of reading, set once by `content`.
    pub content: OnceLock<ContentRead>,
}

/// The result of reading a file or symbolic link.
#[derive(Debug)]
pub(crate) enum ContentRead {
    /// Its content is read, and stored if there is a sink.
    Stored(FileContent),
    /// It could not be read.
    Skipped(SkipReason, String),
    /// It no longer exists.
    Vanished,
}

/// The content of a file or symbolic link.
#[derive(Debug)]
pub(crate) struct FileContent {
    /// The metadata when it was read.
    pub stat: FileStat,
    pub oid: Oid,
    /// The number of bytes read.
    pub size: u64,
    /// Whether it changed at every attempt to read it.
    pub torn: bool,
    pub xattrs: Xattrs,
}

impl ScanResult {
    /// Lists the entries whose content must be read, in the order of the tree.
    pub fn unread(&self) -> Vec<&Unread> {
        let mut unread = Vec::new();
        self.collect_unread(&mut unread);
        unread
    }

    fn collect_unread<'s>(&'s self, unread: &mut Vec<&'s Unread>) {
        let ScanResult::New(dir) = self else { return };
        for entry in &dir.entries {
            match entry {
                ScanEntry::New(_, ScannedNode::Unread(entry)) => unread.push(entry),
                ScanEntry::New(_, ScannedNode::Dir(below)) => below.collect_unread(unread),
                ScanEntry::New(_, ScannedNode::Complete(_)) | ScanEntry::Same(_) => {}
            }
        }
    }

    /// Counts the covered entries that are no directories.
    pub fn count_files(&self) -> u64 {
        let files_in = |dir: &DirState| dir.totals.files + dir.totals.skipped;
        let count = |entry: &ScanEntry| match entry {
            ScanEntry::New(_, ScannedNode::Complete(_) | ScannedNode::Unread(_)) => 1,
            ScanEntry::New(_, ScannedNode::Dir(below)) => below.count_files(),
            ScanEntry::Same(child) => match &child.node {
                Node::Dir(dir) => files_in(dir),
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::StagedFile => 1,
            },
        };
        match self {
            ScanResult::Same(dir) => files_in(dir),
            ScanResult::New(dir) => dir.entries.iter().map(count).sum(),
        }
    }

    /// Says whether a path is a covered directory.
    pub fn has_dir(&self, path: &RelPath) -> bool {
        let mut at = self;
        let mut names = path.bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        loop {
            match (at, names.next()) {
                (_, None) => return true,
                (ScanResult::Same(dir), Some(name)) => {
                    return dir.child(name).is_some_and(|child| has_dir_in(child, names));
                }
                (ScanResult::New(dir), Some(name)) => {
                    let entry = dir.entries.binary_search_by(|entry| entry.name().cmp(name)).ok();
                    match entry.map(|at| &dir.entries[at]) {
                        Some(ScanEntry::New(_, ScannedNode::Dir(below))) => at = below,
                        Some(ScanEntry::Same(child)) => return has_dir_in(child, names),
                        Some(ScanEntry::New(_, ScannedNode::Complete(_) | ScannedNode::Unread(_))) | None => {
                            return false;
                        }
                    }
                }
            }
        }
    }
}

/// Says whether the child, and each of these names below it, is a directory.
fn has_dir_in<'n>(child: &Child, names: impl Iterator<Item = &'n [u8]>) -> bool {
    let mut node = &child.node;
    for name in names {
        let Node::Dir(dir) = node else { return false };
        let Some(child) = dir.child(name) else { return false };
        node = &child.node;
    }
    matches!(node, Node::Dir(_))
}
