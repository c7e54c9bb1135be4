//! The connection of one command to the daemon: made on first use, and again after a restart of the daemon.

use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use fermata_protocol::Code;
use fermata_protocol::client::{Client, ClientError, Incoming};
use fermata_protocol::daemon::HelloResult;
use fermata_protocol::method::Method;
use fermata_protocol::rpc::Notification;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Map, Value};

use crate::autostart;
use crate::cli::global_options::GlobalOptions;
use crate::connect::{self, CallerEnvironment};
use crate::errors::CommandError;
use crate::output::progress::ProgressLine;
use crate::output::{Format, Printer};
use crate::units::millis;

/// How long a following command waits for a daemon that restarts.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);

const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

/// A connection closed sooner than this after a call may have been closed because of the call …
const EARLY_CLOSE: Duration = Duration::from_secs(1);

/// … and after more than this many in a row the call fails.
const MAX_EARLY_CLOSES: u32 = 3;

/// Why a wait for a notification ended.
#[derive(Debug)]
pub enum Wakeup {
    Notification(Notification),
    TimedOut,
    /// The daemon restarted; subscriptions are lost.
    Reconnected,
}

/// The context of a command: global options, output, and the connection to the daemon.
#[derive(Debug)]
pub struct DaemonSession {
    pub globals: GlobalOptions,
    pub out: Printer,
    connection: Option<Client>,
}

impl DaemonSession {
    /// Does not connect yet.
    pub fn new(globals: GlobalOptions) -> Self {
        let out = Printer::new(globals.format(), globals.color);
        Self { globals, out, connection: None }
    }

    pub fn call<M: Method>(&mut self, params: &M) -> Result<M::Result, CommandError> {
        let called = self.client()?.call(params);
        called.map_err(|error| self.explain(error))
    }

    /// Calls a method that may take long, with a progress line on a terminal.
    pub fn call_long<M: Method>(&mut self, label: &str, params: &M) -> Result<M::Result, CommandError> {
        let wanted = self.out.format() == Format::Human;
        let client = self.client()?;
        let progress = ProgressLine::begin(label, wanted);
        let called = client.call_watching(params, |notification| progress.show(notification));
        called.map_err(|error| self.explain(error))
    }

    pub fn call_raw(&mut self, method: &str, params: Map<String, Value>) -> Result<Value, CommandError> {
        let called = self.client()?.call_raw(method, params, |_| {});
        called.map_err(|error| self.explain(error))
    }

    /// Calls a method that changes nothing, and repeats the call when the daemon restarts meanwhile.
    ///
    /// An agent outlives the daemon, so a command that watches the agent does too.
    pub fn call_across_restarts<M: Method>(&mut self, params: &M) -> Result<M::Result, CommandError> {
        let mut early_closes = 0;
        loop {
            let asked_at = Instant::now();
            match self.client()?.call(params) {
                Err(error) if self.is_greeting_overdue(&error) => return Err(self.explain(error)),
                Err(error) if is_disconnect(&error) => {
                    // A daemon that closes the connection because of this call would be asked forever.
                    early_closes = if asked_at.elapsed() < EARLY_CLOSE { early_closes + 1 } else { 0 };
                    if early_closes > MAX_EARLY_CLOSES {
                        return Err(error.into());
                    }
                    self.reconnect()?;
                }
                answer => return answer.map_err(|error| self.explain(error)),
            }
        }
    }

