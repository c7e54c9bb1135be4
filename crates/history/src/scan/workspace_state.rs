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
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::rules::coverage::Rules;
use crate::scan::scan_result::{SkipReason, Skipped};
use crate::store::oid::Oid;
use crate::tree::confined_dir::{Stat, Time};
use crate::tree::metadata::Xattrs;
use crate::tree::names::RelPath;

/// Twice the longest tick of a kernel (100 Hz), in nanoseconds: file times may lag behind by one tick.
pub const TICK_NS: i128 = 20_000_000;

/// The metadata by which an unchanged file is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    /// Type and permission bits.
    pub mode: u32,
    pub mtime: Time,
    /// Set by the kernel on every change of content or attributes; no process can set it.
    pub ctime: Time,
}

impl From<&Stat> for FileFingerprint {
    fn from(stat: &Stat) -> Self {
        FileFingerprint {
            dev: stat.dev,
            ino: stat.ino,
            size: stat.size,
            mode: stat.mode,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }
}

impl FileFingerprint {
    /// The fingerprint of an existing file that equals no other one, so that the file is always read.
    pub const UNSURE: FileFingerprint = FileFingerprint {
        dev: u64::MAX,
        ino: u64::MAX,
        size: u64::MAX,
        mode: 0,
        mtime: Time { sec: 0, nsec: 0 },
        ctime: Time { sec: 0, nsec: 0 },
    };

    /// Returns the permission bits with set-id and sticky bits.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Says whether every later change must change the fingerprint: whether `ctime` is older than the start of
    /// the scan (`started_ns`, nanoseconds since 1970) by more than the granularity of the clock.
    pub fn is_settled(&self, started_ns: i128) -> bool {
        self.ctime.nanos() < started_ns - TICK_NS
    }

    /// Says whether both are of the same inode and type, whatever has happened to it.
    pub fn same_file(&self, other: &FileFingerprint) -> bool {
        (self.dev, self.ino, self.mode & libc::S_IFMT) == (other.dev, other.ino, other.mode & libc::S_IFMT)
    }
}

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
    fn is_suspect(self) -> bool {
        self.torn || self.doubtful || self.linked
    }
}

/// A file or symbolic link whose content is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// The fingerprint when the content was read.
    pub seen: FileFingerprint,
    pub oid: Oid,
    /// Stored bytes.
    pub size: u64,
    pub remarks: ScanRemarks,
    pub xattrs: Xattrs,
}

impl File {
    pub fn is_link(&self) -> bool {
        self.seen.mode & libc::S_IFMT == libc::S_IFLNK
    }
}

/// The entry at a name.
#[derive(Clone, Debug)]
pub enum Node {
    File(File),
    Dir(Arc<Dir>),
    /// A FIFO, socket or device.
    Special {
        seen: FileFingerprint,
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
    Draft,
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
    pub suspects: u64,
    /// Temporary files of restores.
    pub drafts: u64,
    /// The longest chain of nested directories.
    pub height: usize,
}

impl Totals {
    fn add(&mut self, other: &Totals) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.skipped += other.skipped;
        self.torn += other.torn;
        self.suspects += other.suspects;
        self.drafts += other.drafts;
        self.height = self.height.max(other.height);
    }
}

/// A directory with everything below it.
#[derive(Debug)]
pub struct Dir {
    pub seen: FileFingerprint,
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
    /// The covered entries, sorted by name.
    pub children: Box<[Arc<Child>]>,
    pub totals: Totals,
    /// The tree of its files; `None` if there are none.
    pub files: Option<Oid>,
    /// The metadata tree.
    pub meta: Oid,
}

