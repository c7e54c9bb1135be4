//! Handlers of `agent.attach`, `agent.input`, `agent.resize`, `agent.detach` and `agent.send`, which show an agent's
//! terminal and type into it.
//!
//! An attachment is a task that forwards the events of its own connection to the shim as fast as the peer reads them.
//! It buffers nothing: the shim sends a slow peer the current screen.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fermata_core::Project;
use fermata_core::agent::{Agent, AgentState};
use fermata_core::command::Command;
use fermata_core::project::ProjectState;
use fermata_protocol::agent::ExitStatus;
use fermata_protocol::rpc::Notification;
use fermata_protocol::terminal::{
    AgentAttach, AgentAttachResult, AgentDetach, AgentInput, AgentResize, AgentSend, AttachEnd, AttachNotice,
    AttachOutput, AttachScreen, InputState, MAX_INPUT_BYTES, Notice, TypedResult,
};
use fermata_protocol::{AgentName, Code, Refusal, RunId, Target};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::agents::{not_found, remember};
use super::connection::ClientConnection;
use super::reply::wire;
use super::terminals::{Attachment, Claim, check_size};
use crate::errors::Failure;
use crate::project::{ProjectHandle, Tell};
use crate::shims::link::{LinkError, ShimLink};
use crate::shims::viewing::{self, Typing, Viewing, ViewingEvent};
use crate::store::idempotency::Keyed;
use fermata_shim::record::ExitRecord;
use fermata_shim::wire::RefusalCode;

/// How long an agent may take to read the input before the call ends with the rest of it not typed.
const TYPING: Duration = Duration::from_secs(5);

/// The delay between two tries to type the rest.
const PACE: Duration = Duration::from_millis(20);

/// How long the notification of a run's end waits for the end to be in the project's state.
const RECORDING: Duration = Duration::from_secs(5);

/// The terminal of a run.
struct TerminalRun {
    handle: ProjectHandle,
    agent: AgentName,
    run: RunId,
    socket: PathBuf,
}

/// Finds the terminal of an agent.
fn find(connection: &ClientConnection, target: &Target) -> Result<TerminalRun, Failure> {
    let projects = &connection.daemon.projects;
    let handle = projects.get(&target.project)?;
    let name = target.agent.clone().ok_or_else(|| {
        Refusal::new(Code::InvalidParams, format!("'{target}' is a project, not one of its agents"))
            .hint(format!("{target}/AGENT"))
    })?;
    let project = handle.project();
    let agent = project.agents.get(&name).ok_or_else(|| not_found(target))?;
    if agent.spec.supervision.terminal.is_none() {
        return Err(Refusal::new(Code::NoTerminal, format!("agent {target} has no terminal"))
            .hint(format!(
                "read its output: fermatactl logs -f {target}; an agent gets a terminal by 'fermatactl run --tty'"
            ))
            .into());
    }
    let run = agent.run().filter(|run| agent.is_alive() && run.processes.is_some());
    let Some(run) = run else { return Err(not_running(target, agent).into()) };
    let run = run.id.clone();
    let socket = projects.services().shim_socket(&run);
    Ok(TerminalRun { handle, agent: name, run, socket })
}

fn not_running(target: &Target, agent: &Agent) -> Refusal {
    let (why, hint) = match agent.state {
        AgentState::Parked(_) => ("is parked: it has no processes", format!("fermatactl resume {}", target.project)),
        AgentState::Starting(_) | AgentState::Waiting { .. } | AgentState::Backoff { .. } => {
            ("has not started yet", format!("fermatactl ps {}", target.project))
        }
        AgentState::Running(_)
        | AgentState::Frozen(_)
        | AgentState::Stopping { .. }
        | AgentState::Ended { .. }
        | AgentState::Failed { .. }
        | AgentState::TimedOut { .. }
        | AgentState::Interrupted { .. } => ("is not running", format!("fermatactl logs {target}")),
    };
    Refusal::new(Code::AgentNotRunning, format!("agent {target} {why}")).hint(hint)
}

/// Returns whether an agent can read input, and what prevents it.
fn input_state(project: &Project, agent: &AgentName) -> InputState {
    match &*project.state {
        ProjectState::Resting(_) => {}
        ProjectState::Pausing(_)
        | ProjectState::Paused(_)
        | ProjectState::Resuming(_)
        | ProjectState::Restoring(_)
        | ProjectState::Broken(_) => {
            return InputState::Held;
        }
    }
    let run = project.agents.get(agent).and_then(|agent| agent.run());
    run.and_then(|run| run.suspended_at).map_or(InputState::Running, |since| InputState::Suspended { since })
}

