//! The daemon's connection to one shim.
//!
//! One task owns the stream; requests reach it through a bounded channel. When the shim is gone
//! every open and later request answers [`LinkError::Closed`], and the event channel ends. Then
//! `read_exit` tells whether the agent ended properly; if not, the shim was lost (`lost.rs`).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

pub use super::launch::{LaunchError, Launched, launch};
pub use super::lost::{LostTreeError, end_lost_tree};
use fermata_protocol::terminal::Bytes;
pub use fermata_shim::record::{ExitRecord, RunRecord, read_exit, read_run};

use fermata_os::process::ProcessId;
use fermata_shim::wire::{
    Call, FromShim, Frozen, Heard, LEVEL, MAX_LINE_BYTES, Quiesced, RefusalCode, Request, ShimEvent, Status, ToShim,
    Typed, WIRE_VERSION, hear,
};

/// How long a shim may take to answer, on top of what the request itself waits for.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// After how long without an answer somebody should look whether the shim is stopped; it answers in
/// less than a millisecond when it is not.
const DOUBT: Duration = Duration::from_secs(1);

/// How many events may wait for the daemon. A daemon that is further behind loses the link, and
/// asks for the status when it connects again: nothing is lost silently.
const EVENT_QUEUE: usize = 256;
const REQUEST_QUEUE: usize = 64;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The shim is gone, or the link to it.
    #[error("reach the shim: the link is closed")]
    Closed,
    /// The socket cannot be reached.
    #[error("connect to {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The shim did not introduce itself as it should.
    #[error("understand the shim at {}: {message}", socket.display())]
    Handshake {
        /// The socket.
        socket: PathBuf,
        /// What it said.
        message: String,
    },
    /// The shim is of another version; it and its agent are well.
    #[error("speak to the shim at {}: {message}", socket.display())]
    Version {
        /// The socket.
        socket: PathBuf,
        /// Both versions.
        message: String,
    },
    /// No answer came in time.
    #[error("get an answer to {request:?} within {waited_ms} ms")]
    Timeout {
        /// What was asked.
        request: Request,
        /// How long it was waited.
        waited_ms: u64,
    },
    /// The shim refused.
    #[error("have it done by the shim: {message}")]
    Refused {
        /// The stable code.
        code: RefusalCode,
        /// The sentence.
        message: String,
    },
    /// The answer has another form than expected.
    #[error("understand the shim's answer")]
    Answer(#[source] serde_json::Error),
}

pub(super) type RequestResult = Result<serde_json::Value, LinkError>;

struct Order {
    request: Request,
    reply: oneshot::Sender<RequestResult>,
}

/// A connection to one shim.
#[derive(Debug)]
pub struct ShimLink {
    orders: mpsc::Sender<Order>,
    run_id: String,
    shim: ProcessId,
    suspended: Option<bool>,
    task: JoinHandle<()>,
    doubt: Notify,
}

impl ShimLink {
    /// Connects and introduces itself. Events arrive at the returned channel until the link ends.
    pub async fn connect(socket: &Path) -> Result<(Self, mpsc::Receiver<ShimEvent>), LinkError> {
        let Greeted { wire, run_id, shim, suspended, .. } = greet(socket).await?;
        let (orders, orders_in) = mpsc::channel(REQUEST_QUEUE);
        let (events_out, events) = mpsc::channel(EVENT_QUEUE);
        let task = tokio::spawn(wire.run(orders_in, events_out));
        Ok((Self { orders, run_id, shim, suspended, task, doubt: Notify::new() }, events))
    }

    /// Which run this is, as the shim says: to be compared with the one that was expected.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Who answers.
    pub fn shim(&self) -> ProcessId {
        self.shim
    }

    /// Whether somebody else had stopped the main process when this link was made; none when the
    /// shim does not say.
    pub fn suspended(&self) -> Option<bool> {
        self.suspended
    }

    /// Whether the link has ended.
    pub fn is_closed(&self) -> bool {
        self.orders.is_closed()
    }

    /// Waits until the link has ended.
    pub async fn closed(&self) {
        self.orders.closed().await;
    }

    /// Waits until a request has gone without an answer for so long that the shim may be stopped or
    /// hang.
    pub async fn doubted(&self) {
        self.doubt.notified().await;
    }

    /// Ends the link for everybody who uses it: their requests answer [`LinkError::Closed`].
    pub fn close(&self) {
        self.task.abort();
    }

