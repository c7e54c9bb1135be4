//! Calls the handler of a request's method.

use std::sync::Arc;

use fermata_protocol::daemon::{DaemonReloadResult, DaemonStatusResult, Hello, HelloResult, Limits};
use fermata_protocol::method::Call;
use fermata_protocol::rpc::Request;
use fermata_protocol::{Code, MAX_IN_FLIGHT, MAX_LINE_BYTES, PROTOCOL_VERSION, Refusal};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::connection::ClientConnection;
use super::reply::wire;
use super::{
    agent_detail, agents, attach, checkpoints, context, events, logs, operations, plugins, projects, reports,
    retention, transfers, verify,
};
use crate::auth;
use crate::errors::Failure;
use crate::hashing::hex;
use crate::project::Projects;
use crate::store::idempotency::{self, Keyed, KeyedAnswer};

/// The longest idempotency key, in bytes.
const MAX_KEY_BYTES: usize = 128;

/// Carries out a request, at most once for each idempotency key.
///
/// # Errors
/// The request is refused, or its handler fails.
pub(super) async fn call(connection: &Arc<ClientConnection>, mut request: Request) -> Result<Value, Failure> {
    let key = request.params.remove("idempotency_key");
    let keyed = key.map(|key| keyed(connection, &request, &key)).transpose()?;
    let call = Call::parse(&request.method, request.params)?;
    if keyed.is_some() && !call.info().mutating {
        return Err(Refusal::new(
            Code::InvalidParams,
            format!("{} changes nothing and takes no 'idempotency_key'", call.info().name),
        )
        .into());
    }
    if let Call::Hello(hello) = &call {
        return greet(connection, hello);
    }
    let authorised = auth::authorise(&connection.peer(), call)?;
    let call = authorised.into_call();
    let Some(keyed) = keyed else { return carry(connection, call, None).await };
    if let Some(answer) = repeated(connection, &keyed, &call).await? {
        return Ok(answer);
    }
    match carry(connection, call.clone(), Some(keyed.clone())).await {
        // A concurrent call may have used the same key: then this one failed to store the key, or was refused because
        // of the operation that the other one has begun.
        Err(failure) => match repeated(connection, &keyed, &call).await? {
            Some(answer) => Ok(answer),
            None => Err(failure),
        },
        Ok(reply) => Ok(reply),
    }
}

fn keyed(connection: &ClientConnection, request: &Request, key: &Value) -> Result<Keyed, Refusal> {
    let key = key.as_str().filter(|key| !key.is_empty() && key.len() <= MAX_KEY_BYTES).ok_or_else(|| {
        Refusal::new(Code::InvalidParams, format!("'idempotency_key' is a text of 1 to {MAX_KEY_BYTES} bytes"))
    })?;
    // Members of a map are sorted, so the same parameters give the same text.
    let text = json!([request.method, request.params]).to_string();
    Ok(Keyed {
        principal: connection.peer().principal(),
        key: key.to_owned(),
        request: hex(&Sha256::digest(text.as_bytes())),
    })
}

/// Returns the reply of an earlier call with the same key; none when there is no such call.
async fn repeated(connection: &ClientConnection, keyed: &Keyed, call: &Call) -> Result<Option<Value>, Failure> {
    let services = connection.daemon.projects.services();
    let wanted = keyed.clone();
    let earlier = services
        .store
        .read(move |c| idempotency::find(c, &wanted))
        .await
        .map_err(|e| Failure::fault("look up the idempotency key", &e))?;
    match earlier {
        None => Ok(None),
        Some(KeyedAnswer::Reply(reply)) => finish(&connection.daemon.projects, call, reply).await.map(Some),
        Some(KeyedAnswer::Operation(operation)) => operations::end_of(connection, &operation).await.map(Some),
        Some(KeyedAnswer::OtherRequest) => Err(Refusal::new(
            Code::IdempotencyConflict,
            format!("the idempotency key '{}' was used for another request", keyed.key),
        )
        .into()),
    }
}

