//! Handlers of `events.*`. A subscription reads the event table from its own cursor; new events only wake it.

use std::sync::Arc;

use fermata_core::redact::Secrets;
use fermata_protocol::rpc::Notification;
use fermata_protocol::subscription::{
    EventFilter, EventNotification, EventsList, EventsListResult, EventsSubscribe, EventsSubscribeResult,
};
use fermata_protocol::{Code, Refusal};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::connection::ClientConnection;
use super::reply::wire;
use crate::errors::Failure;
use crate::store::Store;
use crate::store::events::{self, EventCursor, Page, Read};

/// The most events of one reply, or of one read of a subscription.
const MAX_PAGE: u32 = 500;

pub(super) async fn list(connection: &ClientConnection, params: EventsList) -> Result<Value, Failure> {
    let store = &connection.daemon.projects.services().store;
    let after = match &params.cursor {
        Some(cursor) => EventCursor::parse(cursor, store.id())?,
        None => store.read(events::oldest).await.map_err(|e| Failure::fault("read events", &e))?,
    };
    let limit = params.limit.unwrap_or(200).clamp(1, MAX_PAGE);
    let mut page = page(store, after, &params.filter, limit).await?;
    // With a filter the next matching event may be many pages away.
    while page.events.is_empty() && page.more {
        page = self::page(store, page.next, &params.filter, limit).await?;
    }
    let mut reply = wire(&EventsListResult { events: page.events, cursor: page.next.to_text(store.id()) })?;
    // Command lines may contain secrets.
    Secrets::default().redact_json(&mut reply);
    Ok(reply)
}

async fn page(store: &Store, after: EventCursor, filter: &EventFilter, limit: u32) -> Result<Page, Failure> {
    let (id, filter) = (store.id().to_owned(), filter.clone());
    let read = store
        .read(move |c| events::read(c, &id, after, &filter, limit as usize))
        .await
        .map_err(|e| Failure::fault("read events", &e))?;
    match read {
        Read::Page(page) => Ok(page),
        Read::Expired(oldest) => Err(expired(oldest, store)),
        Read::Ahead => Err(EventCursor::unknown().into()),
    }
}

fn expired(oldest: EventCursor, store: &Store) -> Failure {
    let oldest = oldest.to_text(store.id());
    Refusal::new(Code::CursorExpired, "the events after this cursor were removed".to_owned())
        .hint(format!("the oldest cursor is {oldest}"))
        .details(json!({ "oldest_cursor": oldest }))
        .into()
}

pub(super) async fn subscribe(connection: &Arc<ClientConnection>, params: EventsSubscribe) -> Result<Value, Failure> {
    let services = Arc::clone(connection.daemon.projects.services());
    let wake = services.store.wake();
    let from = match &params.cursor {
        Some(cursor) => {
            let from = EventCursor::parse(cursor, services.store.id())?;
            // An expired cursor is refused here rather than by a notification.
            page(&services.store, from, &params.filter, 1).await?;
            from
        }
        None => EventCursor(*wake.borrow()),
    };
    let (subscription, token) = connection.subscribe()?;
    let task = Subscription { connection: Arc::clone(connection), id: subscription, filter: params.filter, token };
    services.tracker.spawn(task.run(from, wake));
    wire(&EventsSubscribeResult { subscription, cursor: from.to_text(services.store.id()) })
}

struct Subscription {
    connection: Arc<ClientConnection>,
    id: u64,
    filter: EventFilter,
    token: CancellationToken,
}

impl Subscription {
    async fn run(self, mut at: EventCursor, mut wake: tokio::sync::watch::Receiver<i64>) {
        let services = Arc::clone(self.connection.daemon.projects.services());
        loop {
            wake.mark_unchanged();
            let page = match page(&services.store, at, &self.filter, MAX_PAGE).await {
                Ok(page) => page,
                Err(failure) => {
                    let params = json!({ "subscription": self.id, "error": failure.to_object() });
                    self.connection.send(&Notification::new("subscription_ended", params)).await;
                    self.connection.unsubscribe(self.id);
                    return;
                }
            };
            at = page.next;
            for event in page.events {
                let mut params = json!(EventNotification { subscription: self.id, event });
                Secrets::default().redact_json(&mut params);
                let notification = Notification::new("event", params);
                // Waits while the peer is slow; further events stay in the table.
                tokio::select! {
                    () = self.connection.send(&notification) => {}
                    () = self.token.cancelled() => return,
                }
            }
            if page.more {
                continue;
            }
            tokio::select! {
                changed = wake.changed() => if changed.is_err() { return },
                () = self.token.cancelled() => return,
            }
        }
    }
}

pub(super) fn unsubscribe(connection: &ClientConnection, subscription: u64) -> Result<Value, Failure> {
    if connection.unsubscribe(subscription) {
        Ok(json!({}))
    } else {
        let message = format!("this connection has no subscription {subscription}");
        Err(Refusal::new(Code::InvalidParams, message).into())
    }
}
