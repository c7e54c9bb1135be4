//! The life of the daemon: start, signals, reload, shutdown.
//!
//! ```text
//!   lock ─► settings ─► store ─► plugins ─► recovery ─► listen ─► READY
//!   SIGHUP reload · SIGTSTP pause all · SIGCONT resume those · SIGUSR1 status to the log
//!   SIGTERM/SIGINT: checkpoint or park the projects, undo pauses, join every task, close the store
//! ```

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::Command;
use fermata_core::project::ProjectState;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{OperationId, ProjectName};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Handle;

use crate::config::{OnShutdown, Paths, Settings, SettingsError};
use crate::plugins::{PluginConfig, PluginError, Plugins};
use crate::pressure;
use crate::profile::{ProfileError, Profiles};
use crate::project::{Begin, Label, Projects, before_shutdown, new_boot_epoch, new_operation};
use crate::recovery;
use crate::services::{self, Programs, Services};
use crate::socket::listener::{BindError, Listener};
use crate::socket::{Daemon, resume_quietly};
use crate::store::{Store, StoreError};
use fermata_os::cgroup::{Freezer, FreezerSetting};
use fermata_os::limits::Limit;
use fermata_os::lock::{LockError, StateLock};
use fermata_os::signals::BlockedSignals;
use fermata_os::{limits, memory, peer, process};
use fermata_protocol::error_chain;

/// The exit code when another daemon uses the state directory: `EX_TEMPFAIL` of sysexits(3).
pub const ALREADY_RUNNING: i32 = 75;

/// How long the shutdown waits for the tasks.
const LEAVING: Duration = Duration::from_secs(20);

/// How long the checkpoints at shutdown may take.
const SAVING: Duration = Duration::from_secs(30);

/// How long the pauses at shutdown may take, if agents are to be parked.
const PARKING: Duration = Duration::from_secs(60);

/// How long the start waits for the state directory's lock of a daemon that is exiting.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// The delay after an operation before memory is given back to the kernel. An operation with very many agents leaves
/// megabytes unused, but giving them back takes longer than a small checkpoint, which must not wait for that.
const TRIM_AFTER: Duration = Duration::from_secs(3);

