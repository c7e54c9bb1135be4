//! The result of a walk: directories that are unchanged since the last scan, and changed ones whose trees are
//! not built yet.
//!
//! Data only: `walk` builds it, `content` reads the unread files in it, `trees` builds the directories.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::scan::content::ContentRead;
use crate::scan::workspace_state::{Child, Dir, FileFingerprint, Node};
use crate::tree::confined_dir::Stat;
use crate::tree::metadata::Xattrs;
use crate::tree::names::RelPath;

/// Why a covered path is not in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// The file is larger than the rules allow.
    TooLarge,
    /// The file cannot be opened or read.
    Unreadable,
    /// A FIFO, socket or device. Its kind and mode are recorded.
    Special,
    /// The path changed its kind while it was being read.
    Unsteady,
    /// The name is git's own in another case. A restore never writes it, since on some file systems it would be
    /// a repository.
    Reserved,
}

/// A path that is covered but not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub path: RelPath,
    pub reason: SkipReason,
    /// The system's error, or the size.
    pub detail: String,
}

/// A directory in the result of a walk.
#[derive(Debug)]
pub(crate) enum ScanResult {
    /// Nothing in it or below it has changed.
    Same(Arc<Dir>),
    /// It, or an entry below it, has changed or may have.
    New(Box<NewDir>),
}

/// A directory whose trees are not built yet.
#[derive(Debug)]
pub(crate) struct NewDir {
    pub seen: FileFingerprint,
    pub xattrs: Xattrs,
    /// Whether the rules cover it.
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
    pub entries: Vec<Entry>,
}

/// One name in such a directory.
#[derive(Debug)]
pub(crate) enum Entry {
    /// Unchanged since the last scan.
    Kept(Arc<Child>),
    /// A new or changed entry with its name.
    Anew(Box<[u8]>, ScannedNode),
}

impl Entry {
    pub fn name(&self) -> &[u8] {
        match self {
            Entry::Kept(child) => &child.name,
            Entry::Anew(name, _) => name,
        }
    }
}

/// The entry at a name, as far as a walk can tell without reading its content.
#[derive(Debug)]
pub(crate) enum ScannedNode {
    /// Complete: nothing has to be read.
    Known(Node),
    /// A file or symbolic link whose content must be read.
    Unread(Box<Unread>),
    /// A directory.
    Below(ScanResult),
}

/// A file or symbolic link whose content must be read.
#[derive(Debug)]
pub(crate) struct Unread {
    pub path: RelPath,
    /// Its metadata at the time of the walk.
    pub stat: Stat,
    /// Whether it is tracked although the rules ignore it.
    pub forced: bool,
    /// Whether a process can write to it without changing its fingerprint.
    pub mapped: bool,
    /// The result of reading, set once by `content`.
    pub outcome: OnceLock<ContentRead>,
}
