//! Watches memory and disks if the settings say so, and pauses projects before the machine runs out of either.
//! `fermata_core::pressure` decides from the readings.
//!
//! Nothing is read while no rule is set. The kernel can wake a watcher by a trigger on its pressure file, but a reading
//! every two seconds costs one read, needs no privilege, and is needed anyway to notice the end of the pressure.

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

/// The interval of the readings.
const PACE: Duration = Duration::from_secs(2);

/// How long a reading may take: a workspace may be on a network file system that does not respond.
const PATIENCE: Duration = Duration::from_secs(5);

/// Returns warnings about settings that have no effect on this machine.
pub fn warnings(settings: &Settings) -> Vec<String> {
    let mut warnings = Vec::new();
    if settings.pressure.memory_some_avg10.is_some()
        && let Err(error) = pressure::memory_some_avg10(settings.agents.cgroup_parent.as_deref())
    {
        warnings.push(format!(
            "pressure.memory_some_avg10 is set, but memory pressure cannot be read, so that it pauses nothing: \
             {error} ({}); boot with psi=1",
            pressure::MACHINE
        ));
    }
    if settings.pressure.memory_some_avg10.is_some() && settings.pressure.memory_mode == OnPressure::Freeze {
        warnings.push("pressure.memory_mode is \"freeze\", which frees no memory unless there is swap".into());
    }
    warnings
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

/// Watches until the task is aborted.
pub async fn watch(projects: Arc<Projects>) {
    let services = Arc::clone(projects.services());
    // The last daemon may have ended between a report of usage and the pause that follows from it.
    for handle in projects.all() {
        services.tracker.spawn(automatic::pause_for_budget(handle));
    }
    let mut history = PressureHistory::default();
    let mut reader = PressureReader::default();
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

/// Reads on a blocking thread, one read at a time, so that a read that hangs occupies one thread only.
struct PressureReader<T> {
    late: Option<JoinHandle<T>>,
}

impl<T> Default for PressureReader<T> {
    fn default() -> Self {
        Self { late: None }
    }
}

impl<T: Send + 'static> PressureReader<T> {
    /// Reads; `None` if an earlier read still hangs, or this one takes longer than `patience`.
    async fn read(&mut self, patience: Duration, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.late.as_ref().is_some_and(|late| !late.is_finished()) {
            return None;
        }
        if self.late.take().is_some() {
            // Its result is outdated.
            tracing::info!("memory and disks can be read again");
        }
        // Not in the task tracker: the shutdown must not wait for a read that hangs.
        let mut reading = tokio::task::spawn_blocking(read);
        match tokio::time::timeout(patience, &mut reading).await {
            Ok(Ok(reading)) => Some(reading),
            Ok(Err(error)) => {
                tracing::error!(%error, "failed to read memory and disks");
                None
            }
            Err(_) => {
                tracing::warn!("reading memory and disks takes too long; nothing is paused for pressure meanwhile");
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
    reader: &mut PressureReader<(PressureReading, Devices)>,
) {
    let services = projects.services();
    let active: Vec<ProjectHandle> =
        projects.all().into_iter().filter(|handle| handle.project().state.status() == ProjectStatus::Active).collect();
    let states: Vec<Arc<Project>> = active.iter().map(ProjectHandle::project).collect();
    let workspaces: Vec<PathBuf> = states.iter().map(|project| PathBuf::from(&project.facts.workspace)).collect();
    let (rules_to_read, parent) = (*rules, services.settings().agents.cgroup_parent.clone());
    let state_dir = services.paths.state.clone();
    let reading = reader.read(PATIENCE, move || read(&rules_to_read, parent.as_deref(), &state_dir, &workspaces)).await;
    let Some((reading, devices)) = reading else { return };
    // The usage of the projects is needed only under pressure.
    let candidates = if reading.is_pressed(rules) { candidates(services, &states, &devices).await } else { Vec::new() };
    for decision in decide(rules, &reading, &candidates, history, now()) {
        if let Some(handle) = active.iter().find(|handle| handle.name() == decision.project) {
            let Err(failure) = carry_out(services, handle, &decision).await else { continue };
            if history.pause_failed(rules, &decision, now()) {
                let because = format!("the pause failed and is tried again: {failure}");
                automatic::withhold(handle, decision.cause, &decision.reason, &because).await;
            } else {
                tracing::warn!(project = %decision.project, %failure, "pausing for pressure failed; trying again");
            }
        }
    }
}

/// The devices of the state directory and of each workspace.
struct Devices {
    state: Option<u64>,
    by_workspace: BTreeMap<PathBuf, u64>,
}

fn read(
    rules: &PressureRules,
    parent: Option<&Path>,
    state: &Path,
    workspaces: &[PathBuf],
) -> (PressureReading, Devices) {
    let memory_some_avg10 = rules.memory_some_avg10.and_then(|_| pressure::memory_some_avg10(parent).ok());
    let mut devices = Devices { state: None, by_workspace: BTreeMap::new() };
    let mut disks: BTreeMap<u64, DiskReading> = BTreeMap::new();
    if rules.disk_free_bytes.is_some() {
        let mut note = |path: &Path| {
            // A missing workspace is left out here; the pause reports it.
            let device = std::fs::metadata(path).ok()?.dev();
            if let Entry::Vacant(new) = disks.entry(device) {
                let stat = nix::sys::statvfs::statvfs(path).ok()?;
                let free_bytes = stat.blocks_available().saturating_mul(stat.fragment_size());
                new.insert(DiskReading { device, path: path.display().to_string(), free_bytes });
            }
            Some(device)
        };
        devices.state = note(state);
        for workspace in workspaces {
            if let Some(device) = note(workspace) {
                devices.by_workspace.insert(workspace.clone(), device);
            }
        }
    }
    (PressureReading { memory_some_avg10, disks: disks.into_values().collect() }, devices)
}

async fn candidates(services: &Services, projects: &[Arc<Project>], devices: &Devices) -> Vec<PressureCandidate> {
    let all = projects.iter().flat_map(|project| subjects(services, project)).collect();
    let samples = services.loads.sample_closely(all).await;
    let of_project = |project: &Arc<Project>| {
        let runs = project.agents.values().filter_map(|agent| agent.run());
        let (mut memory_bytes, mut written_bytes) = (0, 0);
        for load in runs.filter_map(|run| samples.get(&run.id)) {
            memory_bytes += load.memory_bytes;
            written_bytes += load.io_written_bytes.unwrap_or(0);
        }
        // Logs and checkpoints of every project go to the state directory.
        let own = devices.by_workspace.get(Path::new(&project.facts.workspace));
        let devices: BTreeSet<u64> = own.into_iter().chain(&devices.state).copied().collect();
        PressureCandidate { project: project.name.clone(), memory_bytes, written_bytes, devices }
    };
    projects.iter().map(of_project).collect()
}

/// Pauses a project, or records why it was not paused.
///
/// # Errors
/// The pause is refused or fails.
async fn carry_out(services: &Services, handle: &ProjectHandle, decision: &PressureDecision) -> Result<(), Failure> {
    let PressureDecision { cause, reason, withheld, .. } = decision;
    if let Some(because) = withheld {
        automatic::withhold(handle, *cause, reason, because).await;
        return Ok(());
    }
    // Frozen processes keep their memory; ending them frees it.
    let parks = *cause == PauseCause::MemoryPressure && services.settings().pressure.memory_mode == OnPressure::Park;
    let mode = if parks { PauseMode::Park } else { PauseMode::Freeze };
    automatic::pause(handle, *cause, reason, mode).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_read_that_hangs_is_not_joined_by_others() {
        let mut reader = PressureReader::default();
        let (release, released) = mpsc::channel::<()>();
        let hung = move || released.recv().map_or(0, |()| 1);
        assert_eq!(reader.read(Duration::ZERO, hung).await, None);
        assert_eq!(reader.read(PATIENCE, || panic!("a second read was begun")).await, None);
        release.send(()).expect("the read still waits");
        let late = reader.late.as_mut().expect("the read is kept");
        while !late.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(reader.read(PATIENCE, || 2).await, Some(2), "not the result of the late read");
    }
}