/// Why the daemon could not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("use the state directory {}: another daemon owns it ({holder})", path.display())]
    AlreadyRunning {
        path: PathBuf,
        /// The other daemon, described for the user.
        holder: String,
    },
    #[error("lock the state directory")]
    Lock(#[source] LockError),
    #[error("create {}", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Config(#[from] SettingsError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("start the plugins")]
    Plugins(#[from] PluginError),
    #[error("load the projects: {0}")]
    Recovery(String),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("find {name}: it is neither beside fermatad nor in the PATH")]
    ProgramMissing { name: &'static str },
    #[error("read the kernel's boot id")]
    BootId(#[source] std::io::Error),
    #[error("block signals")]
    Signals(#[source] std::io::Error),
    #[error("start the threads of the runtime")]
    Runtime(#[source] std::io::Error),
}

/// Options of the command line.
#[derive(Debug)]
pub struct Options {
    pub paths: Paths,
    /// Whether operations that a crash has left unfinished are completed or undone.
    pub recover: bool,
    /// The signals of [`block_signals`].
    pub signals: BlockedSignals,
}

/// Changes the filter of the log while the daemon runs.
pub type LogHandle = Handle<EnvFilter, tracing_subscriber::Registry>;

/// A signal that the daemon acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signal {
    Reload,
    PauseAll,
    ResumeAll,
    Status,
    End,
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// The daemon cannot start.
pub async fn run(options: Options, settings: Settings, log: LogHandle) -> Result<(), StartError> {
    let paths = options.paths.clone();
    prepare_directories(&paths)?;
    let holder = format!("fermatad, pid {}", std::process::id());
    let lock = take_lock(&paths.state.join("lock"), &holder).await.map_err(|error| match error {
        LockError::Held { holder, .. } => StartError::AlreadyRunning { path: paths.state.clone(), holder },
        other => StartError::Lock(other),
    })?;
    // Locked until the process exits: work on blocking threads may outlast this function.
    Box::leak(Box::new(lock));
    let signals = take_signals(options.signals).map_err(StartError::Signals)?;
    // Each agent has a link to its shim; the agents themselves get the original limit.
    let open_files = match limits::raise_open_files() {
        Ok(before) => Some(before),
        Err(error) => {
            tracing::warn!(%error, "failed to raise the limit of open files");
            None
        }
    };
    let services = open_services(&paths, settings, open_files).await?;
    let projects = Arc::new(Projects::new(Arc::clone(&services)));
    let report = recovery::run(&projects, options.recover).await.map_err(|f| StartError::Recovery(f.to_string()))?;
    for line in &report {
        tracing::info!("recovery: {line}");
    }
    let group = nix::unistd::geteuid()
        .is_root()
        .then(|| peer::group_id(&services.settings().operator_group).ok().flatten())
        .flatten();
    let listener = Listener::open(&paths.socket, group)?;
    let reload = reloader(Arc::clone(&services), log);
    let daemon = Arc::new(Daemon {
        projects: Arc::clone(&projects),
        started_at: services::now(),
        boot_epoch: new_boot_epoch(),
        terminals: Default::default(),
        recovery: report,
        freezer: describe_freezer(&services),
        reload: Box::new(reload),
    });
    tracing::info!(socket = %paths.socket.display(), state = %paths.state.display(), "ready");
    notify(&[sd_notify::NotifyState::Ready]);
    let mut background = JoinSet::new();
    background.spawn(housekeeping(Arc::clone(&services)));
    background.spawn(pressure::watch(Arc::clone(&projects)));
    tokio::select! {
        () = listener.run(&daemon) => {}
        () = serve_signals(signals, &daemon) => {}
    }
    notify(&[sd_notify::NotifyState::Stopping]);
    background.shutdown().await;
    listener.remove();
    shut_down(&projects).await;
    Ok(())
}

fn prepare_directories(paths: &Paths) -> Result<(), StartError> {
    let shims = paths.runtime.join("shims");
    for (dir, mode) in [(&paths.state, 0o700), (&paths.runtime, 0o755), (&shims, 0o700)] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(dir)
            .map_err(|source| StartError::Directory { path: dir.clone(), source })?;
    }
    Ok(())
}

async fn open_services(
    paths: &Paths,
    settings: Settings,
    open_files: Option<Limit>,
) -> Result<Arc<Services>, StartError> {
    let profiles = Profiles::load(&paths.profiles)?;
    let programs = Programs { shim: find_program("fermata-shim")?, open_files };
    let host = find_program("fermata-plugin-host")?;
    let boot_id = process::boot_id().map_err(StartError::BootId)?;
    let database = paths.state.join("fermata.sqlite");
    let new_id = new_boot_epoch();
    let store = Store::open(&database, new_id.trim_start_matches("epoch-"))?;
    let config = PluginConfig::new(paths.plugins.clone(), paths.plugin_settings.clone(), host, paths.state.clone());
    let plugins = Plugins::start(config).await?;
    Ok(Arc::new(Services::new(paths.clone(), programs, store, plugins, settings, profiles, boot_id)))
}

/// Takes the lock of the state directory. A daemon that was killed may keep it for an instant: the kernel closes its
/// files when the last of its threads has ended. A live daemon is never waited for, since one that loses the race for
/// the start would otherwise take over when the winner is stopped.
async fn take_lock(path: &Path, holder: &str) -> Result<StateLock, LockError> {
    let until = tokio::time::Instant::now() + LOCK_PATIENCE;
    loop {
        match StateLock::acquire(path, holder) {
            Err(LockError::Held { passing: true, .. }) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            taken => return taken,
        }
    }
}

/// Finds a program beside this one, else in the PATH.
fn find_program(name: &'static str) -> Result<PathBuf, StartError> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join(name)));
    let in_path = std::env::var_os("PATH");
    beside
        .into_iter()
        .chain(in_path.iter().flat_map(std::env::split_paths).map(|dir| dir.join(name)))
        .find(|path| path.is_file())
        .ok_or(StartError::ProgramMissing { name })
}

/// Describes how agents will be frozen. Creates a control group as their shims will, and removes it again.
fn describe_freezer(services: &Services) -> String {
    let agents = &services.settings().agents;
    if agents.freezer == FreezerSetting::Signals {
        return "signals: the configuration says so".to_owned();
    }
    let name = format!("fermata-probe-{}", std::process::id());
    match Freezer::prepare(agents.cgroup_parent.as_deref(), &name) {
        Freezer::Cgroup(group) => {
            if let Err(error) = group.remove(Duration::from_secs(1)) {
                tracing::warn!(error = error_chain(&error), "failed to remove the probe control group");
            }
            "cgroup".to_owned()
        }
        Freezer::Signals { why } => format!("signals: {why}"),
    }
}

/// Returns the function that reads settings and profiles again. If either is not valid, nothing is changed.
fn reloader(services: Arc<Services>, log: LogHandle) -> impl Fn() -> Result<Vec<String>, String> + Send + Sync {
    move || {
        let read = || -> Result<Vec<String>, StartError> {
            let settings = Settings::read(&services.paths)?;
            let profiles = Profiles::load(&services.paths.profiles)?;
            let filter = log_filter(&settings.log);
            if let Err(error) = log.reload(filter) {
                tracing::warn!(%error, "failed to change the filter of the log");
            }
            Ok(services.reload(settings, profiles))
        };
        read().map_err(|error| error_chain(&error))
    }
}

/// Parses the filter of the log; `info` if it is not valid.
pub fn log_filter(text: &str) -> EnvFilter {
    EnvFilter::try_new(text).unwrap_or_else(|_| EnvFilter::new("info"))
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    if let Some(at) = at {
        tokio::time::sleep_until(at).await;
    }
}

/// Periodic work: notifies systemd's watchdog, and gives unused memory back to the kernel.
async fn housekeeping(services: Arc<Services>) {
    let pace = sd_notify::watchdog_enabled().map_or(Duration::from_secs(30), |limit| limit / 3);
    let mut beat = tokio::time::interval_at(tokio::time::Instant::now() + pace, pace);
    let mut trim_at = None;
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = services.settled.notified() => {
                trim_at.get_or_insert_with(|| tokio::time::Instant::now() + TRIM_AFTER);
                continue;
            }
            () = sleep_until(trim_at), if trim_at.is_some() => {
                trim_at = None;
                drop(tokio::task::spawn_blocking(memory::give_back).await);
                continue;
            }
        }
        services.tokens.drop_if_idle();
        drop(tokio::task::spawn_blocking(memory::give_back).await);
        // Without an answer of the store the daemon cannot do anything: the watchdog may then start a new one.
        if services.store.read(|_| Ok(())).await.is_ok() {
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "failed to notify the service manager");
    }
}

/// The signals that the daemon acts on.
const SIGNALS: [(nix::sys::signal::Signal, Signal); 6] = {
    use nix::sys::signal::Signal::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGUSR1};
    [
        (SIGHUP, Signal::Reload),
        (SIGTSTP, Signal::PauseAll),
        (SIGCONT, Signal::ResumeAll),
        (SIGUSR1, Signal::Status),
        (SIGINT, Signal::End),
        (SIGTERM, Signal::End),
    ]
};

