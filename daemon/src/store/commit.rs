//! The transaction of a command: the project's rows, its events, and further writes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use fermata_core::Project;
use fermata_core::context::FlashSavePlan;
use fermata_protocol::checkpoint::CheckpointView;
use fermata_protocol::event::Event;
use fermata_protocol::{AgentName, CheckpointNumber, OperationId, ProjectName, UnixMillis};
use rusqlite::{Connection, params};
use serde_json::Value;

use super::backup::RestoredRows;
use super::connection::Cached as _;
use super::context::NewRow;
use super::error::{Doing, StoreError};
use super::idempotency::Keyed;
use super::writer::Durability;
use super::{Store, backup, checkpoints, context, events, idempotency, operations, rows};

/// A write of data that is not in the state of `fermata_core`.
#[derive(Clone)]
pub enum Write {
    Environment(AgentName, BTreeMap<String, String>),
    /// The state that an agent has saved, as JSON text.
    AgentState(AgentName, String),
    /// New context items; their ids are in [`Written::ids`].
    ContextInsert(AgentName, Vec<NewRow>),
    FlashSave(FlashSavePlan),
    /// Pins or unpins a context item.
    ContextPin(i64, bool),
    ContextRecall(Vec<i64>),
    /// A checkpoint that is complete on disk.
    Checkpoint(Box<CheckpointView>),
    /// Pins or unpins a checkpoint.
    CheckpointPin(CheckpointNumber, bool),
    RestoreRows(Arc<RestoredRows>),
}

/// The content of a transaction.
pub struct Commit {
    pub project: ProjectName,
    /// The project's state before; none for a new one.
    pub before: Option<Arc<Project>>,
    /// The project's state after; none when it is removed.
    pub after: Option<Arc<Project>>,
    pub events: Vec<Event>,
    pub writes: Vec<Write>,
    /// The idempotency key of the call, and the operation that it began.
    pub keyed: Option<(Keyed, Option<OperationId>)>,
    /// Makes the reply of a call that ends with this transaction.
    pub reply: Option<MakeReply>,
    /// The result of the operation that the events end; derived from the events when none.
    pub result: Option<Value>,
    /// The end of the lease that the events rely on: from then on nothing is committed.
    pub only_before: Option<Instant>,
    pub now: UnixMillis,
    pub durability: Durability,
}

/// Makes the reply of a call after its writes.
pub type MakeReply = Box<dyn FnOnce(&Written) -> Value + Send>;

/// The result of a transaction.
#[derive(Debug, Clone, Default)]
pub struct Written {
    /// Ids of new context items.
    pub ids: Vec<i64>,
    /// The reply of [`Commit::reply`].
    pub reply: Option<Value>,
}

impl Store {
    /// Commits rows, events and writes in one transaction.
    ///
    /// # Errors
    /// A part cannot be written; then none is.
    pub async fn commit(&self, commit: Commit) -> Result<Written, StoreError> {
        self.write(commit.durability, move |connection| run(connection, commit)).await
    }
}

fn run(connection: &Connection, mut commit: Commit) -> Result<Written, StoreError> {
    let reply = commit.reply.take();
    let Commit { project, now, .. } = &commit;
    let mut written = Written::default();
    match &commit.after {
        Some(after) => {
            let is_unchanged = commit.before.as_ref().is_some_and(|before| Arc::ptr_eq(before, after));
            if !is_unchanged {
                rows::save(connection, commit.before.as_deref(), after, *now)?;
            }
        }
        None => rows::remove(connection, project)?,
    }
    for write in &commit.writes {
        apply(connection, project, write, *now, &mut written)?;
    }
    for event in &commit.events {
        if let Event::AgentUsed { agent, usage } = event {
            record_usage(connection, project, agent, usage, *now)?;
        }
        if let Event::CheckpointRemoved { checkpoint, .. } = event {
            checkpoints::remove(connection, project, *checkpoint)?;
        }
    }
    if !commit.events.is_empty() {
        operations::project(connection, project, &commit.events, commit.result.as_ref(), *now)?;
        events::append(connection, project, &commit.events, *now)?;
    }
    written.reply = reply.map(|make| make(&written));
    if let Some((keyed, operation)) = &commit.keyed {
        idempotency::remember(connection, keyed, operation.as_ref(), written.reply.as_ref(), *now)?;
    }
    // Checked last. If the daemon is stopped between this check and the commit, the lease cannot be made permanent; the
    // agents are then frozen again, and the break of the freeze is reported.
    if commit.only_before.is_some_and(|end| Instant::now() >= end) {
        return Err(StoreError::TooLate);
    }
    Ok(written)
}

fn apply(
    connection: &Connection,
    project: &ProjectName,
    write: &Write,
    now: UnixMillis,
    written: &mut Written,
) -> Result<(), StoreError> {
    match write {
        Write::Environment(agent, env) => rows::save_environment(connection, project, agent, env),
        Write::AgentState(agent, state) => rows::save_agent_state(connection, project, agent, state, now),
        Write::ContextInsert(agent, new) => {
            written.ids.extend(context::insert(connection, project, agent, new, now)?);
            Ok(())
        }
        Write::FlashSave(plan) => context::apply_plan(connection, plan),
        Write::ContextPin(id, pinned) => context::pin(connection, project, *id, *pinned),
        Write::ContextRecall(ids) => context::recall(connection, project, ids),
        Write::Checkpoint(view) => checkpoints::insert(connection, view),
        Write::CheckpointPin(id, pinned) => checkpoints::pin(connection, project, *id, *pinned),
        Write::RestoreRows(rows) => backup::put_rows(connection, project, rows),
    }
}

fn record_usage(
    connection: &Connection,
    project: &ProjectName,
    agent: &AgentName,
    usage: &fermata_protocol::budget::Usage,
    now: UnixMillis,
) -> Result<(), StoreError> {
    let sql = "INSERT INTO usage (at, project, agent, input_tokens, output_tokens, cost_micro_usd) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    // SQLite's integers are signed; a larger count is an error of the reporting agent.
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    connection
        .execute_cached(
            sql,
            params![
                now.0,
                project.as_str(),
                agent.as_str(),
                signed(usage.input_tokens),
                signed(usage.output_tokens),
                signed(usage.cost_micro_usd)
            ],
        )
        .doing("record usage")?;
    Ok(())
}
