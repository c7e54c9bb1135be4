//! The plan of a restore: data that the caller persists before it is applied, so that a crash in between rolls forward.
//!
//! Owns the types only; `planner` makes plans and `apply` applies them.

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
use crate::tree::metadata::Xattrs;
use crate::tree::names::RelPath;

/// Whether a content is a file's or a link's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentKind {
    /// A file.
    File,
    /// A symbolic link.
    Symlink,
}

/// A content that the safety checkpoint holds, and that may therefore be replaced or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredContent {
    /// Whose content.
    pub kind: ContentKind,
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
        replaces: Option<StoredContent>,
        /// Extended attributes.
        #[serde(default, with = "escaped", skip_serializing_if = "<[_]>::is_empty")]
        xattrs: Xattrs,
        /// Whether it is written with holes.
        #[serde(default)]
        sparse: bool,
        /// The file that it becomes another name of; none for a file of its own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        linked_to: Option<RelPath>,
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
        replaces: Option<StoredContent>,
    },
    /// Removes a file or link.
    RemoveFile {
        /// Where.
        path: RelPath,
        /// What must stand there.
        holds: StoredContent,
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
        /// Extended attributes; none when they are right already.
        #[serde(default, with = "escaped_if_any", skip_serializing_if = "Option::is_none")]
        xattrs: Option<Xattrs>,
        /// A file with more names than so many is left alone: they would all change.
        #[serde(default = "one")]
        names: u64,
    },
}

fn one() -> u64 {
    1
}

/// Extended attributes as pairs of escaped text.
mod escaped {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::tree::metadata::Xattrs;
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

    use crate::tree::metadata::Xattrs;

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
    /// A FIFO, socket or device stands there.
    Special,
    /// A FIFO, socket or device stood there, which is not made again.
    WasSpecial,
    /// The checkpoint's own rules left it out: whether it was there is not known.
    IgnoredThen,
    /// Something that was not asked for is in the way above it.
    BlockedAbove,
}

impl ConflictReason {
    /// Returns the reason in words.
    pub fn in_words(self) -> &'static str {
        match self {
            ConflictReason::NotCovered => "what stands there is not covered by checkpoints",
            ConflictReason::HoldsUncovered => "the directory in its place holds files that checkpoints do not cover",
            ConflictReason::Special => "a special file stands there",
            ConflictReason::WasSpecial => "a special file stood there, which is not made again",
            ConflictReason::IgnoredThen => "the checkpoint's own rules leave it out",
            ConflictReason::BlockedAbove => "something that is not restored stands in the way above it",
        }
    }
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
    /// The checkpoint that holds what is there now; none for a plan that is only shown.
    pub safety: Option<u64>,
    /// Only these paths and what is below them are restored; everything when none.
    #[serde(default)]
    pub paths: Option<Vec<RelPath>>,
    /// The workspace, escaped.
    pub workspace: String,
    /// The steps, in order.
    pub operations: Vec<Operation>,
    /// Unfinished files of earlier restores that were given up, removed first.
    pub drafts: Vec<RelPath>,
    /// Directories that are closed to their owner, with their modes, and that no step gives another mode: opened for the
    /// time of the restore, by whichever run of it, they are closed at the end.
    #[serde(default)]
    pub closed: Vec<(RelPath, u32)>,
    /// What stays as it is.
    pub conflicts: Vec<Conflict>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A plan with what it changes.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The plan.
    pub plan: RestorePlan,
    /// What is different afterwards.
    pub diff: Diff,
}

impl RestorePlan {
    /// Returns how many files and links the plan writes, and how many files, links and directories it removes.
    pub fn counts(&self) -> (u64, u64) {
        self.operations.iter().fold((0, 0), |(written, removed), step| match step {
            Operation::WriteFile { .. } | Operation::WriteLink { .. } => (written + 1, removed),
            Operation::RemoveFile { .. } | Operation::RemoveDirectory { .. } => (written, removed + 1),
            Operation::MakeDirectory { .. } | Operation::SetAttributes { .. } => (written, removed),
        })
    }
}

/// What a restore is to do.
#[derive(Clone, Copy, Debug)]
pub struct RestoreRequest<'a> {
    /// The checkpoint to restore.
    pub number: u64,
    /// The checkpoint, just taken, of what is there now; none to plan against the workspace itself, only to show it.
    pub safety: Option<u64>,
    /// The workspace.
    pub workspace: &'a Path,
    /// What is covered.
    pub rules: &'a Rules,
    /// Only these paths and what is below them; all when none.
    pub paths: Option<&'a [RelPath]>,
}

/// Returns the workspace of a plan.
///
/// # Errors
/// Fails when the plan names none.
pub(crate) fn workspace_of(plan: &RestorePlan) -> Result<PathBuf> {
    let path = unescape(&plan.workspace).map(OsString::from_vec).map(PathBuf::from);
    path.ok_or_else(|| HistoryError::UnsafePath { path: plan.workspace.clone() })
}
