//! The database part of a checkpoint: this project's rows in a file of their own, and back.

use std::path::Path;
use std::sync::Arc;

use fermata_protocol::context::ContextItem;
use fermata_protocol::project::Phase;
use fermata_protocol::task::TaskView;
use fermata_protocol::{AgentName, ProjectName};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};
use serde_json::Value;

use super::rows::{json, load_tasks, word};
use super::{Doing, StoreError, connect, context, migrations};

/// What a checkpoint keeps of the database, `(table, column that names the project)`. Events, usage,
/// operations, checkpoints and environments are not in it: a restore must not rewind them.
const TABLES: &[(&str, &str)] = &[
    ("projects", "name"),
    ("agents", "project"),
    ("agent_states", "project"),
    ("tasks", "project"),
    ("questions", "project"),
    ("context_items", "project"),
];

const BACKUP: &str = "back up the project's rows";
const RESTORE: &str = "restore the project's rows";

/// Everything that one read transaction saw.
pub struct Saved {
    /// The unarchived context items, whole.
    pub items: Vec<ContextItem>,
    /// Each agent's own blob.
    pub states: Vec<(AgentName, Value)>,
    /// How many context items there were, archived ones included.
    pub item_count: u64,
}

/// Copies the project's rows into a new database file, and reads the context, in ONE read
/// transaction; then syncs the file.
///
/// # Errors
/// When a row cannot be read or the file cannot be written.
pub fn save(database: &Path, project: &ProjectName, to: &Path) -> Result<Saved, StoreError> {
    // A connection of its own, with the right to create: the attached file inherits its flags.
    let connection = connect(database, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    connection.execute("ATTACH ?1 AS backup", [to.to_string_lossy()]).doing(BACKUP)?;
    // The file is worth nothing until the checkpoint's row names it, so it is synced once, at the end.
    connection
        .execute_batch("PRAGMA backup.journal_mode = off; PRAGMA backup.synchronous = off; BEGIN")
        .doing(BACKUP)?;
    for (table, column) in TABLES {
        copy_schema(&connection, table)?;
        let sql = format!("INSERT INTO backup.{table} SELECT * FROM main.{table} WHERE {column} = ?1");
        connection.execute(&sql, [project.as_str()]).doing(BACKUP)?;
    }
    copy_schema(&connection, "context_bodies")?;
    connection
        .execute(
            "INSERT INTO backup.context_bodies SELECT b.* FROM main.context_bodies b \
             JOIN main.context_items i USING (id) WHERE i.project = ?1",
            [project.as_str()],
        )
        .doing(BACKUP)?;
    let items = context::unarchived(&connection, project)?;
    let states = read_states(&connection, project)?;
    let item_count = connection
        .query_row("SELECT count(*) FROM main.context_items WHERE project = ?1", [project.as_str()], |row| {
            row.get::<_, i64>(0)
        })
        .doing(BACKUP)?
        .unsigned_abs();
    connection.execute_batch(&format!("PRAGMA backup.user_version = {}", migrations::NEWEST)).doing(BACKUP)?;
    connection.execute_batch("COMMIT; DETACH backup").doing(BACKUP)?;
    let synced = std::fs::File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|source| StoreError::File { what: "sync", path: to.to_owned(), source })?;
    Ok(Saved { items, states, item_count })
}

/// Makes a backup that of another project: whoever imports it may call it otherwise.
///
/// # Errors
/// When the file cannot be written.
pub fn rename(file: &Path, from: &ProjectName, to: &ProjectName) -> Result<(), StoreError> {
    const RENAME: &str = "rename the project of a backup";
    // Not as the daemon's own database: a log beside it would not leave with it, and its schema comes from elsewhere.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags).doing(RENAME)?;
    connection.execute_batch("PRAGMA trusted_schema = off; PRAGMA journal_mode = memory; BEGIN").doing(RENAME)?;
    for (table, column) in TABLES {
        let sql = format!("UPDATE {table} SET {column} = ?1 WHERE {column} = ?2");
        connection.execute(&sql, [to.as_str(), from.as_str()]).doing(RENAME)?;
    }
    connection.execute_batch("COMMIT").doing(RENAME)
}

