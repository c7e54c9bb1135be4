//! `attach`: shows the terminal of an agent in the terminal of the caller.

use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use fermata_protocol::agent::ExitStatus;
use fermata_protocol::client::{ClientError, Incoming};
use fermata_protocol::rpc::Notification;
use fermata_protocol::terminal::{
    AgentAttach, AgentAttachResult, AgentDetach, AgentInput, AgentResize, AttachEnd, AttachNotice, AttachOutput, Bytes,
    InputState, MAX_INPUT_BYTES, Notice, TypedResult,
};
use fermata_protocol::{Code, Refusal, Target};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::agents;
use super::arguments::{all_agents, one_agent, target_of};
use crate::cli::{AttachArgs, DETACH_KEYS};
use crate::errors::{CommandError, CommandResult};
use crate::keys;
use crate::output::note;
use crate::raw_terminal::{self, RawTerminal};
use crate::session::DaemonSession;

/// How long to try to reconnect to a daemon that restarts.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Milliseconds between two attempts.
const RECONNECT_INTERVAL: u16 = 200;

/// No more input is read while this much waits to be sent.
const MAX_PENDING_INPUT: usize = 2 * MAX_INPUT_BYTES;

/// Why an attachment ended.
enum AttachExit {
    /// By the detach keys, or because stdin was closed.
    Detached,
    /// By a signal to this program.
    Signal(Signal),
    /// The agent ended; its exit status, if known.
    Agent(Option<ExitStatus>),
}

pub fn attach(session: &mut DaemonSession, args: &AttachArgs) -> CommandResult {
    let keys =
        keys::bytes(&args.detach_keys).map_err(|error| CommandError::usage(format!("--detach-keys: {error}")))?;
    let target = one_agent(session, &args.target)?;
    show(session, &target, args.read_only, args.steal, keys, &args.detach_keys)
}

/// Attaches to an agent that `run` has just started.
pub fn after_start(session: &mut DaemonSession, target: &Target) -> CommandResult {
    let name = DETACH_KEYS;
    let keys = keys::bytes(name).map_err(CommandError::usage)?;
    show(session, target, false, false, keys, name)
}

fn show(
    session: &mut DaemonSession,
    target: &Target,
    read_only: bool,
    steal: bool,
    keys: Vec<u8>,
    keys_name: &str,
) -> CommandResult {
    if !raw_terminal::is_interactive() {
        return Err(CommandError::usage("attach needs a terminal for stdin and stdout").hint(format!(
            "to see the output: fermatactl logs -f {target}; to send input: fermatactl send {target} TEXT"
        )));
    }
    if session.globals.timeout.is_some() {
        return Err(CommandError::usage("attach does not support --timeout"));
    }
    let params = |steal: bool, scrollback: bool| AgentAttach {
        target: target.clone(),
        read_only,
        steal,
        scrollback,
        size: raw_terminal::size(),
    };
    // Before raw mode: a refusal is reported as usual.
    let attached = session.call(&params(steal, true))?;
    let terminal = RawTerminal::enter()?;
    let mut attached_terminal = AttachedTerminal {
        session,
        terminal: &terminal,
        target,
        read_only,
        keys: keys::DetachScanner::new(keys),
        keys_name,
        attachment: attached.attachment,
        writing: attached.writing,
        typed: Vec::new(),
        pending: None,
    };
    attached_terminal.greet(&attached)?;
    let ended = loop {
        match attached_terminal.run() {
            Ok(end) => break Ok(end),
            Err(AttachError::Connection) => {}
            Err(AttachError::Other(error)) => break Err(error),
        }
        match attached_terminal.reconnect(|| params(false, false)) {
            Ok(None) => {}
            Ok(Some(end)) => break Ok(end),
            Err(error) => break Err(error),
        }
    };
    drop(terminal);
    match ended? {
        AttachExit::Detached => {
            note(&format!("detached from {target}; the agent keeps running"));
            Ok(0)
        }
        AttachExit::Signal(signal) => {
            note(&format!("detached from {target} by signal {}", signal.as_str()));
            Ok(u8::try_from(128 + signal as i32).unwrap_or(1))
        }
        AttachExit::Agent(Some(exit)) => {
            note(&format!("{target} ended with {exit}"));
            Ok(u8::try_from(exit.shell_code()).unwrap_or(1))
        }
        AttachExit::Agent(None) => {
            Err(CommandError::local(format!("{target} has ended; its exit status is not known"))
                .hint(format!("see: fermatactl ps {}", target.project)))
        }
    }
}

