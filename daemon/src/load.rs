//! What agents use: samples that are kept, and taken anew only while somebody looks.
//!
//! Whoever looks is not made to wait: they get what is known, after at most `PATIENCE`, while a
//! blocking thread samples what is stale. So it costs nothing when nobody looks, and when somebody
//! looks without end it costs `SHARE` of one core at most.

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

/// A sample that is younger is fresh enough for everybody.
const FRESH: Duration = Duration::from_secs(2);

/// How long somebody who looks waits for a sample that is not there yet, or old.
const PATIENCE: Duration = Duration::from_millis(10);

/// With more runs than these a sample takes longer than anybody waits.
const FEW: usize = 100;

/// How long somebody who decides by the sample waits for it.
const DECIDING: Duration = Duration::from_secs(5);

/// A sample that took one second is followed by so many without.
const SHARE: u32 = 50;

/// A sample that nobody has renewed for so long belongs to a run that is over.
const FORGET: Duration = Duration::from_secs(600);

/// One run whose tree is looked at.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The run.
    pub run: RunId,
    /// Where its records are.
    pub run_dir: PathBuf,
    /// Its shim.
    pub shim: process::ProcessId,
    /// When it began.
    pub started_at: UnixMillis,
}

/// The samples, by run.
pub type Samples = BTreeMap<RunId, Load>;

/// The samples that are known.
#[derive(Clone)]
pub struct Loads {
    known: Arc<Mutex<SampledRuns>>,
    done: watch::Sender<()>,
    tracker: TaskTracker,
}

#[derive(Default)]
struct SampledRuns {
    runs: HashMap<RunId, SampledRun>,
    /// A thread is sampling.
    busy: bool,
    /// How long the last sample took.
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
    /// Makes an empty store of samples.
    pub fn new(tracker: TaskTracker) -> Self {
        Self { known: Arc::default(), done: watch::channel(()).0, tracker }
    }

    fn lock(&self) -> MutexGuard<'_, SampledRuns> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is known of these runs, and sees to it that more is known soon.
    pub async fn sample(&self, subjects: Vec<Subject>) -> Samples {
        let patience = if subjects.len() <= FEW { PATIENCE } else { Duration::ZERO };
        self.within(patience, subjects).await
    }

    /// Returns samples by which something is decided: fresh ones, unless that takes too long.
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
            // A run that has ended is not there afterwards either.
            if begun == Begun::Ours {
                break;
            }
        }
        let known = self.lock();
        runs.into_iter().filter_map(|run| known.runs.get(&run).map(|kept| (run.clone(), kept.load))).collect()
    }

    /// Begins to sample what is stale, unless somebody does already.
    fn begin(&self, subjects: &[Subject]) -> Begun {
        let mut known = self.lock();
        let stale: Vec<Subject> = subjects.iter().filter(|subject| known.is_stale(&subject.run)).cloned().collect();
        if stale.is_empty() {
            return Begun::Nothing;
        }
        if known.busy {
            return Begun::Others;
        }
        known.busy = true;
        let work = Work(self.clone());
        self.tracker.spawn_blocking(move || work.run(stale));
        Begun::Ours
    }
}

/// Which sample is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// None: everything is fresh.
    Nothing,
    /// That of the runs that were asked for.
    Ours,
    /// That of somebody else, perhaps of other runs.
    Others,
}

/// The work of one sample; the next one may begin when it is dropped, whatever has happened.
struct Work(Loads);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.lock().busy = false;
        self.0.done.send_replace(());
    }
}

impl Work {
    fn run(self, subjects: Vec<Subject>) {
        let began = Instant::now();
        let taken: Vec<(RunId, SampledRun)> = subjects.into_iter().filter_map(|subject| self.take(subject)).collect();
        let mut known = self.0.lock();
        known.runs.retain(|_, kept| kept.taken.elapsed() < FORGET);
        known.runs.extend(taken);
        known.took = began.elapsed();
    }

    /// Samples one run; a run that has just ended keeps its last sample for a while.
    fn take(&self, subject: Subject) -> Option<(RunId, SampledRun)> {
        let before = self.0.lock().runs.get(&subject.run).map(|kept| (kept.load, kept.group.clone()));
        let (before, group) = match before {
            Some((load, group)) => (Some(load), group),
            // Who made the group is the one who knows where it is.
            None => (None, read_run(&subject.run_dir).ok().flatten().and_then(|record| record.cgroup)),
        };
        // A pid that was given to somebody else must not be taken for the agent's.
        if !process::is_alive(subject.shim).unwrap_or(false) {
            return None;
        }
        let used = match usage::of_tree(group.as_deref(), subject.shim.pid) {
            Ok(used) => used,
            Err(error) => {
                tracing::debug!(run = %subject.run, %error, "what it uses cannot be read");
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
