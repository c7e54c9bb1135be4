//! The workspace state: the result of the last scan, as a tree of directories in memory.
//!
//! ```text
//! WorkspaceState ── root: Arc<DirState> ── children, sorted by name ─┬ File(FileState)
//!                                                                    ├ Dir(Arc<DirState>)   shared with the state before
//!                                                                    └ Special, Skipped, StagedFile
//! ```
//!
//! A directory is immutable and carries the ids of its trees. A new state shares every unchanged directory with
//! the state before, so its cost depends on the changes alone. This module reads no files and takes no locks:
//! `walk` and `seal` build new directories, `state_file` saves them.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use crate::rules::coverage::Rules;
use crate::store::oid::Oid;
use crate::tree::fingerprint::{FileFingerprint, RuleSource};
use crate::tree::names::RelPath;
use crate::tree::skipped::{SkipReason, Skipped};
use crate::tree::xattrs::Xattrs;

/// What a scan remembers of a file besides its fingerprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanRemarks {
    /// The file changed at every attempt to read it.
    pub torn: bool,
    /// The file has holes.
    pub sparse: bool,
    /// The file is tracked although the rules ignore it.
    pub forced: bool,
    /// The file has several names.
    pub linked: bool,
    /// The fingerprint does not prove that the content is unchanged: it is too recent, or an agent has the file
    /// mapped writable.
    pub doubtful: bool,
}

impl ScanRemarks {
    /// Says whether the file must be visited although the watcher has not reported it.
    fn is_volatile(self) -> bool {
        self.torn || self.doubtful || self.linked
    }
}

/// A file or symbolic link whose content is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct FileState {
    /// The fingerprint when the content was read.
    pub fingerprint: FileFingerprint,
    pub oid: Oid,
    /// Stored bytes.
    pub size: u64,
    pub remarks: ScanRemarks,
    pub xattrs: Xattrs,
}

impl FileState {
    pub fn is_link(&self) -> bool {
        self.fingerprint.mode & libc::S_IFMT == libc::S_IFLNK
    }
}

/// The entry at a name.
#[derive(Clone, Debug)]
pub enum Node {
    File(FileState),
    Dir(Arc<DirState>),
    /// A FIFO, socket or device.
    Special {
        fingerprint: FileFingerprint,
        /// The kind, as in [`FileKind::Special`](crate::tree::confined_dir::FileKind::Special).
        kind: &'static str,
    },
    /// Covered, but not stored.
    Skipped {
        reason: SkipReason,
        /// The system's error, or the size.
        detail: Box<str>,
    },
    /// A temporary file of a restore that was given up.
    StagedFile,
}

/// One name in a directory; shared with earlier states as long as nothing has changed.
#[derive(Debug)]
pub struct Child {
    pub name: Box<[u8]>,
    pub node: Node,
}

/// Counts of everything below a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files and symbolic links.
    pub files: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Entries that are covered but not stored, special files included.
    pub skipped: u64,
    /// Files that changed while they were read.
    pub torn: u64,
    /// Entries that must be visited although the watcher has not reported them.
    pub volatile: u64,
    /// Temporary files of restores.
    pub staged_files: u64,
    /// The longest chain of nested directories.
    pub height: usize,
}

impl Totals {
    fn add(&mut self, other: &Totals) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.skipped += other.skipped;
        self.torn += other.torn;
        self.volatile += other.volatile;
        self.staged_files += other.staged_files;
        self.height = self.height.max(other.height);
    }
}

/// The properties of a directory itself.
#[derive(Clone, Debug, PartialEq)]
pub struct DirProperties {
    pub fingerprint: FileFingerprint,
    pub xattrs: Xattrs,
    /// Whether the rules cover it. Directories that are not covered are listed if something below them is.
    pub covered: bool,
    /// Whether an unchanged fingerprint proves that the names in it are unchanged.
    pub settled: bool,
    /// Why it could not be listed.
    pub unreadable: Option<Box<str>>,
    /// The fingerprint of its `.gitignore`.
    pub ignore_file: Option<FileFingerprint>,
    /// Whether that fingerprint proves that the contents of the `.gitignore` are unchanged.
    pub ignore_settled: bool,
    /// Whether it is the top of a nested repository.
    pub nested: bool,
}

/// A directory with everything below it.
#[derive(Debug)]
pub struct DirState {
    pub properties: DirProperties,
    /// The covered entries, sorted by name.
    pub children: Box<[Arc<Child>]>,
    pub totals: Totals,
    /// The tree of its files; `None` if there are none.
    pub files: Option<Oid>,
    /// The metadata tree.
    pub meta: Oid,
}

impl Drop for DirState {
    /// Frees unshared directories iteratively, since a tree may be too deep for the stack.
    fn drop(&mut self) {
        let mut open = vec![std::mem::take(&mut self.children)];
        while let Some(children) = open.pop() {
            for child in children {
                if let Some(Child { node: Node::Dir(dir), .. }) = Arc::into_inner(child)
                    && let Some(mut dir) = Arc::into_inner(dir)
                {
                    open.push(std::mem::take(&mut dir.children));
                }
            }
        }
    }
}

impl DirState {
    pub fn child(&self, name: &[u8]) -> Option<&Arc<Child>> {
        let at = self.children.binary_search_by(|child| (*child.name).cmp(name)).ok()?;
        Some(&self.children[at])
    }

