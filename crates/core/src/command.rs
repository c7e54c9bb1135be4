//! What reaches a project (commands) and what follows from it (decisions).

mod effect;

use std::collections::BTreeMap;

use fermata_protocol::agent::{AgentSpec, ExitStatus, Progress, RunProcesses};
use fermata_protocol::budget::Usage;
use fermata_protocol::checkpoint::{CheckpointView, Trigger};
use fermata_protocol::context::FlashSaveResult;
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, Mechanism, PauseCause, PauseMode};
use fermata_protocol::project::ProjectConfig;
use fermata_protocol::task::Phase;
use fermata_protocol::task::{TaskStatus, TaskView};
use fermata_protocol::{AgentName, CheckpointNumber, ErrorObject, OperationId, RunId, UnixMillis};

use crate::due::Due;
use crate::project::PauseStep;
use crate::retention::Removal;

pub use self::effect::{AgentRun, Effect};

/// Something that a project is told: by a person, an agent, a shim, a step or recovery.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Change description, phase or settings.
    Set {
        /// A new description.
        description: Option<String>,
        /// A new phase.
        phase: Option<Phase>,
        /// New settings.
        config: Option<ProjectConfig>,
    },
    /// Remove the project; `checkpoints` is how many it has.
    Remove {
        /// How many checkpoints there are.
        checkpoints: u64,
        /// Remove them too.
        with_checkpoints: bool,
    },
    /// Start an agent.
    Run {
        /// Its name.
        agent: AgentName,
        /// How.
        spec: AgentSpec,
        /// The new run.
        new: NewRun,
    },
    /// Stop an agent, or all.
    Stop {
        /// One agent, or all.
        agent: Option<AgentName>,
        /// Between SIGTERM and SIGKILL, milliseconds; the agent's own when none.
        grace_ms: Option<u64>,
    },
    /// Kill an agent's tree, or all.
    Kill {
        /// One agent, or all.
        agent: Option<AgentName>,
    },
    /// Stop an agent and start it again.
    Restart {
        /// The agent.
        agent: AgentName,
        /// The new run, used at once when the agent has ended already.
        new: NewRun,
    },
    /// Start an agent whose time has come, or bring back one that a person asks for.
    Start {
        /// The agent.
        agent: AgentName,
        /// How.
        start: Start,
        /// Whether a person asks for it; else it has to be due.
        asked: bool,
    },
    /// Something is due.
    FallDue {
        /// What.
        due: Due,
        /// The operation, should it take one.
        operation: OperationId,
    },
    /// An agent is ready.
    Ready {
        /// The agent.
        agent: AgentName,
        /// The run; the current one when the agent says so itself.
        run: Option<RunId>,
    },
    /// Remove an agent that has ended.
    RemoveAgent {
        /// The agent.
        agent: AgentName,
    },
    /// A launch was carried out.
    Launched {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// Its processes, or why there are none.
        outcome: Result<RunProcesses, String>,
    },
    /// A run has ended.
    RunEnded {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// How.
        exit: ExitStatus,
        /// What is known beyond that.
        detail: Option<String>,
        /// When.
        ended_at: UnixMillis,
        /// The new run, should one follow.
        new: NewRun,
        /// Whether the restart policy counts.
        then: AfterEnd,
    },
    /// A run is gone without a recorded end.
    RunLost {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// What is known.
        detail: String,
        /// Whether it may be brought back.
        then: AfterEnd,
    },
    /// A signal that was not Fermata's holds the main process of a run, or no longer does.
    Suspended {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// Whether it is held.
        held: bool,
    },
    /// Something was typed into an agent's terminal.
    Typed {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// Who typed.
        by: String,
        /// How many bytes.
        bytes: u64,
    },
    /// The shim of a run cannot be spoken to, and its agent runs on.
    Unreachable {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// Why.
        detail: String,
    },
    /// A frozen run ran although nobody had let it.
    FreezeBroken {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// How often since this was told last.
        times: u64,
        /// What happened.
        detail: String,
    },
    /// An agent reports progress.
    Progress {
        /// The agent.
        agent: AgentName,
        /// What it reports.
        progress: Progress,
        /// The phase of the work.
        phase: Option<Phase>,
    },
    /// An agent reports usage.
    Use {
        /// The agent.
        agent: AgentName,
        /// What it used.
        usage: Usage,
    },
    /// An agent saves its blob.
    SaveState {
        /// The agent.
        agent: AgentName,
        /// Its size.
        bytes: u64,
    },
    /// A task is created or changed.
    PutTask {
        /// The agent that reports it.
        agent: Option<AgentName>,
        /// The task to change.
        id: Option<u64>,
        /// Its title.
        title: Option<String>,
        /// Its status.
        status: Option<TaskStatus>,
        /// 0 to 100.
        percent: Option<f64>,
    },
    /// An agent asks a person.
    Ask {
        /// The agent.
        agent: AgentName,
        /// What.
        text: String,
        /// Answers to choose from.
        choices: Vec<String>,
    },
    /// A person answers.
    Answer {
        /// The question.
        id: u64,
        /// The answer.
        answer: String,
    },
    /// Context items were put; the rows are written in the same transaction.
    AddContext {
        /// The agent.
        agent: AgentName,
        /// How many.
        items: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// A flash save outside a pause; the rows are written in the same transaction.
    FlashSave {
        /// The agents and what it does to each.
        results: Vec<(AgentName, FlashSaveResult)>,
    },
    /// An item was pinned or unpinned.
    PinContext {
        /// The item.
        id: i64,
        /// Which of it.
        pinned: bool,
    },
    /// Items were brought back from the archive.
    RecallContext {
        /// The items.
        ids: Vec<i64>,
    },
    /// Tell that the project would have been paused automatically, and was not.
    Withhold {
        /// What would have brought it about.
        cause: PauseCause,
        /// What was the matter.
        reason: String,
        /// Why it was not paused.
        because: String,
    },
    /// Pause.
    Pause {
        /// The new operation.
        operation: OperationId,
        /// Who or what brings it about.
        cause: PauseCause,
        /// Why.
        reason: Option<String>,
        /// How.
        mode: PauseMode,
        /// For the agents with a channel, milliseconds.
        grace_ms: Option<u64>,
    },
    /// A step of the pause is done.
    PauseStepped {
        /// The operation.
        operation: OperationId,
        /// The step.
        step: PauseStep,
        /// How long it took, milliseconds.
        took_ms: f64,
        /// What it led to.
        outcome: Result<StepReport, ErrorObject>,
    },
    /// Everything that an undone pause, or an undone checkpoint, did is undone.
    Undone {
        /// The operation.
        operation: OperationId,
    },
    /// Cancel an operation.
    Cancel {
        /// The operation.
        operation: OperationId,
    },
    /// Resume.
    Resume {
        /// The new operation.
        operation: OperationId,
        /// For each held agent that cannot or should not be thawed: the new run and why.
        respawn: BTreeMap<AgentName, Respawn>,
        /// Whether it may go on although a budget is reached.
        over_budget: bool,
    },
    /// The resume was carried out.
    Resumed {
        /// The operation.
        operation: OperationId,
        /// How each agent came back.
        agents: Vec<AgentResumed>,
        /// How long each step took, milliseconds.
        steps_ms: BTreeMap<String, f64>,
        /// What a person should know.
        warnings: Vec<String>,
    },
    /// The processes of a parked agent were ended.
    Parked {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
    },
    /// Make a checkpoint.
    Checkpoint {
        /// The new operation.
        operation: OperationId,
        /// What makes it.
        trigger: Trigger,
    },
    /// The checkpoint was made, or could not be.
    Checkpointed {
        /// The operation.
        operation: OperationId,
        /// The checkpoint and how long agents stood still in milliseconds, or why there is none.
        outcome: Result<(Box<CheckpointView>, f64), ErrorObject>,
        /// Whether it came from a file.
        imported: bool,
    },
    /// Pin or unpin a checkpoint that exists.
    PinCheckpoint {
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// Which of it.
        pinned: bool,
    },
    /// Remove checkpoints; the rows go in the same transaction.
    RemoveCheckpoints {
        /// Which, and why.
        removals: Vec<Removal>,
    },
    /// Restore a checkpoint that exists.
    Restore {
        /// The new operation.
        operation: OperationId,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// Only these paths, and no rows; everything when there are none.
        paths: Vec<String>,
    },
    /// The safety checkpoint was made and the plan is on disk, or that failed.
    RestorePlanned {
        /// The operation.
        operation: OperationId,
        /// The safety checkpoint, or why there is none.
        outcome: Result<Box<CheckpointView>, ErrorObject>,
    },
    /// The plan could not be carried out this time.
    RestoreFailing {
        /// The operation.
        operation: OperationId,
        /// What went wrong.
        error: ErrorObject,
        /// How long it may go on failing before it is given up, milliseconds.
        patience_ms: u64,
    },
    /// The whole workspace was compared with the checkpoint that was restored.
    RestoreChecked {
        /// The operation.
        operation: OperationId,
        /// The checkpoint.
        checkpoint: CheckpointNumber,
        /// How many paths were compared.
        paths: u64,
        /// How many are not as they should be.
        differing: u64,
        /// Some of them, each with what is different.
        examples: Vec<String>,
    },
    /// The plan was carried out.
    Restored {
        /// The operation.
        operation: OperationId,
        /// What the rows say at the checkpoint; none when only some paths were restored.
        rows: Option<Rewound>,
        /// How many paths were written.
        written: u64,
        /// How many were removed.
        removed: u64,
    },
    /// The daemon has started: here is what is left of the runs.
    Recover {
        /// What was found of each agent that had processes.
        agents: BTreeMap<AgentName, Observed>,
        /// For each held agent of an unfinished resume: a new run, should it be needed.
        respawn: BTreeMap<AgentName, Respawn>,
        /// When each was last known to run: downtime is no time of an agent.
        last_seen: BTreeMap<AgentName, UnixMillis>,
    },
}

