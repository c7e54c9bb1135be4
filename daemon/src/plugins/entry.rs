//! One plugin as the registry holds it: what it was made from, the way to its task, and the calls
//! that the rest of the daemon makes through it.
//!
//! An entry never changes: enabling, disabling and reloading put another one in its place.

use super::artifact::{self, PluginArtifact};
use super::config::{ConfigError, ConfiguredPlugin, PluginConfig, PluginFile};
use super::output::Output;
use super::process::Launch;
use super::status::{PluginState, PluginStatus, now_ms};
use super::supervisor::{Request, Supervisor};
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

/// Requests that may wait for one plugin.
const MAILBOX: usize = 16;

/// One plugin as the registry holds it.
pub(super) struct Plugin {
    pub(super) found: ConfiguredPlugin,
    file: PluginFile,
    deadline: Duration,
    status: watch::Receiver<PluginStatus>,
    output: Output,
    dropped: AtomicU64,
    task: Option<Task>,
}

/// The supervisor of a plugin that is not idle.
struct Task {
    requests: mpsc::Sender<Request>,
    events: mpsc::Sender<Arc<Value>>,
    shutdown: CancellationToken,
    joined: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Plugin {
    /// Makes the plugin and, unless it is switched off or unusable, starts its task.
    pub(super) fn new(
        config: &Arc<PluginConfig>,
        found: ConfiguredPlugin,
        file: Result<PluginFile, ConfigError>,
        choice: Option<bool>,
    ) -> Self {
        let (file, error) = match file {
            Ok(file) => (file, None),
            Err(error) => (PluginFile::default(), Some(error_chain(&error))),
        };
        let state = match (choice.unwrap_or(file.enabled), &error) {
            (false, _) => PluginState::Disabled,
            (true, Some(_)) => PluginState::Failed,
            (true, None) => PluginState::Starting,
        };
        if let Some(error) = &error {
            tracing::warn!(plugin = found.name, error, "the plugin is not started");
        }
        let (status, seen) = watch::channel(PluginStatus {
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
        let output = Output::new(&found.name);
        let deadline = match file.deadline_ms {
            Some(deadline) => Duration::from_millis(deadline),
            None => config.deadline,
        };
        let task = (state == PluginState::Starting).then(|| {
            let (requests, request_queue) = mpsc::channel(MAILBOX);
            let (events, event_queue) = mpsc::channel(config.queue.max(1));
            let shutdown = CancellationToken::new();
            let supervisor = Supervisor {
                config: Arc::clone(config),
                launch: Launch::new(config, &found.path, found.settings_file.as_deref()),
                deadline,
                requests: request_queue,
                events: event_queue,
                status,
                output: output.clone(),
                shutdown: shutdown.clone(),
            };
            Task { requests, events, shutdown, joined: std::sync::Mutex::new(Some(tokio::spawn(supervisor.run()))) }
        });
        Self { found, file, deadline, status: seen, output, dropped: AtomicU64::new(0), task }
    }

    /// What `plugin ls` shows of it.
    pub(super) fn status(&self) -> PluginStatus {
        let mut status = self.status.borrow().clone();
        status.dropped_events = self.dropped.load(Ordering::Relaxed);
        status.recent_output = self.output.recent();
        status
    }

    /// The plugin's state as it is now.
    pub(super) fn state(&self) -> PluginState {
        self.status.borrow().state
    }

    /// A view of the status that can be waited on; it ends with this entry.
    pub(super) fn watch(&self) -> watch::Receiver<PluginStatus> {
        self.status.clone()
    }

    /// Says whether the files are those that this plugin was made from, and it got along with them.
    pub(super) fn is_current(&self, found: &ConfiguredPlugin) -> bool {
        let state = self.state();
        // Whose file it is and who may write it is not part of its content: look again.
        state != PluginState::Failed && self.found.path == found.path && self.found.identity == found.identity
    }

    /// Says whether the plugin offers this, or may do so once it has been started.
    pub(super) fn may_offer(&self, kind: PluginKind) -> bool {
        let status = self.status.borrow();
        let unknown = status.version.is_none() && status.state == PluginState::Starting;
        self.task.is_some() && (unknown || status.kinds.contains(&kind))
    }

    /// Queues an event for the plugin if it wants it; never waits.
    pub(super) fn notify(&self, event: &Arc<Value>, name: &str) {
        let Some(task) = &self.task else { return };
        if !self.may_offer(PluginKind::Notify) || !event_matches(&self.file.events, name) {
            return;
        }
        let state = self.state();
        let alive = matches!(state, PluginState::Running | PluginState::Starting);
        if !alive || task.events.try_send(Arc::clone(event)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has the plugin save into a directory of its own, and checks what it has left there.
    pub(super) async fn save(
        self: Arc<Self>,
        mut request: SaveRequest,
        grace: Duration,
    ) -> (String, Result<Vec<PluginArtifact>, CallError>) {
        let name = self.found.name.clone();
        let directory = request.directory.join(&name);
        request.directory = directory.clone();
        let made = {
            let directory = directory.clone();
            blocking(move || artifact::make_directory(&directory)).await
        };
        if let Err(failure) = made {
            return (name, Err(failure));
        }
        let reply = self.call(CHECKPOINT_SAVE, &request, grace).await;
        let named = reply.and_then(|reply| parsed::<SaveReply>(&reply));
        let plugin = name.clone();
        let collected = blocking(move || {
            let result = named.and_then(|reply| artifact::collect(&plugin, &directory, reply.artifacts));
            if result.is_err() {
                artifact::discard(&directory);
            }
            result
        })
        .await;
        (name, collected)
    }

    /// Makes one checkpoint call within the plugin's deadline.
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
        let request = Request { kind: PluginKind::Checkpoint, method, params, deadline, reply };
        let exchange = async {
            task.requests.send(request).await.map_err(|_| not_running())?;
            answer.await.map_err(|_| not_running())?
        };
        // The supervisor keeps the deadline; this is for one that is still waiting for a host to
        // start. Cancelling and burying a host take their time beyond the deadline.
        let last = deadline + grace + Duration::from_secs(7);
        timeout_at(last, exchange)
            .await
            .unwrap_or_else(|_| Err(CallError::new("deadline", format!("{method} was not answered in time"))))
    }

    /// Asks the task to end.
    pub(super) fn cancel(&self) {
        if let Some(task) = &self.task {
            task.shutdown.cancel();
        }
    }

    /// Waits for the end of the task, after [`Plugin::cancel`].
    pub(super) async fn ended(&self) {
        let Some(task) = &self.task else { return };
        let joined = {
            let joined = task.joined.lock();
            joined.unwrap_or_else(PoisonError::into_inner).take()
        };
        if let Some(joined) = joined
            && let Err(error) = joined.await
        {
            tracing::error!(plugin = self.found.name, %error, "the task of a plugin failed");
        }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.cancel();
    }
}

pub(super) fn parsed<T: DeserializeOwned>(reply: &RawValue) -> Result<T, CallError> {
    serde_json::from_str(reply.get())
        .map_err(|error| CallError::new("bad_reply", format!("the plugin's reply is not valid: {error}")))
}
