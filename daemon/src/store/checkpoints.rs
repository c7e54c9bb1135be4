//! The checkpoint table. A checkpoint exists if its row does; files and refs without a row are leftovers of a crash.

use fermata_core::retention::RetentionCandidate;
use fermata_protocol::checkpoint::CheckpointView;
use fermata_protocol::{CheckpointNumber, ProjectName, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json, text, word};

const READ: &str = "read checkpoints";

/// Inserts a checkpoint.
///
/// # Errors
/// When the row cannot be written.
pub fn insert(connection: &Connection, view: &CheckpointView) -> Result<(), StoreError> {
    let sql = "INSERT INTO checkpoints (project, id, name, description, trigger, format, created_at, operation_id, \
               pause_reason, git_commit, database_backup, context_snapshot, manifest_sha256, size_bytes, pinned, \
               metadata) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)";
    connection
        .execute_cached(
            sql,
            params![
                view.project.as_str(),
                view.id as i64,
                view.name,
                view.description,
                view.trigger.as_str(),
                view.format,
                view.created_at.0,
                view.operation_id.as_str(),
                view.pause_reason,
                view.git_commit,
                view.database_backup,
                view.context_snapshot,
                view.manifest_sha256,
                view.size_bytes as i64,
                view.pinned,
                text(&view.metadata)?,
            ],
        )
        .doing("write the checkpoint")?;
    Ok(())
}

const COLUMNS: &str = "project, id, name, description, trigger, format, created_at, operation_id, pause_reason, \
                       git_commit, database_backup, context_snapshot, manifest_sha256, size_bytes, pinned, metadata";

/// Finds a checkpoint.
///
/// # Errors
/// When the row cannot be read.
pub fn find(
    connection: &Connection,
    project: &ProjectName,
    id: CheckpointNumber,
) -> Result<Option<CheckpointView>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM checkpoints WHERE project = ?1 AND id = ?2");
    let raw = connection.query_row(&sql, params![project.as_str(), id as i64], raw).optional().doing(READ)?;
    raw.map(view).transpose()
}

/// Lists checkpoints before a number, newest first.
///
/// # Errors
/// When a row cannot be read.
pub fn list(
    connection: &Connection,
    project: &ProjectName,
    before: Option<CheckpointNumber>,
    limit: u32,
) -> Result<Vec<CheckpointView>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM checkpoints WHERE project = ?1 AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3"
    );
    let mut statement = connection.prepare(&sql).doing(READ)?;
    let before = before.map(|number| number as i64);
    let rows = statement.query_map(params![project.as_str(), before, limit], raw).doing(READ)?;
    rows.map(|row| view(row.doing(READ)?)).collect()
}

/// Returns how many checkpoints a project has.
///
/// # Errors
/// When the table cannot be read.
pub fn count(connection: &Connection, project: &ProjectName) -> Result<u64, StoreError> {
    connection
        .query_row("SELECT count(*) FROM checkpoints WHERE project = ?1", [project.as_str()], |row| {
            row.get::<_, i64>(0)
        })
        .map(i64::unsigned_abs)
        .doing(READ)
}

/// Returns the number of every checkpoint.
///
/// # Errors
/// When the table cannot be read.
pub fn numbers(connection: &Connection, project: &ProjectName) -> Result<Vec<CheckpointNumber>, StoreError> {
    let mut statement = connection.prepare("SELECT id FROM checkpoints WHERE project = ?1 ORDER BY id").doing(READ)?;
    let rows = statement.query_map([project.as_str()], |row| row.get::<_, i64>(0)).doing(READ)?;
    rows.map(|row| row.map(i64::unsigned_abs).doing(READ)).collect()
}

/// Returns every checkpoint as a candidate of the retention, oldest first.
///
/// # Errors
/// When a row cannot be read.
pub fn points(connection: &Connection, project: &ProjectName) -> Result<Vec<RetentionCandidate>, StoreError> {
    let sql = "SELECT id, trigger, created_at, pinned, size_bytes FROM checkpoints WHERE project = ?1 ORDER BY id";
    let mut statement = connection.prepare_cached(sql).doing(READ)?;
    let columns = |row: &Row<'_>| -> rusqlite::Result<(i64, String, i64, bool, i64)> {
        Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
    };
    let rows = statement.query_map([project.as_str()], columns).doing(READ)?;
    rows.map(|row| {
        let (number, trigger, created_at, pinned, bytes) = row.doing(READ)?;
        Ok(RetentionCandidate {
            number: number.unsigned_abs(),
            trigger: word(&trigger)?,
            created_at: UnixMillis(created_at),
            pinned,
            bytes: bytes.unsigned_abs(),
        })
    })
    .collect()
}

/// Removes the row of a checkpoint, which then does not exist any more.
///
/// # Errors
/// When the row cannot be removed.
pub fn remove(connection: &Connection, project: &ProjectName, id: CheckpointNumber) -> Result<(), StoreError> {
    connection
        .execute_cached("DELETE FROM checkpoints WHERE project = ?1 AND id = ?2", params![project.as_str(), id as i64])
        .doing("remove the checkpoint")?;
    Ok(())
}

/// Pins or unpins a checkpoint.
///
/// # Errors
/// When the row cannot be written.
pub fn pin(
    connection: &Connection,
    project: &ProjectName,
    id: CheckpointNumber,
    pinned: bool,
) -> Result<(), StoreError> {
    connection
        .execute_cached(
            "UPDATE checkpoints SET pinned = ?3 WHERE project = ?1 AND id = ?2",
            params![project.as_str(), id as i64, pinned],
        )
        .doing("pin the checkpoint")?;
    Ok(())
}

type RawCheckpoint = (CheckpointFields, String, String, String, String);

struct CheckpointFields {
    id: i64,
    name: String,
    description: String,
    format: u32,
    created_at: i64,
    pause_reason: Option<String>,
    git_commit: String,
    database_backup: String,
    context_snapshot: String,
    manifest_sha256: String,
    size_bytes: i64,
    pinned: bool,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<RawCheckpoint> {
    let fields = CheckpointFields {
        id: row.get(1)?,
        name: row.get(2)?,
        description: row.get(3)?,
        format: row.get(5)?,
        created_at: row.get(6)?,
        pause_reason: row.get(8)?,
        git_commit: row.get(9)?,
        database_backup: row.get(10)?,
        context_snapshot: row.get(11)?,
        manifest_sha256: row.get(12)?,
        size_bytes: row.get(13)?,
        pinned: row.get(14)?,
    };
    Ok((fields, row.get(0)?, row.get(4)?, row.get(7)?, row.get(15)?))
}

fn view((fields, project, trigger, operation, metadata): RawCheckpoint) -> Result<CheckpointView, StoreError> {
    Ok(CheckpointView {
        project: word(&project)?,
        id: fields.id.unsigned_abs(),
        name: fields.name,
        description: fields.description,
        trigger: word(&trigger)?,
        format: fields.format,
        created_at: UnixMillis(fields.created_at),
        operation_id: word(&operation)?,
        pause_reason: fields.pause_reason,
        git_commit: fields.git_commit,
        database_backup: fields.database_backup,
        context_snapshot: fields.context_snapshot,
        manifest_sha256: fields.manifest_sha256,
        size_bytes: fields.size_bytes.unsigned_abs(),
        pinned: fields.pinned,
        metadata: json(&metadata)?,
    })
}
