//! The task that owns one plugin: starts its host, makes one call at a time, restarts or quarantines it after a crash.
//!
//! ```text
//!   start --hello--> serve --shutdown--> end
//!     |  \             |
//!     |   refused      crash (also: invalid frame, timeout)
//!     |     v          v
//!     |   failed     limit reached? -- yes --> quarantined
//!     +<-- after backoff -- no
//! ```
//!
//! Every request gets a reply, in every state. Enabling, disabling and reloading replace the task.

use super::config::PluginConfig;
use super::crash::{AfterCrash, CrashHistory};
use super::frame::{FromHost, ToHost};
use super::output::PluginOutput;
use super::process::{HostError, HostExit, HostLaunch, HostProcess};
use super::status::{HostState, PluginStatus, now_ms};
use fermata_plugin_api::message::NOTIFY;
use fermata_plugin_api::{CallError, Description, PluginKind, abi};
use fermata_protocol::error_chain;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// The result of a call: the plugin's reply, or its error.
pub type CallResult = Result<Box<RawValue>, CallError>;

/// A request for a call with a reply.
#[derive(Debug)]
pub struct PluginRequest {
    /// The function that the plugin must offer.
    pub kind: PluginKind,
    pub method: &'static str,
    pub params: Value,
    /// Includes the time in the queue.
    pub deadline: Instant,
    /// Dropping the receiver cancels the call.
    pub reply: oneshot::Sender<CallResult>,
}

/// The task of one plugin.
pub struct PluginSupervisor {
    pub config: Arc<PluginConfig>,
    pub launch: HostLaunch,
    /// How long a notification may take.
    pub deadline: Duration,
    /// Handled in order, before events.
    pub requests: mpsc::Receiver<PluginRequest>,
    pub events: mpsc::Receiver<Arc<Value>>,
    pub status: watch::Sender<PluginStatus>,
    pub output: PluginOutput,
    /// Ends the task.
    pub shutdown: CancellationToken,
}

/// The next input of a running plugin's task.
enum Input {
    Shutdown,
    Request(PluginRequest),
    Event(Arc<Value>),
    Host(Result<FromHost, HostError>),
}

/// Why a host has ended.
enum HostEnd {
    Shutdown,
    /// The plugin refused to start.
    Refused(CallError),
    Crashed(String),
}

/// The result of waiting for a reply.
enum WaitResult {
    Reply(CallResult),
    Broken(HostError),
    Timeout,
    /// The requester no longer waits, or the daemon shuts down.
    Abandoned,
}

impl PluginSupervisor {
    /// Runs until the shutdown token is cancelled.
    pub async fn run(mut self) {
        let mut history = CrashHistory::default();
        loop {
            let end = match self.start().await {
                Ok((host, description)) => self.serve(host, &description).await,
                Err(end) => end,
            };
            let reason = match end {
                HostEnd::Shutdown => return,
                HostEnd::Refused(failure) => {
                    let message = match &failure.hint {
                        Some(hint) => format!("{} ({hint})", failure.message),
                        None => failure.message,
                    };
                    self.enter(HostState::Failed, Some(message));
                    return self.refuse_requests(None).await;
                }
                HostEnd::Crashed(reason) => reason,
            };
            let now = Instant::now();
            match history.record(now.into_std(), &self.config.crashes) {
                AfterCrash::Restart(delay) => {
                    self.enter(HostState::Starting, Some(reason));
                    self.refuse_requests(Some(now + delay)).await;
                    if self.shutdown.is_cancelled() {
                        return;
                    }
                    self.status.send_modify(|status| status.restarts += 1);
                }
                AfterCrash::Quarantine => {
                    self.enter(HostState::Quarantined, Some(reason));
                    return self.refuse_requests(None).await;
                }
            }
        }
    }

    /// Publishes and logs a new state.
    fn enter(&self, state: HostState, error: Option<String>) {
        let name = self.status.borrow().name.clone();
        match &error {
            Some(error) => tracing::warn!(plugin = name, ?state, error, "the plugin has failed"),
            None => tracing::info!(plugin = name, ?state, "the plugin has changed its state"),
        }
        self.status.send_modify(|status| {
            status.state = state;
            status.since_ms = now_ms();
            status.last_error = error.or(status.last_error.take());
            if state != HostState::Running {
                status.pid = None;
            }
        });
    }

