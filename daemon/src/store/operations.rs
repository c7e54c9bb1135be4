//! The operation table: a projection of the events that begin, step and end operations.

use std::collections::BTreeMap;

use fermata_protocol::event::Event;
use fermata_protocol::operation::{OperationKind, OperationState, OperationView};
use fermata_protocol::{ErrorObject, OperationId, ProjectName, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, ToSql, params};
use serde_json::{Value, json};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json as parse, text, word};

const WRITE: &str = "write the operation";
const READ: &str = "read operations";

/// Updates the operations that the events begin, advance or end. `result` is the result that the operation's step has
/// reported; without one it is derived from the event.
///
/// # Errors
/// A row cannot be written.
pub fn project(
    connection: &Connection,
    project: &ProjectName,
    events: &[Event],
    result: Option<&Value>,
    at: UnixMillis,
) -> Result<(), StoreError> {
    for event in events {
        project_one(connection, project, event, result, at)?;
    }
    Ok(())
}

#[expect(clippy::too_many_lines, reason = "one arm per event")]
fn project_one(
    connection: &Connection,
    project: &ProjectName,
    event: &Event,
    result: Option<&Value>,
    at: UnixMillis,
) -> Result<(), StoreError> {
    let execute = |sql: &str, params: &[&dyn ToSql]| connection.execute_cached(sql, params).map(drop).doing(WRITE);
    match event {
        Event::PauseStarted { operation, .. } => begin(connection, project, operation, OperationKind::Pause, at),
        Event::ResumeStarted { operation, .. } => begin(connection, project, operation, OperationKind::Resume, at),
        Event::CheckpointStarted { operation, .. } => {
            begin(connection, project, operation, OperationKind::Checkpoint, at)
        }
        Event::RestoreStarted { operation, .. } => begin(connection, project, operation, OperationKind::Restore, at),
        Event::OperationStepped { operation, step, concluded, .. } => {
            let sql = "UPDATE operations SET step = ?2, steps_ms = CASE WHEN ?3 IS NULL THEN steps_ms \
                       ELSE json_set(steps_ms, '$.' || ?3, ?4) END WHERE id = ?1";
            let (name, took) = concluded.as_ref().map_or((None, 0.0), |(name, took)| (Some(name), *took));
            execute(sql, params![operation.as_str(), step, name, took])
        }
        Event::OperationUndoing { operation, step, error } => {
            let sql = "UPDATE operations SET state = ?2, step = ?3, error = ?4 WHERE id = ?1";
            let state = OperationState::Undoing.as_str();
            execute(sql, params![operation.as_str(), state, step, text(error)?])
        }
        Event::ProjectPaused { result, .. } => {
            let value = serde_json::to_value(result).doing(WRITE)?;
            succeed(connection, &result.operation_id, &value, Some(&result.steps_ms), at)
        }
        Event::ProjectResumed { result } => {
            let value = serde_json::to_value(result).doing(WRITE)?;
            succeed(connection, &result.operation_id, &value, Some(&result.steps_ms), at)
        }
        Event::CheckpointCreated { operation, checkpoint, frozen_ms, imported: _ } => {
            let brief = || json!({ "checkpoint_id": checkpoint.id, "frozen_ms": frozen_ms });
            let value = result.cloned().unwrap_or_else(brief);
            succeed(connection, operation, &value, Some(&checkpoint.metadata.parts_ms), at)
        }
        Event::RestorePlanned { operation, .. } => {
            execute("UPDATE operations SET step = 'apply' WHERE id = ?1", params![operation.as_str()])
        }
        Event::ProjectRestored { operation, checkpoint, safety, written, removed, .. } => {
            let brief = || {
                json!({
                    "checkpoint_id": checkpoint,
                    "safety_checkpoint_id": safety,
                    "written": written,
                    "removed": removed,
                })
            };
            let value = result.cloned().unwrap_or_else(brief);
            succeed(connection, operation, &value, None, at)
        }
        Event::PauseFailed { operation, error }
        | Event::CheckpointFailed { operation, error }
        | Event::RestoreFailed { operation, error }
        | Event::RestoreGivenUp { operation, error, .. } => fail(connection, operation, error, at),
        Event::RestoreRetried { operation, error, .. } => {
            let sql = "UPDATE operations SET error = ?2 WHERE id = ?1";
            execute(sql, params![operation.as_str(), text(error)?])
        }
        Event::RestoreChecked { operation, paths, differing, examples, .. } => {
            let check = json!({ "paths": paths, "differing": differing, "examples": examples });
            let sql = "UPDATE operations SET result = json_set(result, '$.check', json(?2)) \
                       WHERE id = ?1 AND result IS NOT NULL";
            execute(sql, params![operation.as_str(), text(&check)?])
        }
        Event::ProjectCreated { .. }
        | Event::ProjectChanged { .. }
        | Event::PhaseChanged { .. }
        | Event::ProjectRemoved { .. }
        | Event::AgentCreated { .. }
        | Event::AgentStarting { .. }
        | Event::AgentStarted { .. }
        | Event::AgentLaunchFailed { .. }
        | Event::AgentAdopted { .. }
        | Event::AgentUnreachable { .. }
        | Event::AgentFreezeBroken { .. }
        | Event::AgentStopping { .. }
        | Event::AgentWaiting { .. }
        | Event::AgentReady { .. }
        | Event::AgentTimeUp { .. }
        | Event::AgentStale { .. }
        | Event::AgentBackoff { .. }
        | Event::AgentGivenUp { .. }
        | Event::AgentExited { .. }
        | Event::AgentInterrupted { .. }
        | Event::AgentParked { .. }
        | Event::AgentRemoved { .. }
        | Event::AgentSuspended { .. }
        | Event::AgentContinued { .. }
        | Event::AgentTyped { .. }
        | Event::AgentSessionFound { .. }
        | Event::AgentProgressed { .. }
        | Event::AgentUsed { .. }
        | Event::AgentStateSaved { .. }
        | Event::TaskChanged { .. }
        | Event::QuestionAsked { .. }
        | Event::QuestionAnswered { .. }
        | Event::ContextAdded { .. }
        | Event::FlashSaved { .. }
        | Event::ContextPinned { .. }
        | Event::ContextRecalled { .. }
        | Event::PauseWithheld { .. }
        | Event::CheckpointPinned { .. }
        | Event::CheckpointRemoved { .. } => Ok(()),
    }
}

