//! The paths that a checkpoint covers but does not store.

use serde::{Deserialize, Serialize};

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
