//! The state of one client connection, which its calls share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fermata_protocol::rpc::Notification;
use fermata_protocol::{Code, ErrorObject, MAX_IN_FLIGHT, Refusal};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::terminals::Attachment;
use super::transfer_files::Transfers;
use crate::auth::Peer;
use crate::services::ChannelGuard;

/// The most subscriptions of one connection.
const SUBSCRIPTIONS: usize = 16;

/// A connection of a client.
pub(super) struct ClientConnection {
    pub daemon: Arc<Daemon>,
    out: mpsc::Sender<Vec<u8>>,
    state: Mutex<ConnectionState>,
    pub transfers: Transfers,
    /// Cancelled when the connection ends.
    pub closed: CancellationToken,
}

pub(super) struct ConnectionState {
    peer: Peer,
    /// Why the last `hello` was refused; the requests after it are refused for the same reason.
    pub(super) hello_error: Option<ErrorObject>,
    under_way: BTreeMap<String, CancellationToken>,
    subscriptions: BTreeMap<u64, CancellationToken>,
    next_subscription: u64,
    attachments: BTreeMap<u64, Arc<Attachment>>,
    pub(super) channel: Option<ChannelGuard>,
}

impl ClientConnection {
    /// Creates the connection of a peer; lines for the peer go to `out`.
    pub(super) fn new(daemon: Arc<Daemon>, peer: Peer, out: mpsc::Sender<Vec<u8>>, closed: CancellationToken) -> Self {
        let state = ConnectionState {
            peer,
            hello_error: None,
            under_way: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            next_subscription: 0,
            attachments: BTreeMap::new(),
            channel: None,
        };
        Self { daemon, out, state: Mutex::new(state), transfers: Transfers::default(), closed }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ConnectionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn peer(&self) -> Peer {
        self.lock().peer.clone()
    }

    /// Replaces the peer, which has proved with a token that it is an agent.
    pub fn become_peer(&self, peer: Peer) {
        self.lock().peer = peer;
    }

    /// Keeps the agent's channel open for as long as the connection lasts.
    pub fn keep_channel(&self, guard: ChannelGuard) {
        self.lock().channel = Some(guard);
    }

    /// Sends a line; waits while the queue is full, so that a slow peer delays only its own calls.
    pub async fn send(&self, message: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        // Fails when the connection has ended.
        drop(self.out.send(line).await);
    }

    /// Returns a sender of notifications to the peer.
    pub fn notifications(self: &Arc<Self>) -> mpsc::Sender<Notification> {
        let (sender, mut receiver) = mpsc::channel::<Notification>(16);
        let connection = Arc::clone(self);
        self.daemon.projects.services().tracker.spawn(async move {
            loop {
                let next = tokio::select! {
                    next = receiver.recv() => next,
                    () = connection.closed.cancelled() => return,
                };
                match next {
                    Some(notification) => connection.send(&notification).await,
                    None => return,
                }
            }
        });
        sender
    }

    /// Opens a subscription; returns its id and the token that is cancelled when it ends.
    ///
    /// # Errors
    /// `too_many_requests`.
    pub fn subscribe(&self) -> Result<(u64, CancellationToken), Refusal> {
        let mut state = self.lock();
        if state.subscriptions.len() >= SUBSCRIPTIONS {
            let message = format!("this connection has {SUBSCRIPTIONS} subscriptions already");
            return Err(Refusal::new(Code::TooManyRequests, message).hint("events.unsubscribe"));
        }
        state.next_subscription += 1;
        let (id, token) = (state.next_subscription, self.closed.child_token());
        state.subscriptions.insert(id, token.clone());
        Ok((id, token))
    }

    /// Ends a subscription; returns whether there was one with this id.
    pub fn unsubscribe(&self, id: u64) -> bool {
        match self.lock().subscriptions.remove(&id) {
            Some(token) => {
                token.cancel();
                true
            }
            None => false,
        }
    }

    /// Registers an attachment under the id of its subscription.
    pub fn keep_attachment(&self, id: u64, attachment: Arc<Attachment>) {
        self.lock().attachments.insert(id, attachment);
    }

    pub fn attachment(&self, id: u64) -> Option<Arc<Attachment>> {
        self.lock().attachments.get(&id).cloned()
    }

    /// Ends an attachment and its subscription; returns whether there was one with this id.
    pub fn drop_attachment(&self, id: u64) -> bool {
        let existed = self.lock().attachments.remove(&id).is_some();
        existed && self.unsubscribe(id)
    }

    pub(super) fn begin(&self, id: &Value) -> Result<CancellationToken, Refusal> {
        let mut state = self.lock();
        if state.under_way.len() >= MAX_IN_FLIGHT {
            let message = format!("this connection has {MAX_IN_FLIGHT} requests under way");
            return Err(Refusal::new(Code::TooManyRequests, message).hint("wait for replies before sending more"));
        }
        // Checked before the insertion, so that the request under way keeps its token.
        if state.under_way.contains_key(&id.to_string()) {
            return Err(Refusal::new(Code::InvalidRequest, format!("a request with id {id} is under way already")));
        }
        let token = self.closed.child_token();
        state.under_way.insert(id.to_string(), token.clone());
        Ok(token)
    }

    pub(super) fn end(&self, id: &Value) {
        self.lock().under_way.remove(&id.to_string());
    }

    pub(super) fn cancel(&self, id: &Value) {
        if let Some(token) = self.lock().under_way.get(&id.to_string()) {
            token.cancel();
        }
    }
}
