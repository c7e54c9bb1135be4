//! The services that the modules above the store share: store, plugins, settings, agents' channels, tasks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use fermata_core::redact::Secrets;
use fermata_core::score::{ItemTypeKey, Weights};
use fermata_protocol::context::ItemType;
use fermata_protocol::rpc::Notification;
use fermata_protocol::{AgentName, OperationId, ProjectName, RunId, Target, UnixMillis};
use serde::Serialize;
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Paths, Settings};
use crate::load::Loads;
use crate::plugins::Plugins;
use crate::profile::Profiles;
use crate::store::{Store, StoreError, rows};
use crate::tokens::TokenCounter;
use fermata_history::FileWatcher;
use fermata_os::clock;
use fermata_os::limits::Limit;

/// How many snapshots, comparisons and verifications run at the same time.
const HEAVY: usize = 8;

/// How many automatic checkpoints are made at the same time.
const AUTOMATIC: usize = 2;

/// How shims are started.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The path of `fermata-shim`.
    pub shim: PathBuf,
    /// The limit of open files that agents get: the daemon's own before it was raised.
    pub open_files: Option<Limit>,
}

/// Progress of an operation, for the clients that wait for it. Notes may be dropped for a slow receiver.
#[derive(Debug, Clone, Serialize)]
pub struct ProgressNote {
    pub operation_id: OperationId,
    /// The step, or a part of it.
    pub step: String,
    pub done: u64,
    /// 0 when it is not known.
    pub total: u64,
    /// What is counted: `files`, `objects`, `paths`.
    pub unit: &'static str,
}

/// The services of the daemon.
pub struct Services {
    pub paths: Paths,
    pub programs: Programs,
    pub store: Store,
    pub plugins: Plugins,
    pub tokens: TokenCounter,
    pub loads: Loads,
    pub channels: Channels,
    pub progress: broadcast::Sender<ProgressNote>,
    /// The tasks that the shutdown waits for.
    pub tracker: TaskTracker,
    /// Limits concurrent work on histories, which would otherwise occupy all blocking threads and delay every query of
    /// the database.
    pub heavy: Semaphore,
    /// The same for work on workspaces whose agents are frozen.
    pub urgent: Semaphore,
    /// One permit for maintenance.
    pub background: Semaphore,
    /// Limits concurrent automatic checkpoints, so that those of many projects do not delay requests.
    pub automatic: Arc<Semaphore>,
    /// Cancelled at shutdown.
    pub stopping: CancellationToken,
    /// Notified after a reload of the settings.
    pub reloaded: Notify,
    /// Notified after an operation: its memory can be given back.
    pub settled: Notify,
    /// The kernel's boot id.
    pub boot_id: String,
    watcher: OnceLock<Option<Arc<FileWatcher>>>,
    settings: RwLock<Arc<Settings>>,
    profiles: RwLock<Arc<Profiles>>,
}

impl Services {
    pub fn new(
        paths: Paths,
        programs: Programs,
        store: Store,
        plugins: Plugins,
        settings: Settings,
        profiles: Profiles,
        boot_id: String,
    ) -> Self {
        let tracker = TaskTracker::new();
        Self {
            paths,
            programs,
            store,
            plugins,
            tokens: TokenCounter::default(),
            loads: Loads::new(tracker.clone()),
            channels: Channels::default(),
            progress: broadcast::channel(256).0,
            tracker,
            heavy: Semaphore::new(HEAVY),
            urgent: Semaphore::new(HEAVY),
            background: Semaphore::new(1),
            watcher: OnceLock::new(),
            automatic: Arc::new(Semaphore::new(AUTOMATIC)),
            stopping: CancellationToken::new(),
            reloaded: Notify::new(),
            settled: Notify::new(),
            boot_id,
            settings: RwLock::new(Arc::new(settings)),
            profiles: RwLock::new(Arc::new(profiles)),
        }
    }