    /// Ends the link and waits for its task.
    pub async fn shutdown(self) {
        let Self { orders, task, .. } = self;
        drop(orders);
        // It neither panics nor is it aborted by anyone else.
        task.await.ok();
    }

    /// Asks how the agent is.
    pub async fn status(&self) -> Result<Status, LinkError> {
        self.ask(Request::Status {}, Duration::ZERO).await
    }

    /// Asks the agent to stop by itself (SIGTSTP). Unless a freeze follows within `lease`, the
    /// shim undoes it.
    pub async fn quiesce(&self, grace: Duration, lease: Duration) -> Result<Quiesced, LinkError> {
        let request = Request::Quiesce { grace_ms: millis(grace), lease_ms: millis(lease) };
        self.ask(request, grace).await
    }

    /// Freezes the whole tree for as long as the lease lasts.
    pub async fn freeze(&self, lease: Duration) -> Result<Frozen, LinkError> {
        self.ask(Request::Freeze { lease_ms: millis(lease) }, Duration::ZERO).await
    }

    /// Extends the lease, from now.
    pub async fn renew(&self, lease: Duration) -> Result<(), LinkError> {
        self.order(Request::Renew { lease_ms: millis(lease) }).await
    }

    /// Makes the freeze permanent: the pause was committed.
    pub async fn commit_freeze(&self) -> Result<(), LinkError> {
        self.order(Request::Hold {}).await
    }

    /// Undoes freeze and quiesce; fine when there is nothing to undo.
    pub async fn thaw(&self) -> Result<(), LinkError> {
        self.order(Request::Thaw {}).await
    }

    /// Sends a signal to the main process.
    pub async fn signal(&self, signal: i32) -> Result<(), LinkError> {
        self.order(Request::Signal { signal }).await
    }

    /// Begins to stop the agent; [`ShimEvent::Exited`] follows. Without a grace the spec's counts.
    pub async fn stop(&self, grace: Option<Duration>) -> Result<(), LinkError> {
        self.order(Request::Stop { grace_ms: grace.map(millis) }).await
    }

    /// Begins to kill the whole tree; [`ShimEvent::Exited`] follows.
    pub async fn kill(&self) -> Result<(), LinkError> {
        self.order(Request::Kill {}).await
    }

    /// Types into the agent's terminal; returns how many bytes were taken.
    pub async fn type_in(&self, data: Vec<u8>) -> Result<u64, LinkError> {
        let typed: Typed = self.ask(Request::Type { data: Bytes(data) }, Duration::ZERO).await?;
        Ok(typed.bytes)
    }

    async fn order(&self, request: Request) -> Result<(), LinkError> {
        self.ask::<serde_json::Value>(request, Duration::ZERO).await.map(|_| ())
    }