/// What may follow from the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterEnd {
    /// What the agent's policy says.
    ByPolicy,
    /// Nothing: recovery is switched off.
    Stay,
}

/// The identity of a run to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRun {
    /// Its id.
    pub id: RunId,
    /// SHA-256 of its token, in hexadecimal.
    pub token_sha256: String,
}

/// How an agent is to be started outside a resume of its project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// The new run.
    pub new: NewRun,
    /// The program and arguments.
    pub argv: Vec<String>,
    /// The tool's own session that it goes on with.
    pub session: Option<String>,
    /// What it is told of its earlier life; nothing when it begins anew.
    pub checkpoint: Option<ComesBack>,
}

/// What a run that goes on is told of its agent's earlier life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComesBack {
    /// The checkpoint whose context it is given; none where there is no checkpoint.
    pub checkpoint: Option<CheckpointNumber>,
}

/// How an agent is to be started again by a resume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Respawn {
    /// The new run.
    pub new: NewRun,
    /// The program and arguments.
    pub argv: Vec<String>,
    /// Whether it must not be thawed even if its processes are there, for instance because they
    /// were frozen for too long; the text says why.
    pub instead_of_thaw: Option<String>,
    /// The tool's own session that it goes on with.
    pub session: Option<String>,
}

/// What the rows of a checkpoint say of the project itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewound {
    /// The phase.
    pub phase: Phase,
    /// The tasks.
    pub tasks: Vec<TaskView>,
}

