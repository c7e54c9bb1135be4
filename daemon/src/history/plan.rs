//! The plan of a restore: data that the caller persists before it is applied, so that a crash in between rolls forward.
//!
//! Owns the types only; `planner` makes plans and `restore` applies them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::beneath::Time;
use super::names::RelPath;
use super::oid::Oid;
use super::rules::Rules;

/// Whether a content is a file's or a link's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldKind {
    /// A file.
    File,
    /// A symbolic link.
    Symlink,
}

/// A content that the safety checkpoint holds, and that may therefore be replaced or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Whose content.
    pub kind: HeldKind,
    /// The content.
    pub oid: Oid,
}

/// One step of a restore. Each may be repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Operation {
    /// Makes a directory; its attributes come at the end.
    MakeDirectory {
        /// Where.
        path: RelPath,
    },
    /// Writes a file with its attributes.
    WriteFile {
        /// Where.
        path: RelPath,
        /// The content.
        oid: Oid,
        /// Permission bits.
        mode: u32,
        /// Last change.
        mtime: Time,
        /// What may stand there and be replaced.
        replaces: Option<Held>,
    },
    /// Makes a symbolic link.
    WriteLink {
        /// Where.
        path: RelPath,
        /// The blob with the target.
        oid: Oid,
        /// Last change.
        mtime: Time,
        /// What may stand there and be replaced.
        replaces: Option<Held>,
    },
    /// Removes a file or link.
    RemoveFile {
        /// Where.
        path: RelPath,
        /// What must stand there.
        holds: Held,
    },
    /// Removes a directory, if it is empty by then.
    RemoveDirectory {
        /// Where.
        path: RelPath,
    },
    /// Sets permission bits and time of what is right otherwise.
    SetAttributes {
        /// Where.
        path: RelPath,
        /// Permission bits; none for a link, which has none of its own.
        mode: Option<u32>,
        /// Last change.
        mtime: Time,
    },
}

impl Operation {
    /// Returns the path that the step is about.
    pub fn path(&self) -> &RelPath {
        match self {
            Operation::MakeDirectory { path }
            | Operation::WriteFile { path, .. }
            | Operation::WriteLink { path, .. }
            | Operation::RemoveFile { path, .. }
            | Operation::RemoveDirectory { path }
            | Operation::SetAttributes { path, .. } => path,
        }
    }
}

/// Why a path stays as it is although the checkpoint has something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictReason {
    /// What stands there is not covered: ignored by the rules, or skipped.
    NotCovered,
    /// The directory in the way holds something that is not covered.
    HoldsUncovered,
    /// What stands there is not in the safety checkpoint.
    NotInSafety,
    /// A FIFO, socket or device stands there.
    Special,
    /// Something that was not asked for is in the way above it.
    BlockedAbove,
}

/// A path that a restore leaves alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// The path.
    pub path: RelPath,
    /// Why.
    pub reason: ConflictReason,
}

/// Everything that a restore will do, ready to be persisted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// Names the plan, and its temporary files.
    pub id: String,
    /// The checkpoint that is restored.
    pub number: u64,
    /// The checkpoint that holds what is there now.
    pub safety: u64,
    /// The workspace, escaped.
    pub workspace: String,
    /// The steps, in order.
    pub operations: Vec<Operation>,
    /// Unfinished files of earlier restores that were given up, removed first.
    pub drafts: Vec<RelPath>,
    /// What stays as it is.
    pub conflicts: Vec<Conflict>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// What a restore is to do.
#[derive(Clone, Copy, Debug)]
pub struct RestoreRequest<'a> {
    /// The checkpoint to restore.
    pub number: u64,
    /// The checkpoint, just taken, of what is there now.
    pub safety: u64,
    /// The workspace.
    pub workspace: &'a Path,
    /// What is covered.
    pub rules: &'a Rules,
    /// Only these paths and what is below them; all when none.
    pub paths: Option<&'a [RelPath]>,
}
