//! Errors of the checkpoint store.
//!
//! A damaged store, a refused workspace and a failing disk are different variants, since callers handle them
//! differently.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::oid::Oid;

/// The result of an operation on the store.
pub type Result<T, E = HistoryError> = std::result::Result<T, E>;

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The workspace must never be covered.
    #[error("workspace {path} is refused: {reason}")]
    WorkspaceRefused {
        /// The workspace as given.
        path: PathBuf,
        /// A clause for messages.
        reason: &'static str,
    },
    /// A rule is not a valid pattern.
    #[error("read the rule {pattern:?}: a bracket without its end, an unknown class, or a backslash at the end")]
    BadRule {
        /// The pattern as given.
        pattern: String,
    },
    /// There is no such checkpoint.
    #[error("find checkpoint {number}: there is none with this number")]
    NoSuchCheckpoint {
        /// The requested number.
        number: u64,
    },
    /// The number belongs to another checkpoint.
    #[error("publish checkpoint {number}: the number is taken")]
    NumberTaken {
        /// The number to publish.
        number: u64,
    },
    /// The snapshot was discarded or swept.
    #[error("publish checkpoint {number}: its snapshot is gone")]
    SnapshotGone {
        /// The number to publish.
        number: u64,
    },
    /// The store does not contain an object.
    #[error("find object {oid}")]
    MissingObject { oid: Oid },
    /// An object is stored but its content does not match its id or kind.
    #[error("read object {oid}: {problem}")]
    DamagedObject {
        oid: Oid,
        /// A clause for messages.
        problem: String,
    },
    /// Objects that a restore needs are missing or damaged. The workspace was not changed.
    #[error("restore: {} objects are damaged or missing, the first is {:?}", .bad.len(), .bad.first())]
    Unrestorable {
        /// All of them.
        bad: Vec<crate::BadObject>,
    },
    /// A plan or a checkpoint contains a path that must not be written.
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
        number: u64,
    },
    /// The kernel does not support `openat2`.
    #[error("open files below {path}: the kernel is older than 5.6 or forbids openat2")]
    KernelTooOld { path: PathBuf },
    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,
    /// libgit2 failed.
    #[error("{action}")]
    Git {
        /// A verb phrase that fits behind "failed to".
        action: &'static str,
        #[source]
        source: git2::Error,
    },
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// A verb phrase that fits behind "failed to".
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl HistoryError {
    /// Returns a closure for `map_err` that adds an action and a path to a system error.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self + use<E> {
        let path = path.to_owned();
        move |source| HistoryError::Io { action, path, source: source.into() }
    }

    /// Says whether the disk or a quota was full.
    pub(crate) fn is_disk_full(&self) -> bool {
        let full = |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        matches!(self, HistoryError::Io { source, .. } if full(source.kind()))
    }

    /// Returns a closure for `map_err` that adds an action to an error of libgit2.
    pub(crate) fn git(action: &'static str) -> impl FnOnce(git2::Error) -> Self {
        move |source| HistoryError::Git { action, source }
    }
}

/// An object that is missing or damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadObject {
    pub oid: Oid,
    /// Its path in the checkpoint, escaped.
    pub path: String,
    /// A clause for messages.
    pub problem: String,
}
