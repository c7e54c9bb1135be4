//! The event table: appended in the transaction of what it tells, read from a cursor.

use fermata_protocol::event::Event;
use fermata_protocol::subscription::EventFilter;
use fermata_protocol::subscription::RecordedEvent;
use fermata_protocol::{Code, ProjectName, Refusal, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json, text, word};

/// How many events are kept; older ones go when their cursor is far behind everybody.
const KEPT: i64 = 200_000;

/// How many rows a filtered read looks at before it hands back what it has, so that a rare kind
/// does not hold a reader for the whole table.
const SCANNED: i64 = 20_000;

/// A place between two events, as the wire shows it: opaque, and only good for one database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventCursor(pub i64);

impl EventCursor {
    /// Returns the cursor as text.
    pub fn to_text(self, database: &str) -> String {
        format!("{database}.{}", self.0)
    }

    /// Reads a cursor.
    ///
    /// # Errors
    /// When it is none, or one of another database.
    pub fn parse(text: &str, database: &str) -> Result<Self, Refusal> {
        let (id, seq) = text.rsplit_once('.').ok_or_else(Self::unknown)?;
        if id != database {
            return Err(Self::unknown());
        }
        seq.parse().ok().filter(|seq| *seq >= 0).map(Self).ok_or_else(Self::unknown)
    }

    /// The refusal of a cursor that means no place in this database.
    pub fn unknown() -> Refusal {
        Refusal::new(Code::InvalidParams, "'cursor' is not one that this daemon gave out".to_owned())
            .hint("leave it out to begin anew")
    }
}

/// Appends events; returns the number of the last.
///
/// # Errors
/// When a row cannot be written.
pub fn append(
    connection: &Connection,
    project: &ProjectName,
    events: &[Event],
    at: UnixMillis,
) -> Result<i64, StoreError> {
    let what = "append events";
    let mut statement = connection
        .prepare_cached("INSERT INTO events (at, project, kind, event) VALUES (?1, ?2, ?3, ?4)")
        .doing(what)?;
    for event in events {
        statement.execute(params![at.0, project.as_str(), event.kind(), text(event)?]).doing(what)?;
    }
    let last = connection.last_insert_rowid();
    if last % 1024 < events.len() as i64 && last > KEPT {
        connection
            .execute_cached("DELETE FROM events WHERE seq <= ?1", [last - KEPT])
            .doing("drop the oldest events")?;
    }
    Ok(last)
}

/// A page of events, and where the next one begins.
pub struct Page {
    /// The events, oldest first.
    pub events: Vec<RecordedEvent>,
    /// Where the next page begins.
    pub next: EventCursor,
    /// Whether there may be more right now.
    pub more: bool,
}

/// What a read from a cursor found.
pub enum Read {
    /// Events.
    Page(Page),
    /// The events after the cursor are gone; this is the oldest cursor that still works.
    Expired(EventCursor),
    /// There is no such place yet: the cursor was given out by a database that had more events, for
    /// instance before a power failure took the last of them or a backup was put in its place.
    Ahead,
}

/// Reads at most `limit` events after a cursor that pass the filter.
///
/// # Errors
/// When a row cannot be read.
pub fn read(
    connection: &Connection,
    database: &str,
    after: EventCursor,
    filter: &EventFilter,
    limit: usize,
) -> Result<Read, StoreError> {
    let what = "read events";
    let (oldest, newest): (i64, i64) = connection
        .prepare_cached("SELECT coalesce(min(seq), 1), coalesce(max(seq), 0) FROM events")
        .and_then(|mut statement| statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))))
        .doing(what)?;
    if after.0 < oldest - 1 {
        return Ok(Read::Expired(EventCursor(oldest - 1)));
    }
    if after.0 > newest.max(oldest - 1) {
        return Ok(Read::Ahead);
    }
    let end = newest.min(after.0 + SCANNED);
    let project = filter.project.as_ref().map(ProjectName::as_str);
    let mut statement = connection
        .prepare_cached(
            "SELECT seq, at, project, kind, event FROM events \
             WHERE seq > ?1 AND seq <= ?2 AND (?3 IS NULL OR project = ?3) ORDER BY seq",
        )
        .doing(what)?;
    let mut rows = statement.query(params![after.0, end, project]).doing(what)?;
    let mut events = Vec::new();
    let mut next = EventCursor(end.max(after.0));
    while let Some(row) = rows.next().doing(what)? {
        let kind: String = row.get(3).doing(what)?;
        if !filter.takes_kind(&kind) {
            continue;
        }
        let seq: i64 = row.get(0).doing(what)?;
        if events.len() == limit {
            next = EventCursor(seq - 1);
            break;
        }
        events.push(RecordedEvent {
            cursor: EventCursor(seq).to_text(database),
            at: UnixMillis(row.get(1).doing(what)?),
            project: word(&row.get::<_, String>(2).doing(what)?)?,
            event: json(&row.get::<_, String>(4).doing(what)?)?,
        });
    }
    Ok(Read::Page(Page { events, next, more: next.0 < newest }))
}

/// Returns when the last event was recorded.
///
/// # Errors
/// When the table cannot be read.
pub fn latest_at(connection: &Connection) -> Result<Option<UnixMillis>, StoreError> {
    let sql = "SELECT at FROM events ORDER BY seq DESC LIMIT 1";
    let at: Option<i64> = connection.query_row(sql, [], |row| row.get(0)).optional().doing("read events")?;
    Ok(at.map(UnixMillis))
}

/// Returns the cursor before the oldest event that is left.
///
/// # Errors
/// When the table cannot be read.
pub fn oldest(connection: &Connection) -> Result<EventCursor, StoreError> {
    connection
        .query_row("SELECT coalesce(min(seq), 1) - 1 FROM events", [], |row| row.get(0))
        .map(EventCursor)
        .doing("read events")
}