/// Completes a reply that was stored with the call's transaction, before its effects had ended: the repeated call waits
/// for them as the first one did.
async fn finish(all: &Projects, call: &Call, reply: Value) -> Result<Value, Failure> {
    match call {
        Call::AgentRun(_) | Call::AgentRestart(_) | Call::AgentResume(_) => agents::finish_start(all, reply).await,
        Call::AgentStop(p) => agents::finish_end(all, &p.target.project, p.grace_ms, reply).await,
        Call::AgentKill(p) => match p.signal {
            None => agents::finish_end(all, &p.target.project, None, reply).await,
            Some(_) => Ok(reply),
        },
        Call::ContextPut(p) => context::finish_put(all, p.target.as_ref(), reply).await,
        Call::Hello(_)
        | Call::Discover(_)
        | Call::DaemonStatus(_)
        | Call::DaemonReload(_)
        | Call::ProjectCreate(_)
        | Call::ProjectSet(_)
        | Call::ProjectList(_)
        | Call::ProjectShow(_)
        | Call::ProjectRemove(_)
        | Call::ProjectPause(_)
        | Call::ProjectResume(_)
        | Call::AgentList(_)
        | Call::AgentShow(_)
        | Call::AgentAttach(_)
        | Call::AgentInput(_)
        | Call::AgentResize(_)
        | Call::AgentDetach(_)
        | Call::AgentSend(_)
        | Call::AgentReady(_)
        | Call::AgentRemove(_)
        | Call::AgentWait(_)
        | Call::AgentLogs(_)
        | Call::AgentListen(_)
        | Call::AgentAck(_)
        | Call::AgentProgress(_)
        | Call::AgentUsage(_)
        | Call::StatePut(_)
        | Call::StateGet(_)
        | Call::TaskPut(_)
        | Call::TaskList(_)
        | Call::QuestionAsk(_)
        | Call::QuestionWait(_)
        | Call::QuestionList(_)
        | Call::QuestionAnswer(_)
        | Call::ContextList(_)
        | Call::ContextShow(_)
        | Call::ContextPin(_)
        | Call::ContextSearch(_)
        | Call::ContextRecall(_)
        | Call::ContextFlashSave(_)
        | Call::CheckpointCreate(_)
        | Call::CheckpointList(_)
        | Call::CheckpointShow(_)
        | Call::CheckpointDiff(_)
        | Call::CheckpointRestore(_)
        | Call::CheckpointVerify(_)
        | Call::CheckpointRemove(_)
        | Call::CheckpointPrune(_)
        | Call::CheckpointPin(_)
        | Call::CheckpointExport(_)
        | Call::CheckpointDownload(_)
        | Call::CheckpointUpload(_)
        | Call::CheckpointImport(_)
        | Call::CheckpointConsolidate(_)
        | Call::OperationList(_)
        | Call::OperationShow(_)
        | Call::OperationCancel(_)
        | Call::EventsSubscribe(_)
        | Call::EventsUnsubscribe(_)
        | Call::EventsList(_)
        | Call::PluginList(_)
        | Call::PluginReload(_)
        | Call::PluginEnable(_)
        | Call::PluginCheck(_) => Ok(reply),
    }
}

fn greet(connection: &ClientConnection, hello: &Hello) -> Result<Value, Failure> {
    if hello.min > PROTOCOL_VERSION || hello.max < PROTOCOL_VERSION {
        return Err(Refusal::new(
            Code::UnsupportedVersion,
            format!(
                "this daemon uses protocol version {PROTOCOL_VERSION}, the client versions {} to {}",
                hello.min, hello.max
            ),
        )
        .hint("use a client and a daemon of the same release")
        .into());
    }
    let mut peer = connection.peer();
    if let Some(token) = &hello.token {
        peer = auth::with_token(&peer, token, &connection.daemon.projects)?;
        connection.become_peer(peer.clone());
    }
    wire(&HelloResult {
        protocol: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").into(),
        role: peer.role,
        agent: peer.agent,
        limits: Limits { line_bytes: MAX_LINE_BYTES as u64, in_flight: MAX_IN_FLIGHT as u64 },
        boot_epoch: connection.daemon.boot_epoch.clone(),
    })
}