    /// Finds the entry at a path below.
    pub fn find(&self, path: &RelPath) -> Option<&Node> {
        let mut dir = self;
        let mut names = path.bytes().split(|b| *b == b'/').peekable();
        while let Some(name) = names.next() {
            let node = &dir.child(name)?.node;
            match node {
                _ if names.peek().is_none() => return Some(node),
                Node::Dir(below) => dir = below,
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::StagedFile => return None,
            }
        }
        None
    }

    /// Says whether it leaves no trace in a checkpoint: neither it nor anything below it is covered.
    pub fn is_bare(&self) -> bool {
        !self.properties.covered
            && self.children.iter().all(|child| match &child.node {
                Node::Dir(dir) => dir.is_bare(),
                Node::StagedFile => true,
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } => false,
            })
    }

    /// Lists the paths that are covered but not stored, in byte order.
    pub fn skipped(&self) -> Vec<Skipped> {
        let mut paths = Vec::new();
        let mut add = |path: &RelPath, reason, detail: &str| {
            paths.push(Skipped { path: path.clone(), reason, detail: detail.to_owned() });
        };
        self.walk(&RelPath::root(), &|dir| dir.totals.skipped > 0, &mut |path, node| match node {
            Node::Special { kind, .. } => add(path, SkipReason::Special, kind),
            Node::Skipped { reason, detail } => add(path, *reason, detail),
            Node::Dir(dir) => {
                if let Some(detail) = &dir.properties.unreadable {
                    add(path, SkipReason::Unreadable, detail);
                }
            }
            Node::File(_) | Node::StagedFile => {}
        });
        paths.sort_by(|a, b| a.path.cmp(&b.path));
        paths
    }

    /// Lists the files that changed while they were read.
    pub fn torn(&self) -> Vec<RelPath> {
        let mut paths = Vec::new();
        self.walk(&RelPath::root(), &|dir| dir.totals.torn > 0, &mut |path, node| {
            if matches!(node, Node::File(file) if file.remarks.torn) {
                paths.push(path.clone());
            }
        });
        paths.sort();
        paths
    }

    /// Calls `visit` for every entry below, and descends into a directory if `enter` returns `true` for it.
    pub fn walk<'d>(
        &'d self,
        path: &RelPath,
        enter: &dyn Fn(&DirState) -> bool,
        visit: &mut dyn FnMut(&RelPath, &'d Node),
    ) {
        for child in &self.children {
            let below = path.join(&child.name);
            visit(&below, &child.node);
            if let Node::Dir(dir) = &child.node
                && enter(dir)
            {
                dir.walk(&below, enter, visit);
            }
        }
    }
}

/// Adds up the counts of a directory's children.
pub fn total(children: &[Arc<Child>]) -> Totals {
    let mut totals = Totals::default();
    for child in children {
        match &child.node {
            Node::File(file) => totals.add(&Totals {
                files: 1,
                bytes: file.size,
                torn: u64::from(file.remarks.torn),
                volatile: u64::from(file.remarks.is_volatile()),
                ..Totals::default()
            }),
            Node::Dir(dir) => {
                totals.add(&Totals { height: dir.totals.height + 1, ..dir.totals });
                let unreadable = u64::from(dir.properties.unreadable.is_some());
                totals.skipped += unreadable;
                totals.volatile += unreadable;
            }
            Node::Special { .. } => totals.skipped += 1,
            // An unreadable file may become readable without an event.
            Node::Skipped { .. } => {
                totals.skipped += 1;
                totals.volatile += 1;
            }
            Node::StagedFile => totals.staged_files += 1,
        }
    }
    totals
}

/// The result of one scan.
#[derive(Clone, Debug)]
pub struct WorkspaceState {
    /// A commit that contains all objects named here.
    pub commit: Oid,
    /// The rules of the scan.
    pub rules: Rules,
    /// The ignore files above the workspace.
    pub above: Vec<RuleSource>,
    /// The ignore files of nested repositories.
    pub nested: Vec<RuleSource>,
    /// The mount points below the workspace.
    pub mounts: Vec<String>,
    /// The user's index, and those of its submodules.
    pub indexes: Vec<RuleSource>,
    /// Tracked paths that the rules ignore.
    pub forced: Arc<BTreeSet<RelPath>>,
    /// Warnings for the user, except those about ignore files.
    pub notes: Vec<String>,
    pub root: Arc<DirState>,
}

impl WorkspaceState {
    /// Lists the paths that must be visited although the watcher has not reported them.
    pub fn volatile_paths(&self) -> Vec<RelPath> {
        let mut paths = Vec::new();
        self.root.walk(&RelPath::root(), &|dir| dir.totals.volatile > 0, &mut |path, node| match node {
            Node::File(file) if file.remarks.is_volatile() => paths.push(path.clone()),
            Node::Skipped { .. } => paths.push(path.clone()),
            Node::Dir(dir) if dir.properties.unreadable.is_some() => paths.push(path.clone()),
            Node::File(_) | Node::Dir(_) | Node::Special { .. } | Node::StagedFile => {}
        });
        paths
    }

    /// Finds all names of these inodes: a new link, or a write through one name, raises no event for the other
    /// names.
    pub fn names_of(&self, inodes: &HashSet<u64>) -> Vec<RelPath> {
        let mut paths = Vec::new();
        self.root.walk(&RelPath::root(), &|_| true, &mut |path, node| {
            if matches!(node, Node::File(file) if inodes.contains(&file.fingerprint.ino)) {
                paths.push(path.clone());
            }
        });
        paths
    }
}
