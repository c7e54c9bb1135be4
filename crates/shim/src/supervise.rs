//! The shim's event loop: one thread, one poll; no step waits.
//!
//! ```text
//!  Running ── stop ──> Stopping ── grace over ──> Killing
//!     │ kill ──────────────┼────────────────────────^ │
//!     └────────────────────┴──────────────────────────┤ the main process ended
//!                                                     v
//!        Clearing (kill leftovers) ──> Draining (pipes) ──> [After] ──> Recording (exit.json) ──> end
//! ```
//!
//! After is the post-stop command, if there is one (`hooks`).

mod hooks;
mod killing;
mod life;
mod requests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use self::killing::Killing;
use self::life::{CLEAR_PATIENCE, DRAIN_PATIENCE, Flow, Life, MainEnd, PreStart, RECORD_PATIENCE, RECORD_RETRY};
use super::connection::{ConnectionId, PeerConnection};
use super::freeze::{FreezeController, FreezeEvent};
use super::intake::{Intake, IntakeResult};
use super::log_line::Stream;
use super::log_sink::LogSink;
use super::record::ExitRecord;
use super::reply::{PendingCall, Refused, ShimReply, failed_to};
use super::socket::{SocketFileId, file_identity, listen};
use super::spec::LaunchSpec;
use super::terminal::Terminal;
use super::wire::{FromShim, ShimEvent};
use fermata_os::clock;
use fermata_os::controllers::OutOfMemory;
use fermata_os::fsync::Reserve;
use fermata_os::prelude::Prelude;
use fermata_os::process::{self, ChildChange, ProcessId};

/// More than a pipe can contain, in bytes.
const LAST_BYTES: usize = 2 << 20;

/// More connections than this are not plausible: the oldest one is closed.
const MAX_CONNECTIONS: usize = 16;

/// The descriptor that has become ready.
#[derive(Debug, Clone, Copy)]
enum PollSource {
    Child,
    PreStart,
    Stdout,
    Stderr,
    Terminal,
    Listener,
    Freeze,
    Connection(ConnectionId),
}

/// The state of the event loop.
#[derive(Debug)]
pub struct AgentSupervisor {
    spec: LaunchSpec,
    shim: ProcessId,
    agent: ProcessId,
    freeze: FreezeController,
    life: Life,
    log: LogSink,
    intake: Intake,
    reserve: Reserve,
    /// For the preliminary exit record, if there is more to do after the agent's end that takes time.
    ended: Option<Reserve>,
    pre_start: Option<PreStart>,
    start_failure: Option<String>,
    children: SignalFd,
    listener: UnixListener,
    stdout: Option<File>,
    stderr: Option<File>,
    terminal: Option<Terminal>,
    connections: Vec<PeerConnection>,
    next_connection: u64,
    stopped_by_others: bool,
    /// Identifies the file to which the listener is bound.
    socket_file: Option<SocketFileId>,
}

/// The launcher's results, handed to the event loop.
#[derive(Debug)]
pub struct Parts {
    pub spec: LaunchSpec,
    /// This process.
    pub shim: ProcessId,
    /// The main process.
    pub agent: ProcessId,
    pub freeze: FreezeController,
    /// The destination of the agent's output.
    pub log: LogSink,
    /// For the exit record.
    pub reserve: Reserve,
    /// For the preliminary exit record, while the post-stop command runs or the log is written.
    pub ended: Option<Reserve>,
    /// SIGCHLD and SIGHUP.
    pub children: SignalFd,
    /// The shim's socket, non-blocking.
    pub listener: UnixListener,
    /// The reading end of the agent's standard output, or the master of its terminal; non-blocking.
    pub stdout: OwnedFd,
    /// The reading end of the agent's standard error; `None` with a terminal, which carries both.
    pub stderr: Option<OwnedFd>,
    pub terminal: Option<Terminal>,
    /// The pre-start command, which runs first in the agent's process.
    pub prelude: Option<Prelude>,
}

impl AgentSupervisor {
    pub fn new(parts: Parts) -> Self {
        let Parts {
            spec,
            shim,
            agent,
            freeze,
            log,
            reserve,
            ended,
            children,
            listener,
            stdout,
            stderr,
            terminal,
            prelude,
        } = parts;
        let socket_file = file_identity(&spec.socket);
        let mut supervisor = Self {
            spec,
            socket_file,
            shim,
            agent,
            freeze,
            life: Life::Running,
            log,
            intake: Intake::default(),
            reserve,
            ended,
            pre_start: None,
            start_failure: None,
            children,
            listener,
            stdout: Some(File::from(stdout)),
            stderr: stderr.map(File::from),
            terminal,
            connections: Vec::new(),
            next_connection: 0,
            stopped_by_others: false,
        };
        if let Some(prelude) = prelude {
            supervisor.begin_pre_start(prelude);
        }
        supervisor
    }

