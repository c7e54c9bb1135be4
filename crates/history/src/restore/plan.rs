//! The plan of a restore, which the caller persists before it is applied, so that a crash rolls forward.
//!
//! Types only: `planner` makes plans and `apply` applies them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use fermata_protocol::paths::unescape;
use serde::{Deserialize, Serialize};

use crate::diff::Diff;
use crate::errors::{HistoryError, Result};
use crate::rules::coverage::Rules;
use crate::store::oid::Oid;
use crate::tree::confined_dir::Time;
use crate::tree::names::RelPath;
use crate::tree::xattrs::Xattrs;

/// Whether a content belongs to a file or to a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentKind {
    File,
    Symlink,
}

/// A content that the safety checkpoint holds, so that the restore may replace or remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredContent {
    pub kind: ContentKind,
    pub oid: Oid,
}

/// One step of a restore. Every step may be repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Operation {
    /// Creates a directory; a later step sets its attributes.
    MakeDirectory { path: RelPath },
    /// Writes a file with its attributes.
    WriteFile {
        path: RelPath,
        oid: Oid,
        mode: u32,
        /// Last change of the content.
        mtime: Time,
        /// The content that may be at the path and is then replaced.
        replaces: Option<StoredContent>,
        #[serde(default, with = "escaped", skip_serializing_if = "<[_]>::is_empty")]
        xattrs: Xattrs,
        /// Whether it is written with holes.
        #[serde(default)]
        sparse: bool,
        /// The file that it becomes another name of; `None` for a new file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        linked_to: Option<RelPath>,
    },
    /// Creates a symbolic link.
    WriteLink {
        path: RelPath,
        /// The blob with the target.
        oid: Oid,
        /// Last change of the link.
        mtime: Time,
        /// The content that may be at the path and is then replaced.
        replaces: Option<StoredContent>,
    },
    /// Removes a file or symbolic link.
    RemoveFile {
        path: RelPath,
        /// The content that must be at the path.
        holds: StoredContent,
    },
    /// Removes a directory unless something is in it.
    RemoveDirectory { path: RelPath },
    /// Sets the attributes of an entry whose content is right.
    SetAttributes {
        path: RelPath,
        /// Permission bits; `None` for a symbolic link, which has none of its own.
        mode: Option<u32>,
        /// Last change of the content.
        mtime: Time,
        /// Extended attributes; `None` if they are right already.
        #[serde(default, with = "escaped_if_any", skip_serializing_if = "Option::is_none")]
        xattrs: Option<Xattrs>,
        /// A file with more names than this is left unchanged, since all of them would change.
        #[serde(default = "one")]
        names: u64,
    },
}

fn one() -> u64 {
    1
}

/// Extended attributes as pairs of escaped texts.
mod escaped {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::tree::xattrs::Xattrs;
    use fermata_protocol::paths::{escape, unescape};

    pub(crate) fn serialize<S: Serializer>(xattrs: &Xattrs, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs: Vec<_> = xattrs.iter().map(|(name, value)| (escape(name), escape(value))).collect();
        pairs.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Xattrs, D::Error> {
        let pairs = Vec::<(String, String)>::deserialize(deserializer)?;
        let bytes = |text: &str| unescape(text).map(Vec::into_boxed_slice);
        let pairs: Option<Xattrs> = pairs.iter().map(|(name, value)| Some((bytes(name)?, bytes(value)?))).collect();
        pairs.ok_or_else(|| D::Error::custom("an extended attribute is not well escaped"))
    }
}

mod escaped_if_any {
    use serde::{Deserializer, Serializer};

    use crate::tree::xattrs::Xattrs;

