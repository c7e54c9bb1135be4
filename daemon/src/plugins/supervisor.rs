//! The task that owns one plugin: starts its host, makes its calls one after another, and decides
//! what becomes of it after a crash.
//!
//! ```text
//!   start --hello--> serve --shutdown--> end
//!     |  \             |
//!     |   refused      crash (also: garbage, silence)
//!     |     v          v
//!     |   failed     limit reached? -- yes --> quarantined
//!     +<-- after backoff -- no
//! ```
//!
//! A request always gets an answer, in every state. Enabling, disabling and reloading replace the
//! whole task; it has no such commands.

use super::config::PluginConfig;
use super::crash::{AfterCrash, CrashHistory};
use super::frame::{FromHost, ToHost};
use super::output::Output;
use super::process::{Ending, HostError, HostProcess, Launch};
use super::status::{PluginState, PluginStatus, now_ms};
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

/// A call that somebody waits for.
#[derive(Debug)]
pub struct Request {
    /// What the plugin must be able to do for it.
    pub kind: PluginKind,
    /// Name of the method.
    pub method: &'static str,
    /// Its parameters.
    pub params: Value,
    /// When the daemon gives up, waiting in the queue included.
    pub deadline: Instant,
    /// Where the answer goes; once nobody listens there, the call is cancelled.
    pub reply: oneshot::Sender<Result<Box<RawValue>, CallError>>,
}

/// One plugin's task.
pub struct Supervisor {
    /// The daemon's settings.
    pub config: Arc<PluginConfig>,
    /// How the host is started.
    pub launch: Launch,
    /// How long a notification may take.
    pub deadline: Duration,
    /// Requests, answered in order, before events.
    pub requests: mpsc::Receiver<Request>,
    /// Events to be told.
    pub events: mpsc::Receiver<Arc<Value>>,
    /// What is seen from outside.
    pub status: watch::Sender<PluginStatus>,
    /// What it prints.
    pub output: Output,
    /// Ends the task.
    pub shutdown: CancellationToken,
}

/// What happens next to a running plugin.
enum Next {
    Shutdown,
    Request(Request),
    Event(Arc<Value>),
    Host(Result<FromHost, HostError>),
}

/// Why a start or a run ended.
enum Stopped {
    Shutdown,
    Refused(CallError),
    Crashed(String),
}

/// How waiting for a reply ended.
enum Waited {
    Reply(Result<Box<RawValue>, CallError>),
    Broken(HostError),
    TimeUp,
    Abandoned,
}

impl Supervisor {
    /// Runs until the shutdown token is cancelled.
    pub async fn run(mut self) {
        let mut history = CrashHistory::default();
        loop {
            let stopped = match self.start().await {
                Ok((host, description)) => self.serve(host, &description).await,
                Err(stopped) => stopped,
            };
            let reason = match stopped {
                Stopped::Shutdown => return,
                Stopped::Refused(failure) => {
                    let message = match &failure.hint {
                        Some(hint) => format!("{} ({hint})", failure.message),
                        None => failure.message,
                    };
                    self.enter(PluginState::Failed, Some(message));
                    return self.stay_down(None).await;
                }
                Stopped::Crashed(reason) => reason,
            };
            let now = Instant::now();
            match history.record(now.into_std(), &self.config.crashes) {
                AfterCrash::Restart(delay) => {
                    self.enter(PluginState::Starting, Some(reason));
                    self.stay_down(Some(now + delay)).await;
                    if self.shutdown.is_cancelled() {
                        return;
                    }
                    self.status.send_modify(|status| status.restarts += 1);
                }
                AfterCrash::Quarantine => {
                    self.enter(PluginState::Quarantined, Some(reason));
                    return self.stay_down(None).await;
                }
            }
        }
    }

    /// Publishes a new state; a change of state is logged.
    fn enter(&self, state: PluginState, error: Option<String>) {
        let name = self.status.borrow().name.clone();
        match &error {
            Some(error) => tracing::warn!(plugin = name, ?state, error, "plugin is in trouble"),
            None => tracing::info!(plugin = name, ?state, "plugin"),
        }
        self.status.send_modify(|status| {
            status.state = state;
            status.since_ms = now_ms();
            status.last_error = error.or(status.last_error.take());
            if state != PluginState::Running {
                status.pid = None;
            }
        });
    }

    /// Refuses requests until the given time, or for ever; returns early on shutdown.
    async fn stay_down(&mut self, until: Option<Instant>) {
        let wake = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(wake);
        loop {
            let request = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                request = self.requests.recv() => request,
                () = &mut wake => return,
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
            // Whoever asked may have gone.
            request.reply.send(Err(failure)).ok();
        }
    }

