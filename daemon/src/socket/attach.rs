//! Handlers of `agent.attach`, `agent.input`, `agent.resize`, `agent.detach` and `agent.send`: who
//! looks at an agent's terminal, and who types into it.
//!
//! An attachment is a task that passes on what its own connection to the shim tells, as fast as the
//! peer takes it. Nothing is kept here: a slow peer is shown the present screen by the shim.

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
use super::connection::Connection;
use super::reply::wire;
use super::terminals::{Attachment, Claim, check_size};
use crate::errors::Failure;
use crate::project::{ProjectHandle, Tell};
use crate::shims::link::{LinkError, ShimLink};
use crate::shims::viewing::{self, Typing, Viewing, ViewingEvent};
use crate::store::idempotency::Keyed;
use fermata_shim::record::ExitRecord;
use fermata_shim::wire::RefusalCode;

/// How long an agent may take to read what is typed before the rest of it is given back.
const TYPING: Duration = Duration::from_secs(5);

/// How often the rest is tried again.
const PACE: Duration = Duration::from_millis(20);

/// How long the end of a run that a viewer has seen may take to be in the project's state.
const RECORDING: Duration = Duration::from_secs(5);

/// A run with a terminal.
struct TerminalRun {
    handle: ProjectHandle,
    agent: AgentName,
    run: RunId,
    socket: PathBuf,
}

/// Finds the terminal of an agent.
fn find(connection: &Connection, target: &Target) -> Result<TerminalRun, Failure> {
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
                "its output: fermatactl logs -f {target}; a terminal comes with 'fermatactl run --tty', from its start"
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

/// Says what keeps an agent from reading what is typed.
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
        other => Failure::fault(&format!("reach the terminal of agent {target}"), &other),
    }
}

fn refuse_input(target: &Target) -> Refusal {
    Refusal::new(
        Code::ProjectPaused,
        format!("agent {target} is held: nothing is typed into it, since it would read that by surprise later"),
    )
    .hint(format!("fermatactl resume {}", target.project))
}

pub(super) async fn attach(connection: &Arc<Connection>, params: AgentAttach) -> Result<Value, Failure> {
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
    let now = input_state(&handle.project(), &agent);
    let show = Show { connection: Arc::clone(connection), attachment, id, token, agent, handle, standing: now };
    connection.daemon.projects.services().tracker.spawn(show.run(viewing));
    wire(&AgentAttachResult {
        attachment: id,
        run,
        writing,
        writer: match claim {
            Some(Claim::Taken(by)) => Some(by),
            Some(Claim::Got | Claim::Had) | None => None,
        },
        size,
        standing: now,
    })
}

/// Passes on what a viewer sees.
struct Show {
    connection: Arc<Connection>,
    attachment: Arc<Attachment>,
    id: u64,
    token: CancellationToken,
    agent: AgentName,
    handle: ProjectHandle,
    standing: InputState,
}

enum AttachmentEvent {
    Viewing(ViewingEvent),
    Project,
    Replaced,
    Over,
}

