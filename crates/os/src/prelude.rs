//! Runs another program before the agent's, in the same process: the child that will become the agent forks that
//! program, waits for it, and then either executes the agent's program or exits.
//!
//! ```text
//! child                                              parent
//!   "begins"                                  ──>      Prelude
//!   fork, exec, wait
//!   "ended", status                           ──>      PreludeStep::Ended
//!                                             <──      go_on, or leave after a failure
//!   exec of the agent's program: end of file  ──>      PreludeStep::Executes
//!   or the error                              ──>      PreludeStep::Failed
//! ```
//!
//! The agent thus has its pid, process group and limits from the beginning: whatever freezes, stops or kills the agent
//! also applies to the program before it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use super::spawn_error::{SpawnError, SpawnStage};

/// One byte for the kind of the message, then a number: an errno or a wait status.
const MESSAGE_BYTES: usize = 5;
/// Kinds of messages other than the stages of a spawn.
const BEGINS: u8 = 100;
const ENDED: u8 = 101;
const KILLED: u8 = 102;
/// The parent's answer after the first program has ended.
const GO_ON: u8 = b'g';
const LEAVE: u8 = b'l';

/// A message from the child.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreludeMessage {
    kind: u8,
    value: i32,
}

impl PreludeMessage {
    fn from_bytes(bytes: [u8; MESSAGE_BYTES]) -> Self {
        let [kind, value @ ..] = bytes;
        Self { kind, value: i32::from_le_bytes(value) }
    }

    pub(super) fn begins(self) -> bool {
        self.kind == BEGINS
    }

    pub(super) fn into_error(self) -> SpawnError {
        SpawnError { stage: SpawnStage::from_byte(self.kind), source: io::Error::from_raw_os_error(self.value) }
    }
}

/// In the child: sends a message. Allocates no memory.
pub(super) fn say(report: &UnixStream, kind: u8, value: i32) {
    let mut message = [0u8; MESSAGE_BYTES];
    message[0] = kind;
    message[1..].copy_from_slice(&value.to_le_bytes());
    // Fails if the parent has died; the child notices that when it waits for an answer.
    nix::unistd::write(report, &message).ok();
}

/// In the parent: waits for the first message; `None` once the program executes.
pub(super) fn listen(report: &mut UnixStream) -> io::Result<Option<PreludeMessage>> {
    let mut bytes = [0; MESSAGE_BYTES];
    match report.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(PreludeMessage::from_bytes(bytes))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// In the child, which has a single thread: runs the first program and waits for it. Returns when the agent's program
/// may be executed. Exits if the first program has failed.
pub(super) fn play(report: &UnixStream, exec: impl FnOnce() -> Errno) -> Result<(), (SpawnStage, Errno)> {
    close_all_but(report.as_raw_fd());
    say(report, BEGINS, 0);
    // SAFETY: this process was forked from one with a single thread and has started no other.
    match unsafe { nix::unistd::fork() } {
        Err(errno) => Err((SpawnStage::Fork, errno)),
        Ok(ForkResult::Child) => {
            let errno = exec();
            say(report, SpawnStage::ExecBefore as u8, errno as i32);
            // SAFETY: _exit ends the process without running any exit handler of the parent.
            unsafe { libc::_exit(127) }
        }
        Ok(ForkResult::Parent { child }) => {
            let (kind, value) = wait_for(child);
            say(report, kind, value);
            // The answer is awaited even after a failure. If the tree is being killed, the signal must end this
            // process, and children must end first.
            if may_go_on(report) && (kind, value) == (ENDED, 0) {
                return Ok(());
            }
            // The program failed, or the shim has died, without which no agent may run.
            // SAFETY: as above.
            unsafe { libc::_exit(127) }
        }
    }
}

fn may_go_on(report: &UnixStream) -> bool {
    let mut answer = [0u8; 1];
    loop {
        match nix::unistd::read(report, &mut answer) {
            Err(Errno::EINTR) => {}
            result => return result == Ok(1) && answer == [GO_ON],
        }
    }
}

/// Closes what an exec would close. While this process has the shim's pipes open, their readers would not see end of
/// file before the first program ends.
fn close_all_but(kept: i32) {
    for (first, last) in [(3, kept - 1), (kept + 1, i32::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: this process only executes a program or exits, so that no value that owns one of these descriptors is
        // used or dropped again.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if closed != 0 {
            // Linux before 5.9. A shim has only a few descriptors.
            for fd in first..=last.min(1024) {
                // SAFETY: as above.
                unsafe { libc::close(fd) };
            }
        }
    }
}

fn wait_for(child: Pid) -> (u8, i32) {
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => return (ENDED, code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return (KILLED, signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            // The signal is a real-time signal, which nix cannot represent. Its number is lost.
            Err(_) => return (KILLED, 0),
        }
    }
}

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEnd {
    /// It exited with this code.
    Code(i32),
    /// It was ended by this signal.
    Signal(i32),
}

impl std::fmt::Display for ProcessEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// The progress of a child.
#[derive(Debug)]
pub enum PreludeStep {
    /// Nothing has changed.
    Waiting,
    /// The first program has ended. The child waits for [`Prelude::go_on`] or [`Prelude::leave`].
    Ended(ProcessEnd),
    /// The agent's program executes.
    Executes,
    /// One of the two programs could not be executed.
    Failed(SpawnError),
}

/// A child that runs another program first.
#[derive(Debug)]
pub struct Prelude {
    report: UnixStream,
    inbox: Vec<u8>,
}

impl Prelude {
    pub(super) fn new(report: UnixStream) -> io::Result<Self> {
        report.set_nonblocking(true)?;
        Ok(Self { report, inbox: Vec::new() })
    }

    /// Returns the progress since the last call, without waiting.
    pub fn step(&mut self) -> PreludeStep {
        let mut bytes = [0; MESSAGE_BYTES];
        let read = self.report.read(&mut bytes[self.inbox.len()..]);
        match read {
            Ok(0) => PreludeStep::Executes,
            Ok(count) => {
                let begin = self.inbox.len();
                self.inbox.extend_from_slice(&bytes[begin..begin + count]);
                let Ok(message) = <[u8; MESSAGE_BYTES]>::try_from(&self.inbox[..]) else { return PreludeStep::Waiting };
                self.inbox.clear();
                let message = PreludeMessage::from_bytes(message);
                match message.kind {
                    ENDED => PreludeStep::Ended(ProcessEnd::Code(message.value)),
                    KILLED => PreludeStep::Ended(ProcessEnd::Signal(message.value)),
                    _ => PreludeStep::Failed(message.into_error()),
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                PreludeStep::Waiting
            }
            // The end of the child, which its parent is notified of, tells the rest.
            Err(_) => PreludeStep::Executes,
        }
    }

    /// Lets the child execute the agent's program.
    pub fn go_on(&mut self) {
        // Fails if the child has ended already.
        self.report.write_all(&[GO_ON]).ok();
    }

    /// Lets the child exit because the first program has failed.
    pub fn leave(&mut self) {
        self.report.write_all(&[LEAVE]).ok();
    }
}

impl AsFd for Prelude {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }
}