    /// Refuses requests until the given time, or until the shutdown; returns early on shutdown.
    async fn refuse_requests(&mut self, until: Option<Instant>) {
        let timer = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(timer);
        loop {
            let request = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                request = self.requests.recv() => request,
                () = &mut timer => return,
            };
            let Some(request) = request else { return };
            let status = self.status.borrow();
            let failure = match status.kinds.contains(&request.kind) {
                true => CallError::new(
                    "not_running",
                    format!(
                        "the plugin is not running: {}",
                        status.last_error.as_deref().unwrap_or("it was not started")
                    ),
                ),
                false => CallError::unsupported(request.method),
            };
            drop(status);
            // Fails when the requester no longer waits.
            request.reply.send(Err(failure)).ok();
        }
    }

    /// Starts a host and waits for its hello.
    async fn start(&mut self) -> Result<(HostProcess, Description), HostEnd> {
        if self.shutdown.is_cancelled() {
            return Err(HostEnd::Shutdown);
        }
        let mut host = match HostProcess::spawn(&self.launch, &self.output) {
            Ok(host) => host,
            Err(error) => return Err(HostEnd::Crashed(error_chain(&error))),
        };
        self.status.send_modify(|status| status.pid = Some(host.pid()));
        let limit = self.config.start_deadline;
        let hello = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => None,
            hello = timeout(limit, read_hello(&mut host, &self.output)) => Some(hello),
        };
        let error = match hello {
            None => {
                host.close(Duration::ZERO).await;
                return Err(HostEnd::Shutdown);
            }
            Some(Ok(Ok(Ok(description)))) => {
                self.status.send_modify(|status| {
                    status.version = Some(description.version.clone());
                    status.kinds = description.kind.clone();
                });
                self.enter(HostState::Running, None);
                return Ok((host, description));
            }
            Some(Ok(Ok(Err(failure)))) => {
                host.close(Duration::ZERO).await;
                return Err(HostEnd::Refused(failure));
            }
            Some(Ok(Err(error))) => error,
            Some(Err(_)) => HostError::StartTimeout(limit),
        };
        Err(HostEnd::Crashed(end_broken(host, &error, "while it was starting").await))
    }

    /// Makes calls until the host crashes or the daemon shuts down.
    async fn serve(&mut self, mut host: HostProcess, description: &Description) -> HostEnd {
        let mut last_id = 0;
        loop {
            let input = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => Input::Shutdown,
                request = self.requests.recv() => request.map_or(Input::Shutdown, Input::Request),
                frame = host.next() => Input::Host(frame),
                event = self.events.recv() => event.map_or(Input::Shutdown, Input::Event),
            };
            let (mut reply, kind, method, params, deadline) = match input {
                Input::Shutdown => {
                    host.close(self.config.cancel_grace).await;
                    return HostEnd::Shutdown;
                }
                Input::Host(Ok(FromHost::Log { level, message })) => {
                    self.output.logged(&level, &message);
                    continue;
                }
                // The late reply to a cancelled call.
                Input::Host(Ok(FromHost::Reply { id, .. })) if id <= last_id => continue,
                Input::Host(Ok(frame)) => {
                    return HostEnd::Crashed(end_broken(host, &unexpected(&frame), "between two calls").await);
                }
                Input::Host(Err(error)) => {
                    return HostEnd::Crashed(end_broken(host, &error, "between two calls").await);
                }
                Input::Request(request) => {
                    (Some(request.reply), request.kind, request.method, request.params, request.deadline)
                }
                Input::Event(event) => {
                    let params = json!({ "event": &*event });
                    let deadline = Instant::now() + self.deadline;
                    (None, PluginKind::Notify, NOTIFY, params, deadline)
                }
            };
            let outcome = if description.kind.contains(&kind) {
                last_id += 1;
                let call = PluginCall { id: last_id, method, deadline };
                self.call(&mut host, call, params, reply.as_mut()).await
            } else {
                Ok(Err(CallError::unsupported(method)))
            };
            let error = match outcome {
                Ok(result) => {
                    self.count_call(method, result.as_ref().err());
                    send_reply(reply, result);
                    continue;
                }
                Err(error) => error,
            };
            let reason = end_broken(host, &error, &format!("in {method}")).await;
            let failure = CallError::new("crashed", reason.as_str());
            self.count_call(method, Some(&failure));
            send_reply(reply, Err(failure));
            return HostEnd::Crashed(reason);
        }
    }

    /// Counts a call in the status, with its failure.
    fn count_call(&self, method: &str, failure: Option<&CallError>) {
        let failure = failure.filter(|failure| failure.code != CallError::UNSUPPORTED);
        if let Some(failure) = failure {
            let plugin = self.status.borrow().name.clone();
            tracing::warn!(plugin, method, code = failure.code, message = failure.message, "a plugin's call failed");
        }
        self.status.send_modify(|status| {
            status.calls += 1;
            if let Some(failure) = failure {
                status.failed_calls += 1;
                status.last_error = Some(format!("{method}: {}", failure.message));
            }
        });
    }

    /// Makes one call. After the outer error the host has to be ended.
    async fn call(
        &mut self,
        host: &mut HostProcess,
        call: PluginCall,
        params: Value,
        mut reply: Option<&mut oneshot::Sender<CallResult>>,
    ) -> Result<CallResult, HostError> {
        let started = Instant::now();
        let limit = call.deadline.saturating_duration_since(started);
        let expired = |reason: &str| CallError::new("deadline", format!("{} {reason}", call.method));
        if limit.is_zero() {
            return Ok(Err(expired("waited too long behind other calls")));
        }
        let frame = ToHost::Call {
            id: call.id,
            method: call.method.to_owned(),
            params,
            deadline_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        };
        match timeout_at(call.deadline, host.send(&frame)).await {
            Ok(Err(super::frame::FrameError::TooLong { len })) => {
                // Not a byte was sent: the host is still usable.
                let message = format!("the request of {len} bytes is too long for a plugin");
                return Ok(Err(CallError::new("request_too_long", message)));
            }
            Ok(sent) => sent?,
            Err(_) => return Err(HostError::CallTimeout(limit)),
        }
        let abandoned = async {
            match &mut reply {
                Some(reply) => reply.closed().await,
                None => std::future::pending().await,
            }
        };
        let waited = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => WaitResult::Abandoned,
            () = abandoned => WaitResult::Abandoned,
            waited = wait(host, &self.output, &call, call.deadline) => waited,
        };
        let failure = match waited {
            WaitResult::Reply(result) => return Ok(result),
            WaitResult::Broken(error) => return Err(error),
            WaitResult::Timeout => expired(&format!("took longer than {limit:?}")),
            WaitResult::Abandoned => CallError::cancelled(),
        };
        let grace = Instant::now() + self.config.cancel_grace;
        match timeout_at(grace, host.send(&ToHost::Cancel { id: call.id })).await {
            Ok(sent) => sent?,
            Err(_) => return Err(HostError::CallTimeout(started.elapsed())),
        }
        match wait(host, &self.output, &call, grace).await {
            // It was completed before the cancellation had an effect.
            WaitResult::Reply(Ok(result)) => Ok(Ok(result)),
            WaitResult::Reply(Err(_)) => Ok(Err(failure)),
            WaitResult::Broken(error) => Err(error),
            WaitResult::Timeout | WaitResult::Abandoned => Err(HostError::CallTimeout(started.elapsed())),
        }
    }
}

