//! Retention: how many checkpoints of a project are kept, and for how long.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Trigger;
use crate::ids::{CheckpointNumber, ProjectName};

/// What of the daemon's retention is different in one project; what is left out is the daemon's
/// (section `[retention]` of its configuration).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// The number of manual checkpoints kept, the newest; 0 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_manual: Option<u64>,
    /// The number of checkpoints of pauses kept, the newest; 0 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_pause: Option<u64>,
    /// The number of checkpoints before timeouts, and of those of shutdowns, kept, the newest; 0 for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_ends: Option<u64>,
    /// The age up to which safety checkpoints of restores are kept, milliseconds; 0 for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_safety_ms: Option<u64>,
    /// The age up to which every automatic checkpoint is kept, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_all_ms: Option<u64>,
    /// The age up to which one automatic checkpoint of every ten minutes is kept, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_ten_minutes_ms: Option<u64>,
    /// The age up to which one automatic checkpoint of every hour is kept, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_hourly_ms: Option<u64>,
    /// The age up to which one automatic checkpoint of every day is kept, milliseconds; older ones are removed. 0 for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_daily_ms: Option<u64>,
    /// The bytes that all checkpoints of the project may take on disk; 0 for no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

impl Retention {
    /// Says whether nothing is different.
    pub fn is_unset(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a checkpoint was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RemovalReason {
    /// A person asked for it.
    Asked,
    /// There are more of its trigger than are kept.
    Count,
    /// A newer one of the same ten minutes, hour or day stands for it.
    Thinned,
    /// It is older than those of its trigger are kept.
    Age,
    /// The project's checkpoints take more than they may.
    Quota,
    /// The file system has less free space than must be left.
    DiskFloor,
}

impl RemovalReason {
    /// Returns the text of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Count => "count",
            Self::Thinned => "thinned",
            Self::Age => "age",
            Self::Quota => "quota",
            Self::DiskFloor => "disk_floor",
        }
    }
}

/// Parameters of `checkpoint.remove`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRemove {
    pub project: ProjectName,
    /// The checkpoints; all of them are removed, or, where one of them may not be, none.
    pub checkpoints: Vec<CheckpointNumber>,
}

/// Parameters of `checkpoint.prune`.
///
/// Without `keep`, `older_than_ms` and `max_bytes` the project's retention is applied now. With any of
/// them, the retention does not count: what goes is whatever all the given ones allow, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPrune {
    pub project: ProjectName,
    /// The number of newest checkpoints that stay, whatever made them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u64>,
    /// Those younger than this stay, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than_ms: Option<u64>,
    /// No more are removed once the project's checkpoints take at most this, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Only shows what would go.
    #[serde(default)]
    pub dry_run: bool,
}

/// A checkpoint that was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemovedCheckpoint {
    pub checkpoint_id: CheckpointNumber,
    /// What had made it.
    pub trigger: Trigger,
    /// Why it goes.
    pub reason: RemovalReason,
    /// Bytes that it had added to the disk. Fewer are freed where other checkpoints share them.
    pub size_bytes: u64,
}

/// Result of `checkpoint.remove` and `checkpoint.prune`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointRemoveResult {
    /// What was removed, or would be, the oldest first.
    pub removed: Vec<RemovedCheckpoint>,
    /// How many checkpoints are left, or would be.
    pub kept: u64,
    /// Bytes that the project's checkpoints take on disk, after the removal; before it for a dry run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}
