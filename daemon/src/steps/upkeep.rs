//! Keeps the packs of a project's history few and free of what nobody needs.
//!
//! Not a step of any operation: it is wished for after checkpoints have come or gone, runs beside everything else on a
//! thread that stands back, one project at a time, and ends at once when the project pauses. Nobody waits for it, and
//! whatever it did not come to is done at the next wish. Decides nothing about checkpoints.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fermata_protocol::event::Event;
use tokio::sync::oneshot;

use super::{Cancel, Site, history_failure, storage};
use crate::errors::Failure;
use crate::history::{Consolidated, Extent};

/// How long a consolidation that has failed is left alone: it costs a walk over all checkpoints.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// The upkeep of one project; clones are the same.
#[derive(Clone, Default)]
pub struct Upkeep(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    wanted: Option<Extent>,
    /// Ends the run that is under way.
    running: Option<Cancel>,
    /// Until when nothing is tried, after a failure that was told.
    failed: Option<Instant>,
}

impl Upkeep {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the wish, if there is one; otherwise the run is over.
    fn next(&self) -> Option<Extent> {
        let mut state = self.lock();
        let wanted = state.wanted.take();
        if wanted.is_none() {
            state.running = None;
        }
        wanted
    }
}

/// Wishes for what the events of a project make worth it: a consolidation after a checkpoint, and none while it pauses.
pub fn follow(site: &Site, events: &[Event]) {
    for event in events {
        match event {
            Event::PauseStarted { .. } | Event::ProjectRemoved {} => hold_off(site),
            Event::CheckpointCreated { .. } | Event::ProjectPaused { .. } | Event::RestorePlanned { .. } => {
                wish(site, Extent::Due);
            }
            _ => {}
        }
    }
}

/// Asks for a consolidation as soon as one can be made. Returns at once.
pub fn wish(site: &Site, extent: Extent) {
    let mut state = site.history.upkeep.lock();
    let now = Instant::now();
    if state.failed.is_some_and(|until| now < until) || site.services.stopping.is_cancelled() {
        return;
    }
    state.wanted = state.wanted.max(Some(extent));
    if state.running.is_none() {
        let cancel = Cancel::default();
        state.running = Some(cancel.clone());
        site.services.tracker.spawn(run(Site { cancel, ..site.clone() }));
    }
}

/// Ends what is under way: the project pauses, and nothing else shall use the disk. The wish is forgotten; the
/// checkpoint of the pause brings the next one.
pub fn hold_off(site: &Site) {
    let mut state = site.history.upkeep.lock();
    state.wanted = None;
    if let Some(cancel) = state.running.take() {
        cancel.cancel();
    }
}

async fn run(site: Site) {
    let upkeep = site.history.upkeep.clone();
    while !site.cancel.is_cancelled()
        && let Some(extent) = upkeep.next()
    {
        let done = tokio::select! {
            permit = site.services.background.acquire() => match permit {
                Ok(_permit) => consolidate(&site, extent).await,
                Err(_) => return,
            },
            () = site.cancel.cancelled() => return,
            () = site.services.stopping.cancelled() => return,
        };
        if let Err(failure) = done
            && !site.cancel.is_cancelled()
        {
            let mut state = upkeep.lock();
            state.wanted = None;
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

/// Consolidates on a thread of its own; ends early with the daemon.
///
/// # Errors
/// When the history cannot be opened, when an object is damaged, or when the disk is full.
pub async fn consolidate(site: &Site, extent: Extent) -> Result<Option<Consolidated>, Failure> {
    const DOING: &str = "consolidate the history";
    super::failpoint("upkeep.consolidate")?;
    let (cell, dir, flag) = (site.history.clone(), site.dirs().history(), Arc::clone(&site.cancel.flag));
    let services = Arc::clone(&site.services);
    let (answer, mut answered) = oneshot::channel();
    let work = move || {
        crate::os::priority::stand_back();
        let start = Instant::now();
        let done = cell.open(&dir, services.watcher()).and_then(|history| {
            if let Err(error) = history.keep() {
                tracing::warn!(%error, "what is known of the workspace could not be kept");
            }
            // A look that costs nothing comes first.
            let extent = if extent == Extent::Due { history.due() } else { Some(extent) };
            extent.map_or(Ok(None), |extent| history.consolidate(extent, &|_| {}, &flag))
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
    site.history.upkeep.lock().failed = None;
    if let Some(Consolidated { packs, bytes_before, bytes_after, objects, deltas }) = done {
        let took_ms = took.as_millis() as u64;
        let project = &site.project.name;
        tracing::info!(%project, packs, bytes_before, bytes_after, objects, deltas, took_ms, "packs were consolidated");
        storage::measure(site).await?;
        // What it needed can go.
        site.services.settled.notify_one();
    }
    Ok(done)
}