/// Ends a broken host; returns the error and the exit in one line.
async fn end_broken(host: HostProcess, error: &HostError, when: &str) -> String {
    let exit = host.finish(error).await;
    match (error, exit) {
        // A host that exits also closes the connection.
        (HostError::Closed, HostExit::ByItself(_)) => format!("{exit} {when}"),
        (HostError::Closed, HostExit::Killed | HostExit::Unknown) => format!("the plugin closed descriptor 3 {when}"),
        (HostError::Dying { message }, _) => format!("{message} ({when})"),
        (
            HostError::Spawn { .. }
            | HostError::Frame(_)
            | HostError::Unexpected { .. }
            | HostError::StartTimeout(_)
            | HostError::CallTimeout(_),
            _,
        ) => format!("{} {when}; {exit}", error_chain(error)),
    }
}

/// The call that the host is working on.
#[derive(Debug, Clone, Copy)]
struct PluginCall {
    id: u64,
    method: &'static str,
    deadline: Instant,
}

/// Waits for the reply to a call; log lines before it go to the log.
async fn wait(host: &mut HostProcess, output: &PluginOutput, call: &PluginCall, until: Instant) -> WaitResult {
    loop {
        // Checked here too: while lines are ready, `timeout_at` returns them and not the timeout.
        if Instant::now() >= until {
            return WaitResult::Timeout;
        }
        match timeout_at(until, host.next()).await {
            Err(_) => return WaitResult::Timeout,
            Ok(Err(error)) => return WaitResult::Broken(error),
            Ok(Ok(FromHost::Log { level, message })) => output.logged(&level, &message),
            Ok(Ok(FromHost::Reply { id, ok, error })) if id == call.id => {
                return WaitResult::Reply(match error {
                    Some(failure) => Err(failure),
                    None => Ok(ok.unwrap_or_else(|| RawValue::NULL.to_owned())),
                });
            }
            Ok(Ok(FromHost::Reply { id, .. })) if id < call.id => {}
            Ok(Ok(frame)) => return WaitResult::Broken(unexpected(&frame)),
        }
    }
}

/// Waits for a host's hello, or for its refusal.
pub async fn read_hello(
    host: &mut HostProcess,
    output: &PluginOutput,
) -> Result<Result<Description, CallError>, HostError> {
    loop {
        match host.next().await? {
            FromHost::Log { level, message } => output.logged(&level, &message),
            FromHost::Refused { error } => return Ok(Err(error)),
            FromHost::Hello { abi, describe } if abi == abi::VERSION => return Ok(Ok(describe)),
            FromHost::Hello { abi, .. } => {
                let message = format!("the host uses version {abi} of the ABI, not {}", abi::VERSION);
                return Ok(Err(CallError::new("abi_version", message)));
            }
            frame @ (FromHost::Dying { .. } | FromHost::Reply { .. }) => return Err(unexpected(&frame)),
        }
    }
}

fn unexpected(frame: &FromHost) -> HostError {
    let frame = match frame {
        FromHost::Hello { .. } => "a second hello".to_owned(),
        FromHost::Refused { .. } => "a refusal after the hello".to_owned(),
        FromHost::Dying { error } => error.message.clone(),
        FromHost::Reply { id, .. } => format!("a reply to call {id}, which was not made"),
        FromHost::Log { .. } => "a log line".to_owned(),
    };
    HostError::Unexpected { frame }
}

fn send_reply(reply: Option<oneshot::Sender<CallResult>>, result: CallResult) {
    if let Some(reply) = reply {
        // Fails when the requester no longer waits.
        reply.send(result).ok();
    }
}
