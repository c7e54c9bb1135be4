//! What is requested of a project or reported to it (commands), and what follows from that (decisions).

use std::collections::BTreeMap;

use fermata_protocol::agent::{AgentSpec, ExitStatus, Progress, RunProcesses};
use fermata_protocol::budget::Usage;
use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::context::FlashSaveResult;
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, FreezerKind, PauseCause, PauseMode};
use fermata_protocol::project::ProjectConfig;
use fermata_protocol::task::{Phase, TaskStatus, TaskView};
use fermata_protocol::{AgentName, CheckpointNumber, ErrorObject, OperationId, RunId, UnixMillis};

use crate::deadlines::DueAction;
use crate::effect::{Continuation, Effect};
use crate::project::PauseStep;
use crate::retention::Removal;

/// A request of a person or agent, or a report of an agent, a shim, a step or recovery.
///
/// An `operation` is the id of the new operation where the command may begin one, else that of the operation that
/// the report belongs to. A report that names an operation or run which is no longer current changes nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Change the members that are given.
    Set {
        description: Option<String>,
        phase: Option<Phase>,
        config: Option<ProjectConfig>,
    },
    /// Remove the project.
    Remove {
        /// How many checkpoints the project has.
        checkpoints: u64,
        with_checkpoints: bool,
    },
    /// Create an agent, or start one that has ended with a new spec.
    Run {
        agent: AgentName,
        spec: AgentSpec,
        new: NewRun,
    },
    /// Stop an agent, or all.
    Stop {
        agent: Option<AgentName>,
        /// Between SIGTERM and SIGKILL; that of the agent's spec when none.
        grace_ms: Option<u64>,
    },
    /// Kill the tree of an agent, or of all.
    Kill {
        agent: Option<AgentName>,
    },
    /// Stop an agent and start it again.
    Restart {
        agent: AgentName,
        /// Used at once when the agent has ended already.
        new: NewRun,
    },
    /// Start an agent that [`DueAction::Start`] names, or that a person brings back.
    Start {
        agent: AgentName,
        start: PreparedStart,
        /// Whether a person brings it back; otherwise the start has to be due.
        requested: bool,
    },
    /// Decide about a deadline other than [`DueAction::Start`].
    Due {
        action: DueAction,
        operation: OperationId,
    },
    /// An agent is ready.
    Ready {
        agent: AgentName,
        /// None when the agent itself reports it: the current run.
        run: Option<RunId>,
    },
    /// Remove an agent that has ended.
    RemoveAgent {
        agent: AgentName,
    },
    /// [`Effect::Launch`] was carried out.
    Launched {
        agent: AgentName,
        run: RunId,
        outcome: Result<RunProcesses, String>,
    },
    /// A run has ended.
    RunEnded {
        agent: AgentName,
        run: RunId,
        exit: ExitStatus,
        /// What is known beyond the exit status.
        detail: Option<String>,
        ended_at: UnixMillis,
        /// Used if another run follows at once.
        new: NewRun,
        then: AfterEnd,
    },
    /// A run is gone without a recorded end.
    RunLost {
        agent: AgentName,
        run: RunId,
        detail: String,
        then: AfterEnd,
    },
    /// A signal that Fermata did not send stopped the main process of a run, or continued it.
    Suspended {
        agent: AgentName,
        run: RunId,
        suspended: bool,
    },
    /// Input was typed into an agent's terminal.
    Typed {
        agent: AgentName,
        run: RunId,
        by: String,
        bytes: u64,
    },
    /// The shim of a run does not answer; its agent runs on.
    Unreachable {
        agent: AgentName,
        run: RunId,
        detail: String,
    },
    /// A frozen run ran although Fermata had not thawed it.
    FreezeBroken {
        agent: AgentName,
        run: RunId,
        /// How often since the last report.
        times: u64,
        detail: String,
    },
    /// An agent reports progress.
    Progress {
        agent: AgentName,
        progress: Progress,
        phase: Option<Phase>,
    },
    /// An agent reports usage since its last report.
    Use {
        agent: AgentName,
        usage: Usage,
    },
    /// An agent saves its state blob; the blob is written in the same transaction.
    SaveState {
        agent: AgentName,
        bytes: u64,
    },
    /// Create a task, or change the one with this id.
    PutTask {
        agent: Option<AgentName>,
        id: Option<u64>,
        title: Option<String>,
        status: Option<TaskStatus>,
        percent: Option<f64>,
    },
    /// An agent asks a question.
    Ask {
        agent: AgentName,
        text: String,
        /// Any answer is accepted when empty.
        choices: Vec<String>,
    },
    /// A person answers a question.
    Answer {
        id: u64,
        answer: String,
    },
    /// Context items were put; the rows are written in the same transaction.
    AddContext {
        agent: AgentName,
        items: u64,
        tokens: u64,
    },
    /// A flash save outside a pause; the rows are written in the same transaction.
    FlashSave {
        results: Vec<(AgentName, FlashSaveResult)>,
    },
    PinContext {
        id: i64,
        pinned: bool,
    },
    /// Bring items back from the archive.
    RecallContext {
        ids: Vec<i64>,
    },
    /// Record that an automatic pause was due and was not made.
    Withhold {
        cause: PauseCause,
        /// Why the pause was due.
        reason: String,
        /// Why it was not made.
        because: String,
    },
    Pause {
        operation: OperationId,
        cause: PauseCause,
        reason: Option<String>,
        mode: PauseMode,
        /// How long agents with a channel have to acknowledge.
        grace_ms: Option<u64>,
    },
    /// A step of a pause is done, or has failed.
    PauseStepped {
        operation: OperationId,
        step: PauseStep,
        took_ms: f64,
        outcome: Result<StepReport, ErrorObject>,
    },
    /// A pause or checkpoint is undone completely.
    Undone {
        operation: OperationId,
    },
    /// Cancel an operation.
    Cancel {
        operation: OperationId,
    },
    Resume {
        operation: OperationId,
        /// For each paused agent that cannot or should not be thawed.
        respawn: BTreeMap<AgentName, Respawn>,
        /// Whether the project may go on although a budget is reached.
        over_budget: bool,
    },
    /// [`Effect::Resume`] was carried out.
    Resumed {
        operation: OperationId,
        agents: Vec<AgentResumed>,
        steps_ms: BTreeMap<String, f64>,
        warnings: Vec<String>,
    },
    /// The processes of a frozen agent were ended.
    Parked {
        agent: AgentName,
        run: RunId,
    },
    /// Make a checkpoint outside a pause.
    Checkpoint {
        operation: OperationId,
        trigger: Trigger,
    },
    /// A checkpoint outside a pause was made, or has failed.
    Checkpointed {
        operation: OperationId,
        /// The checkpoint, and for how many milliseconds agents were frozen.
        outcome: Result<(Box<CheckpointView>, f64), ErrorObject>,
        /// Whether it was imported from a file.
        imported: bool,
    },
    PinCheckpoint {
        checkpoint: CheckpointNumber,
        pinned: bool,
    },
    /// Remove checkpoints; the rows go in the same transaction.
    RemoveCheckpoints {
        removals: Vec<Removal>,
    },
    /// Restore a checkpoint that exists.
    Restore {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        /// Only these paths, and no rows; everything when empty.
        paths: Vec<String>,
    },
    /// The safety checkpoint was made and the plan written, or that has failed.
    RestorePlanned {
        operation: OperationId,
        outcome: Result<Box<CheckpointView>, ErrorObject>,
    },
    /// An attempt to carry out the plan has failed.
    RestoreFailing {
        operation: OperationId,
        error: ErrorObject,
        /// How long attempts may go on failing before the restore is given up.
        patience_ms: u64,
    },
    /// The whole workspace was compared with the checkpoint that was restored.
    RestoreChecked {
        operation: OperationId,
        checkpoint: CheckpointNumber,
        /// How many paths were compared.
        paths: u64,
        differing: u64,
        /// Some of the differing paths, each with its difference.
        examples: Vec<String>,
    },
    /// The plan was carried out.
    Restored {
        operation: OperationId,
        /// None when only some paths were restored.
        rows: Option<RestoredProject>,
        /// Paths.
        written: u64,
        /// Paths.
        removed: u64,
    },
    /// The daemon has started, and reports what is left of the runs.
    Recover {
        /// For each agent that had processes.
        agents: BTreeMap<AgentName, RecoveredRun>,
        /// For each paused agent of an unfinished resume: used where it cannot be thawed.
        respawn: BTreeMap<AgentName, Respawn>,
        /// When each agent was last known to run: downtime does not count as its running time.
        last_seen: BTreeMap<AgentName, UnixMillis>,
    },
}