    pub(crate) fn serialize<S: Serializer>(xattrs: &Option<Xattrs>, serializer: S) -> Result<S::Ok, S::Error> {
        match xattrs {
            Some(xattrs) => super::escaped::serialize(xattrs, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Xattrs>, D::Error> {
        super::escaped::deserialize(deserializer).map(Some)
    }
}

impl Operation {
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

/// Why a path is left unchanged although the checkpoint differs from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictReason {
    /// The entry at the path is not covered: ignored by the rules, or skipped.
    NotCovered,
    /// The directory in the way contains an entry that is not covered.
    HoldsUncovered,
    /// A FIFO, socket or device is at the path.
    Special,
    /// A FIFO, socket or device was at the path, which is not created again.
    WasSpecial,
    /// The rules of the checkpoint ignored the path, so the checkpoint does not tell whether it existed.
    IgnoredThen,
    /// An entry that is not restored is in the way above the path.
    BlockedAbove,
}

impl ConflictReason {
    /// Returns the reason as a clause for messages.
    pub fn in_words(self) -> &'static str {
        match self {
            ConflictReason::NotCovered => "the entry at this path is not covered by checkpoints",
            ConflictReason::HoldsUncovered => "the directory at this path contains files that checkpoints do not cover",
            ConflictReason::Special => "a special file is at this path",
            ConflictReason::WasSpecial => "a special file was at this path, which is not created again",
            ConflictReason::IgnoredThen => "the rules of the checkpoint ignore it",
            ConflictReason::BlockedAbove => "an entry above it is in the way and is not restored",
        }
    }
}

/// A path that a restore leaves unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    pub path: RelPath,
    pub reason: ConflictReason,
}

/// All steps of a restore, ready to be persisted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// The id of the plan, which is part of the names of its temporary files.
    pub id: String,
    /// The checkpoint to restore.
    pub number: u64,
    /// The checkpoint of the current workspace; `None` for a plan that is only shown.
    pub safety: Option<u64>,
    /// Restores only these paths and everything below them; everything if `None`.
    #[serde(default)]
    pub paths: Option<Vec<RelPath>>,
    /// The path of the workspace, escaped.
    pub workspace: String,
    /// The steps, in order.
    pub operations: Vec<Operation>,
    /// Temporary files of earlier restores that were given up, removed first.
    #[serde(rename = "drafts")]
    pub staged_files: Vec<RelPath>,
    /// Directories that are closed to their owner and whose mode no step sets, with that mode. They are opened
    /// for the duration of the restore and closed at the end, by whichever run comes that far.
    #[serde(default)]
    pub closed: Vec<(RelPath, u32)>,
    /// Paths that are left unchanged.
    pub conflicts: Vec<Conflict>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// A plan and the difference that it makes.
#[derive(Clone, Debug)]
pub struct Planned {
    pub plan: RestorePlan,
    /// The workspace before the restore compared with the one after it.
    pub diff: Diff,
}

impl RestorePlan {
    /// Returns the number of files and links to write, and of files, links and directories to remove.
    pub fn counts(&self) -> (u64, u64) {
        self.operations.iter().fold((0, 0), |(written, removed), step| match step {
            Operation::WriteFile { .. } | Operation::WriteLink { .. } => (written + 1, removed),
            Operation::RemoveFile { .. } | Operation::RemoveDirectory { .. } => (written, removed + 1),
            Operation::MakeDirectory { .. } | Operation::SetAttributes { .. } => (written, removed),
        })
    }
}

/// The parameters of a restore.
#[derive(Clone, Copy, Debug)]
pub struct RestoreOptions<'a> {
    /// The checkpoint to restore.
    pub number: u64,
    /// The checkpoint of the current workspace, just taken. `None` makes a plan from the workspace itself, to
    /// be shown only.
    pub safety: Option<u64>,
    pub workspace: &'a Path,
    /// The current rules.
    pub rules: &'a Rules,
    /// Restores only these paths and everything below them; everything if `None`.
    pub paths: Option<&'a [RelPath]>,
}

/// Returns the path of the workspace of a plan.
///
/// # Errors
/// Fails when the path is not well escaped.
pub(crate) fn workspace_of(plan: &RestorePlan) -> Result<PathBuf> {
    let path = unescape(&plan.workspace).map(OsString::from_vec).map(PathBuf::from);
    path.ok_or_else(|| HistoryError::UnsafePath { path: plan.workspace.clone() })
}