    /// Starts a host and waits for its hello.
    async fn start(&mut self) -> Result<(HostProcess, Description), Stopped> {
        if self.shutdown.is_cancelled() {
            return Err(Stopped::Shutdown);
        }
        let mut host = match HostProcess::spawn(&self.launch, &self.output) {
            Ok(host) => host,
            Err(error) => return Err(Stopped::Crashed(error_chain(&error))),
        };
        self.status.send_modify(|status| status.pid = Some(host.pid()));
        let limit = self.config.start_deadline;
        let greeting = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => None,
            greeting = timeout(limit, greet(&mut host, &self.output)) => Some(greeting),
        };
        let error = match greeting {
            None => {
                host.close(Duration::ZERO).await;
                return Err(Stopped::Shutdown);
            }
            Some(Ok(Ok(Ok(description)))) => {
                self.status.send_modify(|status| {
                    status.version = Some(description.version.clone());
                    status.kinds = description.kind.clone();
                });
                self.enter(PluginState::Running, None);
                return Ok((host, description));
            }
            Some(Ok(Ok(Err(failure)))) => {
                host.close(Duration::ZERO).await;
                return Err(Stopped::Refused(failure));
            }
            Some(Ok(Err(error))) => error,
            Some(Err(_)) => HostError::Silent(limit),
        };
        Err(self.bury(host, &error, "while it was starting").await)
    }

    /// Ends a broken host and puts what is known about its end into one line.
    async fn bury(&self, host: HostProcess, error: &HostError, when: &str) -> Stopped {
        let ending = host.finish(error).await;
        Stopped::Crashed(match (error, ending) {
            // That the connection was closed says nothing more than that it ended.
            (HostError::Closed, Ending::ByItself(_)) => format!("{ending} {when}"),
            (HostError::Closed, _) => format!("the plugin closed descriptor 3 {when}"),
            (HostError::Dying { message }, _) => format!("{message} ({when})"),
            _ => format!("{} {when}; {ending}", error_chain(error)),
        })
    }

    /// Makes calls until the host crashes or the daemon shuts down.
    async fn serve(&mut self, mut host: HostProcess, description: &Description) -> Stopped {
        let mut last_id = 0;
        loop {
            let next = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => Next::Shutdown,
                request = self.requests.recv() => request.map_or(Next::Shutdown, Next::Request),
                frame = host.next() => Next::Host(frame),
                event = self.events.recv() => event.map_or(Next::Shutdown, Next::Event),
            };
            let (mut reply, kind, method, params, deadline) = match next {
                Next::Shutdown => {
                    host.close(self.config.cancel_grace).await;
                    return Stopped::Shutdown;
                }
                Next::Host(Ok(FromHost::Log { level, message })) => {
                    self.output.logged(&level, &message);
                    continue;
                }
                // The late answer to a call that was given up.
                Next::Host(Ok(FromHost::Reply { id, .. })) if id <= last_id => continue,
                Next::Host(Ok(frame)) => {
                    return self.bury(host, &unexpected(&frame), "between two calls").await;
                }
                Next::Host(Err(error)) => {
                    return self.bury(host, &error, "between two calls").await;
                }
                Next::Request(request) => {
                    (Some(request.reply), request.kind, request.method, request.params, request.deadline)
                }
                Next::Event(event) => {
                    let params = json!({ "event": &*event });
                    let deadline = Instant::now() + self.deadline;
                    (None, PluginKind::Notify, NOTIFY, params, deadline)
                }
            };
            let outcome = if description.kind.contains(&kind) {
                last_id += 1;
                let call = Call { id: last_id, method, deadline };
                self.call(&mut host, call, params, reply.as_mut()).await
            } else {
                Ok(Err(CallError::unsupported(method)))
            };
            let crash = match outcome {
                Ok(result) => {
                    self.concluded(method, result.as_ref().err());
                    answer(reply, result);
                    continue;
                }
                Err(error) => error,
            };
            let stopped = self.bury(host, &crash, &format!("in {method}")).await;
            if let Stopped::Crashed(reason) = &stopped {
                let failure = CallError::new("crashed", reason.as_str());
                self.concluded(method, Some(&failure));
                answer(reply, Err(failure));
            }
            return stopped;
        }
    }

    /// Counts a call and remembers its failure.
    fn concluded(&self, method: &str, failure: Option<&CallError>) {
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

    /// Makes one call. The outer error means that the host has to be ended.
    async fn call(
        &mut self,
        host: &mut HostProcess,
        call: Call,
        params: Value,
        mut reply: Option<&mut oneshot::Sender<Result<Box<RawValue>, CallError>>>,
    ) -> Result<Result<Box<RawValue>, CallError>, HostError> {
        let started = Instant::now();
        let limit = call.deadline.saturating_duration_since(started);
        let expired = |what: &str| CallError::new("deadline", format!("{} {what}", call.method));
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
                // Nothing was sent: the host is as good as before.
                let message = format!("the request of {len} bytes is too long for a plugin");
                return Ok(Err(CallError::new("request_too_long", message)));
            }
            Ok(sent) => sent?,
            Err(_) => return Err(HostError::Deaf(limit)),
        }
        let abandoned = async {
            match &mut reply {
                Some(reply) => reply.closed().await,
                None => std::future::pending().await,
            }
        };
        let waited = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Waited::Abandoned,
            () = abandoned => Waited::Abandoned,
            waited = wait(host, &self.output, &call, call.deadline) => waited,
        };
        let gave_up = match waited {
            Waited::Reply(result) => return Ok(result),
            Waited::Broken(error) => return Err(error),
            Waited::TimeUp => expired(&format!("took longer than {limit:?}")),
            Waited::Abandoned => CallError::cancelled(),
        };
        let grace = Instant::now() + self.config.cancel_grace;
        match timeout_at(grace, host.send(&ToHost::Cancel { id: call.id })).await {
            Ok(sent) => sent?,
            Err(_) => return Err(HostError::Deaf(started.elapsed())),
        }
        match wait(host, &self.output, &call, grace).await {
            // Done after all, a little late.
            Waited::Reply(Ok(result)) => Ok(Ok(result)),
            Waited::Reply(Err(_)) => Ok(Err(gave_up)),
            Waited::Broken(error) => Err(error),
            Waited::TimeUp | Waited::Abandoned => Err(HostError::Deaf(started.elapsed())),
        }
    }
}

