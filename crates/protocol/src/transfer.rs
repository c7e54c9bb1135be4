//! Checkpoints that leave or enter: `checkpoint.export`, `checkpoint.import` and the bytes between.
//!
//! The file is the client's: it is opened, written and read with the client's own rights, and its
//! bytes travel over the socket in pieces. The daemon never opens a path that a client names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{CheckpointNumber, ProjectName};
use crate::terminal::Bytes;

/// The most bytes that one call carries: with base64 they fit into one line.
pub const MAX_PIECE: usize = 512 << 10;

/// Parameters of `checkpoint.export`. What was made stays with this connection, one export at a
/// time, and is read with `checkpoint.download`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointExport {
    pub project: ProjectName,
    pub checkpoint: CheckpointNumber,
}

/// Result of `checkpoint.export`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointExportResult {
    /// The size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// Parameters of `checkpoint.download`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointDownload {
    /// Where in the file to begin.
    pub offset: u64,
}

/// Result of `checkpoint.download`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDownloadResult {
    /// The next bytes of the file, empty at its end.
    pub data: Bytes,
}

/// Parameters of `checkpoint.upload`. The bytes stay with this connection, one file at a time,
/// until `checkpoint.import`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointUpload {
    /// Where in the file they belong: 0 begins a file, afterwards the end of what was sent.
    pub offset: u64,
    /// The bytes, at most 512 KiB.
    pub data: Bytes,
}

/// Result of `checkpoint.upload`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointUploadResult {
    /// How many bytes the file has now.
    pub bytes: u64,
}

/// Parameters of `checkpoint.import`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointImport {
    /// The project that gets the checkpoint, under a new number.
    pub project: ProjectName,
    /// SHA-256 of the file that was sent with `checkpoint.upload`, in hexadecimal.
    pub sha256: String,
}

/// Parameters of `checkpoint.consolidate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConsolidate {
    pub project: ProjectName,
    /// Whether everything is written anew, for the smallest result; otherwise only what is worth it.
    #[serde(default)]
    pub everything: bool,
}

/// Result of `checkpoint.consolidate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointConsolidateResult {
    /// How many packs became one; 0 when there was nothing to do, or a snapshot was in progress.
    pub packs: u64,
    pub bytes_before: u64,
    /// The bytes of the pack that replaces them.
    pub bytes_after: u64,
    /// Objects in it.
    pub objects: u64,
    /// How many of these are stored as a difference to another version.
    pub deltas: u64,
    /// Bytes of all packs of the project now.
    pub bytes: u64,
}
