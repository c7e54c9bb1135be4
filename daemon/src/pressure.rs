//! Watches memory and disks, where the settings ask for it, and pauses projects before the machine runs out of either.
//! `fermata_core::pressure` decides from the readings.
//!
//! Nothing is read while no rule is set. The kernel could wake it by a trigger on its pressure file,
//! but a look every two seconds costs one read, needs no privilege, and is needed anyway to see the
//! end of the pressure.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::pressure::{
    DiskReading, PressureCandidate, PressureDecision, PressureHistory, PressureReading, PressureRules, decide,
};
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::ProjectStatus;
use tokio::task::JoinHandle;

use crate::config::{OnPressure, PressureSettings, Settings};
use crate::errors::Failure;
use crate::project::{ProjectHandle, Projects, automatic, subjects};
use crate::services::{Services, now};
use fermata_os::pressure;

/// How often it looks.
const PACE: Duration = Duration::from_secs(2);

/// How long a look may take: a workspace may lie on a network drive that has gone away.
const PATIENCE: Duration = Duration::from_secs(5);

/// Says what of the settings cannot work on this machine.
pub fn warnings(settings: &Settings) -> Vec<String> {
    let mut found = Vec::new();
    if settings.pressure.memory_some_avg10.is_some()
        && let Err(error) = pressure::memory_some_avg10(settings.agents.cgroup_parent.as_deref())
    {
        found.push(format!(
            "pressure.memory_some_avg10 is set, but memory pressure cannot be read, so that it pauses nothing: \
             {error} ({}); boot with psi=1",
            pressure::MACHINE
        ));
    }
    if settings.pressure.memory_some_avg10.is_some() && settings.pressure.memory_mode == OnPressure::Freeze {
        found.push("pressure.memory_mode is \"freeze\", which frees no memory unless there is swap".into());
    }
    found
}

fn rules(settings: &PressureSettings) -> PressureRules {
    let ms = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    PressureRules {
        memory_some_avg10: settings.memory_some_avg10,
        disk_free_bytes: settings.disk_free_bytes,
        settle_ms: ms(settings.settle_ms),
        apart_ms: ms(settings.apart_ms),
        max_per_hour: settings.max_per_hour as usize,
    }
}

/// Watches until the daemon ends.
pub async fn watch(projects: Arc<Projects>) {
    let services = Arc::clone(projects.services());
    // The daemon may have died between a report of usage and the pause that followed from it.
    for handle in projects.all() {
        services.tracker.spawn(automatic::pause_for_budget(handle));
    }
    let mut history = PressureHistory::default();
    let mut reader = Reader::default();
    for line in warnings(&services.settings()) {
        tracing::warn!("{line}");
    }
    loop {
        let rules = rules(&services.settings().pressure);
        if rules.memory_some_avg10.is_none() && rules.disk_free_bytes.is_none() {
            history = PressureHistory::default();
            services.reloaded.notified().await;
        } else {
            check(&projects, &rules, &mut history, &mut reader).await;
            tokio::select! {
                () = tokio::time::sleep(PACE) => continue,
                () = services.reloaded.notified() => {}
            }
        }
        for line in warnings(&services.settings()) {
            tracing::warn!("{line}");
        }
    }
}

/// Reads on a blocking thread, one read at a time: one that hangs costs one thread, not one for each
/// look.
struct Reader<T> {
    late: Option<JoinHandle<T>>,
}

impl<T> Default for Reader<T> {
    fn default() -> Self {
        Self { late: None }
    }
}

impl<T: Send + 'static> Reader<T> {
    /// Reads, unless an earlier read still hangs; `None` when it does, or this one begins to.
    async fn read(&mut self, patience: Duration, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.late.as_ref().is_some_and(|late| !late.is_finished()) {
            return None;
        }
        if self.late.take().is_some() {
            // What it has found is old.
            tracing::info!("memory and disks can be looked at again");
        }
        let mut reading = tokio::task::spawn_blocking(read);
        match tokio::time::timeout(patience, &mut reading).await {
            Ok(Ok(found)) => Some(found),
            Ok(Err(error)) => {
                tracing::error!(%error, "memory and disks could not be looked at");
                None
            }
            Err(_) => {
                tracing::warn!("memory and disks could not be looked at in time; nothing is paused for them meanwhile");
                self.late = Some(reading);
                None
            }
        }
    }
}

