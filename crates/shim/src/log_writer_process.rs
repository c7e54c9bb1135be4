//! The log writer process: a process beside the shim that writes for an agent which must not wait.
//!
//! The launcher forks it before the shim, so that it is nobody's child and no part of the agent's
//! tree. It takes messages from the shim in their order (`log_sink.rs`), and ends with the shim. It
//! is one thread, like the shim, and the only one here that may wait for a disk.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt::SndBuf,
};

use super::log::LogWriter;
use super::log_sink::{PIECE, apply, parse};
use super::spec::LogLimits;
use fermata_os::clock;

/// How much may be under way between shim and log writer process, in bytes; the kernel gives less to others
/// than root (`net.core.wmem_max`).
const UNDER_WAY: usize = 1 << 20;

/// Makes the ends of the shim and of the log writer process.
///
/// # Errors
/// What the kernel says.
pub fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (shim, log_writer) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // The usual size works too.
    setsockopt(&shim, SndBuf, &UNDER_WAY).ok();
    Ok((shim, log_writer))
}

/// Writes what comes until the shim says that it was all, or is gone.
pub fn run(socket: &OwnedFd, dir: &Path, limits: LogLimits) {
    let mut log = match LogWriter::open(dir, limits) {
        Ok(log) => log,
        // The shim finds its messages refused and tries itself.
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
                eprintln!("fermata-shim: the log writer process did not understand the shim: {error}");
                continue;
            }
        };
        if apply(&mut log, kind, at_ns, rest) {
            // A shim that has not waited has said so in its own log.
            send(socket.as_raw_fd(), &log.lost().to_le_bytes(), MsgFlags::MSG_NOSIGNAL).ok();
            return;
        }
    }
    log.finish(clock::unix_ns());
}
