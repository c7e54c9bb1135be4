//! How others reach a project: its mailbox, and its state to look at.

use std::sync::Arc;

use fermata_core::Project;
use fermata_core::command::Command;
use fermata_protocol::{AgentName, Code, OperationId, ProjectName, Refusal, RunId};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::follow_up::Prepared;
use super::ids::NewToken;
use super::look::Found;
use super::retain::Retain;
use crate::errors::Failure;
use crate::operations::checkpoint::transfer::Held;
use crate::operations::run::launch::Started;
use crate::operations::{Cancel, HistoryCell, Site};
use crate::services::Services;
use crate::shims::link::ShimLink;
use crate::store::commit::{Write, Written};
use crate::store::idempotency::Keyed;

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
    pub import: Option<Held>,
}

/// What a step, a shim or recovery reports.
pub struct Outcome {
    /// What.
    pub command: Command,
    /// What goes with it, if it leads to anything.
    pub writes: Vec<Write>,
    /// The reply of the operation that it ends, where there is more to say than its event does.
    pub reply: Option<Value>,
    /// Tokens of the runs that it may begin.
    pub tokens: Vec<NewToken>,
}

impl From<Command> for Outcome {
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
    Outcome(Box<Outcome>),
    /// A launch was carried out.
    Started {
        /// The agent.
        agent: AgentName,
        /// The run.
        run: RunId,
        /// What runs now, or why nothing does.
        outcome: Result<Box<Started>, String>,
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
    Looked(Box<Found>),
    /// What an operation needs to end cannot be done for now.
    Stuck(Box<Failure>),
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

/// How others reach a project.
#[derive(Clone)]
pub struct ProjectHandle {
    pub(super) mailbox: mpsc::Sender<Message>,
    pub(super) state: watch::Receiver<Arc<Project>>,
    pub(super) history: HistoryCell,
    pub(super) services: Arc<Services>,
}

impl ProjectHandle {
    /// Returns the state as it is now.
    pub fn look(&self) -> Arc<Project> {
        Arc::clone(&self.state.borrow())
    }

    /// Returns what changes whenever the state does.
    pub fn watch(&self) -> watch::Receiver<Arc<Project>> {
        self.state.clone()
    }

    /// Returns the project's name.
    pub fn name(&self) -> ProjectName {
        self.state.borrow().name.clone()
    }

    /// Returns what a read-only step needs; it has no links to agents.
    pub fn site(&self) -> Site {
        Site {
            services: Arc::clone(&self.services),
            project: self.look(),
            history: self.history.clone(),
            links: Default::default(),
            cancel: Cancel::default(),
        }
    }

    /// Sends a command and waits for its reply.
    ///
    /// # Errors
    /// A refusal or a fault.
    pub async fn tell(&self, tell: Tell) -> Result<Value, Failure> {
        self.ask(|answer| Message::Tell(Box::new(tell), answer)).await
    }

    /// Begins an operation and waits for its end.
    ///
    /// # Errors
    /// A refusal or a fault, of the beginning or of the operation.
    pub async fn begin(&self, begin: Begin) -> Result<Value, Failure> {
        self.ask(|answer| Message::Begin(Box::new(begin), answer)).await
    }

    /// Waits for the end of an operation that is under way.
    ///
    /// # Errors
    /// The operation's failure, or `operation_not_found` when it is not under way.
    pub async fn end_of(&self, operation: OperationId) -> Result<Value, Failure> {
        self.ask(|answer| Message::Await(operation, answer)).await
    }

    /// Ends the actor in order.
    pub async fn shut_down(&self) {
        let (done, ended) = oneshot::channel();
        if self.mailbox.send(Message::Shutdown(done)).await.is_ok() {
            // An actor that ended without an answer has ended too.
            drop(ended.await);
        }
    }

    pub(super) async fn ask(&self, message: impl FnOnce(Answer) -> Message) -> Result<Value, Failure> {
        let gone = || {
            Failure::from(Refusal::new(
                Code::ShuttingDown,
                "the project was removed, or the daemon is shutting down".to_owned(),
            ))
        };
        let (answer, answered) = oneshot::channel();
        self.mailbox.send(message(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
