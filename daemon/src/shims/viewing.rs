//! The daemon's connection to a shim for one viewer of the agent's terminal.
//!
//! Unlike a [`ShimLink`](super::link::ShimLink) it is read only as fast as the viewer takes it: a
//! slow viewer makes the shim hold back, which then owes it no more than the present screen. What is
//! typed goes its own way, and is not held up by that.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fermata_protocol::supervision::TerminalSize;
use fermata_protocol::terminal::Bytes;
use serde::de::DeserializeOwned;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;

use super::link::{ANSWER_PATIENCE, Greeted, Lines, LinkError, RequestResult, greet, write};
use fermata_shim::record::ExitRecord;
use fermata_shim::wire::{Call, FromShim, RefusalCode, Request, ShimEvent, ToShim, Typed, Watching};

/// How long an answer may take: it comes behind the output that the viewer has not taken yet.
const SLOW_ANSWER: Duration = Duration::from_secs(60);

/// What a viewer sees.
#[derive(Debug)]
pub enum ViewingEvent {
    /// What was shown is void; the output that follows draws everything anew.
    Screen(TerminalSize),
    /// What the terminal shows.
    Output(Bytes),
    /// The agent has ended.
    Exited(ExitRecord),
    /// The shim is gone, or the connection to it.
    Gone,
}

/// What is open: the answers that are waited for, none once the connection has ended.
type Open = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<RequestResult>>>>>;

/// What comes from the shim.
pub struct Viewing {
    lines: Lines,
    /// What was seen before anybody looked.
    ahead: VecDeque<ViewingEvent>,
    open: Open,
}

/// What goes to the shim.
pub struct Typing {
    writer: tokio::sync::Mutex<(u64, OwnedWriteHalf)>,
    open: Open,
}

/// Connects to the shim of an agent with a terminal.
///
/// # Errors
/// When it cannot be reached, or gives no terminal.
pub async fn connect(socket: &Path) -> Result<(Viewing, Typing), LinkError> {
    let Greeted { wire, terminal, .. } = greet(socket).await?;
    if !terminal {
        let message = "it was started by an older release, whose shim gives no terminal".to_owned();
        return Err(LinkError::Refused { code: RefusalCode::NoTerminal, message });
    }
    let open: Open = Arc::new(Mutex::new(Some(HashMap::new())));
    let writer = tokio::sync::Mutex::new((0, wire.writer));
    Ok((Viewing { lines: wire.lines, ahead: VecDeque::new(), open: Arc::clone(&open) }, Typing { writer, open }))
}

fn lock(open: &Open) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<RequestResult>>>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Viewing {
    /// Begins to watch, having taken on a size where one is given; returns the terminal's size.
    ///
    /// # Errors
    /// When the shim refuses or is gone.
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
            typing.ask::<Watching>(Request::Watch { scrollback }, ANSWER_PATIENCE).await
        };
        tokio::pin!(begin);
        loop {
            tokio::select! {
                begun = &mut begin => return begun.map(|watching| watching.size),
                seen = self.read() => match seen {
                    ViewingEvent::Gone | ViewingEvent::Exited(_) => return Err(LinkError::Closed),
                    seen @ (ViewingEvent::Screen(_) | ViewingEvent::Output(_)) => self.ahead.push_back(seen),
                }
            }
        }
    }

    /// Waits for what is seen next. Safe to cancel.
    pub async fn next(&mut self) -> ViewingEvent {
        match self.ahead.pop_front() {
            Some(seen) => seen,
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
                    // The daemon's own link tells the project.
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

    fn answer(&self, id: u64, outcome: RequestResult) {
        if let Some(reply) = lock(&self.open).as_mut().and_then(|open| open.remove(&id)) {
            // The asker may have run out of patience.
            reply.send(outcome).ok();
        }
    }
}

impl Drop for Viewing {
    fn drop(&mut self) {
        // Nobody reads answers any more: whoever waits for one is told.
        *lock(&self.open) = None;
    }
}

impl Typing {
    /// Types; returns how many bytes were taken.
    ///
    /// # Errors
    /// When the shim refuses or is gone.
    pub async fn type_in(&self, data: Vec<u8>) -> Result<u64, LinkError> {
        Ok(self.ask::<Typed>(Request::Type { data: Bytes(data) }, SLOW_ANSWER).await?.bytes)
    }

    /// Gives the terminal another size.
    ///
    /// # Errors
    /// When the shim refuses or is gone.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), LinkError> {
        self.ask::<serde_json::Value>(Request::Resize(size), SLOW_ANSWER).await.map(drop)
    }

    async fn ask<T: DeserializeOwned>(&self, request: Request, patience: Duration) -> Result<T, LinkError> {
        let (reply, answer) = oneshot::channel();
        let asked = request.clone();
        let exchange = async {
            {
                let mut writer = self.writer.lock().await;
                let (last_id, writer) = &mut *writer;
                *last_id += 1;
                match lock(&self.open).as_mut() {
                    Some(open) => open.insert(*last_id, reply),
                    None => return Err(LinkError::Closed),
                };
                let call = ToShim::Call(Call { id: *last_id, request });
                write(writer, &call).await.map_err(|_| LinkError::Closed)?;
            }
            answer.await.map_err(|_| LinkError::Closed)?
        };
        match tokio::time::timeout(patience, exchange).await {
            Ok(value) => serde_json::from_value(value?).map_err(LinkError::Answer),
            Err(_) => {
                let waited_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
                Err(LinkError::Timeout { request: asked, waited_ms })
            }
        }
    }
}