fn begin(
    connection: &Connection,
    project: &ProjectName,
    operation: &OperationId,
    kind: OperationKind,
    at: UnixMillis,
) -> Result<(), StoreError> {
    let sql =
        "INSERT INTO operations (id, project, kind, state, steps_ms, started_at) VALUES (?1, ?2, ?3, ?4, '{}', ?5)";
    let state = OperationState::Running.as_str();
    connection
        .execute_cached(sql, params![operation.as_str(), project.as_str(), kind.as_str(), state, at.0])
        .doing(WRITE)?;
    Ok(())
}

fn succeed(
    connection: &Connection,
    operation: &OperationId,
    result: &Value,
    steps_ms: Option<&BTreeMap<String, f64>>,
    at: UnixMillis,
) -> Result<(), StoreError> {
    let sql = "UPDATE operations SET state = ?2, step = NULL, error = NULL, result = ?3, ended_at = ?4, \
               steps_ms = coalesce(?5, steps_ms) WHERE id = ?1";
    let state = OperationState::Succeeded.as_str();
    let steps = steps_ms.map(text).transpose()?;
    connection.execute_cached(sql, params![operation.as_str(), state, text(result)?, at.0, steps]).doing(WRITE)?;
    Ok(())
}

fn fail(
    connection: &Connection,
    operation: &OperationId,
    error: &ErrorObject,
    at: UnixMillis,
) -> Result<(), StoreError> {
    let cancelled = error.data.code == fermata_protocol::Code::OperationCancelled;
    let state = if cancelled { OperationState::Cancelled } else { OperationState::Failed };
    let sql = "UPDATE operations SET state = ?2, error = ?3, ended_at = ?4 WHERE id = ?1";
    connection.execute_cached(sql, params![operation.as_str(), state.as_str(), text(error)?, at.0]).doing(WRITE)?;
    Ok(())
}

const COLUMNS: &str = "id, project, kind, state, step, steps_ms, started_at, ended_at, result, error";

/// Finds an operation.
///
/// # Errors
/// The row cannot be read.
pub fn find(connection: &Connection, id: &OperationId) -> Result<Option<OperationView>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM operations WHERE id = ?1");
    let raw = connection.query_row(&sql, [id.as_str()], raw).optional().doing(READ)?;
    raw.map(view).transpose()
}

/// Lists operations, newest first.
///
/// # Errors
/// A row cannot be read.
pub fn list(
    connection: &Connection,
    project: Option<&ProjectName>,
    limit: u32,
) -> Result<Vec<OperationView>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS} FROM operations WHERE ?1 IS NULL OR project = ?1 ORDER BY started_at DESC, id DESC LIMIT ?2"
    );
    let mut statement = connection.prepare(&sql).doing(READ)?;
    let rows = statement.query_map(params![project.map(ProjectName::as_str), limit], raw).doing(READ)?;
    rows.map(|row| view(row.doing(READ)?)).collect()
}

struct RawOperation {
    id: String,
    project: String,
    kind: String,
    state: String,
    step: Option<String>,
    steps_ms: String,
    started_at: i64,
    ended_at: Option<i64>,
    result: Option<String>,
    error: Option<String>,
}

fn raw(row: &Row<'_>) -> rusqlite::Result<RawOperation> {
    Ok(RawOperation {
        id: row.get(0)?,
        project: row.get(1)?,
        kind: row.get(2)?,
        state: row.get(3)?,
        step: row.get(4)?,
        steps_ms: row.get(5)?,
        started_at: row.get(6)?,
        ended_at: row.get(7)?,
        result: row.get(8)?,
        error: row.get(9)?,
    })
}

fn view(raw: RawOperation) -> Result<OperationView, StoreError> {
    Ok(OperationView {
        id: word(&raw.id)?,
        project: word(&raw.project)?,
        kind: word(&raw.kind)?,
        state: word(&raw.state)?,
        step: raw.step,
        steps_ms: parse(&raw.steps_ms)?,
        started_at: UnixMillis(raw.started_at),
        ended_at: raw.ended_at.map(UnixMillis),
        result: raw.result.as_deref().map(parse).transpose()?,
        error: raw.error.as_deref().map(parse).transpose()?,
    })
}