impl Drop for Dir {
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

impl Dir {
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
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::Draft => return None,
            }
        }
        None
    }

    /// Says whether it leaves no trace in a checkpoint: neither it nor anything below it is covered.
    pub fn is_bare(&self) -> bool {
        !self.covered
            && self.children.iter().all(|child| match &child.node {
                Node::Dir(dir) => dir.is_bare(),
                Node::Draft => true,
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } => false,
            })
    }

    /// Calls `visit` for every entry below, and descends into a directory if `enter` returns `true` for it.
    pub fn walk<'d>(&'d self, path: &RelPath, enter: &dyn Fn(&Dir) -> bool, visit: &mut dyn FnMut(&RelPath, &'d Node)) {
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
                suspects: u64::from(file.remarks.is_suspect()),
                ..Totals::default()
            }),
            Node::Dir(dir) => {
                totals.add(&Totals { height: dir.totals.height + 1, ..dir.totals });
                let unreadable = u64::from(dir.unreadable.is_some());
                totals.skipped += unreadable;
                totals.suspects += unreadable;
            }
            Node::Special { .. } => totals.skipped += 1,
            // An unreadable file may become readable without an event.
            Node::Skipped { .. } => {
                totals.skipped += 1;
                totals.suspects += 1;
            }
            Node::Draft => totals.drafts += 1,
        }
    }
    totals
}

/// A file outside the covered tree that contributes to the rules, with its fingerprint when it was read.
pub type Source = (PathBuf, Option<FileFingerprint>);

/// The result of one scan.
#[derive(Clone, Debug)]
pub struct WorkspaceState {
    /// A commit that contains all objects named here.
    pub commit: Oid,
    /// The rules of the scan.
    pub rules: Rules,
    /// The ignore files above the workspace.
    pub above: Vec<Source>,
    /// The ignore files of nested repositories.
    pub nested: Vec<Source>,
    /// The mount points below the workspace.
    pub mounts: Vec<String>,
    /// The user's index, and those of its submodules.
    pub indexes: Vec<Source>,
    /// Tracked paths that the rules ignore.
    pub forced: Arc<BTreeSet<RelPath>>,
    /// Warnings for the user, except those about ignore files.
    pub notes: Vec<String>,
    pub root: Arc<Dir>,
}

impl WorkspaceState {
    /// Lists the paths that are covered but not stored, in byte order.
    pub fn skipped(&self) -> Vec<Skipped> {
        let mut found = Vec::new();
        let mut add = |path: &RelPath, reason, detail: &str| {
            found.push(Skipped { path: path.clone(), reason, detail: detail.to_owned() });
        };
        self.root.walk(&RelPath::root(), &|dir| dir.totals.skipped > 0, &mut |path, node| match node {
            Node::Special { kind, .. } => add(path, SkipReason::Special, kind),
            Node::Skipped { reason, detail } => add(path, *reason, detail),
            Node::Dir(dir) => {
                if let Some(detail) = &dir.unreadable {
                    add(path, SkipReason::Unreadable, detail);
                }
            }
            Node::File(_) | Node::Draft => {}
        });
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    }

    /// Lists the files that changed while they were read.
    pub fn torn(&self) -> Vec<RelPath> {
        let mut found = Vec::new();
        self.root.walk(&RelPath::root(), &|dir| dir.totals.torn > 0, &mut |path, node| {
            if matches!(node, Node::File(file) if file.remarks.torn) {
                found.push(path.clone());
            }
        });
        found.sort();
        found
    }

    /// Lists the paths that must be visited although the watcher has not reported them.
    pub fn volatile_paths(&self) -> Vec<RelPath> {
        let mut found = Vec::new();
        self.root.walk(&RelPath::root(), &|dir| dir.totals.suspects > 0, &mut |path, node| match node {
            Node::File(file) if file.remarks.is_suspect() => found.push(path.clone()),
            Node::Skipped { .. } => found.push(path.clone()),
            Node::Dir(dir) if dir.unreadable.is_some() => found.push(path.clone()),
            Node::File(_) | Node::Dir(_) | Node::Special { .. } | Node::Draft => {}
        });
        found
    }

    /// Finds all names of these inodes: a new link, or a write through one name, raises no event for the other
    /// names.
    pub fn names_of(&self, inodes: &HashSet<u64>) -> Vec<RelPath> {
        let mut found = Vec::new();
        self.root.walk(&RelPath::root(), &|_| true, &mut |path, node| {
            if matches!(node, Node::File(file) if inodes.contains(&file.seen.ino)) {
                found.push(path.clone());
            }
        });
        found
    }
}