fn failed(target: &Target, error: LinkError) -> Failure {
    match error {
        LinkError::Closed | LinkError::Connect { .. } | LinkError::Refused { code: RefusalCode::Ending, .. } => {
            Refusal::new(Code::AgentNotRunning, format!("agent {target} has ended"))
                .hint(format!("fermatactl logs {target}"))
                .into()
        }
        LinkError::Refused { code: RefusalCode::NoTerminal, message } => {
            Refusal::new(Code::NoTerminal, format!("agent {target} has no terminal: {message}"))
                .hint(format!("fermatactl restart {target}"))
                .into()
        }
        LinkError::Refused { code: RefusalCode::TooManyViewers, message } => {
            Refusal::new(Code::TooManyViewers, format!("agent {target}: {message}")).into()
        }
        LinkError::Refused { code: RefusalCode::AgentFrozen, .. } => refuse_input(target).into(),
        LinkError::Handshake { .. }
        | LinkError::Version { .. }
        | LinkError::Timeout { .. }
        | LinkError::Refused { .. }
        | LinkError::Reply(_) => Failure::fault(&format!("connect to the terminal of agent {target}"), &error),
    }
}

fn refuse_input(target: &Target) -> Refusal {
    Refusal::new(Code::ProjectPaused, format!("agent {target} is frozen, or about to be: it cannot read input"))
        .hint(format!("fermatactl resume {}", target.project))
}

pub(super) async fn attach(connection: &Arc<ClientConnection>, params: AgentAttach) -> Result<Value, Failure> {
    static KEYS: AtomicU64 = AtomicU64::new(1);
    if let Some(size) = params.size {
        check_size(size)?;
    }
    if params.read_only && params.steal {
        return Err(Refusal::new(Code::InvalidParams, "'read_only' and 'steal' contradict each other").into());
    }
    let target = params.target;
    let TerminalRun { handle, agent, run, socket } = find(connection, &target)?;
    let (mut viewing, typing) = viewing::connect(&socket).await.map_err(|error| failed(&target, error))?;
    let attachment = Arc::new(Attachment {
        key: KEYS.fetch_add(1, Ordering::Relaxed),
        target: target.clone(),
        run: run.clone(),
        by: connection.peer().principal(),
        read_only: params.read_only,
        typing,
        replaced: watch::Sender::new(None),
    });
    let (id, token) = connection.subscribe()?;
    let terminals = &connection.daemon.terminals;
    let claim = match params.read_only {
        true => terminals.writer(&run).map(Claim::Taken),
        false => Some(terminals.claim(&attachment, params.steal)),
    };
    let writing = matches!(claim, Some(Claim::Got | Claim::Had));
    let size = params.size.filter(|_| writing);
    let size = match viewing.watch(&attachment.typing, size, params.scrollback).await {
        Ok(size) => size,
        Err(error) => {
            terminals.leave(&attachment);
            connection.unsubscribe(id);
            return Err(failed(&target, error));
        }
    };
    connection.keep_attachment(id, Arc::clone(&attachment));
    let input = input_state(&handle.project(), &agent);
    let forwarder = Forwarder { connection: Arc::clone(connection), attachment, id, token, agent, handle, input };
    connection.daemon.projects.services().tracker.spawn(forwarder.run(viewing));
    wire(&AgentAttachResult {
        attachment: id,
        run,
        writing,
        writer: match claim {
            Some(Claim::Taken(by)) => Some(by),
            Some(Claim::Got | Claim::Had) | None => None,
        },
        size,
        standing: input,
    })
}

/// Forwards the events of one attachment to its peer.
struct Forwarder {
    connection: Arc<ClientConnection>,
    attachment: Arc<Attachment>,
    id: u64,
    token: CancellationToken,
    agent: AgentName,
    handle: ProjectHandle,
    /// The input state that the peer was notified of last.
    input: InputState,
}

enum AttachmentEvent {
    Viewing(ViewingEvent),
    /// The state of the project has changed.
    Project,
    /// Another attachment has become the writer.
    Replaced,
    Over,
}

