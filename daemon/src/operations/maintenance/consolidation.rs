//! Keeps the packs of a project's history few and free of what nobody needs.
//!
//! Not a step of any operation: it is wished for after checkpoints have come or gone, runs beside everything else on a
//! thread that stands back, one project at a time, and ends at once when the project pauses. Nobody waits for it, and
//! whatever it did not come to is done at the next wish. Decides nothing about checkpoints.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fermata_protocol::event::Event;
use tokio::sync::oneshot;

use crate::errors::Failure;
use crate::operations::context::history_failure;
use crate::operations::maintenance::storage;
use crate::operations::{Cancel, StepContext};
use fermata_history::{Attempt, Consolidated, Extent};

/// How long a consolidation that has failed is left alone: it costs a walk over all checkpoints.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// How long what follows a checkpoint waits, so that whoever asked for it is told before other threads want the processor.
pub const BREATH: Duration = Duration::from_millis(20);

/// How long whoever needs room waits for others who consolidate, and how often it asks.
const PATIENCE: Duration = Duration::from_secs(60);
const TURN: Duration = Duration::from_millis(20);

/// Wishes for what the events of a project make worth it: a consolidation after a checkpoint, and none while it pauses.
pub fn follow(site: &StepContext, events: &[Event]) {
    for event in events {
        match event {
            Event::PauseStarted { .. } | Event::ProjectRemoved {} => hold_off(site),
            Event::CheckpointCreated { .. }
            | Event::ProjectPaused { .. }
            | Event::PauseFailed { .. }
            | Event::RestorePlanned { .. } => request(site, Extent::Due),
            _ => {}
        }
    }
}

/// Asks for a consolidation as soon as one can be made. Returns at once.
pub fn request(site: &StepContext, extent: Extent) {
    let mut state = site.history.consolidations.lock();
    let now = Instant::now();
    if state.failed.is_some_and(|until| now < until) || site.services.stopping.is_cancelled() {
        return;
    }
    state.wanted.insert(extent);
    if state.running.is_none() {
        let cancel = Cancel::default();
        state.running = Some(cancel.clone());
        site.services.tracker.spawn(run(StepContext { cancel, ..site.clone() }));
    }
}

/// Ends what is under way: the project pauses, and nothing else shall use the disk. What was wished for waits for the
/// next wish, which the end of the pause brings.
pub fn hold_off(site: &StepContext) {
    site.history.consolidations.hold_off();
}

async fn run(site: StepContext) {
    let queue = site.history.consolidations.clone();
    tokio::time::sleep(BREATH).await;
    while let Some(extent) = queue.next(&site.cancel) {
        let done = tokio::select! {
            permit = site.services.background.acquire() => match permit {
                Ok(_permit) => consolidate(&site, extent).await,
                Err(_) => return,
            },
            () = site.cancel.cancelled() => return,
            () = site.services.stopping.cancelled() => return,
        };
        if let Ok(Attempt::Busy) = done {
            return queue.put_off(extent, &site.cancel);
        }
        if let Err(failure) = done
            && !site.cancel.is_cancelled()
        {
            let mut state = queue.lock();
            state.wanted.clear();
            let first = state.failed.replace(Instant::now() + AFTER_FAILURE).is_none();
            drop(state);
            if first {
                tracing::warn!(
                    project = %site.project.name, %failure,
                    "the packs of the history could not be consolidated; nothing has changed, it is tried again later"
                );
            }
        }
    }
}

/// Gives back what nobody needs any more, down to the last of it, since somebody waits for the room; `false` when others
/// were at work for too long. A consolidation that is under way is ended.
///
/// # Errors
/// As for [`consolidate`].
pub async fn reclaim(site: &StepContext) -> Result<bool, Failure> {
    let start = Instant::now();
    hold_off(site);
    while consolidate(site, Extent::Room).await? == Attempt::Busy {
        if start.elapsed() > PATIENCE || site.cancel.is_cancelled() {
            return Ok(false);
        }
        tokio::time::sleep(TURN).await;
    }
    Ok(true)
}

/// Consolidates on a thread of its own; ends early with the daemon.
///
/// # Errors
/// When the history cannot be opened, when an object is damaged, or when the disk is full.
pub async fn consolidate(site: &StepContext, extent: Extent) -> Result<Attempt, Failure> {
    const DOING: &str = "consolidate the history";
    crate::operations::failpoint("upkeep.consolidate")?;
    let (cell, dir, flag) = (site.history.clone(), site.dirs().history(), Arc::clone(&site.cancel.flag));
    let services = Arc::clone(&site.services);
    let removed = site.history.unreclaimed_bytes();
    let (answer, mut answered) = oneshot::channel();
    let work = move || {
        fermata_os::priority::stand_back();
        let start = Instant::now();
        let done = cell.open(&dir, services.watcher()).and_then(|history| {
            if let Err(error) = history.keep() {
                tracing::warn!(%error, "what is known of the workspace could not be kept");
            }
            // A look that costs nothing comes first.
            let extent = if extent == Extent::Due { history.due() } else { Some(extent) };
            extent.map_or(Ok(Attempt::Nothing(None)), |extent| history.consolidate(extent, &|_| {}, &flag))
        });
        // Nobody listens any more when the daemon is about to end.
        drop(answer.send((done, start.elapsed())));
    };
    std::thread::Builder::new().name("consolidation".to_owned()).spawn(work).map_err(|e| Failure::fault(DOING, &e))?;
    let answered = tokio::select! {
        answered = &mut answered => answered,
        () = site.services.stopping.cancelled() => {
            site.cancel.cancel();
            answered.await
        }
    };
    let (done, took) = answered.map_err(|e| Failure::fault(DOING, &e))?;
    let done = done.map_err(|e| history_failure(DOING, &e))?;
    site.history.consolidations.lock().failed = None;
    match done {
        Attempt::Done(Consolidated { wasted, .. }) | Attempt::Nothing(Some(wasted)) => {
            site.history.counted(removed, wasted);
        }
        Attempt::Nothing(None) | Attempt::Busy => {}
    }
    if let Attempt::Done(Consolidated { packs, bytes_before, bytes_after, objects, deltas, wasted: _ }) = done {
        let took_ms = took.as_millis() as u64;
        let project = &site.project.name;
        tracing::info!(%project, packs, bytes_before, bytes_after, objects, deltas, took_ms, "packs were consolidated");
        storage::measure(site).await?;
        // What it needed can go.
        site.services.settled.notify_one();
    }
    Ok(done)
}
