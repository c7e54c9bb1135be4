//! Context items: narrow rows for scoring, their texts in a table of their own, and a full-text index.

use std::collections::BTreeMap;

use fermata_core::context::{FlashSavePlan, ScoredItem};
use fermata_protocol::context::{ContextItem, ContextSummary, ItemType, Tier};
use fermata_protocol::{AgentName, ProjectName, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::word;

const PUT: &str = "add context items";
const READ: &str = "read context items";

/// An item to insert, with its tokens counted and its score computed.
#[derive(Debug, Clone)]
pub struct NewRow {
    pub kind: ItemType,
    pub text: String,
    pub tokens: u64,
    pub score: f64,
    pub tier: Tier,
    pub pinned: bool,
}

/// Inserts items; returns their ids.
///
/// # Errors
/// When a row cannot be written.
pub fn insert(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
    rows: &[NewRow],
    now: UnixMillis,
) -> Result<Vec<i64>, StoreError> {
    let mut items = connection
        .prepare_cached(
            "INSERT INTO context_items (project, agent, type, tokens, score, tier, pinned, archived, access_count, \
             created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0, 0, ?8)",
        )
        .doing(PUT)?;
    let mut bodies = connection.prepare_cached("INSERT INTO context_bodies (id, text) VALUES (?1, ?2)").doing(PUT)?;
    let mut search =
        connection.prepare_cached("INSERT INTO context_search (rowid, text) VALUES (?1, ?2)").doing(PUT)?;
    let mut ids = Vec::with_capacity(rows.len());
    for row in rows {
        let (project, agent) = (project.as_str(), agent.as_str());
        let (kind, tier, tokens) = (row.kind.as_str(), row.tier.as_str(), row.tokens as i64);
        items.execute(params![project, agent, kind, tokens, row.score, tier, row.pinned, now.0]).doing(PUT)?;
        let id = connection.last_insert_rowid();
        bodies.execute(params![id, row.text]).doing(PUT)?;
        search.execute(params![id, row.text]).doing(PUT)?;
        ids.push(id);
    }
    Ok(ids)
}

/// Reads the unarchived items for scoring, by agent.
///
/// # Errors
/// When a row cannot be read.
pub fn scored(
    connection: &Connection,
    project: &ProjectName,
    agent: Option<&AgentName>,
) -> Result<BTreeMap<AgentName, Vec<ScoredItem>>, StoreError> {
    let mut statement = connection
        .prepare_cached(
            "SELECT agent, id, type, created_at, access_count, tokens, pinned, tier, score FROM context_items \
             WHERE project = ?1 AND (?2 IS NULL OR agent = ?2) AND archived = 0 ORDER BY agent, archived, id",
        )
        .doing(READ)?;
    let mut rows = statement.query(params![project.as_str(), agent.map(AgentName::as_str)]).doing(READ)?;
    let mut by_agent: BTreeMap<AgentName, Vec<ScoredItem>> = BTreeMap::new();
    let mut current: Option<(AgentName, Vec<ScoredItem>)> = None;
    while let Some(row) = rows.next().doing(READ)? {
        let text = |column| row.get_ref(column).and_then(|value| Ok(value.as_str()?)).doing(READ);
        let item = ScoredItem {
            id: row.get(1).doing(READ)?,
            kind: kind(text(2)?)?,
            created_at: UnixMillis(row.get(3).doing(READ)?),
            access_count: row.get::<_, i64>(4).doing(READ)?.unsigned_abs(),
            tokens: row.get::<_, i64>(5).doing(READ)?.unsigned_abs(),
            pinned: row.get(6).doing(READ)?,
            tier: tier(text(7)?)?,
            score: row.get(8).doing(READ)?,
        };
        // The rows are ordered by agent: its name is parsed once.
        let agent = text(0)?;
        match &mut current {
            Some((name, items)) if name.as_str() == agent => items.push(item),
            Some(_) | None => {
                let next = (word(agent)?, vec![item]);
                by_agent.extend(current.replace(next));
            }
        }
    }
    by_agent.extend(current);
    Ok(by_agent)
}

/// Parses a type. Faster than [`word`], since a pause may read ten thousand rows.
fn kind(text: &str) -> Result<ItemType, StoreError> {
    ItemType::ALL.into_iter().find(|kind| kind.as_str() == text).map_or_else(|| word(text), Ok)
}

fn tier(text: &str) -> Result<Tier, StoreError> {
    [Tier::Hot, Tier::Warm, Tier::Cold].into_iter().find(|tier| tier.as_str() == text).map_or_else(|| word(text), Ok)
}

/// Applies a planned flash save: writes the scores, tiers and archived flags that have changed.
///
/// # Errors
/// When a row cannot be written.
pub fn apply_plan(connection: &Connection, plan: &FlashSavePlan) -> Result<(), StoreError> {
    const APPLY: &str = "apply the flash save";
    let mut score =
        connection.prepare_cached("UPDATE context_items SET score = ?2, tier = ?3 WHERE id = ?1").doing(APPLY)?;
    // A statement of its own, since it changes an index too.
    let mut archive = connection
        .prepare_cached("UPDATE context_items SET score = ?2, tier = ?3, archived = 1 WHERE id = ?1")
        .doing(APPLY)?;
    for item in plan.items.iter().filter(|item| item.changed) {
        let statement = if item.archive { &mut archive } else { &mut score };
        statement.execute(params![item.id, item.score, item.tier.as_str()]).doing(APPLY)?;
    }
    Ok(())
}

/// The items of a list: those that match every condition.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub agent: Option<AgentName>,
    pub tier: Option<Tier>,
    pub archived: Option<bool>,
    /// An upper bound of the ids, exclusive.
    pub before: Option<i64>,
    pub limit: u32,
}

