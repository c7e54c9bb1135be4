//! The daemon's connection to a shim for one viewer of the agent's terminal.
//!
//! Unlike a [`ShimLink`](super::link::ShimLink) it is read only as fast as the viewer reads: the shim queues nothing for
//! a slow viewer and later sends it the current screen. Input goes through [`Typing`] and does not wait for the output.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fermata_protocol::supervision::TerminalSize;
use fermata_protocol::terminal::Bytes;
use serde::de::DeserializeOwned;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;

use super::link::{Handshake, LineReader, LinkError, REPLY_TIMEOUT, RequestResult, millis, shake_hands, write};
use fermata_shim::record::ExitRecord;
use fermata_shim::wire::{FromShim, RefusalCode, ShimCall, ShimEvent, ShimRequest, ToShim, Typed, Watching};

/// How long a reply may take: it comes behind the output that the viewer has not read yet.
const SLOW_REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// What a viewer receives.
#[derive(Debug)]
pub enum ViewingEvent {
    /// The screen is to be cleared; the output that follows draws it again.
    Screen(TerminalSize),
    Output(Bytes),
    /// The agent has ended.
    Exited(ExitRecord),
    /// The shim has exited, or the connection has ended.
    Gone,
}

/// The pending replies by request id; `None` once the connection has ended.
type PendingReplies = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<RequestResult>>>>>;

/// The direction from the shim. Its owner has to read it for the replies to the requests of [`Typing`] to arrive.
pub struct Viewing {
    lines: LineReader,
    /// Events that arrived during [`Viewing::watch`].
    early_events: VecDeque<ViewingEvent>,
    pending: PendingReplies,
}

/// The direction to the shim.
pub struct Typing {
    /// The id of the last request, and the stream. The lock is held while a line is written, so that lines stay whole and
    /// ids rise; it delays only other input of the same viewer.
    writer: tokio::sync::Mutex<(u64, OwnedWriteHalf)>,
    pending: PendingReplies,
}

/// Connects to the shim of an agent with a terminal.
///
/// # Errors
/// When the shim cannot be reached, or its release has no terminals.
pub async fn connect(socket: &Path) -> Result<(Viewing, Typing), LinkError> {
    let Handshake { wire, terminal, .. } = shake_hands(socket).await?;
    if !terminal {
        let message = "it was started by an older release, whose shim has no terminals".to_owned();
        return Err(LinkError::Refused { code: RefusalCode::NoTerminal, message });
    }
    let pending: PendingReplies = Arc::new(Mutex::new(Some(HashMap::new())));
    let writer = tokio::sync::Mutex::new((0, wire.writer));
    let viewing = Viewing { lines: wire.lines, early_events: VecDeque::new(), pending: Arc::clone(&pending) };
    Ok((viewing, Typing { writer, pending }))
}

fn lock(pending: &PendingReplies) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<RequestResult>>>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Viewing {
    /// Begins to watch, after a resize where a size is given; returns the terminal's size.
    ///
    /// # Errors
    /// When the shim refuses or has exited.
    pub async fn watch(
        &mut self,
        typing: &Typing,
        size: Option<TerminalSize>,
        scrollback: bool,
    ) -> Result<TerminalSize, LinkError> {
        let begin = async {
            if let Some(size) = size {
                typing.resize(size).await?;
            }
            typing.ask::<Watching>(ShimRequest::Watch { scrollback }, REPLY_TIMEOUT).await
        };
        tokio::pin!(begin);
        loop {
            tokio::select! {
                begun = &mut begin => return begun.map(|watching| watching.size),
                event = self.read() => match event {
                    ViewingEvent::Gone | ViewingEvent::Exited(_) => return Err(LinkError::Closed),
                    event @ (ViewingEvent::Screen(_) | ViewingEvent::Output(_)) => self.early_events.push_back(event),
                }
            }
        }
    }

    /// Waits for the next event. Cancel-safe.
    pub async fn next(&mut self) -> ViewingEvent {
        match self.early_events.pop_front() {
            Some(event) => event,
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> ViewingEvent {
        loop {
            match self.lines.next().await {
                Ok(Some(FromShim::Reply { id, ok })) => self.answer(id, Ok(ok)),
                Ok(Some(FromShim::Refusal { id: Some(id), code, message })) => {
                    self.answer(id, Err(LinkError::Refused { code, message }));
                }
                Ok(Some(FromShim::Refusal { id: None, code, message })) => {
                    tracing::warn!(?code, message, "the shim refused a line");
                }
                Ok(Some(FromShim::Event(event))) => match event {
                    ShimEvent::Screen(size) => return ViewingEvent::Screen(size),
                    ShimEvent::Output { data } => return ViewingEvent::Output(data),
                    ShimEvent::Exited(record) => return ViewingEvent::Exited(*record),
                    // The project receives these through the daemon's own link.
                    ShimEvent::Stopped { .. }
                    | ShimEvent::Continued {}
                    | ShimEvent::LeaseExpired {}
                    | ShimEvent::FreezeBroken(_) => {}
                },
                Ok(Some(FromShim::Hello { .. })) => {}
                Ok(None) => return ViewingEvent::Gone,
                Err(error) => {
                    tracing::warn!(%error, "a viewer's link to a shim broke");
                    return ViewingEvent::Gone;
                }
            }
        }
    }

    fn answer(&self, id: u64, result: RequestResult) {
        if let Some(reply) = lock(&self.pending).as_mut().and_then(|pending| pending.remove(&id)) {
            // Fails when the request has timed out.
            reply.send(result).ok();
        }
    }
}

impl Drop for Viewing {
    fn drop(&mut self) {
        // Replies are no longer read: the pending requests fail.
        *lock(&self.pending) = None;
    }
}

impl Typing {
    /// Types into the terminal; returns how many bytes were accepted.
    ///
    /// # Errors
    /// When the shim refuses or has exited.
    pub async fn type_in(&self, data: Vec<u8>) -> Result<u64, LinkError> {
        Ok(self.ask::<Typed>(ShimRequest::Type { data: Bytes(data) }, SLOW_REPLY_TIMEOUT).await?.bytes)
    }

    /// Resizes the terminal.
    ///
    /// # Errors
    /// When the shim refuses or has exited.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), LinkError> {
        self.ask::<serde_json::Value>(ShimRequest::Resize(size), SLOW_REPLY_TIMEOUT).await.map(drop)
    }

    async fn ask<T: DeserializeOwned>(&self, request: ShimRequest, limit: Duration) -> Result<T, LinkError> {
        let (sender, receiver) = oneshot::channel();
        let sent = request.clone();
        let exchange = async {
            {
                let mut writer = self.writer.lock().await;
                let (last_id, writer) = &mut *writer;
                *last_id += 1;
                match lock(&self.pending).as_mut() {
                    Some(pending) => pending.insert(*last_id, sender),
                    None => return Err(LinkError::Closed),
                };
                let call = ToShim::Call(ShimCall { id: *last_id, request });
                write(writer, &call).await.map_err(|_| LinkError::Closed)?;
            }
            receiver.await.map_err(|_| LinkError::Closed)?
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(reply) => serde_json::from_value(reply?).map_err(LinkError::Reply),
            Err(_) => Err(LinkError::Timeout { request: sent, waited_ms: millis(limit) }),
        }
    }
}
