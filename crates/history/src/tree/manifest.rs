//! The manifest of a checkpoint: its description of itself, stored as JSON in its root tree.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::errors::HistoryError;
use crate::rules::coverage::Rules;
use crate::rules::user_repository::UserRepository;
use crate::stats::Stats;
use crate::store::oid::Oid;
use crate::tree::names::RelPath;
use crate::tree::skipped::Skipped;

/// The version of the format, raised when an older program could not read it.
pub const FORMAT: u32 = 1;

/// The description of a checkpoint that it contains itself, stored as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointManifest {
    /// The version of the format.
    pub format: u32,
    pub number: u64,
    /// The number of the previous checkpoint.
    pub parent: Option<u64>,
    /// When it was taken, in milliseconds since 1970.
    pub taken_ms: i64,
    /// The path of the workspace, escaped.
    pub workspace: String,
    pub rules: Rules,
    /// The tree of the files.
    pub files: Oid,
    pub stats: Stats,
    /// Paths that are covered but not stored.
    pub skipped: Vec<Skipped>,
    /// Files that changed at every attempt to read them.
    pub torn: Vec<RelPath>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The state of the user's repository at the time of the scan.
    pub user_repository: Option<UserRepository>,
}

impl CheckpointManifest {
    /// Returns the stored form.
    pub fn text(&self) -> Result<Vec<u8>, HistoryError> {
        let failed = HistoryError::io("describe", Path::new(&self.workspace));
        serde_json::to_vec_pretty(self).map_err(|error| failed(std::io::Error::other(error)))
    }
}