    /// Returns the watcher of all workspaces, started on the first call; none if the settings or the kernel do not allow
    /// it.
    pub fn watcher(&self) -> Option<&Arc<FileWatcher>> {
        if !self.settings().checkpoints.watch {
            return None;
        }
        let start = || match FileWatcher::start(&self.paths.state.join("watch")) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "failed to watch workspaces; each checkpoint compares the state of every file");
                None
            }
        };
        self.watcher.get_or_init(start).as_ref()
    }

    /// Returns the current settings.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the settings and profiles; returns the names of the sections that changed.
    pub fn reload(&self, settings: Settings, profiles: Profiles) -> Vec<String> {
        *self.profiles.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(profiles);
        let mut current = self.settings.write().unwrap_or_else(PoisonError::into_inner);
        let changed = current.differences(&settings);
        *current = Arc::new(settings);
        self.reloaded.notify_one();
        changed
    }

    /// Returns the current profiles.
    pub fn profiles(&self) -> Arc<Profiles> {
        Arc::clone(&self.profiles.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the weights for scoring.
    pub fn weights(&self) -> Weights {
        let settings = self.settings();
        let keyed = settings.context.weights.iter().filter_map(|(name, weight)| {
            let kind = ItemType::ALL.into_iter().find(|kind| kind.as_str() == name)?;
            Some((ItemTypeKey(kind), *weight))
        });
        Weights::default().with(&keyed.collect())
    }

    /// Returns the secrets in an agent's environment, to be redacted in its reports.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn secrets_of(&self, project: &ProjectName, agent: &AgentName) -> Result<Secrets, StoreError> {
        let (project, agent) = (project.clone(), agent.clone());
        let env = self.store.read(move |connection| rows::load_environment(connection, &project, &agent)).await?;
        Ok(Secrets::of(&env))
    }

    pub fn project_dirs(&self, project: &ProjectName) -> ProjectDirs {
        ProjectDirs { root: self.paths.state.join("projects").join(project.as_str()) }
    }

    /// Returns how long a live shim may go without an answer.
    pub fn shim_patience(&self) -> Duration {
        Duration::from_millis(self.settings().agents.shim_patience_ms)
    }

    /// Returns the path of the socket on which the shim of a run listens.
    pub fn shim_socket(&self, run: &RunId) -> PathBuf {
        self.paths.runtime.join("shims").join(format!("{run}.sock"))
    }
}

/// Returns the wall clock's time.
pub fn now() -> UnixMillis {
    UnixMillis(clock::unix_ms())
}

/// The paths of a project's files.
#[derive(Debug, Clone)]
pub struct ProjectDirs {
    pub root: PathBuf,
}

impl ProjectDirs {
    /// Returns the directory of the workspace snapshots.
    pub fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    pub fn checkpoint(&self, number: u64) -> PathBuf {
        self.checkpoints().join(number.to_string())
    }

    /// Returns the directory of a checkpoint that is being made.
    pub fn partial_checkpoint(&self, number: u64) -> PathBuf {
        self.checkpoints().join(format!("{number}.partial"))
    }

    /// Returns the file of a restore's plan.
    pub fn restore_plan(&self, operation: &OperationId) -> PathBuf {
        self.root.join(format!("restore-{operation}.json"))
    }

    pub fn agents(&self) -> PathBuf {
        self.root.join("agents")
    }

    pub fn agent(&self, agent: &AgentName) -> PathBuf {
        self.agents().join(agent.as_str())
    }

    pub fn runs(&self, agent: &AgentName) -> PathBuf {
        self.agent(agent).join("runs")
    }

    pub fn run(&self, agent: &AgentName, run: &RunId) -> PathBuf {
        self.runs(agent).join(run.as_str())
    }
}

/// The connections on which agents listen for pause requests, and their acknowledgements.
#[derive(Default)]
pub struct Channels {
    open: Mutex<BTreeMap<String, Vec<Channel>>>,
}

struct Channel {
    id: u64,
    sender: mpsc::Sender<Notification>,
    acknowledged: watch::Sender<u64>,
}

/// Removes the channel when the connection ends.
pub struct ChannelGuard {
    services: Arc<Services>,
    target: String,
    id: u64,
}

impl Drop for ChannelGuard {
    fn drop(&mut self) {
        let mut open = self.services.channels.lock();
        if let Some(channels) = open.get_mut(&self.target) {
            channels.retain(|channel| channel.id != self.id);
            if channels.is_empty() {
                open.remove(&self.target);
            }
        }
    }
}

impl Channels {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<Channel>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the channel of an agent; notifications go to `sender` until the guard is dropped.
    pub fn open(services: &Arc<Services>, target: &Target, sender: mpsc::Sender<Notification>) -> ChannelGuard {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let id = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let target = target.to_string();
        let channel = Channel { id, sender, acknowledged: watch::channel(0).0 };
        services.channels.lock().entry(target.clone()).or_default().push(channel);
        ChannelGuard { services: Arc::clone(services), target, id }
    }

    /// Sends an agent the request to prepare for a pause; `None` when it has no open channel.
    ///
    /// The returned receivers change when the agent acknowledges.
    pub fn request_pause(&self, target: &Target, notification: &Notification) -> Option<Vec<watch::Receiver<u64>>> {
        let open = self.lock();
        let channels = open.get(&target.to_string())?;
        let receivers = channels
            .iter()
            // A full channel counts as none: its agent reads nothing.
            .filter(|channel| channel.sender.try_send(notification.clone()).is_ok())
            .map(|channel| {
                let mut receiver = channel.acknowledged.subscribe();
                receiver.mark_unchanged();
                receiver
            })
            .collect::<Vec<_>>();
        (!receivers.is_empty()).then_some(receivers)
    }

    /// Records an agent's acknowledgement; `false` when it has no open channel.
    pub fn acknowledge(&self, target: &Target) -> bool {
        let open = self.lock();
        let Some(channels) = open.get(&target.to_string()) else { return false };
        for channel in channels {
            channel.acknowledged.send_modify(|count| *count += 1);
        }
        true
    }
}