    async fn ask<T: DeserializeOwned>(&self, request: Request, extra: Duration) -> Result<T, LinkError> {
        let patience = ANSWER_PATIENCE + extra;
        let (reply, answer) = oneshot::channel();
        let order = Order { request: request.clone(), reply };
        let exchange = async {
            self.orders.send(order).await.map_err(|_| LinkError::Closed)?;
            answer.await.map_err(|_| LinkError::Closed)?
        };
        let mut exchange = std::pin::pin!(exchange);
        let answer = match tokio::time::timeout(DOUBT + extra, &mut exchange).await {
            Ok(answer) => answer,
            Err(_) => {
                self.doubt.notify_one();
                match tokio::time::timeout(patience - DOUBT - extra, exchange).await {
                    Ok(answer) => answer,
                    Err(_) => return Err(LinkError::Timeout { request, waited_ms: millis(patience) }),
                }
            }
        };
        serde_json::from_value(answer?).map_err(LinkError::Answer)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A shim that has introduced itself.
pub(super) struct Greeted {
    pub wire: Wire,
    pub run_id: String,
    pub shim: ProcessId,
    pub terminal: bool,
    pub suspended: Option<bool>,
}

/// Connects to a shim and introduces the daemon.
pub(super) async fn greet(socket: &Path) -> Result<Greeted, LinkError> {
    match tokio::time::timeout(ANSWER_PATIENCE, handshake(socket)).await {
        Ok(done) => done,
        Err(_) => {
            let message = "it did not introduce itself in time".to_owned();
            Err(LinkError::Handshake { socket: socket.to_path_buf(), message })
        }
    }
}

async fn handshake(socket: &Path) -> Result<Greeted, LinkError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| LinkError::Connect { socket: socket.to_path_buf(), source })?;
    let bad = |message: String| LinkError::Handshake { socket: socket.to_path_buf(), message };
    let (reader, writer) = stream.into_split();
    let mut wire = Wire { lines: Lines { reader, inbox: Vec::new() }, writer };
    let hello = ToShim::Hello { version: WIRE_VERSION, level: LEVEL };
    write(&mut wire.writer, &hello).await.map_err(|error| bad(error.to_string()))?;
    match wire.lines.next().await {
        Ok(Some(FromShim::Hello { version: WIRE_VERSION, run_id, shim, terminal, suspended })) => {
            Ok(Greeted { wire, run_id, shim, terminal, suspended })
        }
        Ok(Some(FromShim::Hello { version, .. })) => {
            let message = format!("it speaks version {version}, this daemon speaks version {WIRE_VERSION}");
            Err(LinkError::Version { socket: socket.to_path_buf(), message })
        }
        Ok(Some(FromShim::Refusal { code: RefusalCode::VersionMismatch, message, .. })) => {
            Err(LinkError::Version { socket: socket.to_path_buf(), message })
        }
        Ok(Some(FromShim::Refusal { message, .. })) => Err(bad(message)),
        Ok(Some(FromShim::Reply { .. } | FromShim::Event(_))) => {
            Err(bad("it spoke before it introduced itself".to_owned()))
        }
        Ok(None) => Err(bad("it closed the connection".to_owned())),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// The stream.
pub(super) struct Wire {
    pub lines: Lines,
    pub writer: OwnedWriteHalf,
}

/// What comes in, with what was read of an incomplete line.
pub(super) struct Lines {
    reader: OwnedReadHalf,
    inbox: Vec<u8>,
}

enum Wake {
    Order(Option<Order>),
    Line(io::Result<Option<FromShim>>),
}

impl Wire {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>, events: mpsc::Sender<ShimEvent>) {
        let mut open: HashMap<u64, oneshot::Sender<RequestResult>> = HashMap::new();
        let mut next_id = 1;
        loop {
            let wake = tokio::select! {
                order = orders.recv() => Wake::Order(order),
                line = self.lines.next() => Wake::Line(line),
            };
            match wake {
                Wake::Order(None) => return,
                Wake::Order(Some(Order { request, reply })) => {
                    let id = next_id;
                    next_id += 1;
                    // Who gave up waiting needs no place in the table.
                    open.retain(|_, reply| !reply.is_closed());
                    open.insert(id, reply);
                    // Requests are small and the shim always reads: this does not wait.
                    if write(&mut self.writer, &ToShim::Call(Call { id, request })).await.is_err() {
                        return;
                    }
                }
                Wake::Line(Ok(Some(FromShim::Reply { id, ok }))) => {
                    if let Some(reply) = open.remove(&id) {
                        // The asker may have run out of patience.
                        reply.send(Ok(ok)).ok();
                    }
                }
                Wake::Line(Ok(Some(FromShim::Refusal { id, code, message }))) => {
                    match id.and_then(|id| open.remove(&id)) {
                        Some(reply) => {
                            reply.send(Err(LinkError::Refused { code, message })).ok();
                        }
                        None => tracing::warn!(?code, message, "the shim refused a line"),
                    }
                }
                Wake::Line(Ok(Some(FromShim::Event(event)))) => {
                    if events.try_send(event).is_err() && !events.is_closed() {
                        tracing::warn!("nobody takes the shim's events: closing the link");
                        return;
                    }
                }
                Wake::Line(Ok(Some(FromShim::Hello { .. }))) => {}
                Wake::Line(Ok(None)) => return,
                Wake::Line(Err(error)) => {
                    tracing::warn!(%error, "the link to a shim broke");
                    return;
                }
            }
        }
    }
}

/// Sends a line.
pub(super) async fn write(writer: &mut OwnedWriteHalf, line: &ToShim) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}

impl Lines {
    /// Reads the next line; `None` at the end. Safe to cancel: what was read stays in the inbox.
    pub async fn next(&mut self) -> io::Result<Option<FromShim>> {
        loop {
            if let Some(end) = self.inbox.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.inbox.drain(..=end).collect();
                match hear(&line)? {
                    Heard::Known(line) => return Ok(Some(line)),
                    Heard::Newer(event) => {
                        tracing::debug!(event, "passed over an event of a newer shim");
                        continue;
                    }
                }
            }
            if self.inbox.len() > MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a line of the shim is too long"));
            }
            if self.reader.read_buf(&mut self.inbox).await? == 0 {
                return Ok(None);
            }
        }
    }
}
