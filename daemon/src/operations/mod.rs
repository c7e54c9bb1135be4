//! The steps of operations. Each runs beside the project's actor, reports once, and has an undo
//! that may be repeated.
//!
//! ```text
//!   pause:       validate -> quiesce -> freeze -> plan_flash_save -> checkpoint     undo: thaw, discard
//!   checkpoint:  freeze (a blip) -> checkpoint -> thaw                              undo: thaw, discard
//!   restore:     safety checkpoint -> plan on disk | apply                          rolls forward
//!   import:      unpack -> check -> place                                           undo: discard
//!   resume:      thaw | end what is left, launch                                    rolls forward
//! ```
//!
//! A step knows the state that it was started with and changes none: what follows from its report
//! is `fermata_core`'s decision.

pub mod checkpoint;
pub mod maintenance;
pub mod pause;
pub mod restore;
pub mod run;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use fermata_core::Project;
use fermata_core::retention::RetentionPolicy;
use fermata_protocol::project::ScanProgress;
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::errors::Failure;
use crate::services::{ProgressNote, ProjectDirs, Services};
use crate::shims::link::ShimLink;
use fermata_history::{History, HistoryError, Rules};

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
pub struct Site {
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

impl Site {
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

/// A look at a workspace that is told of, until it ends.
struct Looking(Arc<Mutex<Option<fermata_history::Progress>>>);

impl Looking {
    fn tell(&self, progress: fermata_history::Progress) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What a part of the history's work is called, and what is counted in it.
fn words(phase: fermata_history::Phase) -> (&'static str, &'static str) {
    match phase {
        fermata_history::Phase::Scan => ("scan", "paths"),
        fermata_history::Phase::Read => ("read", "files"),
        fermata_history::Phase::Trees => ("trees", "directories"),
        fermata_history::Phase::Pack => ("pack", "objects"),
        fermata_history::Phase::Verify => ("verify", "objects"),
        fermata_history::Phase::Apply => ("apply", "paths"),
        fermata_history::Phase::Recheck => ("recheck", "paths"),
    }
}

fn note(operation: &OperationId, progress: fermata_history::Progress) -> ProgressNote {
    let (step, unit) = words(progress.phase);
    ProgressNote {
        operation_id: operation.clone(),
        step: step.to_owned(),
        done: progress.done,
        total: progress.total,
        unit,
    }
}

/// Makes the note of work that is counted in bytes.
fn note_bytes(operation: OperationId, step: &str, done: u64, total: u64) -> ProgressNote {
    ProgressNote { operation_id: operation, step: step.to_owned(), done, total, unit: "bytes" }
}

fn cancelled_by_request() -> Failure {
    Refusal::new(Code::OperationCancelled, "the operation was cancelled").into()
}

/// Turns an error of the history into a refusal where a person can do something about it.
fn history_failure(doing: &str, error: &HistoryError) -> Failure {
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

/// The history of a project, opened when it is first needed.
#[derive(Clone, Default)]
pub struct HistoryCell {
    opened: Arc<Mutex<Option<Arc<History>>>>,
    used_bytes: Arc<AtomicU64>,
    sizes: Arc<Mutex<maintenance::storage::Sizes>>,
    looking: Arc<Mutex<Option<fermata_history::Progress>>>,
    /// How much of these is taken to come back: checkpoints were removed, and nobody needs it any more.
    unreclaimed: Arc<AtomicU64>,
    upkeep: maintenance::upkeep::Upkeep,
}

impl HistoryCell {
    /// Returns the history, opened.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(
        &self,
        dir: &std::path::Path,
        watcher: Option<&Arc<fermata_history::Watcher>>,
    ) -> Result<Arc<History>, HistoryError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(history) = &*opened {
            return Ok(Arc::clone(history));
        }
        let history = Arc::new(History::open_watched(dir, watcher)?);
        *opened = Some(Arc::clone(&history));
        Ok(history)
    }

    /// Begins to tell of a look at the workspace.
    fn looking(&self) -> Looking {
        Looking(Arc::clone(&self.looking))
    }

    /// Returns how far a look at the workspace has come that is under way while agents run.
    pub fn look_under_way(&self) -> Option<ScanProgress> {
        let progress = *self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        progress.map(|fermata_history::Progress { phase, done, total }| {
            let (step, unit) = words(phase);
            ScanProgress { step: step.to_owned(), done, total, unit: unit.to_owned() }
        })
    }

    /// Returns what the project's checkpoints took on disk when they were measured last, bytes.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Returns what they take without what is to be given back, bytes.
    pub fn needed_bytes(&self) -> u64 {
        self.used_bytes().saturating_sub(self.unreclaimed_bytes())
    }

    fn unreclaimed_bytes(&self) -> u64 {
        self.unreclaimed.load(Ordering::Relaxed)
    }

    /// Notes that checkpoints go which had added so many bytes.
    pub fn unreclaimed(&self, bytes: u64) {
        self.unreclaimed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Notes that so many bytes of these are given back, or stay after all.
    pub fn reclaimed(&self, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(bytes));
    }

    /// Notes what nobody needs as it was counted, in the place of what was taken for it before.
    fn counted(&self, before: u64, bytes: u64) {
        self.change_unreclaimed(|now| now.saturating_sub(before).saturating_add(bytes));
    }

    fn change_unreclaimed(&self, change: impl Fn(u64) -> u64) {
        let changed = self.unreclaimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(change(now)));
        debug_assert!(changed.is_ok(), "there is always a value");
    }
}

/// Ends an operation early: tasks look at the token, blocking work at the flag.
#[derive(Clone, Default)]
pub struct Cancel {
    token: CancellationToken,
    flag: Arc<AtomicBool>,
}

impl Cancel {
    /// Asks the operation to end.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.token.cancel();
    }

    /// Says whether it was asked to end.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is asked to end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
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
