//! Handlers of the methods that begin operations (pause, resume, checkpoint, restore) and of `operation.*`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fermata_core::budget::refuse_over_budget;
use fermata_core::command::{Command, Respawn};
use fermata_core::project::ProjectState;
use fermata_core::{Project, view};
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::checkpoint::{
    CheckpointCreate, CheckpointRestore, MAX_CHECKPOINT_DESCRIPTION, MAX_CHECKPOINT_NAME, Trigger,
};
use fermata_protocol::operation::{OperationList, OperationListResult, OperationView};
use fermata_protocol::pause::{PauseCause, ProjectPause, ProjectResume};
use fermata_protocol::rpc::Notification;
use fermata_protocol::{CheckpointNumber, Code, OperationId, Refusal};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::TryRecvError;

use super::connection::ClientConnection;
use super::reply::wire;
use super::reports::project_of;
use crate::errors::Failure;
use crate::operations::restore as restoring;
use crate::operations::run::session;
use crate::project::{Begin, Label, NewToken, ProjectHandle, Tell, new_operation, new_run};
use crate::services::now;
use crate::store::idempotency::Keyed;
use crate::store::{checkpoints, operations};

/// The interval of progress notifications.
const PROGRESS_PACE: Duration = Duration::from_millis(50);

/// The most rows of one list.
const MAX_ROWS: u32 = 1000;

/// Begins an operation and sends its progress to this connection until it has ended.
pub(super) async fn watched(
    connection: &Arc<ClientConnection>,
    handle: &ProjectHandle,
    begin: Begin,
) -> Result<Value, Failure> {
    let operation = begin.operation.clone();
    with_progress(connection, &operation, handle.begin(begin)).await
}

