//! A program that runs first in another one's place: the child that will become the agent forks it,
//! waits for it, and then either executes the agent's program or ends.
//!
//! ```text
//! child                                              parent
//!   "begins"                                  ──>      Prelude
//!   fork, exec, wait
//!   "ended", status                           ──>      Step::Ended
//!                                             <──      go_on, or leave after a failure
//!   exec of the agent's program: end of file  ──>      Step::Executes
//!   or the error                              ──>      Step::Failed
//! ```
//!
//! So the agent has its pid, its group and its limits from the beginning: whatever holds, stops or
//! kills it does the same to what runs before it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use super::spawn::{SpawnError, Stage};

/// One byte that says what it is about, then a number: an errno or a wait status.
const MESSAGE_BYTES: usize = 5;
/// The kinds of messages beside the stages of a spawn.
const BEGINS: u8 = 100;
const ENDED: u8 = 101;
const KILLED: u8 = 102;
/// What the parent answers when it has ended.
const GO_ON: u8 = b'g';
const LEAVE: u8 = b'l';

/// What the child says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message {
    kind: u8,
    value: i32,
}

impl Message {
    fn from_bytes(bytes: [u8; MESSAGE_BYTES]) -> Self {
        let [kind, value @ ..] = bytes;
        Self { kind, value: i32::from_le_bytes(value) }
    }

    pub(super) fn begins(self) -> bool {
        self.kind == BEGINS
    }

    pub(super) fn into_error(self) -> SpawnError {
        SpawnError { stage: Stage::from_byte(self.kind), source: io::Error::from_raw_os_error(self.value) }
    }
}

/// In the child: says something. Allocates nothing.
pub(super) fn say(report: &UnixStream, kind: u8, value: i32) {
    let mut message = [0u8; MESSAGE_BYTES];
    message[0] = kind;
    message[1..].copy_from_slice(&value.to_le_bytes());
    // If the parent is gone there is nobody to tell.
    nix::unistd::write(report, &message).ok();
}

/// In the parent: waits for the first message; `None` when the program executes.
pub(super) fn listen(report: &mut UnixStream) -> io::Result<Option<Message>> {
    let mut bytes = [0; MESSAGE_BYTES];
    match report.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(Message::from_bytes(bytes))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// In the child that will become the agent, whose only thread this is: runs a program and waits for
/// it. Returns when the agent's turn has come; the child ends here when the program failed.
pub(super) fn play(report: &UnixStream, exec: impl FnOnce() -> Errno) -> Result<(), (Stage, Errno)> {
    close_all_but(report.as_raw_fd());
    say(report, BEGINS, 0);
    // SAFETY: this process was forked from one with a single thread, and has none but this one.
    match unsafe { nix::unistd::fork() } {
        Err(errno) => Err((Stage::Fork, errno)),
        Ok(ForkResult::Child) => {
            let errno = exec();
            say(report, Stage::ExecBefore as u8, errno as i32);
            // SAFETY: _exit ends the process without running anything of the parent's.
            unsafe { libc::_exit(127) }
        }
        Ok(ForkResult::Parent { child }) => {
            let (kind, value) = wait_for(child);
            say(report, kind, value);
            // Also after a failure: who is being killed, children first, ends by that and not by this.
            if may_go_on(report) && (kind, value) == (ENDED, 0) {
                return Ok(());
            }
            // It failed, or the shim is gone, without which no agent is to run.
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
            answered => return answered == Ok(1) && answer == [GO_ON],
        }
    }
}

/// Closes what an exec would close: as long as this process holds them open, whoever waits for the
/// end of a pipe of the shim's would wait for the end of this program too.
fn close_all_but(kept: i32) {
    for (first, last) in [(3, kept - 1), (kept + 1, i32::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: this process only executes a program or ends, so that no value that owns one of
        // these descriptors is used or dropped again.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if closed != 0 {
            // Before Linux 5.9. A shim has only a few.
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
            // A real-time signal, which nix does not know: the number is lost, the failure is not.
            Err(_) => return (KILLED, 0),
        }
    }
}

/// How the program that ran first has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// How far the child has come.
#[derive(Debug)]
pub enum Step {
    /// Nothing new.
    Waiting,
    /// The program that ran first has ended. The child waits for [`Prelude::go_on`] or
    /// [`Prelude::leave`].
    Ended(Ending),
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

    /// Looks how far it has come; never waits.
    pub fn step(&mut self) -> Step {
        let mut bytes = [0; MESSAGE_BYTES];
        let read = self.report.read(&mut bytes[self.inbox.len()..]);
        match read {
            Ok(0) => Step::Executes,
            Ok(count) => {
                let begin = self.inbox.len();
                self.inbox.extend_from_slice(&bytes[begin..begin + count]);
                let Ok(whole) = <[u8; MESSAGE_BYTES]>::try_from(&self.inbox[..]) else { return Step::Waiting };
                self.inbox.clear();
                let message = Message::from_bytes(whole);
                match message.kind {
                    ENDED => Step::Ended(Ending::Code(message.value)),
                    KILLED => Step::Ended(Ending::Signal(message.value)),
                    _ => Step::Failed(message.into_error()),
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Step::Waiting
            }
            // The child's own end says the rest.
            Err(_) => Step::Executes,
        }
    }

    /// Lets the agent's program be executed.
    pub fn go_on(&mut self) {
        // A child that is gone needs no leave.
        self.report.write_all(&[GO_ON]).ok();
    }

    /// Lets the child end, because the program that ran first has failed.
    pub fn leave(&mut self) {
        self.report.write_all(&[LEAVE]).ok();
    }
}

impl AsFd for Prelude {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.report.as_fd()
    }
}
