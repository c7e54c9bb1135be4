//! The request for one checkpoint, as an operation gives it to the steps that make it.

use fermata_core::agent::RunKey;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::{CheckpointNumber, OperationId};

/// A checkpoint that is to be made.
#[derive(Debug, Clone)]
pub struct CheckpointOrder {
    /// The operation that makes it.
    pub operation: OperationId,
    /// Its number.
    pub number: CheckpointNumber,
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// What makes it.
    pub trigger: Trigger,
    /// The reason of the pause.
    pub reason: Option<String>,
    /// Whether the agents stand still meanwhile.
    pub frozen: bool,
    /// The runs that may be writing to the workspace.
    pub runs: Vec<RunKey>,
}