impl Forwarder {
    async fn run(mut self, mut viewing: Viewing) {
        let mut project = self.handle.watch();
        let mut replaced = self.attachment.replaced.subscribe();
        loop {
            let event = tokio::select! {
                event = viewing.next() => AttachmentEvent::Viewing(event),
                changed = project.changed() => if changed.is_ok() { AttachmentEvent::Project } else { AttachmentEvent::Over },
                changed = replaced.changed() => if changed.is_ok() { AttachmentEvent::Replaced } else { AttachmentEvent::Over },
                () = self.token.cancelled() => AttachmentEvent::Over,
            };
            let go_on = match event {
                AttachmentEvent::Viewing(ViewingEvent::Screen(size)) => {
                    self.tell("$/attach.screen", &AttachScreen { attachment: self.id, size }).await
                }
                AttachmentEvent::Viewing(ViewingEvent::Output(data)) => {
                    self.tell("$/attach.output", &AttachOutput { attachment: self.id, data }).await
                }
                AttachmentEvent::Viewing(ViewingEvent::Exited(record)) => {
                    self.until_recorded(&mut project).await;
                    let end = AttachEnd { attachment: self.id, exit: Some(exit_of(&record)) };
                    self.tell("$/attach.end", &end).await;
                    false
                }
                AttachmentEvent::Viewing(ViewingEvent::Gone) => {
                    self.tell("$/attach.end", &AttachEnd { attachment: self.id, exit: None }).await;
                    false
                }
                AttachmentEvent::Project => {
                    let input = input_state(&project.borrow_and_update(), &self.agent);
                    if input == self.input {
                        continue;
                    }
                    self.input = input;
                    self.notice(Notice::InputState(input)).await
                }
                AttachmentEvent::Replaced => {
                    let by = replaced.borrow_and_update().clone();
                    match by {
                        Some(by) => self.notice(Notice::Replaced { by }).await,
                        None => true,
                    }
                }
                AttachmentEvent::Over => false,
            };
            if !go_on {
                break;
            }
        }
        self.connection.daemon.terminals.leave(&self.attachment);
        self.connection.drop_attachment(self.id);
    }

    /// Waits until the end of the run is in the project's state, which learns of it by another link: a client that is
    /// notified of the end can rely on it in its next call.
    async fn until_recorded(&self, project: &mut watch::Receiver<Arc<Project>>) {
        let ended = project.wait_for(|project| {
            project
                .agents
                .get(&self.agent)
                .is_none_or(|agent| !agent.is_alive() || agent.current_run_id() != Some(&self.attachment.run))
        });
        let recorded = async { ended.await.is_ok() };
        tokio::select! {
            // Bounded, in case the database cannot be written to.
            _ = tokio::time::timeout(RECORDING, recorded) => {}
            () = self.token.cancelled() => {}
        }
    }

    async fn notice(&self, notice: Notice) -> bool {
        self.tell("$/attach.notice", &AttachNotice { attachment: self.id, notice }).await
    }

    /// Sends a notification; waits while the peer is slow. Returns whether the attachment continues.
    async fn tell(&self, method: &str, params: &(impl Serialize + Sync)) -> bool {
        let notification = Notification::new(method, json!(params));
        tokio::select! {
            () = self.connection.send(&notification) => true,
            () = self.token.cancelled() => false,
        }
    }
}

fn exit_of(record: &ExitRecord) -> ExitStatus {
    crate::project::exit_status(record)
}

fn attachment(connection: &ClientConnection, id: u64) -> Result<Arc<Attachment>, Refusal> {
    connection.attachment(id).ok_or_else(|| {
        Refusal::new(Code::NotAttached, format!("this connection has no attachment {id}")).hint("agent.attach")
    })
}

/// Makes an attachment the writer of its terminal if there is no other one.
fn claim(connection: &ClientConnection, attachment: &Arc<Attachment>) -> Result<Claim, Refusal> {
    let target = &attachment.target;
    if attachment.read_only {
        return Err(Refusal::new(Code::NotAttached, format!("this attachment to agent {target} is read-only"))
            .hint("attach again without read_only"));
    }
    match connection.daemon.terminals.claim(attachment, false) {
        Claim::Taken(by) => {
            Err(Refusal::new(Code::TerminalBusy, format!("the terminal of agent {target} is in use by {by}"))
                .hint(format!("take it over: fermatactl attach --steal {target}"))
                .details(json!({ "writer": by })))
        }
        claim @ (Claim::Had | Claim::Got) => Ok(claim),
    }
}

pub(super) async fn input(connection: &Arc<ClientConnection>, params: AgentInput) -> Result<Value, Failure> {
    check_input(&params.data.0)?;
    let attachment = attachment(connection, params.attachment)?;
    let handle = connection.daemon.projects.get(&attachment.target.project)?;
    let agent = attachment.target.agent.clone();
    let is_held = move || agent.as_ref().is_some_and(|agent| input_state(&handle.project(), agent) == InputState::Held);
    if is_held() {
        return Err(refuse_input(&attachment.target).into());
    }
    let claimed = claim(connection, &attachment)? == Claim::Got;
    let keyboard = Keyboard::Attached(&attachment.typing);
    let bytes = type_all(&attachment.target, params.data.0, is_held, keyboard).await?;
    wire(&TypedResult { bytes, claimed })
}