/// Sends the progress of an operation to this connection until `ending` is ready: the newest note in each
/// [`PROGRESS_PACE`], so that short work has no notification before its reply.
pub(super) async fn with_progress<T>(
    connection: &Arc<ClientConnection>,
    operation: &OperationId,
    ending: impl Future<Output = T>,
) -> T {
    let mut notes = connection.daemon.projects.services().progress.subscribe();
    tokio::pin!(ending);
    loop {
        tokio::select! {
            result = &mut ending => return result,
            () = tokio::time::sleep(PROGRESS_PACE) => {}
        }
        let mut newest = None;
        loop {
            match notes.try_recv() {
                Ok(note) if note.operation_id == *operation => newest = Some(note),
                Ok(_) | Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        if let Some(note) = newest {
            connection.send(&Notification::new("$/progress", json!(note))).await;
        }
    }
}

/// Returns the message of an operation that has no label and begins no run.
pub(super) fn begin(command: Command, operation: OperationId, keyed: Option<Keyed>) -> Begin {
    Begin { command, operation, label: Label::default(), tokens: Vec::new(), keyed }
}

pub(super) async fn pause(
    connection: &Arc<ClientConnection>,
    params: ProjectPause,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let operation = new_operation();
    let ProjectPause { reason, mode, grace_ms, .. } = params;
    let cause = if connection.peer().agent.is_some() { PauseCause::Agent } else { PauseCause::Person };
    let command = Command::Pause { operation: operation.clone(), cause, reason, mode, grace_ms };
    // An agent that pauses its own project is frozen before the reply is sent, and reads it once it is thawed.
    watched(connection, &handle, begin(command, operation, keyed)).await
}

pub(super) async fn resume(
    connection: &Arc<ClientConnection>,
    params: ProjectResume,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    if !params.over_budget {
        // Checked before the restore: otherwise the project would be restored and the resume refused.
        refuse_over_budget(&handle.project())?;
    }
    if let Some(number) = params.checkpoint {
        if !matches!(&*handle.project().state, ProjectState::Paused(_)) {
            return Err(not_paused(&handle.project()));
        }
        exists(connection, &handle, number).await?;
        restored(connection, &handle, number, Vec::new(), None).await?;
    }
    let operation = new_operation();
    let (respawn, tokens) = respawns(&handle).await?;
    let command = Command::Resume { operation: operation.clone(), respawn, over_budget: params.over_budget };
    watched(connection, &handle, Begin { tokens, ..begin(command, operation, keyed) }).await
}

/// Resumes a project on behalf of the daemon itself.
///
/// # Errors
/// The resume is refused or fails.
pub async fn resume_quietly(handle: &ProjectHandle) -> Result<Value, Failure> {
    let operation = new_operation();
    let (respawn, tokens) = respawns(handle).await?;
    let command = Command::Resume { operation: operation.clone(), respawn, over_budget: false };
    handle.begin(Begin { tokens, ..begin(command, operation, None) }).await
}

fn not_paused(project: &Project) -> Failure {
    Refusal::new(Code::NotPaused, format!("project '{}' is {}, not paused", project.name, project.state.status()))
        .hint(format!("restore it without a resume: fermatactl checkpoint restore {} N", project.name))
        .into()
}

/// Prepares a new run for every paused agent, for the case that it cannot be thawed.
async fn respawns(
    handle: &ProjectHandle,
) -> Result<(BTreeMap<fermata_protocol::AgentName, Respawn>, Vec<NewToken>), Failure> {
    let step = handle.step_context();
    let stale_after = i64::try_from(step.services.settings().agents.stale_after_ms).unwrap_or(i64::MAX);
    let frozen_ms = match &*step.project.state {
        ProjectState::Paused(paused) => now().since(paused.since),
        ProjectState::Resting(_)
        | ProjectState::Pausing(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_)
        | ProjectState::Broken(_) => 0,
    };
    let (mut respawn, mut tokens) = (BTreeMap::new(), Vec::new());
    for agent in step.project.agents.values().filter(|agent| agent.status(false) == AgentStatus::Paused) {
        let again = session::restart_command(&step, agent).await?;
        let (new, token) = new_run();
        let stale = again.goes_on && frozen_ms > stale_after;
        let instead_of_thaw =
            stale.then(|| format!("frozen for {} s: its network connections have timed out", frozen_ms / 1000));
        tokens.push(token);
        respawn.insert(agent.name.clone(), Respawn { new, argv: again.argv, instead_of_thaw, session: again.session });
    }
    Ok((respawn, tokens))
}

pub(super) async fn checkpoint(
    connection: &Arc<ClientConnection>,
    params: CheckpointCreate,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = project_of(&connection.daemon.projects, params.project.as_ref())?;
    let too_long = |what: &str, text: &str, limit: usize| {
        let count = text.chars().count();
        (count > limit)
            .then(|| Refusal::new(Code::TooLarge, format!("the {what} has {count} characters, more than {limit}")))
    };
    let name = params.name.as_deref().unwrap_or_default();
    if let Some(refusal) = too_long("name", name, MAX_CHECKPOINT_NAME)
        .or_else(|| too_long("description", &params.description, MAX_CHECKPOINT_DESCRIPTION))
    {
        return Err(refusal.into());
    }
    let operation = new_operation();
    let command = Command::Checkpoint { operation: operation.clone(), trigger: Trigger::Manual };
    let label = Label { name: params.name, description: params.description, import: None };
    watched(connection, &handle, Begin { label, ..begin(command, operation, keyed) }).await
}

pub(super) async fn restore(
    connection: &Arc<ClientConnection>,
    params: CheckpointRestore,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let handle = connection.daemon.projects.get(&params.project)?;
    let paths = restoring::parse_paths(&params.paths)?;
    exists(connection, &handle, params.checkpoint).await?;
    if let Some(paths) = &paths {
        restoring::check_paths(&handle.step_context(), params.checkpoint, paths.clone()).await?;
    }
    if params.dry_run {
        return wire(&restoring::preview(&handle.step_context(), params.checkpoint, paths).await?);
    }
    let paths = paths.into_iter().flatten().map(|path| path.to_string()).collect();
    restored(connection, &handle, params.checkpoint, paths, keyed).await
}

async fn restored(
    connection: &Arc<ClientConnection>,
    handle: &ProjectHandle,
    number: CheckpointNumber,
    paths: Vec<String>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let operation = new_operation();
    let command = Command::Restore { operation: operation.clone(), checkpoint: number, paths };
    watched(connection, handle, begin(command, operation, keyed)).await
}

async fn exists(
    connection: &ClientConnection,
    handle: &ProjectHandle,
    number: CheckpointNumber,
) -> Result<(), Failure> {
    let name = handle.name();
    let shown = name.clone();
    let found = connection
        .daemon
        .projects
        .services()
        .store
        .read(move |c| checkpoints::find(c, &name, number))
        .await
        .map_err(|e| Failure::fault("find the checkpoint", &e))?;
    match found {
        Some(_) => Ok(()),
        None => Err(Refusal::new(Code::CheckpointNotFound, format!("project '{shown}' has no checkpoint {number}"))
            .hint(format!("fermatactl checkpoint ls {shown}"))
            .into()),
    }
}

pub(super) async fn list(connection: &ClientConnection, params: OperationList) -> Result<Value, Failure> {
    let limit = params.limit.unwrap_or(50).min(MAX_ROWS);
    let store = &connection.daemon.projects.services().store;
    let operations = store
        .read(move |c| operations::list(c, params.project.as_ref(), limit))
        .await
        .map_err(|e| Failure::fault("list operations", &e))?;
    wire(&OperationListResult { operations })
}

/// Finds the row of an operation.
async fn find(connection: &ClientConnection, id: &OperationId) -> Result<OperationView, Failure> {
    let store = &connection.daemon.projects.services().store;
    let wanted = id.clone();
    let stored = store
        .read(move |c| operations::find(c, &wanted))
        .await
        .map_err(|e| Failure::fault("find the operation", &e))?;
    stored.ok_or_else(|| {
        Refusal::new(Code::OperationNotFound, format!("there is no operation {id}")).hint("fermatactl op ls").into()
    })
}

pub(super) async fn show(connection: &ClientConnection, id: &OperationId) -> Result<Value, Failure> {
    let stored = find(connection, id).await?;
    let current = connection
        .daemon
        .projects
        .get(&stored.project)
        .ok()
        .and_then(|handle| view::operation(&handle.project()))
        .filter(|current| current.id == *id);
    wire(&current.unwrap_or(stored))
}

pub(super) async fn cancel(
    connection: &ClientConnection,
    id: &OperationId,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let stored = find(connection, id).await?;
    if stored.ended_at.is_some() {
        return Err(Refusal::new(
            Code::OperationNotCancellable,
            format!("operation {id} has ended: {}", stored.state.as_str()),
        )
        .into());
    }
    let handle = connection.daemon.projects.get(&stored.project)?;
    let command = Command::Cancel { operation: id.clone() };
    handle
        .tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view: Box::new(|_, _| Value::Null) })
        .await?;
    // Replied to after the undo, with the operation as it has ended.
    match handle.end_of(id.clone()).await {
        Ok(_) | Err(Failure::Refused(_)) => {}
        Err(fault) => return Err(fault),
    }
    wire(&find(connection, id).await?)
}

/// Waits for the end of an operation that another call began; returns the same result.
pub(super) async fn end_of(connection: &ClientConnection, id: &OperationId) -> Result<Value, Failure> {
    let stored = find(connection, id).await?;
    if stored.ended_at.is_none()
        && let Ok(handle) = connection.daemon.projects.get(&stored.project)
    {
        match handle.end_of(id.clone()).await {
            // It has ended since the row was read.
            Err(Failure::Refused(refusal)) if refusal.code == Code::OperationNotFound => {}
            other => return other,
        }
    }
    let ended = find(connection, id).await?;
    match (ended.result, ended.error) {
        (_, Some(error)) => Err(Refusal::from(error).into()),
        (result, None) => Ok(result.unwrap_or(Value::Null)),
    }
}
