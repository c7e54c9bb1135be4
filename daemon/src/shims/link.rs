//! The daemon's connection to one shim.
//!
//! One task owns the stream; requests reach it through a bounded channel. When the shim exits, every pending and later
//! request fails with [`LinkError::Closed`], and the event channel ends. If the shim has left no exit record
//! (`read_exit`), the run is lost (`lost.rs`).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

pub use super::launch::{LaunchError, Launched, launch};
pub use super::lost::{LostTreeError, end_lost_tree};
use fermata_protocol::terminal::Bytes;
pub use fermata_shim::record::{ExitRecord, RunRecord, read_exit, read_run};

use fermata_os::process::ProcessId;
use fermata_shim::wire::{
    FreezeReply, FromShim, LEVEL, LineFromShim, MAX_LINE_BYTES, Quiesced, RefusalCode, ShimCall, ShimEvent,
    ShimRequest, Status, ToShim, Typed, WIRE_VERSION, parse_line,
};

/// How long a shim may take to reply, in addition to the time that the request itself waits.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a reply may take until the owner of the link is asked to check whether the shim is stopped. A shim that is
/// not replies in less than a millisecond.
const DOUBT: Duration = Duration::from_secs(1);

/// How many events may wait for the daemon. A daemon that is further behind loses the link, and requests the status when
/// it reconnects, so that no change is lost.
const EVENT_QUEUE: usize = 256;
const REQUEST_QUEUE: usize = 64;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The shim has exited, or the connection has ended.
    #[error("reach the shim: the link is closed")]
    Closed,
    #[error("connect to {}", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The shim sent no valid hello.
    #[error("complete the handshake with the shim at {}: {message}", socket.display())]
    Handshake { socket: PathBuf, message: String },
    /// The shim is of another version; it and its agent run on.
    #[error("use the protocol of the shim at {}: {message}", socket.display())]
    Version { socket: PathBuf, message: String },
    #[error("get a reply to {request:?} within {waited_ms} ms")]
    Timeout { request: ShimRequest, waited_ms: u64 },
    #[error("have the request carried out by the shim: {message}")]
    Refused { code: RefusalCode, message: String },
    #[error("parse the shim's reply")]
    Reply(#[source] serde_json::Error),
}

pub(super) type RequestResult = Result<serde_json::Value, LinkError>;

/// A request on its way to the task of the link.
struct LinkRequest {
    request: ShimRequest,
    reply: oneshot::Sender<RequestResult>,
}

/// A connection to one shim.
#[derive(Debug)]
pub struct ShimLink {
    requests: mpsc::Sender<LinkRequest>,
    run_id: String,
    shim: ProcessId,
    suspended: Option<bool>,
    task: AbortHandle,
    doubt: Notify,
}

/// Ends the task, also while it waits for a shim that does not read. A request borrows the link, so none is lost.
impl Drop for ShimLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl ShimLink {
    /// Connects and shakes hands. The returned channel receives the shim's events until the link ends. The task of the
    /// link runs in `tasks` and ends when the link is dropped.
    pub async fn connect(socket: &Path, tasks: &TaskTracker) -> Result<(Self, mpsc::Receiver<ShimEvent>), LinkError> {
        let Handshake { wire, run_id, shim, suspended, .. } = shake_hands(socket).await?;
        let (requests, request_queue) = mpsc::channel(REQUEST_QUEUE);
        let (event_queue, events) = mpsc::channel(EVENT_QUEUE);
        let task = tasks.spawn(wire.run(request_queue, event_queue)).abort_handle();
        Ok((Self { requests, run_id, shim, suspended, task, doubt: Notify::new() }, events))
    }

    /// Returns the run that the shim names, which may not be the expected one.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Returns the shim's process.
    pub fn shim(&self) -> ProcessId {
        self.shim
    }

    /// Returns whether the main process was stopped by another process when this link was made; `None` when the shim does
    /// not report it.
    pub fn suspended(&self) -> Option<bool> {
        self.suspended
    }

    pub fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Waits until the link has ended.
    pub async fn closed(&self) {
        self.requests.closed().await;
    }

    /// Waits until a reply takes so long that the shim may be stopped or hang.
    pub async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// Ends the link: all pending requests fail with [`LinkError::Closed`].
    pub fn close(&self) {
        self.task.abort();
    }

    pub async fn status(&self) -> Result<Status, LinkError> {
        self.ask(ShimRequest::Status {}, Duration::ZERO).await
    }