fn copy_schema(connection: &Connection, table: &str) -> Result<(), StoreError> {
    let sql: String = connection
        .query_row("SELECT sql FROM main.sqlite_schema WHERE type = 'table' AND name = ?1", [table], |row| row.get(0))
        .doing(BACKUP)?;
    // The stored text begins with `CREATE TABLE <name>`; only the schema's name is put in front.
    let sql = sql.replacen(&format!("CREATE TABLE {table}"), &format!("CREATE TABLE backup.{table}"), 1);
    connection.execute_batch(&sql).doing(BACKUP)
}

fn read_states(connection: &Connection, project: &ProjectName) -> Result<Vec<(AgentName, Value)>, StoreError> {
    let mut statement =
        connection.prepare("SELECT agent, state FROM main.agent_states WHERE project = ?1").doing(BACKUP)?;
    let rows = statement
        .query_map([project.as_str()], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
        .doing(BACKUP)?;
    rows.map(|row| {
        let (agent, state) = row.doing(BACKUP)?;
        Ok((word(&agent)?, json(&state)?))
    })
    .collect()
}

/// What a backup says of the project, for the event that restores it.
pub struct Backed {
    /// The phase of the work.
    pub phase: Phase,
    /// The tasks.
    pub tasks: Vec<TaskView>,
}

/// Reads a backup and checks that it is sound.
///
/// # Errors
/// When the file is missing, damaged, or not of this project.
pub fn open(file: &Path, project: &ProjectName) -> Result<Backed, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    check_version(&connection, file)?;
    let phase: String = connection
        .query_row("SELECT phase FROM projects WHERE name = ?1", [project.as_str()], |row| row.get(0))
        .doing(RESTORE)?;
    let tasks = load_tasks(&connection, project.as_str())?;
    Ok(Backed { phase: word(&phase)?, tasks: tasks.into_values().map(Arc::unwrap_or_clone).collect() })
}

/// Returns what is wrong with a backup, `None` when it is sound.
///
/// # Errors
/// When the file cannot be opened at all.
pub fn check(file: &Path, project: &ProjectName) -> Result<Option<String>, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    check_version(&connection, file)?;
    let verdict: String = connection.query_row("PRAGMA quick_check", [], |row| row.get(0)).doing("check the backup")?;
    if verdict != "ok" {
        return Ok(Some(verdict));
    }
    let found = connection
        .query_row("SELECT 1 FROM projects WHERE name = ?1", [project.as_str()], |_| Ok(()))
        .optional()
        .doing("check the backup")?;
    Ok(found.is_none().then(|| format!("it has no row of project '{project}'")))
}

fn check_version(connection: &Connection, file: &Path) -> Result<(), StoreError> {
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).doing(RESTORE)?;
    // There is one schema so far; a second one brings the migration of older backups with it.
    if found > migrations::NEWEST {
        return Err(StoreError::TooNew { path: file.to_owned(), found, known: migrations::NEWEST });
    }
    Ok(())
}

/// Reads the rows that a restore puts back into memory, to be written by [`put_rows`].
pub struct RestoredRows {
    items: Vec<context::Raw>,
    states: Vec<(String, String, i64)>,
}

/// Reads context and agents' blobs from a backup.
///
/// # Errors
/// When the file cannot be read.
pub fn read_rows(file: &Path, project: &ProjectName) -> Result<RestoredRows, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
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

/// Replaces the project's context and agents' blobs by those of a backup, in the writer's transaction.
///
/// # Errors
/// When a row cannot be written.
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
        // An imported checkpoint may name an id that another project has here; then the item gets a new one.
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
