//! The messages to the actor of a project.

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

/// A start with its run and command, or why it could not be prepared.
pub type StartPreparation = Result<(PreparedStart, NewToken), Failure>;

/// The result of a scan that precedes an automatic checkpoint.
pub struct AutomaticScan {
    /// Whether anything has changed; none when the scan was cancelled, or the checkpoint is no longer due.
    pub(super) changed: Option<bool>,
    /// The state that was scanned, to be kept where nothing has changed.
    pub(super) unchanged: UnchangedScan,
    /// The permit under which a checkpoint may follow.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

/// A request to remove checkpoints.
pub struct Retain {
    pub ask: RemovalRequest,
    pub keyed: Option<Keyed>,
}

/// Makes the reply of a call from the state after its transaction.
pub type View = Box<dyn FnOnce(&Project, &Written) -> Value + Send>;

/// Sends the reply of a call.
pub type ReplySender = oneshot::Sender<Result<Value, Failure>>;

/// A command that ends with one transaction.
pub struct Tell {
    pub command: Command,
    /// Further writes of the same transaction.
    pub writes: Vec<Write>,
    /// Tokens of the runs that the command may begin.
    pub tokens: Vec<NewToken>,
    pub keyed: Option<Keyed>,
    pub view: View,
}

/// A command that begins an operation. It is replied to when the operation ends.
pub struct Begin {
    pub command: Command,
    /// The id of the new operation.
    pub operation: OperationId,
    /// Name and description of the checkpoint, where the operation makes one.
    pub label: Label,
    /// Tokens of the runs that the command may begin.
    pub tokens: Vec<NewToken>,
    pub keyed: Option<Keyed>,
}

/// Name and description of a checkpoint that is to be made.
#[derive(Debug, Clone, Default)]
pub struct Label {
    /// Derived from trigger and number when none.
    pub name: Option<String>,
    pub description: String,
    /// The file to import the checkpoint from; none where it is made of the project.
    pub import: Option<BundleFile>,
}

/// A report of a step, a shim or the recovery.
#[derive(Clone)]
pub struct CommandReport {
    pub command: Command,
    /// Further writes of the same transaction; dropped where the command leads to no event.
    pub writes: Vec<Write>,
    /// The reply of the operation that the report ends; derived from its event when none.
    pub reply: Option<Value>,
    /// Tokens of the runs that the command may begin.
    pub tokens: Vec<NewToken>,
}

impl From<Command> for CommandReport {
    fn from(command: Command) -> Self {
        Self { command, writes: Vec::new(), reply: None, tokens: Vec::new() }
    }
}

/// A message to the actor.
pub enum ActorMessage {
    Tell(Box<Tell>, ReplySender),
    Begin(Box<Begin>, ReplySender),
    /// Replied to when the current operation, which must have this id, ends.
    Await(OperationId, ReplySender),
    Retain(Box<Retain>, ReplySender),
    CommandReport(Box<CommandReport>),
    /// A launch has succeeded, or failed for the reason given.
    Started {
        agent: AgentName,
        run: RunId,
        outcome: Result<Box<StartedRun>, String>,
    },
    /// The preparation of a due start has ended.
    Prepared {
        agent: AgentName,
        prepared: Box<StartPreparation>,
    },
    /// A new link replaces a broken one.
    Linked {
        agent: AgentName,
        run: RunId,
        link: Arc<ShimLink>,
    },
    /// A scan that precedes an automatic checkpoint has ended.
    Scanned(Box<AutomaticScan>),
    /// A step that has to succeed fails again and again.
    Blocked(Box<Failure>),
    /// The lease of a freeze has expired.
    Thawed {
        agent: AgentName,
        run: RunId,
    },
    /// Undo a pause that is under way, end, and confirm.
    Shutdown(oneshot::Sender<()>),
}

pub(super) fn reply(answer: ReplySender, result: Result<Value, Failure>) {
    // The caller may have gone; what was done stays done.
    drop(answer.send(result));
}