enum AttachError {
    Connection,
    Other(CommandError),
}

impl From<ClientError> for AttachError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Closed | ClientError::Broken(_) | ClientError::Unreachable { .. } => Self::Connection,
            ClientError::Garbled(_) | ClientError::Refused(_) => Self::Other(error.into()),
        }
    }
}

impl From<io::Error> for AttachError {
    fn from(error: io::Error) -> Self {
        Self::Other(CommandError::io("use the terminal", &error))
    }
}

struct AttachedTerminal<'a> {
    session: &'a mut DaemonSession,
    terminal: &'a RawTerminal,
    target: &'a Target,
    read_only: bool,
    keys: keys::DetachScanner,
    keys_name: &'a str,
    attachment: u64,
    writing: bool,
    typed: Vec<u8>,
    /// The id of the unanswered input request, and how many bytes it carries.
    pending: Option<(u64, usize)>,
}

/// Which inputs are readable.
struct ReadyInputs {
    keys: bool,
    daemon: bool,
}

impl AttachedTerminal<'_> {
    fn greet(&mut self, attached: &AgentAttachResult) -> Result<(), CommandError> {
        let message = match (&attached.writer, attached.standing) {
            _ if self.read_only => format!("watching {}; {} detaches", self.target, self.keys_name),
            (Some(by), _) => {
                format!("watching {}, {by} has the input; {} detaches, --steal takes over", self.target, self.keys_name)
            }
            (None, InputState::Running) => format!("attached to {}; {} detaches", self.target, self.keys_name),
            (None, run_state) => run_state_text(self.target, run_state),
        };
        self.terminal.show_message(&message).map_err(CommandError::from)
    }

    /// Forwards output and input until the attachment ends.
    fn run(&mut self) -> Result<AttachExit, AttachError> {
        loop {
            self.send_input()?;
            if let Some(end) = self.receive_all()? {
                return Ok(end);
            }
            let ready = self.wait(PollTimeout::NONE)?;
            if let Some(end) = self.take_signals()? {
                return Ok(end);
            }
            if ready.keys && self.read_keys()? {
                // Best effort: otherwise the daemon notices the closed connection.
                if let Ok(client) = self.session.client() {
                    client.begin(&AgentDetach { attachment: self.attachment }).ok();
                }
                return Ok(AttachExit::Detached);
            }
            if ready.daemon
                && let Some(end) = self.receive()?
            {
                return Ok(end);
            }
        }
    }

    fn wait(&mut self, timeout: PollTimeout) -> Result<ReadyInputs, AttachError> {
        let stdin = io::stdin();
        let keys = if self.typed.len() < MAX_PENDING_INPUT { PollFlags::POLLIN } else { PollFlags::empty() };
        let client = self.session.current_client();
        let mut fds = vec![PollFd::new(self.terminal.signals(), PollFlags::POLLIN), PollFd::new(stdin.as_fd(), keys)];
        if let Some(client) = client {
            fds.push(PollFd::new(client.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(AttachError::Other(CommandError::io("wait for the terminal", &error.into()))),
        }
        let ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
        Ok(ReadyInputs { keys: ready(fds.get(1)), daemon: ready(fds.get(2)) })
    }

    /// Reads input; returns true when the user detaches.
    fn read_keys(&mut self) -> Result<bool, AttachError> {
        let mut bytes = [0; 4096];
        // Not through the buffer of `Stdin`, which poll(2) does not see.
        let count = match nix::unistd::read(io::stdin(), &mut bytes) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => return Ok(false),
            // The terminal is closed.
            Err(_) => 0,
        };
        if count == 0 {
            return Ok(true);
        }
        let scanned = self.keys.scan(&bytes[..count]);
        if self.read_only && !scanned.typed.is_empty() {
            self.terminal.show_message(&format!("input is off (--read-only); {} detaches", self.keys_name))?;
        } else {
            self.typed.extend_from_slice(&scanned.typed);
        }
        Ok(scanned.detached)
    }

    /// Sends pending input, one request at a time, since concurrent requests may be reordered.
    fn send_input(&mut self) -> Result<(), AttachError> {
        if self.typed.is_empty() || self.pending.is_some() {
            return Ok(());
        }
        let count = self.typed.len().min(MAX_INPUT_BYTES);
        let input = AgentInput { attachment: self.attachment, data: Bytes(self.typed[..count].to_vec()) };
        let id = self.client()?.begin(&input)?;
        self.pending = Some((id, count));
        Ok(())
    }

    fn client(&mut self) -> Result<&mut fermata_protocol::client::Client, AttachError> {
        self.session.client().map_err(|_| AttachError::Connection)
    }

    /// Handles the messages that are buffered already.
    fn receive_all(&mut self) -> Result<Option<AttachExit>, AttachError> {
        while self.client()?.has_whole_message() {
            if let Some(end) = self.receive()? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn receive(&mut self) -> Result<Option<AttachExit>, AttachError> {
        match self.client()?.try_receive()? {
            Some(Incoming::Notification(notification)) => self.handle_notification(notification),
            Some(Incoming::Answer(id, answer)) => {
                if self.pending.is_some_and(|(pending, _)| pending == id) {
                    self.handle_answer(answer)?;
                }
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn handle_answer(&mut self, answer: Result<Value, ClientError>) -> Result<(), AttachError> {
        let Some((_, count)) = self.pending.take() else { return Ok(()) };
        match answer {
            Ok(value) => {
                let typed: TypedResult = read(value)?;
                let accepted = usize::try_from(typed.bytes).unwrap_or(count).min(count);
                self.typed.drain(..accepted);
                if typed.claimed {
                    self.writing = true;
                    self.send_size()?;
                }
                if accepted < count {
                    self.typed.clear();
                    self.terminal
                        .show_message(&format!("{} does not read its input; some input was dropped", self.target))?;
                }
            }
            Err(ClientError::Refused(refusal)) if refusal.code == Code::ShuttingDown => {
                return Err(AttachError::Connection);
            }
            Err(ClientError::Refused(refusal)) => {
                // Input that was refused must not be sent later.
                self.typed.clear();
                self.writing &= refusal.code != Code::TerminalBusy;
                self.terminal.show_message(&refusal_text(&refusal))?;
            }
            Err(other) => return Err(other.into()),
        }
        Ok(())
    }

    fn handle_notification(&mut self, notification: Notification) -> Result<Option<AttachExit>, AttachError> {
        match notification.method.as_str() {
            "$/attach.output" => {
                let output: AttachOutput = read(notification.params)?;
                if output.attachment == self.attachment {
                    self.terminal.show(&output.data.0)?;
                }
            }
            "$/attach.notice" => {
                let notice: AttachNotice = read(notification.params)?;
                let text = match notice.notice {
                    Notice::Replaced { by } => {
                        self.writing = false;
                        self.typed.clear();
                        format!("{by} has taken over the input of {}; {} detaches", self.target, self.keys_name)
                    }
                    Notice::InputState(run_state) => run_state_text(self.target, run_state),
                };
                self.terminal.show_message(&text)?;
            }
            "$/attach.end" => {
                let end: AttachEnd = read(notification.params)?;
                return Ok((end.attachment == self.attachment).then_some(AttachExit::Agent(end.exit)));
            }
            // `$/attach.screen` needs no handling: the output after it begins by redrawing the screen.
            _ => {}
        }
        Ok(None)
    }

    fn take_signals(&mut self) -> Result<Option<AttachExit>, AttachError> {
        while let Some(signal) = self.terminal.signal() {
            #[cfg_attr(
                not(test),
                expect(clippy::wildcard_enum_match_arm, reason = "every other signal ends the viewer")
            )]
            match signal {
                Signal::SIGWINCH if self.writing => self.send_size()?,
                Signal::SIGWINCH => {}
                // Another program may have changed the mode meanwhile.
                Signal::SIGCONT => self.terminal.set_raw().map_err(io::Error::from)?,
                other => return Ok(Some(AttachExit::Signal(other))),
            }
        }
        Ok(None)
    }

    fn send_size(&mut self) -> Result<(), AttachError> {
        if let Some(size) = raw_terminal::size() {
            let attachment = self.attachment;
            self.client()?.begin(&AgentResize { attachment, size })?;
        }
        Ok(())
    }

    /// Reconnects to a daemon that restarts and attaches again; the user can detach meanwhile.
    fn reconnect(&mut self, params: impl Fn() -> AgentAttach) -> Result<Option<AttachExit>, CommandError> {
        self.session.disconnect();
        self.pending = None;
        // It is not known whether this input arrived; sending it twice would be worse than dropping it.
        self.typed.clear();
        let until = Instant::now() + RECONNECT_TIMEOUT;
        let keys_name = self.keys_name;
        self.terminal.show_message(&format!("connection to the daemon lost; reconnecting, {keys_name} detaches"))?;
        let to_command_error = |error: AttachError| match error {
            AttachError::Other(error) => error,
            AttachError::Connection => CommandError::local("the connection to the daemon broke"),
        };
        loop {
            let ready = self.wait(PollTimeout::from(RECONNECT_INTERVAL)).map_err(to_command_error)?;
            while let Some(signal) = self.terminal.signal() {
                if !matches!(signal, Signal::SIGWINCH | Signal::SIGCONT) {
                    return Ok(Some(AttachExit::Signal(signal)));
                }
            }
            if ready.keys && self.read_keys().map_err(to_command_error)? {
                return Ok(Some(AttachExit::Detached));
            }
            self.typed.clear();
            let attached = match self.session.try_reconnect() {
                Ok(()) => self.session.call(&params()),
                Err(error) => Err(error),
            };
            match attached {
                Ok(attached) => {
                    self.attachment = attached.attachment;
                    self.writing = attached.writing;
                    return Ok(None);
                }
                Err(error) if error.is(Code::AgentNotRunning) => return self.ended_meanwhile(error),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => self.session.disconnect(),
            }
        }
    }

    fn ended_meanwhile(&mut self, error: CommandError) -> Result<Option<AttachExit>, CommandError> {
        let agents = all_agents(self.session, Some(&self.target.project))?;
        match agents.iter().find(|agent| target_of(agent) == *self.target) {
            Some(agent) if agent.exit.is_some() || agents::exit_code(agent) == 0 => {
                Ok(Some(AttachExit::Agent(agent.exit)))
            }
            _ => Err(error),
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, AttachError> {
    serde_json::from_value(value).map_err(|error| AttachError::Other(ClientError::Garbled(error.to_string()).into()))
}

fn refusal_text(refusal: &Refusal) -> String {
    match &refusal.hint {
        Some(hint) => format!("{} ({hint})", refusal.message),
        None => refusal.message.clone(),
    }
}

fn run_state_text(target: &Target, run_state: InputState) -> String {
    match run_state {
        InputState::Running => format!("{target} is running"),
        InputState::Suspended { .. } => {
            format!("{target} is suspended; continue with: fermatactl kill -s CONT {target}")
        }
        InputState::Held => format!("{target} is paused; resume with: fermatactl resume {}", target.project),
    }
}
