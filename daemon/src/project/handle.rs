//! How others reach a project: its mailbox, and its state to look at.

use std::sync::Arc;

use fermata_core::Project;
use fermata_protocol::{Code, OperationId, ProjectName, Refusal};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::message::{Answer, Begin, Message, Tell};
use crate::errors::Failure;
use crate::operations::{Cancel, HistoryCell, StepContext};
use crate::services::Services;

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
    pub fn project(&self) -> Arc<Project> {
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
    pub fn step_context(&self) -> StepContext {
        StepContext {
            services: Arc::clone(&self.services),
            project: self.project(),
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