async fn check(
    projects: &Projects,
    rules: &PressureRules,
    history: &mut PressureHistory,
    reader: &mut Reader<(PressureReading, Devices)>,
) {
    let services = projects.services();
    let active: Vec<ProjectHandle> =
        projects.all().into_iter().filter(|handle| handle.project().state.status() == ProjectStatus::Active).collect();
    let found: Vec<Arc<Project>> = active.iter().map(ProjectHandle::project).collect();
    let places: Vec<PathBuf> = found.iter().map(|project| PathBuf::from(&project.facts.workspace)).collect();
    let (wanted, parent) = (*rules, services.settings().agents.cgroup_parent.clone());
    let state = services.paths.state.clone();
    let reading = reader.read(PATIENCE, move || read(&wanted, parent.as_deref(), &state, &places)).await;
    let Some((reading, devices)) = reading else { return };
    // Their use is looked at only while something presses.
    let candidates = if reading.is_pressed(rules) { candidates(services, &found, &devices).await } else { Vec::new() };
    for verdict in decide(rules, &reading, &candidates, history, now()) {
        if let Some(handle) = active.iter().find(|handle| handle.name() == verdict.project) {
            let Err(failure) = carry_out(services, handle, &verdict).await else { continue };
            if history.pause_failed(rules, &verdict, now()) {
                let because = format!("the pause failed and is tried again: {failure}");
                automatic::withhold(handle, verdict.cause, &verdict.reason, &because).await;
            } else {
                tracing::warn!(project = %verdict.project, %failure, "not paused for it yet");
            }
        }
    }
}

/// The device of each place, the state directory's included.
struct Devices {
    state: Option<u64>,
    by_place: BTreeMap<PathBuf, u64>,
}

fn read(rules: &PressureRules, parent: Option<&Path>, state: &Path, places: &[PathBuf]) -> (PressureReading, Devices) {
    let memory_some_avg10 = rules.memory_some_avg10.and_then(|_| pressure::memory_some_avg10(parent).ok());
    let mut devices = Devices { state: None, by_place: BTreeMap::new() };
    let mut disks: BTreeMap<u64, DiskReading> = BTreeMap::new();
    if rules.disk_free_bytes.is_some() {
        let mut note = |place: &Path| {
            // A workspace that is gone is the pause's business, not this one's.
            let device = std::fs::metadata(place).ok()?.dev();
            if let Entry::Vacant(new) = disks.entry(device) {
                let stat = nix::sys::statvfs::statvfs(place).ok()?;
                let free_bytes = stat.blocks_available().saturating_mul(stat.fragment_size());
                new.insert(DiskReading { device, path: place.display().to_string(), free_bytes });
            }
            Some(device)
        };
        devices.state = note(state);
        for place in places {
            if let Some(device) = note(place) {
                devices.by_place.insert(place.clone(), device);
            }
        }
    }
    (PressureReading { memory_some_avg10, disks: disks.into_values().collect() }, devices)
}

async fn candidates(services: &Services, found: &[Arc<Project>], devices: &Devices) -> Vec<PressureCandidate> {
    let all = found.iter().flat_map(|project| subjects(services, project)).collect();
    let samples = services.loads.sample_closely(all).await;
    let of_project = |project: &Arc<Project>| {
        let runs = project.agents.values().filter_map(|agent| agent.run());
        let (mut memory_bytes, mut written_bytes) = (0, 0);
        for load in runs.filter_map(|run| samples.get(&run.id)) {
            memory_bytes += load.memory_bytes;
            written_bytes += load.io_written_bytes.unwrap_or(0);
        }
        // Logs and checkpoints of every project go to the state directory.
        let own = devices.by_place.get(Path::new(&project.facts.workspace));
        let devices: BTreeSet<u64> = own.into_iter().chain(&devices.state).copied().collect();
        PressureCandidate { project: project.name.clone(), memory_bytes, written_bytes, devices }
    };
    found.iter().map(of_project).collect()
}

/// Pauses a project or tells why not; fails when a pause that was wanted was not made.
async fn carry_out(services: &Services, handle: &ProjectHandle, verdict: &PressureDecision) -> Result<(), Failure> {
    let PressureDecision { cause, reason, withheld, .. } = verdict;
    if let Some(because) = withheld {
        automatic::withhold(handle, *cause, reason, because).await;
        return Ok(());
    }
    let mode = match (cause, services.settings().pressure.memory_mode) {
        // Frozen processes keep their memory; only ending them gives it back.
        (PauseCause::MemoryPressure, OnPressure::Park) => PauseMode::Park,
        _ => PauseMode::Freeze,
    };
    automatic::pause(handle, *cause, reason, mode).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_read_that_hangs_is_not_joined_by_others() {
        let mut reader = Reader::default();
        let (release, released) = mpsc::channel::<()>();
        let hung = move || released.recv().map_or(0, |()| 1);
        assert_eq!(reader.read(Duration::ZERO, hung).await, None);
        assert_eq!(reader.read(PATIENCE, || panic!("a second read was begun")).await, None);
        release.send(()).expect("it still waits");
        let late = reader.late.as_mut().expect("it is kept");
        while !late.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(reader.read(PATIENCE, || 2).await, Some(2), "not what the late one has found");
    }
}