    /// Asks the agent to stop by itself (SIGTSTP). The shim undoes it unless a freeze follows within `lease`.
    pub async fn quiesce(&self, grace: Duration, lease: Duration) -> Result<Quiesced, LinkError> {
        let request = ShimRequest::Quiesce { grace_ms: millis(grace), lease_ms: millis(lease) };
        self.ask(request, grace).await
    }

    /// Freezes the process tree until the lease expires.
    pub async fn freeze(&self, lease: Duration) -> Result<FreezeReply, LinkError> {
        self.ask(ShimRequest::Freeze { lease_ms: millis(lease) }, Duration::ZERO).await
    }

    /// Extends the lease, counted from now.
    pub async fn renew(&self, lease: Duration) -> Result<(), LinkError> {
        self.command(ShimRequest::Renew { lease_ms: millis(lease) }).await
    }

    /// Makes the freeze permanent.
    pub async fn commit_freeze(&self) -> Result<(), LinkError> {
        self.command(ShimRequest::Commit {}).await
    }

    /// Undoes freeze and quiesce; succeeds when there is nothing to undo.
    pub async fn thaw(&self) -> Result<(), LinkError> {
        self.command(ShimRequest::Thaw {}).await
    }

    /// Sends a signal to the main process.
    pub async fn signal(&self, signal: i32) -> Result<(), LinkError> {
        self.command(ShimRequest::Signal { signal }).await
    }

    /// Begins to stop the agent; [`ShimEvent::Exited`] follows. `None`: the grace of the launch spec.
    pub async fn stop(&self, grace: Option<Duration>) -> Result<(), LinkError> {
        self.command(ShimRequest::Stop { grace_ms: grace.map(millis) }).await
    }

    /// Begins to kill the process tree; [`ShimEvent::Exited`] follows.
    pub async fn kill(&self) -> Result<(), LinkError> {
        self.command(ShimRequest::Kill {}).await
    }

    /// Types into the agent's terminal; returns how many bytes were accepted.
    pub async fn type_in(&self, data: Vec<u8>) -> Result<u64, LinkError> {
        let typed: Typed = self.ask(ShimRequest::Type { data: Bytes(data) }, Duration::ZERO).await?;
        Ok(typed.bytes)
    }

    /// Sends a request whose reply has no content.
    async fn command(&self, request: ShimRequest) -> Result<(), LinkError> {
        self.ask::<serde_json::Value>(request, Duration::ZERO).await.map(drop)
    }