/// What a step of a pause led to.
#[derive(Debug, Clone, PartialEq)]
pub enum StepReport {
    /// Nothing to remember.
    Done,
    /// The last step: everything that the commit needs.
    Sealed(Box<Sealed>),
}

/// Everything that the commit of a pause needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Sealed {
    /// The checkpoint.
    pub checkpoint: CheckpointView,
    /// The flash save's numbers, all agents together.
    pub flash_save: FlashSaveResult,
    /// What froze the processes.
    pub mechanism: Mechanism,
    /// How many processes.
    pub processes: u64,
    /// How long they had stood still, milliseconds.
    pub frozen_ms: f64,
    /// The agents that were frozen.
    pub agents: Vec<AgentName>,
    /// The tools' sessions that were found.
    pub sessions: Vec<(AgentName, String)>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// What a new daemon finds of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Shim and agent are there.
    Alive(RunProcesses),
    /// It ended while no daemon looked.
    Ended {
        /// How.
        exit: ExitStatus,
        /// What is known beyond that.
        detail: Option<String>,
        /// When.
        at: UnixMillis,
    },
    /// Nobody recorded an end.
    Lost {
        /// What is known.
        detail: String,
    },
}

/// What a command leads to, when it is not refused.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Decision {
    /// The facts to persist, then to apply, in order.
    pub events: Vec<Event>,
    /// What to carry out afterwards.
    pub effects: Vec<Effect>,
}

impl Decision {
    /// Makes a decision of events alone.
    pub fn events(events: Vec<Event>) -> Self {
        Self { events, effects: Vec::new() }
    }

    /// Adds an effect.
    #[must_use]
    pub fn then(mut self, effect: Effect) -> Self {
        self.effects.push(effect);
        self
    }
}
