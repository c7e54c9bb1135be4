//! Resource usage of agents: samples that are taken only when a caller asks for them.
//!
//! A caller gets the samples that exist after at most `PATIENCE`, while a blocking thread renews the stale ones. Sampling
//! costs nothing while there is no caller, and at most one `SHARE`th of a core however often callers ask.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fermata_core::load::{LoadReading, sample};
use fermata_protocol::load::{Load, MemoryKind};
use fermata_protocol::{RunId, UnixMillis};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use fermata_os::usage::{self, Memory};
use fermata_os::{clock, process};
use fermata_shim::record::read_run;

/// The age at which a sample is stale.
const FRESH: Duration = Duration::from_secs(2);

/// How long a caller that only displays usage waits for new samples.
const PATIENCE: Duration = Duration::from_millis(10);

/// With more runs than this, sampling takes longer than [`PATIENCE`].
const FEW: usize = 100;

/// How long a caller that decides by the samples waits for them.
const DECIDING: Duration = Duration::from_secs(5);

/// After sampling for one second no sample is taken for this many seconds.
const SHARE: u32 = 50;

/// The age at which a sample is dropped, since its run has ended.
const FORGET: Duration = Duration::from_secs(600);

/// A run whose process tree is sampled.
#[derive(Debug, Clone)]
pub struct Subject {
    pub run: RunId,
    pub run_dir: PathBuf,
    pub shim: process::ProcessId,
    pub started_at: UnixMillis,
}

/// The samples, by run.
pub type Samples = BTreeMap<RunId, Load>;

/// The newest sample of each run.
#[derive(Clone)]
pub struct Loads {
    sampled: Arc<Mutex<SampledRuns>>,
    done: watch::Sender<()>,
    tracker: TaskTracker,
}

#[derive(Default)]
struct SampledRuns {
    runs: HashMap<RunId, SampledRun>,
    /// Whether a thread is sampling.
    busy: bool,
    /// How long the last sampling took.
    took: Duration,
}

struct SampledRun {
    load: Load,
    taken: Instant,
    group: Option<PathBuf>,
}

impl SampledRuns {
    fn is_stale(&self, run: &RunId) -> bool {
        self.runs.get(run).is_none_or(|kept| kept.taken.elapsed() >= FRESH.max(self.took * SHARE))
    }
}

impl Loads {
    pub fn new(tracker: TaskTracker) -> Self {
        Self { sampled: Arc::default(), done: watch::channel(()).0, tracker }
    }

    fn lock(&self) -> MutexGuard<'_, SampledRuns> {
        self.sampled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns samples for display, stale ones included, and begins to renew those.
    pub async fn sample(&self, subjects: Vec<Subject>) -> Samples {
        let patience = if subjects.len() <= FEW { PATIENCE } else { Duration::ZERO };
        self.within(patience, subjects).await
    }

    /// Returns samples for a decision: fresh ones unless sampling takes longer than 5 s.
    pub async fn sample_closely(&self, subjects: Vec<Subject>) -> Samples {
        self.within(DECIDING, subjects).await
    }

    async fn within(&self, patience: Duration, subjects: Vec<Subject>) -> Samples {
        let until = tokio::time::Instant::now() + patience;
        let mut done = self.done.subscribe();
        let runs: Vec<RunId> = subjects.iter().map(|subject| subject.run.clone()).collect();
        loop {
            let begun = self.begin(&subjects);
            if begun == Begun::Nothing || tokio::time::timeout_at(until, done.changed()).await.is_err() {
                break;
            }
            // Not repeated for a run that has ended and has no sample.
            if begun == Begun::Ours {
                break;
            }
        }
        let sampled = self.lock();
        runs.into_iter().filter_map(|run| sampled.runs.get(&run).map(|kept| (run.clone(), kept.load))).collect()
    }

    /// Begins to sample the runs whose samples are stale, unless a thread is sampling already.
    fn begin(&self, subjects: &[Subject]) -> Begun {
        let mut sampled = self.lock();
        let stale: Vec<Subject> = subjects.iter().filter(|subject| sampled.is_stale(&subject.run)).cloned().collect();
        if stale.is_empty() {
            return Begun::Nothing;
        }
        if sampled.busy {
            return Begun::Others;
        }
        sampled.busy = true;
        let work = Sampling(self.clone());
        self.tracker.spawn_blocking(move || work.run(stale));
        Begun::Ours
    }
}

/// Which sampling is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// None: no sample is stale.
    Nothing,
    /// That of the caller's runs.
    Ours,
    /// That of another caller, perhaps of other runs.
    Others,
}

/// One sampling; the next one may begin when it is dropped, even by a panic.
struct Sampling(Loads);

impl Drop for Sampling {
    fn drop(&mut self) {
        self.0.lock().busy = false;
        self.0.done.send_replace(());
    }
}

impl Sampling {
    fn run(self, subjects: Vec<Subject>) {
        let began = Instant::now();
        let taken: Vec<(RunId, SampledRun)> = subjects.into_iter().filter_map(|subject| self.take(subject)).collect();
        let mut sampled = self.0.lock();
        sampled.runs.retain(|_, kept| kept.taken.elapsed() < FORGET);
        sampled.runs.extend(taken);
        sampled.took = began.elapsed();
    }

    /// Samples one run; returns none for a run that has ended, which keeps its last sample until it is dropped.
    fn take(&self, subject: Subject) -> Option<(RunId, SampledRun)> {
        let before = self.0.lock().runs.get(&subject.run).map(|kept| (kept.load, kept.group.clone()));
        let (before, group) = match before {
            Some((load, group)) => (Some(load), group),
            // The shim has recorded the control group that it made.
            None => (None, read_run(&subject.run_dir).ok().flatten().and_then(|record| record.cgroup)),
        };
        // A process that got the same pid later must not be sampled.
        if !process::is_alive(subject.shim).unwrap_or(false) {
            return None;
        }
        let used = match usage::of_tree(group.as_deref(), subject.shim.pid) {
            Ok(used) => used,
            Err(error) => {
                tracing::debug!(run = %subject.run, %error, "failed to read the usage of a run");
                return None;
            }
        };
        let (memory_bytes, memory_peak_bytes, memory_kind) = match used.memory {
            Memory::Charged { now, peak } => (now, peak, MemoryKind::Charged),
            Memory::Resident(bytes) => (bytes, None, MemoryKind::Resident),
        };
        let reading = LoadReading {
            at: UnixMillis(clock::unix_ms()),
            cpu_us: used.cpu_us,
            memory_bytes,
            memory_peak_bytes,
            memory_kind,
            io_read_bytes: used.io_read_bytes,
            io_written_bytes: used.io_written_bytes,
            processes: used.processes,
        };
        let load = sample(before.as_ref(), &reading, subject.started_at);
        Some((subject.run, SampledRun { load, taken: Instant::now(), group }))
    }
}
