//! The handle to a project: its mailbox and its published state.

use std::sync::Arc;

use fermata_core::Project;
use fermata_protocol::{Code, OperationId, ProjectName, Refusal};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::message::{ActorMessage, Begin, ReplySender, Tell};
use crate::errors::Failure;
use crate::operations::{Cancel, HistoryCell, StepContext};
use crate::services::Services;

/// Sends messages to the actor of a project and reads its published state.
#[derive(Clone)]
pub struct ProjectHandle {
    pub(super) mailbox: mpsc::Sender<ActorMessage>,
    pub(super) state: watch::Receiver<Arc<Project>>,
    pub(super) history: HistoryCell,
    pub(super) services: Arc<Services>,
}

impl ProjectHandle {
    /// Returns the current state.
    pub fn project(&self) -> Arc<Project> {
        Arc::clone(&self.state.borrow())
    }

    /// Returns a receiver of the state after every change.
    pub fn watch(&self) -> watch::Receiver<Arc<Project>> {
        self.state.clone()
    }

    pub fn name(&self) -> ProjectName {
        self.state.borrow().name.clone()
    }

    /// Returns the context of a read-only step, which has no links to agents.
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
    /// The command is refused, or cannot be persisted.
    pub async fn tell(&self, tell: Tell) -> Result<Value, Failure> {
        self.ask(|answer| ActorMessage::Tell(Box::new(tell), answer)).await
    }

    /// Begins an operation and waits for its end.
    ///
    /// # Errors
    /// The operation is refused, or fails.
    pub async fn begin(&self, begin: Begin) -> Result<Value, Failure> {
        self.ask(|answer| ActorMessage::Begin(Box::new(begin), answer)).await
    }

    /// Waits for the end of the current operation.
    ///
    /// # Errors
    /// The operation's failure, or `operation_not_found` when it is not the current one.
    pub async fn end_of(&self, operation: OperationId) -> Result<Value, Failure> {
        self.ask(|answer| ActorMessage::Await(operation, answer)).await
    }

    /// Shuts the actor down, and waits until it has ended.
    pub async fn shut_down(&self) {
        let (done, ended) = oneshot::channel();
        if self.mailbox.send(ActorMessage::Shutdown(done)).await.is_ok() {
            // An error means that the actor has ended without confirming.
            drop(ended.await);
        }
    }

    pub(super) async fn ask(&self, message: impl FnOnce(ReplySender) -> ActorMessage) -> Result<Value, Failure> {
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
