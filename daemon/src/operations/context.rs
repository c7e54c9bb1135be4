//! What a step is given: the project as it was when the step began, its links and its history.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use fermata_core::Project;
use fermata_core::retention::RetentionPolicy;
use fermata_history::{History, HistoryError, Rules};
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId};
use tokio::task::JoinSet;

use crate::errors::Failure;
use crate::operations::cancel::Cancel;
use crate::operations::history_cell::HistoryCell;
use crate::operations::progress::note;
use crate::services::{ProjectDirs, Services};
use crate::shims::link::ShimLink;

/// The link to the shim of one run.
#[derive(Clone)]
pub struct Link {
    /// The run.
    pub run: RunId,
    /// The shim.
    pub shim: Arc<ShimLink>,
}

/// What a step knows: the project as it was when the step began, and the links to its agents.
#[derive(Clone)]
pub struct StepContext {
    /// What all rooms share.
    pub services: Arc<Services>,
    /// The project.
    pub project: Arc<Project>,
    /// Its snapshots' store.
    pub history: HistoryCell,
    /// The links, by agent. Shared: every agent's own step has the whole site.
    pub links: Arc<BTreeMap<AgentName, Link>>,
    /// Ends the operation early.
    pub cancel: Cancel,
}

impl StepContext {
    /// Returns the project's directories.
    pub fn dirs(&self) -> ProjectDirs {
        self.services.project_dirs(&self.project.name)
    }

    /// Returns the rules for what a snapshot covers.
    pub fn rules(&self) -> Rules {
        let config = &self.project.facts.config;
        Rules {
            include: config.include.clone(),
            exclude: config.exclude.clone(),
            max_file_bytes: config.max_file_bytes,
            use_gitignore: config.use_gitignore,
        }
    }

    /// Returns which checkpoints of the project are kept.
    pub fn retention(&self) -> RetentionPolicy {
        self.services.settings().retention.with(&self.project.facts.config.retention)
    }

    /// Returns the links of these runs; runs whose processes are gone have none.
    pub fn links_of<'a>(
        &'a self,
        runs: &'a [(AgentName, RunId)],
    ) -> impl Iterator<Item = (&'a AgentName, &'a Link)> + 'a {
        runs.iter().filter_map(|(agent, run)| {
            let link = self.links.get(agent)?;
            (link.run == *run).then_some((agent, link))
        })
    }

    /// Runs blocking work of the history, with progress told under the operation's id.
    ///
    /// # Errors
    /// The work's own error.
    pub async fn with_history<T: Send + 'static>(
        &self,
        operation: Option<&OperationId>,
        doing: &'static str,
        work: impl FnOnce(&History, fermata_history::OnProgress<'_>, &AtomicBool) -> Result<T, HistoryError>
        + Send
        + 'static,
    ) -> Result<T, Failure> {
        self.history_work(&self.services.heavy, operation, doing, work).await
    }

    /// The same while agents stand still: it does not queue behind what takes long.
    ///
    /// # Errors
    /// The work's own error.
    pub async fn with_history_at_once<T: Send + 'static>(
        &self,
        operation: &OperationId,
        doing: &'static str,
        work: impl FnOnce(&History, fermata_history::OnProgress<'_>, &AtomicBool) -> Result<T, HistoryError>
        + Send
        + 'static,
    ) -> Result<T, Failure> {
        self.history_work(&self.services.urgent, Some(operation), doing, work).await
    }

    async fn history_work<T: Send + 'static>(
        &self,
        permits: &tokio::sync::Semaphore,
        operation: Option<&OperationId>,
        doing: &'static str,
        work: impl FnOnce(&History, fermata_history::OnProgress<'_>, &AtomicBool) -> Result<T, HistoryError>
        + Send
        + 'static,
    ) -> Result<T, Failure> {
        let _permit = permits.acquire().await.map_err(|e| Failure::fault(doing, &e))?;
        let (cell, services) = (self.history.clone(), Arc::clone(&self.services));
        let dir = self.dirs().history();
        let flag = Arc::clone(&self.cancel.flag);
        let notes = self.services.progress.clone();
        let operation = operation.cloned();
        blocking(doing, move || {
            let history = cell.open(&dir, services.watcher()).map_err(|e| history_failure("open the history", &e))?;
            let tell = move |progress: fermata_history::Progress| {
                if let Some(operation) = &operation {
                    // Nobody may be listening.
                    drop(notes.send(note(operation, progress)));
                }
            };
            let done = work(&history, &tell, &flag).map_err(|e| history_failure(doing, &e));
            history.rest();
            done
        })
        .await
    }
}

pub(super) fn cancelled_by_request() -> Failure {
    Refusal::new(Code::OperationCancelled, "the operation was cancelled").into()
}

/// Turns an error of the history into a refusal where a person can do something about it.
pub(super) fn history_failure(doing: &str, error: &HistoryError) -> Failure {
    match error {
        HistoryError::WorkspaceRefused { .. } => {
            Refusal::new(Code::WorkspaceRefused, fermata_protocol::error_chain(error))
                .hint("choose a directory of its own as the workspace")
                .into()
        }
        HistoryError::NoSuchCheckpoint { number } => {
            Refusal::new(Code::CheckpointNotFound, format!("there is no checkpoint {number}")).into()
        }
        HistoryError::NoSuchPath { path, number } => {
            let text = format!("neither checkpoint {number} nor the workspace has the path '{path}'");
            Refusal::new(Code::PathNotFound, text)
                .hint("paths are those inside the workspace; fermatactl checkpoint diff shows what differs")
                .into()
        }
        HistoryError::Unrestorable { .. } => {
            Refusal::new(Code::CheckpointDamaged, fermata_protocol::error_chain(error))
                .hint("fermatactl checkpoint verify tells which checkpoints are good")
                .into()
        }
        HistoryError::Cancelled => cancelled_by_request(),
        _ => Failure::fault(doing, error),
    }
}

/// Runs work that touches the disk off the async threads.
///
/// # Errors
/// The work's own error, or a fault when it panicked.
pub async fn blocking<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::fault(doing, &error)),
    }
}

/// Runs futures side by side and returns their results, in the order in which they end.
pub async fn side_by_side<T: Send + 'static>(
    futures: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    futures.into_iter().collect::<JoinSet<T>>().join_all().await
}

/// Returns the milliseconds since an instant.
pub fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// Failpoints of the steps, as a failure: an armed `error` makes the step fail.
///
/// # Errors
/// When the failpoint is armed with `error`.
pub fn failpoint(name: &'static str) -> Result<(), Failure> {
    fermata_failpoint::check(name).map_err(|error| Failure::fault(name, &error))
}