    /// Runs until the agent has ended, no process of its tree is left, and its exit is on disk.
    pub fn run(mut self) {
        loop {
            let ready = self.wait();
            self.take_output(&ready);
            for source in ready {
                match source {
                    PollSource::Child => self.reap(),
                    PollSource::Listener => self.accept(),
                    PollSource::Connection(id) => self.serve(id),
                    PollSource::Terminal => self.terminal.iter_mut().for_each(Terminal::flush),
                    // Output has been read above, `tick` handles the freezer and `watch_pre_start` the start.
                    PollSource::Stdout | PollSource::Stderr | PollSource::Freeze | PollSource::PreStart => {}
                }
            }
            let now = Instant::now();
            let events = self.freeze.tick(now);
            self.report(events);
            self.watch_pre_start(now);
            self.go_on(now);
            if let Some(terminal) = &mut self.terminal {
                terminal.feed(&mut self.connections);
            }
            self.connections.retain(|connection| !connection.is_dead());
            if let Life::Over { record } = self.life {
                let event = FromShim::Event(ShimEvent::Exited(Box::new(record)));
                if let Some(terminal) = &mut self.terminal {
                    terminal.feed_last(&mut self.connections);
                }
                for mut connection in self.connections {
                    if connection.is_open() {
                        connection.send(&event);
                    }
                    connection.send_rest(Duration::from_millis(100));
                }
                // The daemon may have removed the whole directory already.
                std::fs::remove_file(&self.spec.socket).ok();
                return;
            }
        }
    }

