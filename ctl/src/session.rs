//! One command's conversation with the daemon: connect late, call, follow across a daemon's restart.

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
use crate::cli::Globals;
use crate::connect::{self, Surroundings};
use crate::errors::Failure;
use crate::output::progress::Progress;
use crate::output::{Format, Output};

/// How long a follower waits for a daemon that is being restarted.
const RESTART_TIME: Duration = Duration::from_secs(15);

/// Between two tries to reach it.
const TRY_EVERY: Duration = Duration::from_millis(100);

/// A connection that ends sooner than this after a call may have ended because of it …
const QUICK: Duration = Duration::from_secs(1);

/// … and so many of them in a row did.
const QUICK_ENDS: u32 = 3;

/// What a wait for a notification has brought.
#[derive(Debug)]
pub enum Told {
    /// A notification.
    Notification(Notification),
    /// None in time.
    Nothing,
    /// The daemon went away and came back; its subscriptions are lost.
    CameBack,
}

/// What every command gets: flags, output, and the daemon once it is needed.
#[derive(Debug)]
pub struct Session {
    /// The global flags.
    pub globals: Globals,
    /// Where results go.
    pub out: Output,
    connection: Option<Client>,
}

impl Session {
    /// Begins without a connection.
    pub fn new(globals: Globals) -> Self {
        let out = Output::new(&globals);
        Self { globals, out, connection: None }
    }

    /// Calls a method.
    pub fn call<M: Method>(&mut self, params: &M) -> Result<M::Result, Failure> {
        let called = self.client()?.call(params);
        called.map_err(|error| self.explain(error))
    }

    /// Calls a method that takes long, with a progress bar where one can be seen.
    pub fn call_long<M: Method>(&mut self, label: &str, params: &M) -> Result<M::Result, Failure> {
        let wanted = self.out.format() == Format::Human;
        let client = self.client()?;
        let progress = Progress::begin(label, wanted);
        let called = client.call_watching(params, |notification| progress.watch(notification));
        called.map_err(|error| self.explain(error))
    }

    /// Calls a method by name.
    pub fn call_raw(&mut self, method: &str, params: Map<String, Value>) -> Result<Value, Failure> {
        let called = self.client()?.call_raw(method, params, |_| {});
        called.map_err(|error| self.explain(error))
    }

    /// Calls a method that changes nothing, and again when the daemon went away meanwhile.
    ///
    /// An agent outlives the daemon, so whoever watches it should as well.
    pub fn call_lasting<M: Method>(&mut self, params: &M) -> Result<M::Result, Failure> {
        let mut quick_ends = 0;
        loop {
            let asked_at = Instant::now();
            match self.client()?.call(params) {
                Err(error) if self.has_not_greeted(&error) => return Err(self.explain(error)),
                Err(error) if is_farewell(&error) => {
                    // A daemon that hangs up on this very call would be asked for ever.
                    quick_ends = if asked_at.elapsed() < QUICK { quick_ends + 1 } else { 0 };
                    if quick_ends > QUICK_ENDS {
                        return Err(error.into());
                    }
                    self.reconnect()?;
                }
                answer => return answer.map_err(|error| self.explain(error)),
            }
        }
    }

