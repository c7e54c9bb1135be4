//! The files behind the standard streams of the agent and its hooks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

/// Creates a pipe with a non-blocking reading end; the agent's end is blocking, as programs expect.
pub(super) fn output_pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((ours, theirs))
}

pub(super) fn open_null_file() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}
