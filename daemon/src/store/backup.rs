//! Opens, checks and restores the database part of a checkpoint, which [`super::pinned`] writes.

use std::cmp::Ordering;
use std::path::Path;
use std::sync::Arc;

use fermata_protocol::ProjectName;
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskView;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};

use super::connection::connect;
use super::error::{Doing, StoreError};
use super::pinned::SMALL;
use super::rows::{load_tasks, word};
use super::{context, migrations};

const RESTORE: &str = "restore the project's rows";

/// Changes the project's name in a backup that is imported under another name.
///
/// # Errors
/// The file cannot be written.
pub fn rename(file: &Path, from: &ProjectName, to: &ProjectName) -> Result<(), StoreError> {
    const RENAME: &str = "rename the project of a backup";
    // Not opened by `connect`: the file must have no write-ahead log beside it, and its schema is not to be trusted.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags).doing(RENAME)?;
    connection.execute_batch("PRAGMA trusted_schema = off; PRAGMA journal_mode = memory; BEGIN").doing(RENAME)?;
    for (table, column) in SMALL.iter().chain(&[("context_items", "project")]) {
        let sql = format!("UPDATE {table} SET {column} = ?1 WHERE {column} = ?2");
        connection.execute(&sql, [to.as_str(), from.as_str()]).doing(RENAME)?;
    }
    connection.execute_batch("COMMIT").doing(RENAME)
}

/// The part of a backup that the event of the restore contains.
pub struct BackedUpProject {
    pub phase: Phase,
    pub tasks: Vec<TaskView>,
}

/// Reads phase and tasks from a backup.
///
/// # Errors
/// The file is missing, damaged, or of another project.
pub fn open(file: &Path, project: &ProjectName) -> Result<BackedUpProject, StoreError> {
    let connection = read(file)?;
    let phase: String = connection
        .query_row("SELECT phase FROM projects WHERE name = ?1", [project.as_str()], |row| row.get(0))
        .doing(RESTORE)?;
    let tasks = load_tasks(&connection, project.as_str())?;
    Ok(BackedUpProject { phase: word(&phase)?, tasks: tasks.into_values().map(Arc::unwrap_or_clone).collect() })
}

/// Checks a backup; returns what is wrong with it, or `None`.
///
/// # Errors
/// The file cannot be opened.
pub fn check(file: &Path, project: &ProjectName) -> Result<Option<String>, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    // The file itself, before any of its tables is read.
    let result: String = connection.query_row("PRAGMA quick_check", [], |row| row.get(0)).doing("check the backup")?;
    if result != "ok" {
        return Ok(Some(result));
    }
    let row = read(file)?
        .query_row("SELECT 1 FROM projects WHERE name = ?1", [project.as_str()], |_| Ok(()))
        .optional()
        .doing("check the backup")?;
    Ok(row.is_none().then(|| format!("it has no row of project '{project}'")))
}

/// Opens a backup for reading. One of an older schema is migrated in a copy in memory, so that the file and its hash
/// do not change.
fn read(file: &Path) -> Result<Connection, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).doing(RESTORE)?;
    match found.cmp(&migrations::NEWEST) {
        Ordering::Equal => Ok(connection),
        Ordering::Less => migrations::migrated_copy(file, found),
        Ordering::Greater => Err(StoreError::TooNew { path: file.to_owned(), found, known: migrations::NEWEST }),
    }
}

/// The rows of a backup that [`put_rows`] writes to the database.
pub struct RestoredRows {
    items: Vec<context::RawItem>,
    states: Vec<(String, String, i64)>,
}

/// Reads the context and the saved states of agents from a backup.
///
/// # Errors
/// The file cannot be read.
pub fn read_rows(file: &Path, project: &ProjectName) -> Result<RestoredRows, StoreError> {
    let connection = read(file)?;
    let sql = format!(
        "SELECT {} FROM context_items i JOIN context_bodies b USING (id) WHERE i.project = ?1",
        context::columns("b.text")
    );
    let mut statement = connection.prepare(&sql).doing(RESTORE)?;
    let items = statement
        .query_map([project.as_str()], context::raw)
        .doing(RESTORE)?
        .collect::<Result<_, _>>()
        .doing(RESTORE)?;
    let mut statement =
        connection.prepare("SELECT agent, state, saved_at FROM agent_states WHERE project = ?1").doing(RESTORE)?;
    let states = statement
        .query_map([project.as_str()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .doing(RESTORE)?
        .collect::<Result<_, _>>()
        .doing(RESTORE)?;
    Ok(RestoredRows { items, states })
}

/// Replaces the project's context and the saved states of its agents, in the writer's transaction.
///
/// # Errors
/// A row cannot be written.
pub fn put_rows(connection: &Connection, project: &ProjectName, rows: &RestoredRows) -> Result<(), StoreError> {
    let name = project.as_str();
    let search = "DELETE FROM context_search WHERE rowid IN (SELECT id FROM context_items WHERE project = ?1)";
    connection.execute(search, [name]).doing(RESTORE)?;
    connection.execute("DELETE FROM context_items WHERE project = ?1", [name]).doing(RESTORE)?;
    connection.execute("DELETE FROM agent_states WHERE project = ?1", [name]).doing(RESTORE)?;
    let mut insert = connection
        .prepare_cached(
            "INSERT INTO context_items (id, project, agent, type, tokens, score, tier, pinned, archived, \
             access_count, created_at) VALUES (\
             (SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM context_items WHERE id = ?1)), ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )
        .doing(RESTORE)?;
    let mut body = connection.prepare_cached("INSERT INTO context_bodies (id, text) VALUES (?1, ?2)").doing(RESTORE)?;
    let mut index =
        connection.prepare_cached("INSERT INTO context_search (rowid, text) VALUES (?1, ?2)").doing(RESTORE)?;
    for row in &rows.items {
        insert
            .execute(rusqlite::params![
                row.id,
                name,
                row.agent,
                row.kind,
                row.tokens,
                row.score,
                row.tier,
                row.pinned,
                row.archived,
                row.access_count,
                row.created_at
            ])
            .doing(RESTORE)?;
        // An item of an imported checkpoint gets a new id if an item of another project has its id.
        let id = connection.last_insert_rowid();
        body.execute(rusqlite::params![id, row.text]).doing(RESTORE)?;
        index.execute(rusqlite::params![id, row.text]).doing(RESTORE)?;
    }
    let mut state = connection
        .prepare_cached("INSERT INTO agent_states (project, agent, state, saved_at) VALUES (?1, ?2, ?3, ?4)")
        .doing(RESTORE)?;
    for (agent, blob, saved_at) in &rows.states {
        state.execute(rusqlite::params![name, agent, blob, saved_at]).doing(RESTORE)?;
    }
    Ok(())
}
