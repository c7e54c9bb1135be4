//! What is carried out after the events of a decision are persisted.

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::{AgentName, CheckpointNumber, OperationId, RunId};

use crate::agent::RunKey;
use crate::project::PauseStep;

/// What a run that continues an earlier one is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continuation {
    /// The checkpoint whose context the run is given; none where the project has no checkpoint.
    pub checkpoint: Option<CheckpointNumber>,
}

/// Something to carry out after the events are persisted. Every effect is idempotent: recovery
/// requests it again when it is not known whether it was carried out.
///
/// A run in an effect is the only one that it may reach; a later run of the agent is left alone.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a run; answers with [`Launched`](crate::command::Command::Launched).
    Launch {
        agent: AgentName,
        run: RunId,
        /// None for a run that continues no earlier one.
        continuation: Option<Continuation>,
    },
    /// SIGTERM to the whole tree, and SIGKILL after the grace.
    Stop { agent: AgentName, run: RunId, grace_ms: u64 },
    /// SIGKILL to the whole tree.
    Kill { agent: AgentName, run: RunId },
    /// Pause the project because a budget is reached; does nothing where no budget is reached any more.
    PauseForBudget {},
    /// Run a step of a pause; answers with [`PauseStepped`](crate::command::Command::PauseStepped).
    PauseStep { operation: OperationId, step: PauseStep },
    /// Stop the steps of the operation, thaw its agents, discard its checkpoint; answers with
    /// [`Undone`](crate::command::Command::Undone) and is retried until it succeeds.
    Undo { operation: OperationId, checkpoint: CheckpointNumber, runs: Vec<RunKey> },
    /// Make the freeze of these runs permanent: the pause is committed.
    CommitFreeze { runs: Vec<RunKey> },
    /// End the processes of these runs while they are frozen; answers with
    /// [`Parked`](crate::command::Command::Parked) for each.
    Park { runs: Vec<RunKey> },
    /// Thaw these runs if they are frozen.
    Thaw { runs: Vec<RunKey> },
    /// Bring agents back; answers with [`Resumed`](crate::command::Command::Resumed).
    Resume {
        operation: OperationId,
        thaw: Vec<RunKey>,
        /// The new runs to start; what is left of older runs of these agents is ended first.
        respawn: Vec<RunKey>,
        /// The checkpoint whose context the new runs are given.
        checkpoint: CheckpointNumber,
    },
    /// Make a checkpoint beside running agents; answers with
    /// [`Checkpointed`](crate::command::Command::Checkpointed).
    Checkpoint {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        trigger: Trigger,
        /// The runs to freeze meanwhile.
        runs: Vec<RunKey>,
    },
    /// Remove the files of checkpoints whose rows are gone; the start of the daemon removes what a crash leaves.
    DiscardCheckpoints { checkpoints: Vec<CheckpointNumber> },
    /// Make the safety checkpoint and write the plan; answers with
    /// [`RestorePlanned`](crate::command::Command::RestorePlanned).
    PlanRestore {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        safety: CheckpointNumber,
        /// Only these paths, and no rows; everything when empty.
        paths: Vec<String>,
    },
    /// Carry out the plan; answers with [`Restored`](crate::command::Command::Restored), or with
    /// [`RestoreFailing`](crate::command::Command::RestoreFailing) where that fails.
    ApplyRestore {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        safety: CheckpointNumber,
        /// The wait before, milliseconds.
        after_ms: u64,
    },
    /// Delete the plan of a restore that has ended; not before: the plan carries the restore over a crash.
    ForgetPlan { operation: OperationId },
    /// Stop watching a removed agent and delete its files.
    ForgetAgent { agent: AgentName },
}
