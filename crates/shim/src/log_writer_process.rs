//! The log writer process: writes the log of an agent that must not wait for a disk.
//!
//! The launcher forks it before the shim, so that it is not a child of the shim and not part of the agent's tree. It
//! receives messages from the shim in order (`log_sink`) and ends with the shim. Like the shim it has one thread, and
//! it alone may wait for a disk.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt::SndBuf,
};

use super::log::LogWriter;
use super::log_line::Stream;
use super::spec::LogLimits;
use fermata_os::clock;

/// The maximum output in one message, in bytes; less than the socket buffer of any kernel.
pub(super) const PIECE: usize = 64 * 1024;
/// The size of the socket buffer between shim and log writer process, in bytes. Without root privileges the kernel
/// grants less (`net.core.wmem_max`).
const UNDER_WAY: usize = 1 << 20;

/// The first byte of a message to the log writer process: its kind. A time stamp and the payload follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum MessageKind {
    Stdout = 1,
    Stderr = 2,
    Note = 3,
    Gap = 4,
    EndOfStdout = 5,
    EndOfStderr = 6,
    Finish = 7,
}

impl MessageKind {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        let all =
            [Self::Stdout, Self::Stderr, Self::Note, Self::Gap, Self::EndOfStdout, Self::EndOfStderr, Self::Finish];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Creates the socket pair of shim and log writer process.
///
/// # Errors
/// If the kernel refuses.
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (shim, log_writer) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // The default size works too.
    setsockopt(&shim, SndBuf, &UNDER_WAY).ok();
    Ok((shim, log_writer))
}

/// Writes the messages of the shim until the shim sends the last one or dies.
pub fn run(socket: &OwnedFd, dir: &Path, limits: LogLimits) {
    let mut log = match LogWriter::open(dir, limits) {
        Ok(log) => log,
        // The shim's next message fails, and it tries to write the log itself.
        Err(error) => return eprintln!("fermata-shim: the log writer process failed to open the log: {error}"),
    };
    let mut buffer = vec![0; PIECE + 1024];
    loop {
        let count = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => break,
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(error) => {
                eprintln!("fermata-shim: the log writer process failed to read: {error}");
                break;
            }
        };
        let (kind, at_ns, rest) = match parse(&buffer[..count]) {
            Ok(message) => message,
            Err(error) => {
                eprintln!("fermata-shim: the log writer process received an invalid message: {error}");
                continue;
            }
        };
        if apply(&mut log, kind, at_ns, rest) {
            // Fails if the shim has stopped waiting, which it has reported itself.
            send(socket.as_raw_fd(), &log.lost().to_le_bytes(), MsgFlags::MSG_NOSIGNAL).ok();
            return;
        }
    }
    log.finish(clock::unix_ns());
}

/// Applies a message to the log; returns whether it was the last one.
pub(super) fn apply(log: &mut LogWriter, kind: MessageKind, at_ns: i64, rest: &[u8]) -> bool {
    match kind {
        MessageKind::Stdout => log.push(Stream::Stdout, rest, at_ns),
        MessageKind::Stderr => log.push(Stream::Stderr, rest, at_ns),
        MessageKind::EndOfStdout => log.end(Stream::Stdout, at_ns),
        MessageKind::EndOfStderr => log.end(Stream::Stderr, at_ns),
        MessageKind::Note => log.say(Stream::Note, rest, at_ns),
        MessageKind::Gap => {
            // Output after the gap does not continue the line before it.
            log.end(Stream::Stdout, at_ns);
            log.end(Stream::Stderr, at_ns);
            log.say(Stream::Gap, rest, at_ns);
        }
        MessageKind::Finish => {
            log.finish(at_ns);
            return true;
        }
    }
    log.flush(at_ns);
    false
}

/// The length of the kind and the time stamp of a message.
const HEAD_BYTES: usize = 9;

pub(super) fn head(kind: MessageKind, at_ns: i64) -> [u8; HEAD_BYTES] {
    let mut head = [kind as u8; HEAD_BYTES];
    head[1..].copy_from_slice(&at_ns.to_le_bytes());
    head
}

/// Divides a message into kind, time stamp and payload.
pub(super) fn parse(message: &[u8]) -> io::Result<(MessageKind, i64, &[u8])> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "an unknown message");
    let (head, rest) = message.split_at_checked(HEAD_BYTES).ok_or_else(wrong)?;
    let kind = MessageKind::from_byte(head[0]).ok_or_else(wrong)?;
    let at = head[1..].try_into().map_err(|_| wrong())?;
    Ok((kind, i64::from_le_bytes(at), rest))
}
