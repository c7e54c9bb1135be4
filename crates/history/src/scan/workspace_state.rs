//! The workspace state: the result of the last scan, as a tree of directories in memory.
//!
//! ```text
//! WorkspaceState ── root: Arc<Dir> ── children, sorted by name ─┬ File { fingerprint, content }
//!                                                               ├ Dir(Arc<Dir>)   shared with the state before
//!                                                               └ Special, Skipped, Draft
//! ```
//! A directory is immutable and carries the ids of its trees. A new state shares every unchanged directory with the state
//! before, so its cost depends on the changes alone. This module reads no files and takes no locks: `walk` builds new
//! directories, `trees` computes their ids, `state_file` stores them.

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

/// Times may lag by one tick of a kernel with 100 Hz; twice that is on the safe side.
pub const TICK_NS: i128 = 20_000_000;

/// The state of a file by which an unchanged one is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or attributes.
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
    /// The state of a file that is there and vouches for nothing: no other state equals it.
    pub const UNSURE: FileFingerprint = FileFingerprint {
        dev: u64::MAX,
        ino: u64::MAX,
        size: u64::MAX,
        mode: 0,
        mtime: Time { sec: 0, nsec: 0 },
        ctime: Time { sec: 0, nsec: 0 },
    };

    /// Returns the permission bits, with set-id and sticky.
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Says whether a later change must show in the times: whether the time of change, which nobody can set, is older
    /// than `started_ns`, the instant at which the look began, by more than the grain of the clock.
    pub fn is_settled(&self, started_ns: i128) -> bool {
        self.ctime.nanos() < started_ns - TICK_NS
    }

    /// Says whether both are of the same file, whatever has happened to it.
    pub fn same_file(&self, other: &FileFingerprint) -> bool {
        (self.dev, self.ino, self.mode & libc::S_IFMT) == (other.dev, other.ino, other.mode & libc::S_IFMT)
    }
}

/// What has to be remembered of a file beside its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanRemarks {
    /// It changed at every attempt to read it.
    pub torn: bool,
    /// It has holes.
    pub sparse: bool,
    /// It is tracked although it is ignored.
    pub forced: bool,
    /// It has several names.
    pub linked: bool,
    /// Its state does not vouch for its content: too fresh, or mapped writable by an agent.
    pub doubtful: bool,
}

impl ScanRemarks {
    /// Says whether the file has to be looked at even when no event has named it.
    fn is_suspect(self) -> bool {
        self.torn || self.doubtful || self.linked
    }
}

/// A file or symbolic link whose content is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// Its state when it was read.
    pub seen: FileFingerprint,
    /// The content.
    pub oid: Oid,
    /// Stored bytes.
    pub size: u64,
    /// What else is known.
    pub remarks: ScanRemarks,
    /// Its extended attributes.
    pub xattrs: Xattrs,
}

impl File {
    /// Says whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.seen.mode & libc::S_IFMT == libc::S_IFLNK
    }
}

/// What stands at a name.
#[derive(Clone, Debug)]
pub enum Node {
    /// A file or symbolic link.
    File(File),
    /// A directory.
    Dir(Arc<Dir>),
    /// A FIFO, socket or device.
    Special {
        /// Its state.
        seen: FileFingerprint,
        /// Its kind.
        kind: &'static str,
    },
    /// Covered, but not stored.
    Skipped {
        /// Why.
        reason: SkipReason,
        /// What the system said, or the size.
        detail: Box<str>,
    },
    /// What a restore that was given up has left behind.
    Draft,
}

/// One name in a directory; shared with the pictures before, as long as nothing has changed.
#[derive(Debug)]
pub struct Child {
    /// The name.
    pub name: Box<[u8]>,
    /// What stands there.
    pub node: Node,
}

/// Counts of all that is below a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files and links.
    pub files: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// What is covered but not stored, special files included.
    pub skipped: u64,
    /// Files that changed while they were read.
    pub torn: u64,
    /// What has to be looked at even when no event has named it.
    pub suspects: u64,
    /// Unfinished files of restores.
    pub drafts: u64,
    /// How many directories lie in each other, at most.
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

/// A directory as it was seen, with all that is below it.
#[derive(Debug)]
pub struct Dir {
    /// Its state.
    pub seen: FileFingerprint,
    /// Its extended attributes.
    pub xattrs: Xattrs,
    /// Whether the rules cover it; one that they do not is here for what is covered below it.
    pub covered: bool,
    /// Whether its names are surely the same while its state is.
    pub settled: bool,
    /// Why it could not be listed.
    pub unreadable: Option<Box<str>>,
    /// The state of its `.gitignore`.
    pub ignore_file: Option<FileFingerprint>,
    /// Whether that state vouches for what it said.
    pub ignore_settled: bool,
    /// Whether it is the top of a nested repository.
    pub nested: bool,
    /// What is in it and covered, sorted by name.
    pub children: Box<[Arc<Child>]>,
    /// Counts.
    pub totals: Totals,
    /// The tree of its files; none when there are none.
    pub files: Option<Oid>,
    /// Its metadata tree.
    pub meta: Oid,
}

impl Drop for Dir {
    /// Frees what nobody shares level by level: a tree may be deeper than a stack.
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
    /// Finds a name.
    pub fn child(&self, name: &[u8]) -> Option<&Arc<Child>> {
        let at = self.children.binary_search_by(|child| (*child.name).cmp(name)).ok()?;
        Some(&self.children[at])
    }

    /// Finds what stands at a path below.
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

    /// Says whether it leaves no trace in a checkpoint: not covered, and nothing below it is.
    pub fn is_bare(&self) -> bool {
        !self.covered
            && self.children.iter().all(|child| match &child.node {
                Node::Dir(dir) => dir.is_bare(),
                Node::Draft => true,
                Node::File(_) | Node::Special { .. } | Node::Skipped { .. } => false,
            })
    }

    /// Calls `visit` with every path below that `enter` lets it come to; `enter` is asked about directories.
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

/// Counts what the children of a directory come to.
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
            // What could not be read may be readable by now, without any event.
            Node::Skipped { .. } => {
                totals.skipped += 1;
                totals.suspects += 1;
            }
            Node::Draft => totals.drafts += 1,
        }
    }
    totals
}

/// A file outside the covered tree that decides what is covered, with its state when it was read.
pub type Source = (PathBuf, Option<FileFingerprint>);

/// What one snapshot saw.
#[derive(Clone, Debug)]
pub struct WorkspaceState {
    /// The commit whose objects all contents named here are.
    pub commit: Oid,
    /// The rules that it was seen through.
    pub rules: Rules,
    /// The files above the workspace that decided, too.
    pub above: Vec<Source>,
    /// The files of nested repositories that decided, too.
    pub nested: Vec<Source>,
    /// What is mounted below the workspace.
    pub mounts: Vec<String>,
    /// The user's index, and those of the submodules in it.
    pub indexes: Vec<Source>,
    /// What they track and the rules, or its absence, leave out.
    pub forced: Arc<BTreeSet<RelPath>>,
    /// What the user should know, beside what is wrong with ignore files.
    pub notes: Vec<String>,
    /// The workspace.
    pub root: Arc<Dir>,
}

impl WorkspaceState {
    /// Lists what is covered but not stored, in byte order.
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

    /// Lists what has to be looked at even when no event has named it.
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

    /// Finds all names of these files, by inode. The other names of a file are not told of a new link, nor of what is
    /// written through it.
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
