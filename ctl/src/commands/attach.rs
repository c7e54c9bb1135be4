//! `attach`: an agent's terminal at one's own.

use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use fermata_protocol::agent::ExitStatus;
use fermata_protocol::client::{ClientError, Incoming};
use fermata_protocol::rpc::Notification;
use fermata_protocol::terminal::{
    AgentAttach, AgentAttachResult, AgentDetach, AgentInput, AgentResize, AttachEnd, AttachNotice, AttachOutput, Bytes,
    MAX_INPUT_BYTES, Notice, Standing, TypedResult,
};
use fermata_protocol::{Code, Refusal, Target};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Ended, agents, one_agent, target_of};
use crate::cli::AttachArgs;
use crate::errors::Failure;
use crate::keys;
use crate::output::note;
use crate::raw_terminal::{self, RawTerminal};
use crate::session::Session;

/// How long a daemon that is gone is tried again.
const RETURN: Duration = Duration::from_secs(60);

/// Between two tries.
const TRY_EVERY: u16 = 200;

/// So much may wait for the daemon before no more keys are read.
const MAX_TYPED: usize = 2 * MAX_INPUT_BYTES;

/// How a look at an agent ended.
enum End {
    /// The person left.
    Detached,
    /// A signal ended this program.
    Signal(Signal),
    /// The run ended; without a status when nobody saw how.
    Agent(Option<ExitStatus>),
}

/// Runs `attach`.
pub fn attach(session: &mut Session, args: &AttachArgs) -> Ended {
    let keys = keys::bytes(&args.detach_keys).map_err(|error| Failure::usage(format!("--detach-keys: {error}")))?;
    let target = one_agent(session, &args.target)?;
    show(session, &target, args.read_only, args.steal, keys, &args.detach_keys)
}

/// Attaches to an agent that was just started.
pub fn after_start(session: &mut Session, target: &Target) -> Ended {
    let name = crate::cli::DETACH_KEYS;
    let keys = keys::bytes(name).map_err(Failure::usage)?;
    show(session, target, false, false, keys, name)
}

fn show(session: &mut Session, target: &Target, read_only: bool, steal: bool, keys: Vec<u8>, keys_name: &str) -> Ended {
    if !raw_terminal::is_there() {
        return Err(Failure::usage("attach needs a terminal for stdin and stdout")
            .hint(format!("fermatactl logs -f {target} shows the output, fermatactl send {target} types")));
    }
    if session.globals.timeout.is_some() {
        return Err(Failure::usage("attach lasts until you leave it, and takes no --timeout"));
    }
    let params = |steal: bool, scrollback: bool| AgentAttach {
        target: target.clone(),
        read_only,
        steal,
        scrollback,
        size: raw_terminal::size(),
    };
    // The first time before the terminal changes: a refusal is said as usual.
    let attached = session.call(&params(steal, true))?;
    let terminal = RawTerminal::enter()?;
    let mut view = View {
        session,
        terminal: &terminal,
        target,
        read_only,
        keys: keys::Watch::new(keys),
        keys_name,
        attachment: attached.attachment,
        writing: attached.writing,
        typed: Vec::new(),
        asked: None,
    };
    view.greet(&attached)?;
    let ended = loop {
        match view.until_something_ends() {
            Ok(end) => break Ok(end),
            Err(Failed::Connection) => {}
            Err(Failed::Here(failure)) => break Err(failure),
        }
        match view.wait_for_daemon(|| params(false, false)) {
            Ok(None) => {}
            Ok(Some(end)) => break Ok(end),
            Err(failure) => break Err(failure),
        }
    };
    drop(terminal);
    match ended? {
        End::Detached => {
            note(&format!("detached from {target}, which goes on"));
            Ok(0)
        }
        End::Signal(signal) => {
            note(&format!("detached from {target} by {}", signal.as_str()));
            Ok(u8::try_from(128 + signal as i32).unwrap_or(1))
        }
        End::Agent(Some(exit)) => {
            note(&format!("{target} ended with {exit}"));
            Ok(u8::try_from(exit.shell_code()).unwrap_or(1))
        }
        End::Agent(None) => Err(Failure::local(format!("{target} has ended, and nobody saw how"))
            .hint(format!("fermatactl ps {}", target.project))),
    }
}

enum Failed {
    Connection,
    Here(Failure),
}

impl From<ClientError> for Failed {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Closed | ClientError::Broken(_) | ClientError::Unreachable { .. } => Self::Connection,
            ClientError::Garbled(_) | ClientError::Refused(_) => Self::Here(error.into()),
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Here(Failure::io("use the terminal", &error))
    }
}

struct View<'a> {
    session: &'a mut Session,
    terminal: &'a RawTerminal,
    target: &'a Target,
    read_only: bool,
    keys: keys::Watch,
    keys_name: &'a str,
    attachment: u64,
    writing: bool,
    typed: Vec<u8>,
    /// The request that types and has no answer yet, and how much it types.
    asked: Option<(u64, usize)>,
}

