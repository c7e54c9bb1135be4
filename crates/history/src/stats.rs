//! What a snapshot contains and how long it took, as numbers.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Counts of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Files and symbolic links.
    pub files: u64,
    /// The bytes of their contents.
    pub bytes: u64,
    /// Files and symbolic links that were not read, since the workspace state had their content.
    pub unchanged: u64,
    /// Objects in the new pack; 0 in the manifest, which is part of that pack.
    pub new_objects: u64,
    /// Bytes of the new pack; 0 in the manifest.
    pub new_bytes: u64,
}

/// The duration of each phase of a snapshot, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Scanning the workspace.
    pub scan_us: u64,
    /// Reading and compressing contents.
    pub read_us: u64,
    /// Building trees.
    pub trees_us: u64,
    /// Completing and flushing the pack.
    pub pack_us: u64,
}

pub(crate) fn micros_since(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}
