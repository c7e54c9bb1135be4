//! What is carried out after the events of a decision are persisted.

use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::{AgentName, CheckpointNumber, OperationId, RunId};

use super::ComesBack;
use crate::project::PauseStep;

/// One run of one agent. Effects name runs, so that one that comes late cannot reach a newer run.
pub type AgentRun = (AgentName, RunId);

/// Something to carry out after the events are persisted. Every effect is idempotent: recovery
/// asks for it again when nobody knows whether it was carried out.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a run; answers with [`super::Command::Launched`].
    Launch {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// What it is told, when it goes on.
        comes_back: Option<ComesBack>,
    },
    /// SIGTERM, grace, SIGKILL to the whole tree.
    Stop {
        /// The agent.
        agent: AgentName,
        /// The run; a later one is left alone.
        run: RunId,
        /// Milliseconds.
        grace_ms: u64,
    },
    /// SIGKILL to the whole tree.
    Kill {
        /// The agent.
        agent: AgentName,
        /// The run; a later one is left alone.
        run: RunId,
    },
    /// Pause the project because a budget is reached; does nothing when none is any more.
    PauseForBudget {},
    /// Run a step of a pause; answers with [`super::Command::PauseStepped`].
    PauseStep {
        /// The operation.
        operation: OperationId,
        /// The step.
        step: PauseStep,
    },
    /// Stop what the operation is doing, thaw its agents, discard its checkpoint; answers with
    /// [`super::Command::Undone`] and is retried until it succeeds.
    Undo {
        /// The operation.
        operation: OperationId,
        /// Its unfinished checkpoint.
        checkpoint: CheckpointNumber,
        /// The runs to let go on.
        runs: Vec<AgentRun>,
    },
    /// Make the freeze of these agents permanent: the pause is committed.
    Hold {
        /// The runs.
        runs: Vec<AgentRun>,
    },
    /// End the processes of these agents while they are frozen; answers with [`super::Command::Parked`] each.
    Park {
        /// The runs.
        runs: Vec<AgentRun>,
    },
    /// Let these agents run, should anything still hold them.
    Thaw {
        /// The runs.
        runs: Vec<AgentRun>,
    },
    /// Bring agents back; answers with [`super::Command::Resumed`].
    Resume {
        /// The operation.
        operation: OperationId,
        /// The runs to thaw.
        thaw: Vec<AgentRun>,
        /// The agents to start again, each in its run; what is left of older runs is ended first.
        respawn: Vec<AgentRun>,
        /// The checkpoint whose context they are given.
        checkpoint: CheckpointNumber,
    },
    /// Make a checkpoint beside running agents; answers with [`super::Command::Checkpointed`].
    Checkpoint {
        /// The operation.
        operation: OperationId,
        /// Its number.
        checkpoint: CheckpointNumber,
        /// What makes it.
        trigger: Trigger,
        /// The runs to freeze meanwhile.
        runs: Vec<AgentRun>,
    },
    /// Remove what is left of checkpoints whose rows are gone; a start sweeps what a crash leaves of it.
    DiscardCheckpoints {
        /// Their numbers.
        checkpoints: Vec<CheckpointNumber>,
    },
    /// Make the safety checkpoint and write the plan; answers with [`super::Command::RestorePlanned`].
    PlanRestore {
        /// The operation.
        operation: OperationId,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// The safety checkpoint's number.
        safety: CheckpointNumber,
        /// Only these paths, and no rows; everything when there are none.
        paths: Vec<String>,
    },
    /// Carry out the plan; answers with [`super::Command::Restored`], and with
    /// [`super::Command::RestoreFailing`] where that cannot be done now.
    ApplyRestore {
        /// The operation.
        operation: OperationId,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// The safety checkpoint's number.
        safety: CheckpointNumber,
        /// How long to wait before, milliseconds.
        after_ms: u64,
    },
    /// Delete the plan of a restore that has ended; not before: until then it is what carries the
    /// restore over a crash.
    ForgetPlan {
        /// The operation.
        operation: OperationId,
    },
    /// Stop watching a removed agent and delete its files.
    Forget {
        /// The agent.
        agent: AgentName,
    },
}
