//! What is sent to the actor of a project.

use std::sync::Arc;

use fermata_core::Project;
use fermata_core::automatic::UnchangedScan;
use fermata_core::command::{Command, PreparedStart};
use fermata_core::retention::RemovalRequest;
use fermata_protocol::{AgentName, OperationId, RunId};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::ids::NewToken;
use crate::errors::Failure;
use crate::operations::checkpoint::transfer::BundleFile;
use crate::operations::run::launch::StartedRun;
use crate::shims::link::ShimLink;
use crate::store::commit::{Write, Written};
use crate::store::idempotency::Keyed;

/// A start whose run and command are known, or why they are not.
pub type Prepared = Result<(PreparedStart, NewToken), Failure>;

/// What a look found.
pub struct AutomaticScan {
    /// Whether anything has changed; none when the look was cut short, or is no longer due.
    pub(super) changed: Option<bool>,
    /// What it has seen.
    pub(super) unchanged: UnchangedScan,
    /// The turn in which a checkpoint may be made.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

/// A wish to remove checkpoints.
pub struct Retain {
    /// Which.
    pub ask: RemovalRequest,
    /// The caller's idempotency key.
    pub keyed: Option<Keyed>,
}

/// Makes the reply of a call from the state that it led to.
pub type View = Box<dyn FnOnce(&Project, &Written) -> Value + Send>;

/// The answer to a call.
pub type Answer = oneshot::Sender<Result<Value, Failure>>;

/// A command that is done with one transaction.
pub struct Tell {
    /// What.
    pub command: Command,
    /// What goes with it.
    pub writes: Vec<Write>,
    /// Tokens of the runs that it may begin.
    pub tokens: Vec<NewToken>,
    /// The caller's idempotency key.
    pub keyed: Option<Keyed>,
    /// Makes the reply.
    pub view: View,
}

/// A command that begins an operation; the answer comes when the operation has ended.
pub struct Begin {
    /// What.
    pub command: Command,
    /// The new operation.
    pub operation: OperationId,
    /// What a checkpoint is called, where one is made.
    pub label: Label,
    /// Tokens of the runs that it may begin.
    pub tokens: Vec<NewToken>,
    /// The caller's idempotency key.
    pub keyed: Option<Keyed>,
}

/// What a checkpoint is called.
#[derive(Debug, Clone, Default)]
pub struct Label {
    /// Its name; one is made up when none is given.
    pub name: Option<String>,
    /// Its description.
    pub description: String,
    /// The file that it is made of, where it is imported instead of made.
    pub import: Option<BundleFile>,
}

/// What a step, a shim or recovery reports.
pub struct CommandReport {
    /// What.
    pub command: Command,
    /// What goes with it, if it leads to anything.
    pub writes: Vec<Write>,
    /// The reply of the operation that it ends, where there is more to say than its event does.
    pub reply: Option<Value>,
    /// Tokens of the runs that it may begin.
    pub tokens: Vec<NewToken>,
}

impl From<Command> for CommandReport {
    fn from(command: Command) -> Self {
        Self { command, writes: Vec::new(), reply: None, tokens: Vec::new() }
    }
}

/// What can be in a mailbox.
pub enum Message {
    /// A command of a caller.
    Tell(Box<Tell>, Answer),
    /// A command of a caller that begins an operation.
    Begin(Box<Begin>, Answer),
    /// Waits for the end of an operation that is under way.
    Await(OperationId, Answer),
    /// A wish to remove checkpoints.
    Retain(Box<Retain>, Answer),
    /// A report.
    CommandReport(Box<CommandReport>),
    /// A launch was carried out.
    Started {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// What runs now, or why nothing does.
        outcome: Result<Box<StartedRun>, String>,
    },
    /// A start that is due was prepared.
    Prepared {
        /// The agent.
        agent: AgentName,
        /// How it is started.
        prepared: Box<Prepared>,
    },
    /// The link to a shim was made anew.
    Linked {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// The link.
        link: Arc<ShimLink>,
    },
    /// A look for what an automatic checkpoint would save is over.
    Scanned(Box<AutomaticScan>),
    /// What an operation needs to end cannot be done for now.
    Blocked(Box<Failure>),
    /// A freeze has ended by itself.
    Thawed {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
    },
    /// End: undo a pause that is under way, then answer.
    Shutdown(oneshot::Sender<()>),
}

pub(super) fn reply(answer: Answer, result: Result<Value, Failure>) {
    // A caller that no longer waits has lost interest, not the fact.
    drop(answer.send(result));
}