    /// Waits for the next notification; `None` when the daemon went away and came back.
    pub fn next_notification(&mut self) -> Result<Option<Notification>, Failure> {
        match self.client()?.next_notification() {
            Ok(notification) => Ok(Some(notification)),
            Err(ClientError::Closed | ClientError::Broken(_)) => {
                self.reconnect()?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Like [`Self::next_notification`], for so long at most.
    pub fn next_notification_within(&mut self, patience: Duration) -> Result<Told, Failure> {
        let deadline = Instant::now() + patience;
        let client = self.client()?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !client.has_whole_message() {
                // One more than the whole milliseconds, so that it does not spin through the last one.
                let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
                match poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], timeout) {
                    Ok(0) => return Ok(Told::Nothing),
                    Ok(_) => {}
                    Err(Errno::EINTR) => continue,
                    Err(error) => return Err(Failure::io("wait for the daemon", &error.into())),
                }
            }
            match client.try_receive() {
                Ok(Some(Incoming::Notification(notification))) => return Ok(Told::Notification(notification)),
                // A part of a message, or an answer that nobody waits for.
                Ok(Some(Incoming::Answer(..)) | None) if left.is_zero() => return Ok(Told::Nothing),
                Ok(Some(Incoming::Answer(..)) | None) => {}
                Err(ClientError::Closed | ClientError::Broken(_)) => {
                    self.reconnect()?;
                    return Ok(Told::CameBack);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns what the daemon said when it greeted, connecting first where needed.
    pub fn hello(&mut self) -> Result<HelloResult, Failure> {
        let hello = self.client()?.hello().cloned();
        hello.map_err(|error| self.explain(error))
    }

    /// Returns the connection, made first where there is none, for whoever polls it.
    ///
    /// # Errors
    /// When no daemon answers.
    pub fn live(&mut self) -> Result<&mut Client, Failure> {
        self.client()
    }

    /// Returns the connection if there is one.
    pub fn live_if_connected(&self) -> Option<&Client> {
        self.connection.as_ref()
    }

    /// Gives the connection up.
    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// Tries once to reach a daemon that has gone; never starts one.
    ///
    /// # Errors
    /// When none answers.
    pub fn try_reconnect(&mut self) -> Result<(), Failure> {
        let mut last = ClientError::Closed;
        for socket in &connect::sockets(&self.globals, &surroundings())? {
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

    fn client(&mut self) -> Result<&mut Client, Failure> {
        let connected = match self.connection.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        Ok(self.connection.insert(connected))
    }

    /// Says whether whoever listens has not even greeted in time.
    fn has_not_greeted(&self, error: &ClientError) -> bool {
        let late = |kind| matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let awaited = self.connection.as_ref().is_some_and(Client::is_hello_awaited);
        awaited && matches!(error, ClientError::Broken(source) if late(source.kind()))
    }

    /// Explains an error of a call, which may be one of the greeting that went with it.
    fn explain(&self, error: ClientError) -> Failure {
        match &self.connection {
            Some(client) if client.is_hello_awaited() => connect::explain(error, token().is_some()),
            _ => error.into(),
        }
    }

    fn connect(&self) -> Result<Client, Failure> {
        let around = surroundings();
        let sockets = connect::sockets(&self.globals, &around)?;
        let token = token();
        let agent = token.is_some();
        let mut first_error = None;
        for socket in &sockets {
            match connect::connect(socket, token.clone()) {
                Ok(connected) => return Ok(connected),
                // Someone may be there but not for us; the next socket may be another daemon's.
                Err(error @ ClientError::Unreachable { .. }) => {
                    first_error.get_or_insert(error);
                }
                Err(error) => return Err(connect::explain(error, agent)),
            }
        }
        let Some(error) = first_error else {
            return Err(
                Failure::usage("there is no place where a daemon could listen").hint("name its socket with --socket")
            );
        };
        let may_start = !self.globals.no_autostart && !agent;
        match sockets.first() {
            Some(socket) if may_start && connect::nobody_listens(&error) => {
                let state_dir = connect::state_dir(&self.globals, &around)?;
                autostart::start(&self.globals, socket, &state_dir)
            }
            _ => Err(connect::explain(error, agent)),
        }
    }

    /// Waits for the daemon to come back; never starts one.
    fn reconnect(&mut self) -> Result<(), Failure> {
        self.connection = None;
        let deadline = Instant::now() + RESTART_TIME;
        loop {
            match self.try_reconnect() {
                Err(failure) if Instant::now() >= deadline => return Err(failure),
                Err(_) => std::thread::sleep(TRY_EVERY),
                Ok(()) => return Ok(()),
            }
        }
    }
}

/// Says whether a call ended because the daemon went away, in whatever way.
fn is_farewell(error: &ClientError) -> bool {
    match error {
        ClientError::Closed | ClientError::Broken(_) => true,
        ClientError::Refused(refusal) => refusal.code == Code::ShuttingDown,
        ClientError::Unreachable { .. } | ClientError::Garbled(_) => false,
    }
}

/// The surroundings of this process.
pub fn surroundings() -> Surroundings<'static> {
    Surroundings { root: nix::unistd::geteuid().is_root(), variable: &connect::process_variable }
}

/// The per-launch token, when this process is an agent.
pub fn token() -> Option<String> {
    std::env::var("FERMATA_TOKEN").ok().filter(|t| !t.is_empty())
}