/// Blocks the signals that [`run`] acts on. To be called before the process has a second thread.
///
/// # Errors
/// When the kernel refuses.
pub fn block_signals() -> std::io::Result<BlockedSignals> {
    BlockedSignals::block(SIGNALS.map(|(signal, _)| signal))
}

fn take_signals(blocked: BlockedSignals) -> std::io::Result<mpsc::Receiver<Signal>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(taken) = blocked.wait() {
            let signal = SIGNALS.iter().find(|(signal, _)| *signal == taken).map(|(_, signal)| *signal);
            if signal.is_some_and(|signal| sender.blocking_send(signal).is_err()) {
                return;
            }
        }
    })?;
    Ok(receiver)
}

/// The pauses by SIGTSTP, which SIGCONT ends.
///
/// The lock is held across the pauses and resumes on purpose: a SIGCONT must not resume before the pauses of the SIGTSTP
/// before it have ended (tokio's mutex is fair). It delays only these tasks; the signals themselves are still read.
type SignalPauses = Arc<tokio::sync::Mutex<Vec<(ProjectName, OperationId)>>>;

/// Acts on signals until one ends the daemon. systemd sends SIGCONT right after SIGTERM and means no resume: SIGTERM is
/// taken first, since its number is lower, and no signal is read after it.
async fn serve_signals(mut signals: mpsc::Receiver<Signal>, daemon: &Arc<Daemon>) {
    let pauses = SignalPauses::default();
    let mut tasks = JoinSet::new();
    while let Some(signal) = signals.recv().await {
        match signal {
            Signal::Reload => {
                notify(&[sd_notify::NotifyState::Reloading]);
                match (daemon.reload)() {
                    Ok(changed) => tracing::info!(?changed, "reloaded the settings"),
                    Err(error) => tracing::error!(error, "failed to reload the settings; they are unchanged"),
                }
                if let Err(error) = daemon.projects.services().plugins.reload().await {
                    tracing::error!(error = error_chain(&error), "failed to reload the plugins; they are unchanged");
                }
                notify(&[sd_notify::NotifyState::Ready]);
            }
            // Separate tasks, so that a SIGTERM is read meanwhile.
            Signal::PauseAll => {
                let (daemon, pauses) = (Arc::clone(daemon), Arc::clone(&pauses));
                tasks.spawn(async move {
                    let mut pauses = pauses.lock().await;
                    pauses.extend(
                        pause_all(&daemon, PauseMode::Freeze, PauseCause::Signal, "SIGTSTP to the daemon").await,
                    );
                });
            }
            Signal::ResumeAll => {
                let (daemon, pauses) = (Arc::clone(daemon), Arc::clone(&pauses));
                tasks.spawn(async move {
                    let mut pauses = pauses.lock().await;
                    resume_all(&daemon, std::mem::take(&mut *pauses)).await;
                });
            }
            Signal::Status => log_status(daemon),
            Signal::End => break,
        }
    }
    match daemon.projects.services().settings().on_shutdown {
        OnShutdown::Park => {
            let parking = pause_all(daemon, PauseMode::Park, PauseCause::Shutdown, "the daemon shuts down");
            if tokio::time::timeout(PARKING, parking).await.is_err() {
                tracing::warn!("not every project could be parked in time");
            }
        }
        OnShutdown::Leave => {
            if tokio::time::timeout(SAVING, save_all(daemon)).await.is_err() {
                tracing::warn!("not every project could be saved in time; the agents keep running");
            }
        }
    }
    tasks.shutdown().await;
}

