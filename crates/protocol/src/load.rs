//! What an agent's whole tree uses of the machine, as a sample taken now and then.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::UnixMillis;

/// What `memory_bytes` of a [`Load`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryKind {
    /// What the kernel charges to the control group: page cache and kernel memory too, each page once.
    Charged,
    /// The resident sets of the processes, summed: a shared page counts in each of them.
    Resident,
}

/// What an agent's whole tree uses: a sample of its current run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Load {
    /// When the sample was taken. Samples are taken only while clients ask, so it may be older than the call.
    pub sampled_at: UnixMillis,
    /// Processor time since the run began, microseconds.
    pub cpu_us: u64,
    /// Processor time over the last `cpu_window_ms`, percent of one core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// The time that `cpu_percent` is the average of, milliseconds: since the sample before, or since
    /// the run began.
    pub cpu_window_ms: i64,
    pub memory_bytes: u64,
    /// The most memory, bytes: by the kernel's own account where memory is charged, else the largest
    /// of the samples so far.
    pub memory_peak_bytes: u64,
    /// What the memory counts.
    pub memory_kind: MemoryKind,
    /// Bytes read from disks since the run began; left out where that cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_read_bytes: Option<u64>,
    /// Bytes written to disks since the run began; left out where that cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_written_bytes: Option<u64>,
    pub processes: u64,
}