/// What may follow from the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterEnd {
    /// What the agent's restart policy says.
    ByPolicy,
    /// Nothing: recovery is switched off.
    Stay,
}

/// The identity of a run to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRun {
    pub id: RunId,
    /// SHA-256 of its token, in hexadecimal.
    pub token_sha256: String,
}

/// How an agent is to be started outside a resume of its project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedStart {
    pub new: NewRun,
    pub argv: Vec<String>,
    /// The tool's own session that the run continues.
    pub session: Option<String>,
    /// None for a run that continues no earlier one.
    pub continuation: Option<Continuation>,
}

/// How an agent is to be started again by a resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Respawn {
    pub new: NewRun,
    pub argv: Vec<String>,
    /// Why the agent must not be thawed even if its processes are there, for instance because they
    /// were frozen for too long.
    pub instead_of_thaw: Option<String>,
    /// The tool's own session that the run continues.
    pub session: Option<String>,
}

/// What the rows of a checkpoint say of the project itself.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoredProject {
    pub phase: Phase,
    pub tasks: Vec<TaskView>,
}

/// The result of a pause step.
#[derive(Debug, Clone, PartialEq)]
pub enum StepReport {
    /// There is nothing to remember.
    Done,
    /// The last step has sealed the checkpoint.
    Sealed(Box<PauseCommit>),
}

