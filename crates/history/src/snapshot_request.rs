//! The parameters of a snapshot.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::rules::coverage::Rules;
use crate::scan::pool::Urgency;
use crate::tree::names::RelPath;

/// The parameters of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// The absolute path of the workspace.
    pub workspace: PathBuf,
    /// The number of the future checkpoint; 0 for a warm-up scan, which becomes none.
    pub number: u64,
    /// The commit message.
    pub message: String,
    /// The number of the previous checkpoint.
    pub parent: Option<u64>,
    pub rules: Rules,
    /// Files that processes can write to without an event of the watcher.
    pub mapped: Mapped,
    /// The age of the last full scan from which another one is made, whatever the watcher reports. `None` means
    /// never.
    pub full_scan_after: Option<Duration>,
}

impl SnapshotRequest {
    /// Returns whether frozen agents wait for the result.
    pub(crate) fn urgency(&self) -> Urgency {
        if self.is_checkpoint() { Urgency::Urgent } else { Urgency::Background }
    }

    /// Says whether the snapshot becomes a checkpoint. Numbers begin at one; 0 is a warm-up scan.
    pub(crate) fn is_checkpoint(&self) -> bool {
        self.number > 0
    }
}

/// Files of the workspace that processes have mapped writable or open for writing.
#[derive(Clone, Debug, Default)]
pub struct Mapped {
    /// Mapped files by path, with their inode numbers.
    pub paths: BTreeMap<RelPath, u64>,
    /// The inode numbers of mapped files whose path is not in the workspace.
    pub inodes: HashSet<u64>,
    /// Files that are only open for writing. Their fingerprint shows every change, but a change raises no
    /// event.
    pub open: BTreeSet<RelPath>,
    /// How many processes have mappings that could not be read.
    pub unreadable_processes: u64,
}
