//! Consolidates the packs of a project's history: few packs, without unneeded objects.
//!
//! Not a step of an operation. It is requested after checkpoints were made or removed, runs in a thread of low priority,
//! for one project at a time, and is cancelled when the project pauses. No operation waits for it, and the next request
//! continues what it did not finish. It decides nothing about checkpoints.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fermata_protocol::event::Event;
use tokio::sync::oneshot;

use crate::errors::Failure;
use crate::operations::context::history_failure;
use crate::operations::maintenance::storage;
use crate::operations::{Cancel, StepContext, failpoint};
use fermata_history::{Attempt, Consolidated, Extent};

/// The time after a failed consolidation in which none is tried, since each walks over all checkpoints.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// The delay of work that follows a checkpoint, so that the reply is sent before other threads use the processor.
pub const BREATH: Duration = Duration::from_millis(20);

/// How long [`reclaim`] waits for another consolidation, and how often it tries.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(60);
const RECLAIM_PERIOD: Duration = Duration::from_millis(20);

/// Requests a consolidation after the events that end a checkpoint, and interrupts it at the start of a pause.
pub fn follow(step: &StepContext, events: &[Event]) {
    let interrupts = |event: &Event| matches!(event, Event::PauseStarted { .. } | Event::ProjectRemoved {});
    let ends_checkpoint = |event: &Event| {
        matches!(
            event,
            Event::CheckpointCreated { .. }
                | Event::ProjectPaused { .. }
                | Event::PauseFailed { .. }
                | Event::RestorePlanned { .. }
        )
    };
    for event in events {
        if interrupts(event) {
            interrupt(step);
        } else if ends_checkpoint(event) {
            request(step, Extent::ManyFresh);
        }
    }
}

/// Requests a consolidation. Returns at once.
pub fn request(step: &StepContext, extent: Extent) {
    let mut state = step.history.consolidations.lock();
    let now = Instant::now();
    if state.failed.is_some_and(|until| now < until) || step.services.stopping.is_cancelled() {
        return;
    }
    state.requested.insert(extent);
    state.renewed = true;
    if state.running.is_none() {
        let cancel = Cancel::default();
        state.running = Some(cancel.clone());
        step.services.tracker.spawn(run(StepContext { cancel, ..step.clone() }));
    }
}

/// Cancels the consolidation that runs, so that a pause has the disk for itself. The requests stay until the next
/// request, which the end of the pause makes.
pub fn interrupt(step: &StepContext) {
    step.history.consolidations.interrupt();
}

/// Waits until no consolidation of the project runs. Returns whether every requested one has been made.
pub async fn idle(step: &StepContext) -> bool {
    step.history.consolidations.idle().await
}

/// Ends the task in the queue when dropped, also at the shutdown and after a panic.
struct ConsolidationTask(StepContext);

impl Drop for ConsolidationTask {
    fn drop(&mut self) {
        self.0.history.consolidations.end(&self.0.cancel);
    }
}

async fn run(step: StepContext) {
    let task = ConsolidationTask(step);
    let step = &task.0;
    let queue = step.history.consolidations.clone();
    tokio::time::sleep(BREATH).await;
    while let Some(extent) = queue.next(&step.cancel) {
        let result = tokio::select! {
            permit = step.services.background.acquire() => match permit {
                Ok(_permit) => consolidate(step, extent).await,
                Err(_) => return,
            },
            () = step.cancel.cancelled() => return,
            () = step.services.stopping.cancelled() => return,
        };
        if let Ok(Attempt::Busy) = result {
            if queue.postpone(extent, &step.cancel) {
                tokio::time::sleep(BREATH).await;
                continue;
            }
            return;
        }
        if let Err(failure) = result
            && !step.cancel.is_cancelled()
        {
            let mut state = queue.lock();
            state.requested.clear();
            let first = state.failed.replace(Instant::now() + AFTER_FAILURE).is_none();
            drop(state);
            if first {
                tracing::warn!(
                    project = %step.project.name, %failure,
                    "the packs of the history could not be consolidated and are unchanged; it is tried again later"
                );
            }
        }
    }
}

/// Frees all unneeded space now, for an operation that needs it. Cancels a consolidation that runs. Returns `false` when
/// the store stayed busy for too long.
///
/// # Errors
/// As for [`consolidate`].
pub async fn reclaim(step: &StepContext) -> Result<bool, Failure> {
    let start = Instant::now();
    interrupt(step);
    while consolidate(step, Extent::FreeSpace).await? == Attempt::Busy {
        if start.elapsed() > RECLAIM_TIMEOUT || step.cancel.is_cancelled() {
            return Ok(false);
        }
        tokio::time::sleep(RECLAIM_PERIOD).await;
    }
    Ok(true)
}

/// Consolidates on a thread of its own; the daemon's shutdown cancels it and waits for it.
///
/// # Errors
/// When the history cannot be opened, when an object is damaged, or when the disk is full.
pub async fn consolidate(step: &StepContext, extent: Extent) -> Result<Attempt, Failure> {
    const DOING: &str = "consolidate the history";
    failpoint("maintenance.consolidate")?;
    let (cell, dir, flag) = (step.history.clone(), step.dirs().history(), Arc::clone(&step.cancel.flag));
    let services = Arc::clone(&step.services);
    let unreclaimed_before = step.history.unreclaimed_bytes();
    let (sender, mut receiver) = oneshot::channel();
    let work = move || {
        fermata_os::priority::stand_back();
        let start = Instant::now();
        let result = cell.open(&dir, services.watcher()).and_then(|history| {
            if let Err(error) = history.save_state() {
                tracing::warn!(%error, "the workspace state could not be written");
            }
            // Reads only counters in memory.
            let extent = if extent == Extent::ManyFresh { history.worthwhile_extent() } else { Some(extent) };
            extent.map_or(Ok(Attempt::Nothing(None)), |extent| history.consolidate(extent, &|_| {}, &flag))
        });
        // Fails when the waiting task was dropped.
        drop(sender.send((result, start.elapsed())));
    };
    std::thread::Builder::new().name("consolidation".to_owned()).spawn(work).map_err(|e| Failure::fault(DOING, &e))?;
    let received = tokio::select! {
        received = &mut receiver => received,
        () = step.services.stopping.cancelled() => {
            step.cancel.cancel();
            receiver.await
        }
    };
    let (result, elapsed) = received.map_err(|e| Failure::fault(DOING, &e))?;
    let attempt = result.map_err(|e| history_failure(DOING, &e))?;
    step.history.consolidations.lock().failed = None;
    match attempt {
        Attempt::Done(Consolidated { wasted, .. }) | Attempt::Nothing(Some(wasted)) => {
            step.history.counted(unreclaimed_before, wasted);
        }
        Attempt::Nothing(None) | Attempt::Busy => {}
    }
    if let Attempt::Done(Consolidated { packs, bytes_before, bytes_after, objects, deltas, wasted: _ }) = attempt {
        let took_ms = elapsed.as_millis() as u64;
        let project = &step.project.name;
        tracing::info!(%project, packs, bytes_before, bytes_after, objects, deltas, took_ms, "packs were consolidated");
        storage::measure(step).await?;
        step.services.settled.notify_one();
    }
    Ok(attempt)
}