/// Everything that the commit of a pause needs.
#[derive(Debug, Clone, PartialEq)]
pub struct PauseCommit {
    pub checkpoint: CheckpointView,
    /// The sum over all agents.
    pub flash_save: FlashSaveResult,
    pub mechanism: FreezerKind,
    pub processes: u64,
    pub frozen_ms: f64,
    /// The agents that were frozen.
    pub agents: Vec<AgentName>,
    /// The tools' sessions that were found.
    pub sessions: Vec<(AgentName, String)>,
    pub warnings: Vec<String>,
}

/// What a new daemon finds of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveredRun {
    /// Shim and agent are there.
    Alive(RunProcesses),
    /// It ended while no daemon ran.
    Ended {
        exit: ExitStatus,
        /// What is known beyond the exit status.
        detail: Option<String>,
        at: UnixMillis,
    },
    /// It is gone without a recorded end.
    Lost { detail: String },
}

/// What a command leads to when it is not refused.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Decision {
    /// The facts to persist and then to apply, in order.
    pub events: Vec<Event>,
    /// What to carry out afterwards.
    pub effects: Vec<Effect>,
}

impl Decision {
    pub fn events(events: Vec<Event>) -> Self {
        Self { events, effects: Vec::new() }
    }

    /// Adds an effect.
    #[must_use]
    pub fn then(mut self, effect: Effect) -> Self {
        self.effects.push(effect);
        self
    }

    /// Adds the events and effects of another decision.
    pub fn append(&mut self, mut other: Self) {
        self.events.append(&mut other.events);
        self.effects.append(&mut other.effects);
    }
}