fn check_input(data: &[u8]) -> Result<(), Refusal> {
    if data.len() <= MAX_INPUT_BYTES {
        return Ok(());
    }
    let message = format!("'data' has {} bytes, more than the {MAX_INPUT_BYTES} of one call", data.len());
    Err(Refusal::new(Code::TooLarge, message).hint("send it in several calls"))
}

/// The connection by which input reaches a terminal.
enum Keyboard<'a> {
    Attached(&'a Typing),
    /// A link for this input alone.
    Once(&'a ShimLink),
}

impl Keyboard<'_> {
    async fn type_in(&self, data: Vec<u8>) -> Result<u64, LinkError> {
        match self {
            Self::Attached(typing) => typing.type_in(data).await,
            Self::Once(link) => link.type_in(data).await,
        }
    }
}

/// Types input while the agent reads it, for [`TYPING`] at most; returns how many bytes were typed.
async fn type_all(
    target: &Target,
    data: Vec<u8>,
    is_held: impl Fn() -> bool + Send,
    keyboard: Keyboard<'_>,
) -> Result<u64, Failure> {
    let deadline = Instant::now() + TYPING;
    let (total, mut rest) = (data.len() as u64, data);
    loop {
        match keyboard.type_in(rest.clone()).await {
            Ok(typed) => {
                let typed = usize::try_from(typed).unwrap_or(rest.len()).min(rest.len());
                rest.drain(..typed);
            }
            // A checkpoint of a running project freezes its agents only for a moment.
            Err(LinkError::Refused { code: RefusalCode::AgentFrozen, .. })
                if !is_held() && Instant::now() < deadline => {}
            Err(error) if rest.len() as u64 == total => return Err(failed(target, error)),
            // The number says how much was typed before the error.
            Err(_) => return Ok(total - rest.len() as u64),
        }
        if rest.is_empty() || Instant::now() >= deadline {
            return Ok(total - rest.len() as u64);
        }
        tokio::time::sleep(PACE).await;
    }
}

pub(super) async fn resize(connection: &Arc<ClientConnection>, params: &AgentResize) -> Result<Value, Failure> {
    check_size(params.size)?;
    let attachment = attachment(connection, params.attachment)?;
    if !connection.daemon.terminals.writes(&attachment) {
        let message = format!("this attachment is not the writer of agent {}'s terminal", attachment.target);
        return Err(Refusal::new(Code::NotAttached, message).into());
    }
    attachment.typing.resize(params.size).await.map_err(|error| failed(&attachment.target, error))?;
    Ok(json!({}))
}

pub(super) fn detach(connection: &ClientConnection, params: &AgentDetach) -> Result<Value, Failure> {
    let attachment = attachment(connection, params.attachment)?;
    // Not left to the task of the attachment: the next call may make another attachment the writer.
    connection.daemon.terminals.leave(&attachment);
    connection.drop_attachment(params.attachment);
    Ok(json!({}))
}

pub(super) async fn send(
    connection: &Arc<ClientConnection>,
    params: AgentSend,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    check_input(&params.data.0)?;
    let target = params.target;
    let TerminalRun { handle, agent, run, socket } = find(connection, &target)?;
    if let Some(by) = connection.daemon.terminals.writer(&run).filter(|_| !params.anyway) {
        return Err(Refusal::new(Code::TerminalBusy, format!("the terminal of agent {target} is in use by {by}"))
            .hint("give --anyway to type nevertheless")
            .details(json!({ "writer": by }))
            .into());
    }
    let is_held = || input_state(&handle.project(), &agent) == InputState::Held;
    if is_held() {
        return Err(refuse_input(&target).into());
    }
    let tasks = &connection.daemon.projects.services().tracker;
    let (link, _events) = ShimLink::connect(&socket, tasks).await.map_err(|error| failed(&target, error))?;
    let all = TypedResult { bytes: params.data.0.len() as u64, claimed: false };
    // Stored before typing, so that the input is typed at most once if the call is repeated after a crash.
    remember(&connection.daemon.projects, keyed, &wire(&all)?).await?;
    let bytes = type_all(&target, params.data.0, is_held, Keyboard::Once(&link)).await?;
    let by = connection.peer().principal();
    let command = Command::Typed { agent, run, by, bytes };
    let view = Box::new(move |_: &Project, _: &_| json!(TypedResult { bytes, claimed: false }));
    handle.tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed: None, view }).await
}
