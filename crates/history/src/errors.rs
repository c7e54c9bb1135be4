//! What can go wrong in the checkpoint store.
//!
//! A damaged store, a refused workspace and a failing disk are told apart, since callers answer them differently.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::oid::Oid;

/// The result of an operation on the store.
pub type Result<T, E = HistoryError> = std::result::Result<T, E>;

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The workspace is one that must never be covered.
    #[error("workspace {path} is refused: {reason}")]
    WorkspaceRefused {
        /// The workspace as given.
        path: PathBuf,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A rule is not a valid pattern.
    #[error("read the rule {pattern:?}: a bracket without its end, an unknown class, or a backslash at the end")]
    BadRule {
        /// The pattern as given.
        pattern: String,
    },
    /// There is no such checkpoint.
    #[error("find checkpoint {number}")]
    NoSuchCheckpoint {
        /// The number that was asked for.
        number: u64,
    },
    /// The number already belongs to another checkpoint.
    #[error("publish checkpoint {number}: the number is taken")]
    NumberTaken {
        /// The number that was to be published.
        number: u64,
    },
    /// The snapshot was discarded, or swept away.
    #[error("publish checkpoint {number}: its snapshot is gone")]
    SnapshotGone {
        /// The number that was to be published.
        number: u64,
    },
    /// An object is not in the store.
    #[error("find object {oid}")]
    MissingObject {
        /// The object.
        oid: Oid,
    },
    /// An object is in the store but cannot be what it claims to be.
    #[error("read object {oid}: {problem}")]
    DamagedObject {
        /// The object.
        oid: Oid,
        /// What is wrong with it.
        problem: String,
    },
    /// Objects that a restore needs are missing or damaged; nothing was touched.
    #[error("restore: {} objects are damaged or missing, the first is {:?}", .bad.len(), .bad.first())]
    Unrestorable {
        /// Every bad object.
        bad: Vec<crate::BadObject>,
    },
    /// A plan or a checkpoint names a path that must not be written.
    #[error("use path {path}: it is unsafe")]
    UnsafePath {
        /// The path, escaped.
        path: String,
    },
    /// Neither the checkpoint nor the workspace has the path.
    #[error("find {path}: neither checkpoint {number} nor the workspace has it")]
    NoSuchPath {
        /// The path, escaped.
        path: String,
        /// The checkpoint.
        number: u64,
    },
    /// The kernel has no `openat2`.
    #[error("open files beneath {path}: the kernel is older than 5.6 or forbids openat2")]
    KernelTooOld {
        /// The workspace.
        path: PathBuf,
    },
    /// The caller asked for an end.
    #[error("cancelled")]
    Cancelled,
    /// The git library failed.
    #[error("{action}")]
    Git {
        /// What was attempted.
        action: &'static str,
        /// The library's error.
        #[source]
        source: git2::Error,
    },
    /// The operating system failed.
    #[error("{action} {path}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

impl HistoryError {
    /// Makes the closure that dresses a system error, for `map_err`.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| HistoryError::Io { action, path, source: source.into() }
    }

    /// Says whether there was no room on the disk.
    pub(crate) fn is_disk_full(&self) -> bool {
        let full = |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        matches!(self, HistoryError::Io { source, .. } if full(source.kind()))
    }

    /// Makes the closure that dresses an error of the git library, for `map_err`.
    pub(crate) fn git(action: &'static str) -> impl FnOnce(git2::Error) -> Self {
        move |source| HistoryError::Git { action, source }
    }
}

/// An object that is missing or damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadObject {
    /// The object.
    pub oid: Oid,
    /// Where it belongs in the checkpoint, escaped.
    pub path: String,
    /// What is wrong with it.
    pub problem: String,
}