impl Show {
    async fn run(mut self, mut viewing: Viewing) {
        let mut project = self.handle.watch();
        let mut replaced = self.attachment.replaced.subscribe();
        loop {
            let news = tokio::select! {
                seen = viewing.next() => AttachmentEvent::Viewing(seen),
                changed = project.changed() => if changed.is_ok() { AttachmentEvent::Project } else { AttachmentEvent::Over },
                changed = replaced.changed() => if changed.is_ok() { AttachmentEvent::Replaced } else { AttachmentEvent::Over },
                () = self.token.cancelled() => AttachmentEvent::Over,
            };
            let go_on = match news {
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
                    let now = input_state(&project.borrow_and_update(), &self.agent);
                    if now == self.standing {
                        continue;
                    }
                    self.standing = now;
                    self.notice(Notice::InputState(now)).await
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

    /// Waits until the project knows of the end, which its own link to the shim tells it: whoever is told of it here
    /// and looks there finds it.
    async fn until_recorded(&self, project: &mut watch::Receiver<Arc<Project>>) {
        let ended = project.wait_for(|project| {
            project
                .agents
                .get(&self.agent)
                .is_none_or(|agent| !agent.is_alive() || agent.current_run_id() != Some(&self.attachment.run))
        });
        let recorded = async { ended.await.is_ok() };
        tokio::select! {
            // A project that is removed, or whose database cannot be written, keeps nobody waiting.
            _ = tokio::time::timeout(RECORDING, recorded) => {}
            () = self.token.cancelled() => {}
        }
    }

    async fn notice(&self, notice: Notice) -> bool {
        self.tell("$/attach.notice", &AttachNotice { attachment: self.id, notice }).await
    }

    /// Waits while the peer is slow; the shim waits with it. Returns whether the attachment goes on.
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

fn attachment(connection: &Connection, id: u64) -> Result<Arc<Attachment>, Refusal> {
    connection.attachment(id).ok_or_else(|| {
        Refusal::new(Code::NotAttached, format!("this connection has no attachment {id}")).hint("agent.attach")
    })
}

/// Has an attachment write, where nobody else does.
fn claim(connection: &Connection, attachment: &Arc<Attachment>) -> Result<Claim, Refusal> {
    let target = &attachment.target;
    if attachment.read_only {
        return Err(Refusal::new(Code::NotAttached, format!("this attachment to agent {target} only watches"))
            .hint("attach again without read_only"));
    }
    match connection.daemon.terminals.claim(attachment, false) {
        Claim::Taken(by) => Err(Refusal::new(Code::TerminalBusy, format!("{by} types into agent {target}, you watch"))
            .hint(format!("fermatactl attach --steal {target}"))
            .details(json!({ "writer": by }))),
        claim @ (Claim::Had | Claim::Got) => Ok(claim),
    }
}

pub(super) async fn input(connection: &Arc<Connection>, params: AgentInput) -> Result<Value, Failure> {
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
    Err(Refusal::new(Code::TooLarge, message).hint("type it in parts"))
}

/// The way into a terminal.
enum Keyboard<'a> {
    /// The connection of a viewer.
    Attached(&'a Typing),
    /// A link that was made for this.
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

/// Types for as long as the agent reads; returns how much was taken.
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
            Ok(taken) => {
                let taken = usize::try_from(taken).unwrap_or(rest.len()).min(rest.len());
                rest.drain(..taken);
            }
            // A checkpoint of a running project holds its agents for a moment only.
            Err(LinkError::Refused { code: RefusalCode::AgentFrozen, .. })
                if !is_held() && Instant::now() < deadline => {}
            Err(error) if rest.len() as u64 == total => return Err(failed(target, error)),
            // The beginning was taken: what became of the rest is in the number.
            Err(_) => return Ok(total - rest.len() as u64),
        }
        if rest.is_empty() || Instant::now() >= deadline {
            return Ok(total - rest.len() as u64);
        }
        tokio::time::sleep(PACE).await;
    }
}

pub(super) async fn resize(connection: &Arc<Connection>, params: &AgentResize) -> Result<Value, Failure> {
    check_size(params.size)?;
    let attachment = attachment(connection, params.attachment)?;
    if !connection.daemon.terminals.writes(&attachment) {
        let message = format!("only who types into agent {} rules the size of its terminal", attachment.target);
        return Err(Refusal::new(Code::NotAttached, message).into());
    }
    attachment.typing.resize(params.size).await.map_err(|error| failed(&attachment.target, error))?;
    Ok(json!({}))
}

pub(super) fn detach(connection: &Connection, params: &AgentDetach) -> Result<Value, Failure> {
    let attachment = attachment(connection, params.attachment)?;
    // At once, so that the next one who asks can write.
    connection.daemon.terminals.leave(&attachment);
    connection.drop_attachment(params.attachment);
    Ok(json!({}))
}

pub(super) async fn send(
    connection: &Arc<Connection>,
    params: AgentSend,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    check_input(&params.data.0)?;
    let target = params.target;
    let TerminalRun { handle, agent, run, socket } = find(connection, &target)?;
    if let Some(by) = connection.daemon.terminals.writer(&run).filter(|_| !params.anyway) {
        return Err(Refusal::new(Code::TerminalBusy, format!("{by} is attached to agent {target} and types"))
            .hint("give --anyway to type all the same")
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
    // Typed at most once: a call that is repeated after a crash in between types nothing.
    remember(&connection.daemon.projects, keyed, &wire(&all)?).await?;
    let bytes = type_all(&target, params.data.0, is_held, Keyboard::Once(&link)).await?;
    let by = connection.peer().principal();
    let command = Command::Typed { agent, run, by, bytes };
    let view = Box::new(move |_: &Project, _: &_| json!(TypedResult { bytes, claimed: false }));
    handle.tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed: None, view }).await
}
