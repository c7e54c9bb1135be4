//! The order for one checkpoint, which an operation passes to the steps that make it.

use fermata_core::agent::RunKey;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::{CheckpointNumber, OperationId};

/// A checkpoint that is to be made.
#[derive(Debug, Clone)]
pub struct CheckpointOrder {
    pub operation: OperationId,
    pub number: CheckpointNumber,
    pub name: String,
    pub description: String,
    pub trigger: Trigger,
    /// The reason of the pause, where there is a pause.
    pub reason: Option<String>,
    /// Whether the agents stay frozen until the checkpoint is sealed.
    pub frozen: bool,
    /// The runs whose processes may have files of the workspace mapped or open for writing.
    pub runs: Vec<RunKey>,
}
