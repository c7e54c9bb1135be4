//! The context of a step: the project's state when the step began, the links to its agents, its history.

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
pub struct AgentLink {
    pub run: RunId,
    pub shim: Arc<ShimLink>,
}

/// The project's state when a step began, and what the step works with. Cheap to clone.
#[derive(Clone)]
pub struct StepContext {
    pub services: Arc<Services>,
    /// Unchanged during the step; the actor's state may be newer.
    pub project: Arc<Project>,
    pub history: HistoryCell,
    pub links: Arc<BTreeMap<AgentName, AgentLink>>,
    /// Ends the operation early.
    pub cancel: Cancel,
}

impl StepContext {
    pub fn dirs(&self) -> ProjectDirs {
        self.services.project_dirs(&self.project.name)
    }

    /// Returns the rules that select the files of a snapshot.
    pub fn rules(&self) -> Rules {
        let config = &self.project.facts.config;
        Rules {
            include: config.include.clone(),
            exclude: config.exclude.clone(),
            max_file_bytes: config.max_file_bytes,
            use_gitignore: config.use_gitignore,
        }
    }

    /// Returns the project's retention policy over the daemon's.
    pub fn retention(&self) -> RetentionPolicy {
        self.services.settings().retention.with(&self.project.facts.config.retention)
    }

    /// Returns the links of these runs; a run whose processes have ended has none.
    pub fn links_of<'a>(
        &'a self,
        runs: &'a [(AgentName, RunId)],
    ) -> impl Iterator<Item = (&'a AgentName, &'a AgentLink)> + 'a {
        runs.iter().filter_map(|(agent, run)| {
            let link = self.links.get(agent)?;
            (link.run == *run).then_some((agent, link))
        })
    }

    /// Runs blocking work on the history and reports its progress under the operation's id. Waits for a permit of
    /// [`Services::heavy`].
    ///
    /// # Errors
    /// The error of `work`, and errors of opening the history.
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

    /// Like [`with_history`](Self::with_history) while agents are frozen: takes a permit of [`Services::urgent`], so that
    /// it does not queue behind long work.
    ///
    /// # Errors
    /// The error of `work`, and errors of opening the history.
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
        let progress_notes = self.services.progress.clone();
        let operation = operation.cloned();
        blocking(doing, move || {
            let history = cell.open(&dir, services.watcher()).map_err(|e| history_failure("open the history", &e))?;
            let report = move |progress: fermata_history::StoreProgress| {
                if let Some(operation) = &operation {
                    // Fails when no client follows the operation.
                    drop(progress_notes.send(note(operation, progress)));
                }
            };
            let result = work(&history, &report, &flag).map_err(|e| history_failure(doing, &e));
            history.free_caches();
            result
        })
        .await
    }
}

pub(super) fn cancelled_by_request() -> Failure {
    Refusal::new(Code::OperationCancelled, "the operation was cancelled").into()
}

/// Turns an error of the history into a refusal where the user can act on it, else into a fault.
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
                .hint("give paths relative to the workspace; fermatactl checkpoint diff lists those that differ")
                .into()
        }
        HistoryError::Unrestorable { .. } => {
            Refusal::new(Code::CheckpointDamaged, fermata_protocol::error_chain(error))
                .hint("fermatactl checkpoint verify lists the checkpoints that are intact")
                .into()
        }
        HistoryError::Cancelled => cancelled_by_request(),
        HistoryError::BadRule { .. }
        | HistoryError::NumberTaken { .. }
        | HistoryError::SnapshotGone { .. }
        | HistoryError::MissingObject { .. }
        | HistoryError::DamagedObject { .. }
        | HistoryError::UnsafePath { .. }
        | HistoryError::KernelTooOld { .. }
        | HistoryError::Git { .. }
        | HistoryError::Io { .. } => Failure::fault(doing, error),
    }
}

/// Runs blocking work on a thread for it.
///
/// # Errors
/// The error of `work`, or a fault when it panicked.
pub async fn blocking<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::fault(doing, &error)),
    }
}

/// Runs futures concurrently and returns their results, in the order in which they end. Dropping it aborts them.
pub async fn side_by_side<T: Send + 'static>(
    futures: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    futures.into_iter().collect::<JoinSet<T>>().join_all().await
}

pub fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// Passes a failpoint of a step.
///
/// # Errors
/// When the failpoint is armed with `error`.
pub fn failpoint(name: &'static str) -> Result<(), Failure> {
    fermata_failpoint::check(name).map_err(|error| Failure::fault(name, &error))
}