/// Pauses every active project, side by side; returns the pauses that have succeeded.
async fn pause_all(
    daemon: &Daemon,
    mode: PauseMode,
    cause: PauseCause,
    reason: &str,
) -> Vec<(ProjectName, OperationId)> {
    let active = daemon.projects.all().into_iter().filter(|h| h.project().state.status() == ProjectStatus::Active);
    let each = active.map(|handle| {
        let reason = Some(reason.to_owned());
        async move {
            let operation = new_operation();
            let command = Command::Pause { operation: operation.clone(), cause, reason, mode, grace_ms: None };
            let begin = Begin {
                command,
                operation: operation.clone(),
                label: Label::default(),
                tokens: Vec::new(),
                keyed: None,
            };
            let name = handle.name();
            match handle.begin(begin).await {
                Ok(_) => Some((name, operation)),
                Err(failure) => {
                    tracing::error!(project = %name, %failure, "failed to pause a project");
                    None
                }
            }
        }
    });
    crate::operations::side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten().collect()
}

/// Makes a checkpoint of every project whose agents run and that has changed: the machine may be shutting down.
async fn save_all(daemon: &Daemon) {
    let each = daemon.projects.all().into_iter().map(|handle| async move {
        if let Err(failure) = before_shutdown(&handle).await {
            tracing::error!(project = %handle.name(), %failure, "failed to save a project before the shutdown");
        }
    });
    drop(crate::operations::side_by_side(each.collect::<Vec<_>>()).await);
}

/// Resumes the projects that are still paused by these pauses, and not by a later one.
async fn resume_all(daemon: &Daemon, pauses: Vec<(ProjectName, OperationId)>) {
    let still_paused = |(name, pause): &(ProjectName, OperationId)| {
        let handle = daemon.projects.get(name).ok()?;
        let is_same = matches!(&*handle.project().state, ProjectState::Paused(paused) if paused.operation == *pause);
        is_same.then_some(handle)
    };
    let handles = pauses.iter().filter_map(still_paused);
    let each = handles.map(|handle| async move {
        if let Err(failure) = resume_quietly(&handle).await {
            tracing::error!(project = %handle.name(), %failure, "failed to resume a project");
        }
    });
    drop(crate::operations::side_by_side(each.collect::<Vec<_>>()).await);
}

fn log_status(daemon: &Daemon) {
    for handle in daemon.projects.all() {
        let project = handle.project();
        tracing::info!(
            project = %project.name,
            status = %project.state.status(),
            agents = project.agents.len(),
            running = project.alive_agents().count(),
            operation = project.operation().map(ToString::to_string),
            "status"
        );
    }
}

/// Undoes pauses, joins all tasks, closes the store. The agents keep running.
async fn shut_down(projects: &Projects) {
    let services = projects.services();
    let ended = async {
        projects.shut_down().await;
        services.stopping.cancel();
        services.tracker.close();
        services.tracker.wait().await;
    };
    if tokio::time::timeout(LEAVING, ended).await.is_err() {
        tracing::warn!("not every operation has ended in time; the next start completes or undoes them");
        services.stopping.cancel();
    }
    services.plugins.shutdown().await;
    services.store.close().await;
    tracing::info!("ended");
}
