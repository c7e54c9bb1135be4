//! What a project has done since its newest checkpoint: counters that only grow, and what the newest checkpoint holds
//! of them.

use fermata_protocol::{CheckpointNumber, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;

/// How much has happened in a project; each counter only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ActivityCounters {
    /// Units of progress that agents have reported.
    pub units: u64,
    /// Changes to what a checkpoint holds beside the workspace: tasks, context, blobs, questions, settings.
    pub changes: u64,
    /// Changes of the phase of the work.
    pub phases: u64,
}

/// The activity of a project, compared with its newest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Activity {
    #[serde(rename = "tally")]
    pub counters: ActivityCounters,
    /// The counters when the newest checkpoint began.
    pub saved: ActivityCounters,
    /// The newest checkpoint, whatever made it; 0 for none.
    pub checkpoint: CheckpointNumber,
    /// How long agents have run since the newest checkpoint.
    pub clock: Clock,
    /// How many automatic checkpoints have failed in a row.
    pub failures: u32,
    /// The earliest time of the next attempt after a failure.
    pub retry_at: Option<UnixMillis>,
}

impl Activity {
    /// Says whether anything beside the workspace certainly differs from the newest checkpoint.
    pub fn has_changed(&self) -> bool {
        self.checkpoint == 0 || self.counters.changes != self.saved.changes
    }
}