/// The length of the texts in lists, in characters.
const EXCERPT: u32 = 200;

pub(super) fn columns(text: &str) -> String {
    format!(
        "i.id, i.agent, i.type, i.tokens, i.score, i.tier, i.pinned, i.archived, i.access_count, i.created_at, {text}"
    )
}

/// Lists items, newest first, with the beginning of their texts.
///
/// # Errors
/// When a row cannot be read.
pub fn list(
    connection: &Connection,
    project: &ProjectName,
    selection: &Selection,
) -> Result<Vec<ContextItem>, StoreError> {
    let sql = format!(
        "SELECT {} FROM context_items i JOIN context_bodies b USING (id) WHERE i.project = ?1 \
         AND (?2 IS NULL OR i.agent = ?2) AND (?3 IS NULL OR i.tier = ?3) AND (?4 IS NULL OR i.archived = ?4) \
         AND (?5 IS NULL OR i.id < ?5) ORDER BY i.id DESC LIMIT ?6",
        columns(&format!("substr(b.text, 1, {EXCERPT})"))
    );
    let mut statement = connection.prepare_cached(&sql).doing(READ)?;
    let agent = selection.agent.as_ref().map(AgentName::as_str);
    let tier = selection.tier.map(Tier::as_str);
    let given = params![project.as_str(), agent, tier, selection.archived, selection.before, selection.limit];
    let rows = statement.query_map(given, raw).doing(READ)?;
    rows.map(|row| item(row.doing(READ)?)).collect()
}

