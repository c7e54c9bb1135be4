//! One plugin in the registry: its files, the queues of its task, and the calls that the daemon makes through it.
//!
//! An entry never changes: enabling, disabling and reloading replace it.

use super::artifact::{self, PluginArtifact};
use super::config::{ConfiguredPlugin, PluginConfig, PluginConfigError, PluginFile};
use super::output::PluginOutput;
use super::process::HostLaunch;
use super::status::{HostState, PluginStatus, now_ms};
use super::supervisor::{PluginRequest, PluginSupervisor};
use fermata_protocol::error_chain;

use super::blocking;
use fermata_plugin_api::message::CHECKPOINT_SAVE;
use fermata_plugin_api::{CallError, PluginKind, SaveReply, SaveRequest, event_matches};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How many requests may wait for one plugin.
const REQUEST_QUEUE: usize = 16;

/// How long the supervisor may take to cancel a call and to end its host, beyond deadline and cancel grace.
const SUPERVISOR_TIMEOUT: Duration = Duration::from_secs(7);

/// One plugin in the registry.
pub(super) struct RegisteredPlugin {
    pub(super) found: ConfiguredPlugin,
    file: PluginFile,
    deadline: Duration,
    status: watch::Receiver<PluginStatus>,
    output: PluginOutput,
    dropped: AtomicU64,
    /// `None` when the plugin is disabled or unusable.
    task: Option<SupervisorTask>,
}