    fn wait(&self) -> Vec<PollSource> {
        let mut fds = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        let mut sources = vec![PollSource::Child];
        for (file, source) in [(&self.stdout, PollSource::Stdout), (&self.stderr, PollSource::Stderr)] {
            if let Some(file) = file {
                fds.push(PollFd::new(file.as_fd(), PollFlags::POLLIN));
                sources.push(source);
            }
        }
        if let Some(fd) = self.pre_start_fd() {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
            sources.push(PollSource::PreStart);
        }
        if let Some(terminal) = self.terminal.as_ref().filter(|terminal| terminal.wants_write()) {
            fds.push(PollFd::new(terminal.as_fd(), PollFlags::POLLOUT));
            sources.push(PollSource::Terminal);
        }
        fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        sources.push(PollSource::Listener);
        if let Some(watch) = self.freeze.watch() {
            fds.push(PollFd::new(watch.as_fd(), PollFlags::POLLPRI));
            sources.push(PollSource::Freeze);
        }
        for connection in &self.connections {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, connection.wants_write());
            fds.push(PollFd::new(connection.as_fd(), flags));
            sources.push(PollSource::Connection(connection.id()));
        }
        // After an interrupted or failed poll, every tick examines the state itself.
        if poll(&mut fds, self.timeout()).is_err() {
            return Vec::new();
        }
        fds.iter().zip(sources).filter(|(fd, _)| fd.any() == Some(true)).map(|(_, source)| source).collect()
    }

    fn timeout(&self) -> PollTimeout {
        let now = Instant::now();
        match self
            .life
            .next_tick(now)
            .into_iter()
            .chain(self.freeze.next_tick(now))
            .chain(self.pre_start_timeout(now))
            .min()
        {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(now);
                // Rounded up: a timeout that is slightly too short would cause a busy loop.
                let left = if left.is_zero() { left } else { left + Duration::from_millis(1) };
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        }
    }

    fn reap(&mut self) {
        // One wake-up may stand for several signals.
        while let Ok(Some(signal)) = self.children.read_signal() {
            if signal.ssi_signo == libc::SIGHUP as u32 {
                self.listen_again();
            }
        }
        loop {
            let (pid, change) = match process::next_child_change() {
                Ok(Some(change)) => change,
                Ok(None) => return,
                Err(error) => {
                    eprintln!("fermata-shim: failed to wait for children: {error}");
                    return;
                }
            };
            if matches!(change, ChildChange::Stopped(_) | ChildChange::Continued) {
                self.freeze.check_soon(Instant::now());
            }
            let is_agent = pid == self.agent.pid && !self.life.has_ended();
            if !is_agent {
                // The post-stop command, or an adopted orphan, which only had to be reaped.
                self.reaped_post_stop(pid, change, Instant::now());
                continue;
            }
            match change {
                ChildChange::Exited(code) => self.agent_ended(Some(code), None, false),
                ChildChange::Signaled { signal, core_dumped } => {
                    self.agent_ended(None, Some(signal), core_dumped);
                }
                ChildChange::Stopped(signal) if self.freeze.is_idle() && matches!(self.life, Life::Running) => {
                    self.stopped_by_others = true;
                    self.broadcast(ShimEvent::Stopped { signal });
                }
                ChildChange::Continued if self.stopped_by_others && self.freeze.is_idle() => {
                    self.stopped_by_others = false;
                    self.broadcast(ShimEvent::Continued {});
                }
                // Caused by a quiesce, freeze or thaw of the shim.
                ChildChange::Stopped(_) | ChildChange::Continued => {}
            }
        }
    }

    /// Recreates the socket if its file has been removed: a daemon that does not find it asks for that.
    fn listen_again(&mut self) {
        if self.socket_file.is_some() && self.socket_file == file_identity(&self.spec.socket) {
            return;
        }
        match listen(&self.spec.socket) {
            Ok(listener) => {
                self.listener = listener;
                self.socket_file = file_identity(&self.spec.socket);
            }
            Err(failure) => eprintln!("fermata-shim: {}", failure.message),
        }
    }

    fn agent_ended(&mut self, code: Option<i32>, signal: Option<i32>, core_dumped: bool) {
        let now = Instant::now();
        // Reads the last message of the child, which may say why it never became the agent.
        self.watch_pre_start(now);
        self.pre_start = None;
        let end = MainEnd { code, signal, core_dumped, at_ms: clock::unix_ms() };
        let events = self.freeze.abandon(true, now);
        self.report(events);
        let work = match std::mem::replace(&mut self.life, Life::Running) {
            Life::Killing { work } => work,
            Life::Running
            | Life::Stopping { .. }
            | Life::Clearing { .. }
            | Life::Draining { .. }
            | Life::After(_)
            | Life::Recording { .. }
            | Life::Over { .. } => self.kill_tree(),
        };
        self.life = Life::Clearing { end, work, until: now + CLEAR_PATIENCE };
    }

    fn kill_tree(&self) -> Killing {
        Killing::begin(self.shim.pid, self.freeze.group(), Instant::now())
    }

    /// Continues the end of the agent.
    fn go_on(&mut self, now: Instant) {
        loop {
            self.life = match std::mem::replace(&mut self.life, Life::Running) {
                Life::Stopping { kill_at } if now >= kill_at => {
                    let events = self.freeze.abandon(false, now);
                    self.report(events);
                    Life::Killing { work: self.kill_tree() }
                }
                Life::Killing { mut work } => {
                    // `reap` leaves this state when the main process has ended.
                    work.step();
                    self.life = Life::Killing { work };
                    return;
                }
                Life::Clearing { end, mut work, until } => {
                    if !work.finishes(self.freeze.group()) && now < until {
                        self.life = Life::Clearing { end, work, until };
                        return;
                    }
                    let leftovers = work.killed().iter().filter(|id| **id != self.agent).count() as u64;
                    self.terminal.iter_mut().for_each(Terminal::hang_up);
                    Life::Draining { end, leftovers, until: now + DRAIN_PATIENCE }
                }
                Life::Draining { end, leftovers, until } => {
                    if (self.stdout.is_some() || self.stderr.is_some()) && now < until {
                        self.life = Life::Draining { end, leftovers, until };
                        return;
                    }
                    // The time may have passed while a slow disk was written: read the rest of the output.
                    self.drain_output();
                    let out_of_memory = self.freeze.group().map(OutOfMemory::of).unwrap_or_default();
                    let record = ExitRecord {
                        run_id: self.spec.run_id.clone(),
                        code: end.code,
                        signal: end.signal,
                        core_dumped: end.core_dumped,
                        ended_at_ms: end.at_ms,
                        leftovers_killed: leftovers,
                        log_bytes_lost: self.log.lost(),
                        start_failure: self.start_failure.take(),
                        post_stop_failure: None,
                        out_of_memory,
                    };
                    self.after(record, now)
                }
                Life::After(stage) => match self.go_on_after(stage, now) {
                    Flow::On(life) => life,
                    Flow::Wait(life) => {
                        self.life = life;
                        return;
                    }
                },
                Life::Recording { record, next, until } => {
                    if now < next {
                        self.life = Life::Recording { record, next, until };
                        return;
                    }
                    match Self::record(&self.reserve, &record) {
                        Err(message) if now < until => {
                            eprintln!("fermata-shim: {message}");
                            self.life = Life::Recording { record, next: now + RECORD_RETRY, until };
                            return;
                        }
                        // Connected peers are told the exit even if it cannot be written.
                        _ => Life::Over { record },
                    }
                }
                life @ (Life::Running | Life::Stopping { .. } | Life::Over { .. }) => {
                    self.life = life;
                    return;
                }
            };
        }
    }

    /// Does the last work before the exit is recorded.
    fn finish(&mut self, mut record: ExitRecord, now: Instant) -> Life {
        // Finishing the log may take long, and a failing disk must not cost the exit code as well. With a post-stop
        // command the preliminary record has been written already.
        if self.spec.post_stop.is_none()
            && let Some(Err(message)) = self.ended.as_ref().map(|reserve| Self::record(reserve, &record))
        {
            eprintln!("fermata-shim: {message}");
        }
        self.log.finish(clock::unix_ns());
        self.remove_group();
        record.log_bytes_lost = self.log.lost();
        Life::Recording { record, next: now, until: now + RECORD_PATIENCE }
    }

    fn record(reserve: &Reserve, record: &ExitRecord) -> Result<(), String> {
        let bytes = serde_json::to_vec(record).map_err(|error| failed_to(&error))?;
        reserve.commit(&bytes).map_err(|error| failed_to(&error))
    }

    fn remove_group(&self) {
        if let Some(group) = self.freeze.group()
            && let Err(error) = group.remove(Duration::from_millis(500))
        {
            eprintln!("fermata-shim: {}", failed_to(&error));
        }
    }

    fn take_output(&mut self, ready: &[PollSource]) {
        let mut taken = false;
        for source in ready {
            taken |= match source {
                PollSource::Stdout => self.take_stdout() != IntakeResult::Nothing,
                PollSource::Stderr => {
                    self.intake.take(&mut self.stderr, Stream::Stderr, &mut self.log) != IntakeResult::Nothing
                }
                PollSource::Child
                | PollSource::PreStart
                | PollSource::Terminal
                | PollSource::Listener
                | PollSource::Freeze
                | PollSource::Connection(_) => false,
            };
        }
        if taken {
            self.log.flush(clock::unix_ns());
        }
    }

    /// Reads standard output once. A terminal carries all output as standard output.
    fn take_stdout(&mut self) -> IntakeResult {
        let Self { intake, stdout, log, terminal, .. } = self;
        match terminal {
            Some(terminal) => intake.read_and_show(stdout, Stream::Stdout, log, |bytes| terminal.show(bytes)),
            None => intake.take(stdout, Stream::Stdout, log),
        }
    }

    /// Reads the available output, at most about [`LAST_BYTES`] of each stream, since a process may still be writing.
    fn drain_output(&mut self) {
        let mut taken = 0;
        while let IntakeResult::Bytes(count) = self.take_stdout() {
            taken += count;
            if taken >= LAST_BYTES {
                break;
            }
        }
        self.intake.drain(&mut self.stderr, Stream::Stderr, &mut self.log, LAST_BYTES);
        self.log.flush(clock::unix_ns());
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let id = ConnectionId(self.next_connection);
                    self.next_connection += 1;
                    if self.connections.len() >= MAX_CONNECTIONS {
                        self.connections.remove(0);
                    }
                    match PeerConnection::new(id, stream) {
                        Ok(connection) => self.connections.push(connection),
                        Err(error) => {
                            eprintln!("fermata-shim: failed to set up a connection: {error}")
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    eprintln!("fermata-shim: failed to accept a connection: {error}");
                    // Most likely there is no free descriptor: do not loop at full speed.
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            }
        }
    }

    fn report(&mut self, events: Vec<FreezeEvent>) {
        for event in events {
            match event {
                FreezeEvent::Answer(caller, answer) => self.answer(caller, answer),
                FreezeEvent::LeaseExpired => self.broadcast(ShimEvent::LeaseExpired {}),
                FreezeEvent::Broken(broken) => self.broadcast(ShimEvent::FreezeBroken(broken)),
            }
        }
    }

    fn answer(&mut self, caller: PendingCall, answer: ShimReply) {
        let line = match answer {
            Ok(ok) => FromShim::Reply { id: caller.id, ok },
            Err(Refused { code, message }) => FromShim::Refusal { id: Some(caller.id), code, message },
        };
        self.send(caller.connection, &line);
    }

    fn send(&mut self, id: ConnectionId, line: &FromShim) {
        // The caller may have disconnected.
        if let Some(connection) = self.connections.iter_mut().find(|c| c.id() == id) {
            connection.send(line);
        }
    }

    fn broadcast(&mut self, event: ShimEvent) {
        let level = event.level();
        let line = FromShim::Event(event);
        for connection in self.connections.iter_mut().filter(|c| c.is_open() && c.level() >= level) {
            connection.send(&line);
        }
    }
}
