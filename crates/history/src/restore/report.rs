//! The report of a restore.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::restore::plan::Conflict;
use crate::tree::names::RelPath;

/// A path that differs from what the plan wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    pub path: RelPath,
    /// A clause for messages.
    pub problem: String,
}

/// The result of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Files and symbolic links written.
    pub written: u64,
    /// Files and symbolic links that were right already, as after a crash.
    pub already_right: u64,
    /// Files, symbolic links and directories removed.
    pub removed: u64,
    /// Directories that were not removed, since entries in them are not covered.
    pub kept: Vec<RelPath>,
    /// Paths that the plan leaves unchanged.
    pub conflicts: Vec<Conflict>,
    /// Paths that differ from what the plan wants.
    pub mismatches: Vec<Mismatch>,
    /// Paths whose extended attributes the file system does not support.
    pub without_xattrs: BTreeSet<RelPath>,
    /// Names that could not be hard-linked and are separate files.
    pub unlinked: BTreeSet<RelPath>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}