/// Reads the unarchived items with their complete texts, one by one, sorted by agent and age (oldest first).
///
/// # Errors
/// When a row cannot be read.
pub fn each_unarchived(
    connection: &Connection,
    project: &ProjectName,
    mut each: impl FnMut(ContextItem),
) -> Result<(), StoreError> {
    let sql = format!(
        "SELECT {} FROM context_items i CROSS JOIN context_bodies b USING (id) \
         WHERE i.project = ?1 AND i.archived = 0 ORDER BY i.agent, i.archived, i.id",
        columns("b.text")
    );
    // The order is that of the index, so that SQLite does not sort the texts.
    let mut statement = connection.prepare_cached(&sql).doing(READ)?;
    let mut rows = statement.query([project.as_str()]).doing(READ)?;
    let mut last: Option<AgentName> = None;
    while let Some(row) = rows.next().doing(READ)? {
        let text = |column| row.get_ref(column).and_then(|value| Ok(value.as_str()?)).doing(READ);
        let agent = match last.take() {
            Some(agent) if agent.as_str() == text(1)? => agent,
            Some(_) | None => word(text(1)?)?,
        };
        last = Some(agent.clone());
        each(ContextItem {
            id: row.get(0).doing(READ)?,
            agent,
            kind: kind(text(2)?)?,
            tokens: row.get::<_, i64>(3).doing(READ)?.unsigned_abs(),
            score: row.get(4).doing(READ)?,
            tier: tier(text(5)?)?,
            pinned: row.get(6).doing(READ)?,
            archived: row.get(7).doing(READ)?,
            access_count: row.get::<_, i64>(8).doing(READ)?.unsigned_abs(),
            created_at: UnixMillis(row.get(9).doing(READ)?),
            text: row.get(10).doing(READ)?,
        });
    }
    Ok(())
}

/// Finds an item with its complete text.
///
/// # Errors
/// When the row cannot be read.
pub fn find(connection: &Connection, project: &ProjectName, id: i64) -> Result<Option<ContextItem>, StoreError> {
    let sql = format!(
        "SELECT {} FROM context_items i JOIN context_bodies b USING (id) WHERE i.project = ?1 AND i.id = ?2",
        columns("b.text")
    );
    let row = connection.query_row(&sql, params![project.as_str(), id], raw).optional().doing(READ)?;
    row.map(item).transpose()
}

/// Counts an access to an item.
///
/// # Errors
/// When the row cannot be written.
pub fn count_access(connection: &Connection, project: &ProjectName, id: i64) -> Result<(), StoreError> {
    connection
        .execute_cached(
            "UPDATE context_items SET access_count = access_count + 1 WHERE project = ?1 AND id = ?2",
            params![project.as_str(), id],
        )
        .doing("count the access")?;
    Ok(())
}

/// Pins or unpins an item.
///
/// # Errors
/// When the row cannot be written.
pub fn pin(connection: &Connection, project: &ProjectName, id: i64, pinned: bool) -> Result<(), StoreError> {
    connection
        .execute_cached(
            "UPDATE context_items SET pinned = ?3, tier = CASE WHEN ?3 THEN 'hot' ELSE tier END \
             WHERE project = ?1 AND id = ?2",
            params![project.as_str(), id, pinned],
        )
        .doing("pin the item")?;
    Ok(())
}

/// Makes archived items unarchived; a flash save may archive them again.
///
/// # Errors
/// When a row cannot be written.
pub fn recall(connection: &Connection, project: &ProjectName, ids: &[i64]) -> Result<(), StoreError> {
    let mut statement = connection
        .prepare_cached(
            "UPDATE context_items SET archived = 0, access_count = access_count + 1 WHERE project = ?1 AND id = ?2",
        )
        .doing("recall items")?;
    for id in ids {
        statement.execute(params![project.as_str(), id]).doing("recall items")?;
    }
    Ok(())
}

