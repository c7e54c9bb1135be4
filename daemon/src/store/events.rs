//! The event table. Events are appended in the transaction of the changes that they record, and read from a cursor.

use fermata_protocol::event::Event;
use fermata_protocol::subscription::EventFilter;
use fermata_protocol::subscription::RecordedEvent;
use fermata_protocol::{Code, ProjectName, Refusal, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json, text, word};

/// How many events are kept.
const KEPT: i64 = 200_000;

/// The most rows that one read with a filter visits, so that it does not occupy a connection for the whole table.
const SCANNED: i64 = 20_000;

/// A position between two events. Its text is opaque to clients, and valid for one database only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventCursor(pub i64);

impl EventCursor {
    pub fn to_text(self, database: &str) -> String {
        format!("{database}.{}", self.0)
    }

    /// Parses a cursor.
    ///
    /// # Errors
    /// The text is not a cursor of this database.
    pub fn parse(text: &str, database: &str) -> Result<Self, Refusal> {
        let (id, seq) = text.rsplit_once('.').ok_or_else(Self::unknown)?;
        if id != database {
            return Err(Self::unknown());
        }
        seq.parse().ok().filter(|seq| *seq >= 0).map(Self).ok_or_else(Self::unknown)
    }

    /// Returns the refusal of a cursor that is not one of this database.
    pub fn unknown() -> Refusal {
        Refusal::new(Code::InvalidParams, "'cursor' is not a cursor of this daemon's events".to_owned())
            .hint("leave it out to begin with the oldest event")
    }
}

/// Appends events; returns the number of the last one.
///
/// # Errors
/// A row cannot be written.
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
            .doing("remove the oldest events")?;
    }
    Ok(last)
}

/// A page of events.
pub struct Page {
    /// Oldest first.
    pub events: Vec<RecordedEvent>,
    /// The beginning of the next page.
    pub next: EventCursor,
    /// Whether the table has more events at present.
    pub more: bool,
}

/// The result of a read from a cursor.
pub enum Read {
    Page(Page),
    /// The events after the cursor were removed; this is the oldest valid cursor.
    Expired(EventCursor),
    /// The cursor is beyond the last event: the database has lost events since, for instance by a power failure, or was
    /// replaced by a backup.
    Ahead,
}

/// Reads at most `limit` events after a cursor that match the filter.
///
/// # Errors
/// A row cannot be read.
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
/// The table cannot be read.
pub fn latest_at(connection: &Connection) -> Result<Option<UnixMillis>, StoreError> {
    let sql = "SELECT at FROM events ORDER BY seq DESC LIMIT 1";
    let at: Option<i64> = connection.query_row(sql, [], |row| row.get(0)).optional().doing("read events")?;
    Ok(at.map(UnixMillis))
}

/// Returns the cursor before the oldest event.
///
/// # Errors
/// The table cannot be read.
pub fn oldest(connection: &Connection) -> Result<EventCursor, StoreError> {
    connection
        .query_row("SELECT coalesce(min(seq), 1) - 1 FROM events", [], |row| row.get(0))
        .map(EventCursor)
        .doing("read events")
}
