//! The result of a walk: directories that are unchanged since the last scan, and new ones whose trees are not built yet.
//!
//! Data only: `walk` builds it, `content` reads the unread files in it, `trees` builds the directories.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::scan::content::ContentRead;
use crate::scan::workspace_state::{Child, Dir, FileFingerprint, Node};
use crate::tree::confined_dir::Stat;
use crate::tree::metadata::Xattrs;
use crate::tree::names::RelPath;

/// Why a path is not in a checkpoint although the rules cover it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Larger than the rules allow.
    TooLarge,
    /// It may not be opened, or reading it failed.
    Unreadable,
    /// A FIFO, socket or device; its kind and mode are recorded.
    Special,
    /// It became something else at every attempt to read it.
    Unsteady,
    /// Its name is git's own in another case, which no restore writes to: on some file systems it is a repository's.
    Reserved,
}

/// A path that is covered but not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The path.
    pub path: RelPath,
    /// Why.
    pub reason: SkipReason,
    /// The error of the system, or the size.
    pub detail: String,
}

/// A directory as a walk found it.
#[derive(Debug)]
pub(crate) enum ScanResult {
    /// Nothing in it or below it has changed.
    Same(Arc<Dir>),
    /// Something has, or may have.
    New(Box<NewDir>),
}

/// A directory whose trees have yet to be made.
#[derive(Debug)]
pub(crate) struct NewDir {
    /// Its state.
    pub seen: FileFingerprint,
    /// Its extended attributes.
    pub xattrs: Xattrs,
    /// Whether the rules cover it.
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
    /// The covered entries, sorted by name.
    pub entries: Vec<Entry>,
}

/// One name in such a directory.
#[derive(Debug)]
pub(crate) enum Entry {
    /// It is what it was.
    Kept(Arc<Child>),
    /// This stands there now.
    Anew(Box<[u8]>, ScannedNode),
}

impl Entry {
    /// Returns the name.
    pub fn name(&self) -> &[u8] {
        match self {
            Entry::Kept(child) => &child.name,
            Entry::Anew(name, _) => name,
        }
    }
}

/// The entry at a name, as far as a walk can tell without opening it.
#[derive(Debug)]
pub(crate) enum ScannedNode {
    /// All is known.
    Known(Node),
    /// A file or link whose content has to be read.
    Unread(Box<Unread>),
    /// A directory.
    Below(ScanResult),
}

/// A file or link whose content has to be read.
#[derive(Debug)]
pub(crate) struct Unread {
    /// The path.
    pub path: RelPath,
    /// Its state at the instant of the walk.
    pub stat: Stat,
    /// Whether it is tracked although it is ignored.
    pub forced: bool,
    /// Whether an agent can write to it without its state telling.
    pub mapped: bool,
    /// The result of reading it.
    pub outcome: OnceLock<ContentRead>,
}