/// Finds the items whose texts contain all words, archived ones included, best matches first.
///
/// # Errors
/// When a row cannot be read.
pub fn search(
    connection: &Connection,
    project: &ProjectName,
    agent: Option<&AgentName>,
    query: &str,
    limit: u32,
) -> Result<Vec<ContextItem>, StoreError> {
    // Each word becomes a quoted string, so that none of its characters is an operator of FTS5. A NUL would end the
    // expression within the string.
    let words: Vec<String> = query
        .split(|c: char| c.is_whitespace() || c == '\0')
        .filter(|word| !word.is_empty())
        .map(|word| format!("\"{}\"", word.replace('"', "\"\"")))
        .collect();
    if words.is_empty() {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT {} FROM context_search s JOIN context_items i ON i.id = s.rowid JOIN context_bodies b ON b.id = i.id \
         WHERE context_search MATCH ?1 AND i.project = ?2 AND (?3 IS NULL OR i.agent = ?3) ORDER BY rank LIMIT ?4",
        columns(&format!("substr(b.text, 1, {EXCERPT})"))
    );
    let mut statement = connection.prepare_cached(&sql).doing(READ)?;
    let given = params![words.join(" "), project.as_str(), agent.map(AgentName::as_str), limit];
    let rows = statement.query_map(given, raw).doing(READ)?;
    rows.map(|row| item(row.doing(READ)?)).collect()
}

/// Counts a project's items.
///
/// # Errors
/// When the table cannot be read.
pub fn summary(connection: &Connection, project: &ProjectName) -> Result<ContextSummary, StoreError> {
    let sql = "SELECT count(*), total(archived), total(iif(archived, 0, tokens)), \
               total(not archived and tier = 'hot'), total(not archived and tier = 'warm'), \
               total(not archived and tier = 'cold') FROM context_items WHERE project = ?1";
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Sums of counts below 2^53.
    let number = |value: f64| value as u64;
    connection
        .query_row(sql, [project.as_str()], |row| {
            Ok(ContextSummary {
                items: row.get::<_, i64>(0)?.unsigned_abs(),
                archived: number(row.get(1)?),
                tokens: number(row.get(2)?),
                hot: number(row.get(3)?),
                warm: number(row.get(4)?),
                cold: number(row.get(5)?),
            })
        })
        .doing(READ)
}

/// Returns the tokens of an agent's unarchived items.
///
/// # Errors
/// When the table cannot be read.
pub fn tokens(connection: &Connection, project: &ProjectName, agent: &AgentName) -> Result<u64, StoreError> {
    let sql = "SELECT coalesce(sum(tokens), 0) FROM context_items WHERE project = ?1 AND agent = ?2 AND archived = 0";
    connection
        .query_row(sql, [project.as_str(), agent.as_str()], |row| row.get::<_, i64>(0))
        .map(i64::unsigned_abs)
        .doing(READ)
}

/// A row of [`columns`] with the values of the database, which a restore writes back unchanged.
pub(super) struct RawItem {
    pub(super) id: i64,
    pub(super) agent: String,
    pub(super) kind: String,
    pub(super) tokens: i64,
    pub(super) score: f64,
    pub(super) tier: String,
    pub(super) pinned: bool,
    pub(super) archived: bool,
    pub(super) access_count: i64,
    pub(super) created_at: i64,
    pub(super) text: String,
}

pub(super) fn raw(row: &Row<'_>) -> rusqlite::Result<RawItem> {
    Ok(RawItem {
        id: row.get(0)?,
        agent: row.get(1)?,
        kind: row.get(2)?,
        tokens: row.get(3)?,
        score: row.get(4)?,
        tier: row.get(5)?,
        pinned: row.get(6)?,
        archived: row.get(7)?,
        access_count: row.get(8)?,
        created_at: row.get(9)?,
        text: row.get(10)?,
    })
}

fn item(raw: RawItem) -> Result<ContextItem, StoreError> {
    Ok(ContextItem {
        id: raw.id,
        agent: word(&raw.agent)?,
        kind: kind(&raw.kind)?,
        tokens: raw.tokens.unsigned_abs(),
        score: raw.score,
        tier: tier(&raw.tier)?,
        pinned: raw.pinned,
        archived: raw.archived,
        access_count: raw.access_count.unsigned_abs(),
        created_at: UnixMillis(raw.created_at),
        text: raw.text,
    })
}
