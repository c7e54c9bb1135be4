//! The log writer process: writes the log of an agent that must not wait for a disk.
//!
//! The launcher forks it before the shim, so that it is not a child of the shim and not part of the agent's tree. It
//! receives messages from the shim in order (`log_sink`) and ends with the shim. Like the shim it has one thread, and
//! it alone may wait for a disk.

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

/// The size of the socket buffer between shim and log writer process, in bytes. Without root privileges the kernel
/// grants less (`net.core.wmem_max`).
const UNDER_WAY: usize = 1 << 20;

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