/// The task that supervises a plugin.
struct SupervisorTask {
    requests: mpsc::Sender<PluginRequest>,
    events: mpsc::Sender<Arc<Value>>,
    shutdown: CancellationToken,
    /// Taken by the first call of [`RegisteredPlugin::ended`].
    handle: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl RegisteredPlugin {
    /// Makes the entry and, unless the plugin is disabled or unusable, starts its task in `tasks`. `choice` overrides the
    /// plugin's file.
    pub(super) fn new(
        config: &Arc<PluginConfig>,
        tasks: &TaskTracker,
        found: ConfiguredPlugin,
        file: Result<PluginFile, PluginConfigError>,
        choice: Option<bool>,
    ) -> Self {
        let (file, error) = match file {
            Ok(file) => (file, None),
            Err(error) => (PluginFile::default(), Some(error_chain(&error))),
        };
        let state = match (choice.unwrap_or(file.enabled), &error) {
            (false, _) => HostState::Disabled,
            (true, Some(_)) => HostState::Failed,
            (true, None) => HostState::Starting,
        };
        if let Some(error) = &error {
            tracing::warn!(plugin = found.name, error, "the plugin is not started");
        }
        let (status, status_receiver) = watch::channel(PluginStatus {
            name: found.name.clone(),
            path: found.path.clone(),
            version: None,
            kinds: Vec::new(),
            state,
            restarts: 0,
            last_error: error,
            since_ms: now_ms(),
            pid: None,
            calls: 0,
            failed_calls: 0,
            dropped_events: 0,
            settings_file: found.settings_file.clone(),
            recent_output: Vec::new(),
        });
        let output = PluginOutput::new(&found.name);
        let deadline = match file.deadline_ms {
            Some(deadline) => Duration::from_millis(deadline),
            None => config.deadline,
        };
        let task = (state == HostState::Starting).then(|| {
            let (requests, request_queue) = mpsc::channel(REQUEST_QUEUE);
            let (events, event_queue) = mpsc::channel(config.queue.max(1));
            let shutdown = CancellationToken::new();
            let supervisor = PluginSupervisor {
                config: Arc::clone(config),
                launch: HostLaunch::new(config, tasks, &found.path, found.settings_file.as_deref()),
                deadline,
                requests: request_queue,
                events: event_queue,
                status,
                output: output.clone(),
                shutdown: shutdown.clone(),
            };
            let handle = std::sync::Mutex::new(Some(tasks.spawn(supervisor.run())));
            SupervisorTask { requests, events, shutdown, handle }
        });
        Self { found, file, deadline, status: status_receiver, output, dropped: AtomicU64::new(0), task }
    }

    pub(super) fn status(&self) -> PluginStatus {
        let mut status = self.status.borrow().clone();
        status.dropped_events = self.dropped.load(Ordering::Relaxed);
        status.recent_output = self.output.recent();
        status
    }

    pub(super) fn state(&self) -> HostState {
        self.status.borrow().state
    }

    /// Returns a receiver of the status that is closed with this entry.
    pub(super) fn watch(&self) -> watch::Receiver<PluginStatus> {
        self.status.clone()
    }

    /// Returns whether the plugin's files are unchanged and usable.
    pub(super) fn is_current(&self, found: &ConfiguredPlugin) -> bool {
        let state = self.state();
        // A failed plugin is checked again: the owner or mode of its file may have been corrected.
        state != HostState::Failed && self.found.path == found.path && self.found.identity == found.identity
    }

    /// Returns whether the plugin offers this function, or may do so once its first start is complete.
    pub(super) fn may_offer(&self, kind: PluginKind) -> bool {
        let status = self.status.borrow();
        let unknown = status.version.is_none() && status.state == HostState::Starting;
        self.task.is_some() && (unknown || status.kinds.contains(&kind))
    }

    /// Queues an event if the plugin subscribes to it; never waits. An event that does not fit is counted and dropped.
    pub(super) fn notify(&self, event: &Arc<Value>, name: &str) {
        let Some(task) = &self.task else { return };
        if !self.may_offer(PluginKind::Notify) || !event_matches(&self.file.events, name) {
            return;
        }
        let state = self.state();
        let has_host = matches!(state, HostState::Running | HostState::Starting);
        if !has_host || task.events.try_send(Arc::clone(event)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets the plugin write artifacts into a directory of its own, and checks them; removes the directory on failure.
    /// Returns the plugin's name with the result.
    pub(super) async fn save(
        self: Arc<Self>,
        mut request: SaveRequest,
        grace: Duration,
    ) -> (String, Result<Vec<PluginArtifact>, CallError>) {
        let name = self.found.name.clone();
        let directory = request.directory.join(&name);
        request.directory = directory.clone();
        let created = {
            let directory = directory.clone();
            blocking(move || artifact::make_directory(&directory)).await
        };
        if let Err(failure) = created {
            return (name, Err(failure));
        }
        let reply = self.call(CHECKPOINT_SAVE, &request, grace).await;
        let reply = reply.and_then(|reply| parsed::<SaveReply>(&reply));
        let plugin = name.clone();
        let collected = blocking(move || {
            let result = reply.and_then(|reply| artifact::collect(&plugin, &directory, reply.artifacts));
            if result.is_err() {
                artifact::discard(&directory);
            }
            result
        })
        .await;
        (name, collected)
    }

    /// Makes one checkpoint call within the plugin's deadline. `grace` is the time that a cancelled call may still take.
    pub(super) async fn call(
        &self,
        method: &'static str,
        params: &impl Serialize,
        grace: Duration,
    ) -> Result<Box<RawValue>, CallError> {
        let not_running = || CallError::new("not_running", "the plugin is not running");
        let task = self.task.as_ref().ok_or_else(not_running)?;
        let params = serde_json::to_value(params).map_err(|error| CallError::new("encoding", error.to_string()))?;
        let deadline = Instant::now() + self.deadline;
        let (reply, answer) = oneshot::channel();
        let request = PluginRequest { kind: PluginKind::Checkpoint, method, params, deadline, reply };
        let exchange = async {
            task.requests.send(request).await.map_err(|_| not_running())?;
            answer.await.map_err(|_| not_running())?
        };
        // The supervisor enforces the deadline of a call that it makes. This is for a supervisor that still starts a host.
        timeout_at(deadline + grace + SUPERVISOR_TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| Err(CallError::new("deadline", format!("{method} was not answered in time"))))
    }

    /// Cancels the task.
    pub(super) fn cancel(&self) {
        if let Some(task) = &self.task {
            task.shutdown.cancel();
        }
    }

    /// Waits for the end of the task, after [`RegisteredPlugin::cancel`].
    pub(super) async fn ended(&self) {
        let Some(task) = &self.task else { return };
        let handle = task.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle
            && let Err(error) = handle.await
        {
            tracing::error!(plugin = self.found.name, %error, "the task of a plugin failed");
        }
    }
}

impl Drop for RegisteredPlugin {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Parses a plugin's reply.
pub(super) fn parsed<T: DeserializeOwned>(reply: &RawValue) -> Result<T, CallError> {
    serde_json::from_str(reply.get())
        .map_err(|error| CallError::new("bad_reply", format!("the plugin's reply is not valid: {error}")))
}