async fn carry(connection: &Arc<ClientConnection>, call: Call, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let all = &connection.daemon.projects;
    let own = connection.peer().agent;
    match call {
        Call::Hello(hello) => greet(connection, &hello),
        Call::Discover(_) => Ok(fermata_protocol::openrpc::document()),
        Call::DaemonStatus(_) => status(connection),
        Call::DaemonReload(_) => reload(connection),
        Call::ProjectCreate(p) => projects::create(all, p, keyed).await,
        Call::ProjectSet(p) => projects::set(all, p, keyed).await,
        Call::ProjectList(_) => projects::list(all),
        Call::ProjectShow(p) => projects::show(all, &p.project).await,
        Call::ProjectRemove(p) => all.remove(&p.project, p.with_checkpoints, keyed).await,
        Call::ProjectPause(p) => operations::pause(connection, p, keyed).await,
        Call::ProjectResume(p) => operations::resume(connection, p, keyed).await,
        Call::AgentRun(p) => agents::run(all, p, keyed).await,
        Call::AgentList(p) => agents::list(all, &p).await,
        Call::AgentShow(p) => agent_detail::show(all, p).await,
        Call::AgentAttach(p) => attach::attach(connection, p).await,
        Call::AgentInput(p) => attach::input(connection, p).await,
        Call::AgentResize(p) => attach::resize(connection, &p).await,
        Call::AgentDetach(p) => attach::detach(connection, &p),
        Call::AgentSend(p) => attach::send(connection, p, keyed).await,
        Call::AgentStop(p) => agents::stop(all, &p, keyed).await,
        Call::AgentKill(p) => agents::kill(all, &p, keyed).await,
        Call::AgentRestart(p) => agents::restart(all, &p.target, keyed).await,
        Call::AgentResume(p) => agents::resume(all, &p.target, keyed).await,
        Call::AgentReady(p) => reports::ready(all, p.target.as_ref(), keyed).await,
        Call::AgentRemove(p) => agents::remove(all, &p.target, keyed).await,
        Call::AgentWait(p) => agents::wait(all, &p).await,
        Call::AgentLogs(p) => logs::read(all, &p).await,
        Call::AgentListen(_) => reports::listen(connection),
        Call::AgentAck(p) => reports::acknowledge(connection, p.target.as_ref()),
        Call::AgentProgress(p) => reports::progress(all, p, keyed).await,
        Call::AgentUsage(p) => reports::usage(all, p, keyed).await,
        Call::StatePut(p) => reports::put_state(all, p, keyed).await,
        Call::StateGet(p) => reports::get_state(all, p.target.as_ref()).await,
        Call::TaskPut(p) => reports::put_task(all, p, own.as_ref(), keyed).await,
        Call::TaskList(p) => reports::list_tasks(all, p.project.as_ref()),
        Call::QuestionAsk(p) => reports::ask(all, p, keyed).await,
        Call::QuestionWait(p) => reports::wait_for_answer(all, &p, own.as_ref()).await,
        Call::QuestionList(p) => reports::list_questions(all, &p),
        Call::QuestionAnswer(p) => reports::answer(all, p, keyed).await,
        Call::ContextPut(p) => context::put(all, p, keyed).await,
        Call::ContextList(p) => context::list(all, p).await,
        Call::ContextShow(p) => context::show(all, &p, own.as_ref()).await,
        Call::ContextPin(p) => context::pin(all, &p, own.as_ref(), keyed).await,
        Call::ContextSearch(p) => context::search(all, p).await,
        Call::ContextRecall(p) => context::recall(all, p, own.as_ref(), keyed).await,
        Call::ContextFlashSave(p) => context::flash_save(all, p, keyed).await,
        Call::CheckpointCreate(p) => operations::checkpoint(connection, p, keyed).await,
        Call::CheckpointList(p) => checkpoints::list(all, p).await,
        Call::CheckpointShow(p) => checkpoints::show(all, &p).await,
        Call::CheckpointDiff(p) => checkpoints::diff(all, &p).await,
        Call::CheckpointRestore(p) => operations::restore(connection, p, keyed).await,
        Call::CheckpointVerify(p) => verify::run(connection, &p).await,
        Call::CheckpointRemove(p) => retention::remove(all, p, keyed).await,
        Call::CheckpointPrune(p) => retention::prune(all, &p, keyed).await,
        Call::CheckpointPin(p) => checkpoints::pin(all, &p, keyed).await,
        Call::CheckpointExport(p) => transfers::export(connection, p).await,
        Call::CheckpointDownload(p) => transfers::download(connection, p).await,
        Call::CheckpointUpload(p) => transfers::upload(connection, p).await,
        Call::CheckpointImport(p) => transfers::import(connection, p, keyed).await,
        Call::CheckpointConsolidate(p) => transfers::consolidate(all, p).await,
        Call::OperationList(p) => operations::list(connection, p).await,
        Call::OperationShow(p) => operations::show(connection, &p.operation_id).await,
        Call::OperationCancel(p) => operations::cancel(connection, &p.operation_id, keyed).await,
        Call::EventsSubscribe(p) => events::subscribe(connection, p).await,
        Call::EventsUnsubscribe(p) => events::unsubscribe(connection, p.subscription),
        Call::EventsList(p) => events::list(connection, p).await,
        Call::PluginList(_) => plugins::list(all),
        Call::PluginReload(_) => plugins::reload(all).await,
        Call::PluginEnable(p) => plugins::enable(all, &p).await,
        Call::PluginCheck(p) => plugins::check(all, &p.path).await,
    }
}

fn reload(connection: &ClientConnection) -> Result<Value, Failure> {
    let changed = (connection.daemon.reload)().map_err(|message| {
        Refusal::new(Code::InvalidParams, message).hint("correct the file; the previous settings stay in force")
    })?;
    wire(&DaemonReloadResult { changed, needs_restart: Vec::new() })
}

fn status(connection: &ClientConnection) -> Result<Value, Failure> {
    let daemon = &connection.daemon;
    let services = daemon.projects.services();
    let projects = daemon.projects.all();
    let running = projects.iter().map(|handle| handle.project().alive_agents().count() as u64).sum();
    wire(&DaemonStatusResult {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        started_at: daemon.started_at,
        state_dir: services.paths.state.to_string_lossy().into_owned(),
        socket: services.paths.socket.to_string_lossy().into_owned(),
        freezer: daemon.freezer.clone(),
        projects: projects.len() as u64,
        agents_running: running,
        recovery: daemon.recovery.clone(),
    })
}