/// What woke the loop.
struct Ready {
    keys: bool,
    daemon: bool,
}

impl View<'_> {
    fn greet(&mut self, attached: &AgentAttachResult) -> Result<(), Failure> {
        let said = match (&attached.writer, attached.standing) {
            _ if self.read_only => format!("you watch {}; {} leaves", self.target, self.keys_name),
            (Some(by), _) => {
                format!("{by} types into {}, you watch; {} leaves, --steal takes over", self.target, self.keys_name)
            }
            (None, Standing::Running) => format!("{} leaves {}, which goes on", self.keys_name, self.target),
            (None, standing) => standing_text(self.target, standing),
        };
        self.terminal.say(&said).map_err(Failure::from)
    }

    /// Shows and types until the person leaves or the agent ends.
    fn until_something_ends(&mut self) -> Result<End, Failed> {
        loop {
            self.type_on()?;
            if let Some(end) = self.receive_all()? {
                return Ok(end);
            }
            let ready = self.wait(PollTimeout::NONE)?;
            if let Some(end) = self.take_signals()? {
                return Ok(end);
            }
            if ready.keys && self.read_keys()? {
                // Best effort: a daemon that does not hear it sees the connection end.
                if let Ok(client) = self.session.live() {
                    client.begin(&AgentDetach { attachment: self.attachment }).ok();
                }
                return Ok(End::Detached);
            }
            if ready.daemon
                && let Some(end) = self.receive()?
            {
                return Ok(end);
            }
        }
    }

    fn wait(&mut self, timeout: PollTimeout) -> Result<Ready, Failed> {
        let stdin = io::stdin();
        let keys = if self.typed.len() < MAX_TYPED { PollFlags::POLLIN } else { PollFlags::empty() };
        let client = self.session.live_if_connected();
        let mut fds = vec![PollFd::new(self.terminal.signals(), PollFlags::POLLIN), PollFd::new(stdin.as_fd(), keys)];
        if let Some(client) = client {
            fds.push(PollFd::new(client.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Failed::Here(Failure::io("wait for the terminal", &error.into()))),
        }
        let ready = |fd: Option<&PollFd<'_>>| fd.and_then(PollFd::any).unwrap_or(false);
        Ok(Ready { keys: ready(fds.get(1)), daemon: ready(fds.get(2)) })
    }

    /// Reads keys; says whether the person leaves.
    fn read_keys(&mut self) -> Result<bool, Failed> {
        let mut bytes = [0; 4096];
        // Past the buffer of `Stdin`, which poll(2) does not know of.
        let count = match nix::unistd::read(io::stdin(), &mut bytes) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => return Ok(false),
            // The terminal is gone, and its person with it.
            Err(_) => 0,
        };
        if count == 0 {
            return Ok(true);
        }
        let scanned = self.keys.scan(&bytes[..count]);
        if self.read_only && !scanned.typed.is_empty() {
            self.terminal.say(&format!("you only watch; {} leaves", self.keys_name))?;
        } else {
            self.typed.extend_from_slice(&scanned.typed);
        }
        Ok(scanned.detached)
    }

    /// Sends what was typed, one request after the other: they would overtake each other otherwise.
    fn type_on(&mut self) -> Result<(), Failed> {
        if self.typed.is_empty() || self.asked.is_some() {
            return Ok(());
        }
        let count = self.typed.len().min(MAX_INPUT_BYTES);
        let input = AgentInput { attachment: self.attachment, data: Bytes(self.typed[..count].to_vec()) };
        let id = self.live()?.begin(&input)?;
        self.asked = Some((id, count));
        Ok(())
    }

    fn live(&mut self) -> Result<&mut fermata_protocol::client::Client, Failed> {
        self.session.live().map_err(|_| Failed::Connection)
    }

    /// Takes what has come already, perhaps together with the answer to `agent.attach`.
    fn receive_all(&mut self) -> Result<Option<End>, Failed> {
        while self.live()?.has_whole_message() {
            if let Some(end) = self.receive()? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn receive(&mut self) -> Result<Option<End>, Failed> {
        match self.live()?.try_receive()? {
            Some(Incoming::Notification(notification)) => self.told(notification),
            Some(Incoming::Answer(id, answer)) => {
                if self.asked.is_some_and(|(asked, _)| asked == id) {
                    self.answered(answer)?;
                }
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn answered(&mut self, answer: Result<Value, ClientError>) -> Result<(), Failed> {
        let Some((_, count)) = self.asked.take() else { return Ok(()) };
        match answer {
            Ok(value) => {
                let typed: TypedResult = read(value)?;
                let taken = usize::try_from(typed.bytes).unwrap_or(count).min(count);
                self.typed.drain(..taken);
                if typed.claimed {
                    self.writing = true;
                    self.tell_size()?;
                }
                if taken < count {
                    self.typed.clear();
                    self.terminal.say(&format!("{} does not read: what was typed last is lost", self.target))?;
                }
            }
            Err(ClientError::Refused(refusal)) if refusal.code == Code::ShuttingDown => return Err(Failed::Connection),
            Err(ClientError::Refused(refusal)) => {
                // What was typed in vain must not come later, when nobody expects it.
                self.typed.clear();
                self.writing &= refusal.code != Code::TerminalBusy;
                self.terminal.say(&said(&refusal))?;
            }
            Err(other) => return Err(other.into()),
        }
        Ok(())
    }

    fn told(&mut self, notification: Notification) -> Result<Option<End>, Failed> {
        match notification.method.as_str() {
            "$/attach.output" => {
                let output: AttachOutput = read(notification.params)?;
                if output.attachment == self.attachment {
                    self.terminal.show(&output.data.0)?;
                }
            }
            "$/attach.notice" => {
                let told: AttachNotice = read(notification.params)?;
                let text = match told.notice {
                    Notice::Replaced { by } => {
                        self.writing = false;
                        self.typed.clear();
                        format!("{by} has taken over {}, you watch; {} leaves", self.target, self.keys_name)
                    }
                    Notice::Standing(standing) => standing_text(self.target, standing),
                };
                self.terminal.say(&text)?;
            }
            "$/attach.end" => {
                let end: AttachEnd = read(notification.params)?;
                return Ok((end.attachment == self.attachment).then_some(End::Agent(end.exit)));
            }
            // The bytes that follow `$/attach.screen` begin with all that makes a screen new.
            _ => {}
        }
        Ok(None)
    }

    fn take_signals(&mut self) -> Result<Option<End>, Failed> {
        while let Some(signal) = self.terminal.signal() {
            match signal {
                Signal::SIGWINCH if self.writing => self.tell_size()?,
                Signal::SIGWINCH => {}
                // Somebody else may have had the terminal meanwhile.
                Signal::SIGCONT => self.terminal.make_raw().map_err(io::Error::from)?,
                other => return Ok(Some(End::Signal(other))),
            }
        }
        Ok(None)
    }

    fn tell_size(&mut self) -> Result<(), Failed> {
        if let Some(size) = raw_terminal::size() {
            let attachment = self.attachment;
            self.live()?.begin(&AgentResize { attachment, size })?;
        }
        Ok(())
    }

    /// Waits for a daemon that is gone, while the person can leave; attaches again.
    fn wait_for_daemon(&mut self, params: impl Fn() -> AgentAttach) -> Result<Option<End>, Failure> {
        self.session.hang_up();
        self.asked = None;
        // Nobody knows whether it was typed; twice would be worse than never.
        self.typed.clear();
        let until = Instant::now() + RETURN;
        let keys_name = self.keys_name;
        self.terminal.say(&format!("the daemon is gone, the agent goes on; looking for it, {keys_name} leaves"))?;
        let here = |failed: Failed| match failed {
            Failed::Here(failure) => failure,
            Failed::Connection => Failure::local("the connection to the daemon broke"),
        };
        loop {
            let ready = self.wait(PollTimeout::from(TRY_EVERY)).map_err(here)?;
            while let Some(signal) = self.terminal.signal() {
                if !matches!(signal, Signal::SIGWINCH | Signal::SIGCONT) {
                    return Ok(Some(End::Signal(signal)));
                }
            }
            if ready.keys && self.read_keys().map_err(here)? {
                return Ok(Some(End::Detached));
            }
            self.typed.clear();
            let attached = match self.session.try_reconnect() {
                Ok(()) => self.session.call(&params()),
                Err(failure) => Err(failure),
            };
            match attached {
                Ok(attached) => {
                    self.attachment = attached.attachment;
                    self.writing = attached.writing;
                    return Ok(None);
                }
                Err(failure) if failure.is(Code::AgentNotRunning) => return self.ended_meanwhile(failure),
                Err(failure) if Instant::now() >= until => return Err(failure),
                Err(_) => self.session.hang_up(),
            }
        }
    }

    fn ended_meanwhile(&mut self, failure: Failure) -> Result<Option<End>, Failure> {
        let agents = super::all_agents(self.session, Some(&self.target.project))?;
        match agents.iter().find(|agent| target_of(agent) == *self.target) {
            Some(agent) if agent.exit.is_some() || agents::exit_code(agent) == 0 => Ok(Some(End::Agent(agent.exit))),
            _ => Err(failure),
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Failed> {
    serde_json::from_value(value).map_err(|error| Failed::Here(ClientError::Garbled(error.to_string()).into()))
}

fn said(refusal: &Refusal) -> String {
    match &refusal.hint {
        Some(hint) => format!("{} ({hint})", refusal.message),
        None => refusal.message.clone(),
    }
}

fn standing_text(target: &Target, standing: Standing) -> String {
    match standing {
        Standing::Running => format!("{target} goes on"),
        Standing::Suspended { .. } => {
            format!("{target} is suspended: fermatactl kill -s CONT {target} lets it go on")
        }
        Standing::Held => format!("{target} is held by a pause: fermatactl resume {} lets it go on", target.project),
    }
}