    /// Sends a request and waits for its reply, `extra` longer than [`REPLY_TIMEOUT`].
    async fn ask<T: DeserializeOwned>(&self, request: ShimRequest, extra: Duration) -> Result<T, LinkError> {
        let (sender, receiver) = oneshot::channel();
        let queued = LinkRequest { request: request.clone(), reply: sender };
        let exchange = async {
            self.requests.send(queued).await.map_err(|_| LinkError::Closed)?;
            receiver.await.map_err(|_| LinkError::Closed)?
        };
        let mut exchange = std::pin::pin!(exchange);
        let reply = match tokio::time::timeout(DOUBT + extra, &mut exchange).await {
            Ok(reply) => reply,
            Err(_) => {
                self.doubt.notify_one();
                match tokio::time::timeout(REPLY_TIMEOUT - DOUBT, exchange).await {
                    Ok(reply) => reply,
                    Err(_) => return Err(LinkError::Timeout { request, waited_ms: millis(REPLY_TIMEOUT + extra) }),
                }
            }
        };
        serde_json::from_value(reply?).map_err(LinkError::Reply)
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A connection after the handshake.
pub(super) struct Handshake {
    pub wire: Wire,
    pub run_id: String,
    pub shim: ProcessId,
    pub terminal: bool,
    pub suspended: Option<bool>,
}

/// Connects to a shim and exchanges hellos.
pub(super) async fn shake_hands(socket: &Path) -> Result<Handshake, LinkError> {
    match tokio::time::timeout(REPLY_TIMEOUT, handshake(socket)).await {
        Ok(result) => result,
        Err(_) => {
            let message = "it sent no hello in time".to_owned();
            Err(LinkError::Handshake { socket: socket.to_path_buf(), message })
        }
    }
}

async fn handshake(socket: &Path) -> Result<Handshake, LinkError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| LinkError::Connect { socket: socket.to_path_buf(), source })?;
    let bad = |message: String| LinkError::Handshake { socket: socket.to_path_buf(), message };
    let (reader, writer) = stream.into_split();
    let mut wire = Wire { lines: LineReader { reader, buffer: Vec::new() }, writer };
    let hello = ToShim::Hello { version: WIRE_VERSION, level: LEVEL };
    write(&mut wire.writer, &hello).await.map_err(|error| bad(error.to_string()))?;
    match wire.lines.next().await {
        Ok(Some(FromShim::Hello { version: WIRE_VERSION, run_id, shim, terminal, suspended })) => {
            Ok(Handshake { wire, run_id, shim, terminal, suspended })
        }
        Ok(Some(FromShim::Hello { version, .. })) => {
            let message = format!("it speaks version {version}, this daemon speaks version {WIRE_VERSION}");
            Err(LinkError::Version { socket: socket.to_path_buf(), message })
        }
        Ok(Some(FromShim::Refusal { code: RefusalCode::VersionMismatch, message, .. })) => {
            Err(LinkError::Version { socket: socket.to_path_buf(), message })
        }
        Ok(Some(FromShim::Refusal { message, .. })) => Err(bad(message)),
        Ok(Some(FromShim::Reply { .. } | FromShim::Event(_))) => Err(bad("its first line is no hello".to_owned())),
        Ok(None) => Err(bad("it closed the connection".to_owned())),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Both directions of the stream.
pub(super) struct Wire {
    pub lines: LineReader,
    pub writer: OwnedWriteHalf,
}

/// Reads the shim's lines.
pub(super) struct LineReader {
    reader: OwnedReadHalf,
    /// Bytes that were read and not yet returned as a line.
    buffer: Vec<u8>,
}

enum LinkEvent {
    Request(Option<LinkRequest>),
    Line(io::Result<Option<FromShim>>),
}

impl Wire {
    /// The task of a link; ends when the link is dropped or the stream ends.
    async fn run(mut self, mut requests: mpsc::Receiver<LinkRequest>, events: mpsc::Sender<ShimEvent>) {
        let mut pending: HashMap<u64, oneshot::Sender<RequestResult>> = HashMap::new();
        let mut next_id = 1;
        loop {
            let event = tokio::select! {
                request = requests.recv() => LinkEvent::Request(request),
                line = self.lines.next() => LinkEvent::Line(line),
            };
            match event {
                LinkEvent::Request(None) | LinkEvent::Line(Ok(None)) => return,
                LinkEvent::Request(Some(LinkRequest { request, reply })) => {
                    let id = next_id;
                    next_id += 1;
                    // Those that have timed out.
                    pending.retain(|_, reply| !reply.is_closed());
                    pending.insert(id, reply);
                    // Requests are small and the shim always reads, so that this does not wait.
                    if write(&mut self.writer, &ToShim::Call(ShimCall { id, request })).await.is_err() {
                        return;
                    }
                }
                LinkEvent::Line(Ok(Some(FromShim::Reply { id, ok }))) => {
                    if let Some(reply) = pending.remove(&id) {
                        // Fails when the request has timed out.
                        reply.send(Ok(ok)).ok();
                    }
                }
                LinkEvent::Line(Ok(Some(FromShim::Refusal { id, code, message }))) => {
                    match id.and_then(|id| pending.remove(&id)) {
                        Some(reply) => {
                            reply.send(Err(LinkError::Refused { code, message })).ok();
                        }
                        None => tracing::warn!(?code, message, "the shim refused a line"),
                    }
                }
                LinkEvent::Line(Ok(Some(FromShim::Event(event)))) => {
                    if events.try_send(event).is_err() && !events.is_closed() {
                        tracing::warn!("the queue for the shim's events is full: closing the link");
                        return;
                    }
                }
                LinkEvent::Line(Ok(Some(FromShim::Hello { .. }))) => {}
                LinkEvent::Line(Err(error)) => {
                    tracing::warn!(%error, "the link to a shim broke");
                    return;
                }
            }
        }
    }
}

pub(super) async fn write(writer: &mut OwnedWriteHalf, line: &ToShim) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}

impl LineReader {
    /// Reads the next line; `None` at the end. Cancel-safe: the bytes of an incomplete line stay in the buffer.
    pub async fn next(&mut self) -> io::Result<Option<FromShim>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                match parse_line(&line)? {
                    LineFromShim::Understood(line) => return Ok(Some(line)),
                    LineFromShim::NewerEvent(event) => {
                        tracing::debug!(event, "ignored an event of a newer shim");
                        continue;
                    }
                }
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of the shim is too long"));
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}