    /// Waits for the next notification; `None` when the daemon restarted.
    pub fn next_notification(&mut self) -> Result<Option<Notification>, CommandError> {
        match self.client()?.next_notification() {
            Ok(notification) => Ok(Some(notification)),
            Err(ClientError::Closed | ClientError::Broken(_)) => {
                self.reconnect()?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Like [`Self::next_notification`], with a timeout.
    pub fn next_notification_within(&mut self, timeout: Duration) -> Result<Wakeup, CommandError> {
        let deadline = Instant::now() + timeout;
        let client = self.client()?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !client.has_whole_message() {
                // Rounded up, so that the last fraction of a millisecond is not spent spinning.
                let poll_timeout =
                    PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
                match poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], poll_timeout) {
                    Ok(0) => return Ok(Wakeup::TimedOut),
                    Ok(_) => {}
                    Err(Errno::EINTR) => continue,
                    Err(error) => return Err(CommandError::io("wait for the daemon", &error.into())),
                }
            }
            match client.try_receive() {
                Ok(Some(Incoming::Notification(notification))) => return Ok(Wakeup::Notification(notification)),
                // A part of a message, or an answer that is not awaited.
                Ok(Some(Incoming::Answer(..)) | None) if left.is_zero() => return Ok(Wakeup::TimedOut),
                Ok(Some(Incoming::Answer(..)) | None) => {}
                Err(ClientError::Closed | ClientError::Broken(_)) => {
                    self.reconnect()?;
                    return Ok(Wakeup::Reconnected);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the daemon's greeting; connects first if needed.
    pub fn hello(&mut self) -> Result<HelloResult, CommandError> {
        let hello = self.client()?.hello().cloned();
        hello.map_err(|error| self.explain(error))
    }

    pub fn current_client(&self) -> Option<&Client> {
        self.connection.as_ref()
    }

    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Tries once to connect to a daemon; never starts one.
    ///
    /// # Errors
    /// When no daemon answers.
    pub fn try_reconnect(&mut self) -> Result<(), CommandError> {
        let mut last = ClientError::Closed;
        for socket in &connect::sockets(&self.globals, &caller_environment())? {
            match connect::greet(socket, token()) {
                Ok(connected) => {
                    self.connection = Some(connected);
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(connect::explain(last, token().is_some()))
    }

    /// Returns the connection; connects first if needed.
    ///
    /// # Errors
    /// When no daemon answers.
    pub fn client(&mut self) -> Result<&mut Client, CommandError> {
        let connected = match self.connection.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        Ok(self.connection.insert(connected))
    }

    fn is_greeting_overdue(&self, error: &ClientError) -> bool {
        let late = |kind| matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let awaited = self.connection.as_ref().is_some_and(Client::is_hello_awaited);
        awaited && matches!(error, ClientError::Broken(source) if late(source.kind()))
    }

    /// Returns `--timeout` in milliseconds.
    pub fn timeout_ms(&self) -> Option<u64> {
        self.globals.timeout.map(millis)
    }

    /// Converts the error of a call, which may stem from the greeting sent with it.
    fn explain(&self, error: ClientError) -> CommandError {
        match &self.connection {
            Some(client) if client.is_hello_awaited() => connect::explain(error, token().is_some()),
            _ => error.into(),
        }
    }

    fn connect(&self) -> Result<Client, CommandError> {
        let caller = caller_environment();
        let sockets = connect::sockets(&self.globals, &caller)?;
        let token = token();
        let agent = token.is_some();
        let mut first_error = None;
        for socket in &sockets {
            match connect::connect(socket, token.clone()) {
                Ok(connected) => return Ok(connected),
                // Access may be denied here; the next socket may belong to another daemon.
                Err(error @ ClientError::Unreachable { .. }) => {
                    first_error.get_or_insert(error);
                }
                Err(error) => return Err(connect::explain(error, agent)),
            }
        }
        let Some(error) = first_error else {
            return Err(CommandError::usage("there is no directory for a socket").hint("name its socket with --socket"));
        };
        let may_start = !self.globals.no_autostart && !agent;
        match sockets.first() {
            Some(socket) if may_start && connect::is_no_listener(&error) => {
                let state_dir = connect::state_dir(&self.globals, &caller)?;
                autostart::start(&self.globals, socket, &state_dir)
            }
            _ => Err(connect::explain(error, agent)),
        }
    }

    /// Waits for the daemon to restart; never starts one.
    fn reconnect(&mut self) -> Result<(), CommandError> {
        self.connection = None;
        let deadline = Instant::now() + RECONNECT_TIMEOUT;
        loop {
            match self.try_reconnect() {
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => std::thread::sleep(RECONNECT_INTERVAL),
                Ok(()) => return Ok(()),
            }
        }
    }
}

/// Says whether a call failed because the daemon shut down or the connection broke.
fn is_disconnect(error: &ClientError) -> bool {
    match error {
        ClientError::Closed | ClientError::Broken(_) => true,
        ClientError::Refused(refusal) => refusal.code == Code::ShuttingDown,
        ClientError::Unreachable { .. } | ClientError::Garbled(_) => false,
    }
}

pub fn caller_environment() -> CallerEnvironment<'static> {
    CallerEnvironment { root: nix::unistd::geteuid().is_root(), variable: &connect::process_variable }
}

/// Returns the token of the run, when this process is an agent.
pub fn token() -> Option<String> {
    std::env::var("FERMATA_TOKEN").ok().filter(|t| !t.is_empty())
}