/// A call on its way.
#[derive(Debug, Clone, Copy)]
struct Call {
    id: u64,
    method: &'static str,
    deadline: Instant,
}

/// Waits for the reply to a call; log lines that come before it are passed on.
async fn wait(host: &mut HostProcess, output: &Output, call: &Call, until: Instant) -> Waited {
    loop {
        // A plugin that logs without end must not keep the timeout from being looked at.
        if Instant::now() >= until {
            return Waited::TimeUp;
        }
        match timeout_at(until, host.next()).await {
            Err(_) => return Waited::TimeUp,
            Ok(Err(error)) => return Waited::Broken(error),
            Ok(Ok(FromHost::Log { level, message })) => output.logged(&level, &message),
            Ok(Ok(FromHost::Reply { id, ok, error })) if id == call.id => {
                return Waited::Reply(match error {
                    Some(failure) => Err(failure),
                    None => Ok(ok.unwrap_or_else(|| RawValue::NULL.to_owned())),
                });
            }
            Ok(Ok(FromHost::Reply { id, .. })) if id < call.id => {}
            Ok(Ok(frame)) => return Waited::Broken(unexpected(&frame)),
        }
    }
}

/// Waits for a host's hello, or for its refusal.
pub async fn greet(host: &mut HostProcess, output: &Output) -> Result<Result<Description, CallError>, HostError> {
    loop {
        match host.next().await? {
            FromHost::Log { level, message } => output.logged(&level, &message),
            FromHost::Refused { error } => return Ok(Err(error)),
            FromHost::Hello { abi, describe } if abi == abi::VERSION => return Ok(Ok(describe)),
            FromHost::Hello { abi, .. } => {
                let message = format!("the host speaks version {abi} of the ABI, not {}", abi::VERSION);
                return Ok(Err(CallError::new("abi_version", message)));
            }
            frame => return Err(unexpected(&frame)),
        }
    }
}

fn unexpected(frame: &FromHost) -> HostError {
    let what = match frame {
        FromHost::Hello { .. } => "a second hello".to_owned(),
        FromHost::Refused { .. } => "a refusal after the hello".to_owned(),
        FromHost::Dying { error } => error.message.clone(),
        FromHost::Reply { id, .. } => format!("a reply to call {id}, which was not made"),
        FromHost::Log { .. } => "a log line".to_owned(),
    };
    HostError::Unexpected { what }
}

fn answer(reply: Option<oneshot::Sender<Result<Box<RawValue>, CallError>>>, result: Result<Box<RawValue>, CallError>) {
    if let Some(reply) = reply {
        // Whoever asked may have gone.
        reply.send(result).ok();
    }
}
