//! Pseudo terminals.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::termios::{InputFlags, SetArg, tcgetattr, tcsetattr};

/// Both ends of a pseudo terminal.
#[derive(Debug)]
pub struct Pty {
    /// The end of the terminal emulator; non-blocking.
    pub master: OwnedFd,
    /// The end that a program uses as its terminal.
    pub slave: OwnedFd,
}

fn window(rows: u16, cols: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Opens a terminal of the given size and makes it the controlling terminal of this process, which must be the leader
/// of a session without one (`TIOCSCTTY` in tty_ioctl(4)).
///
/// # Errors
/// If the system has no free terminal, or this process leads no session.
pub fn open_controlling(rows: u16, cols: u16) -> io::Result<Pty> {
    let pair = openpty(&window(rows, cols), None)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // Without this flag the kernel's line editing erases single bytes of a multi-byte character.
    let mut attributes = tcgetattr(&pair.slave)?;
    attributes.input_flags.insert(InputFlags::IUTF8);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &attributes)?;
    // SAFETY: the descriptor is open during the call; the argument 0 is a number, not a pointer.
    if unsafe { libc::ioctl(pair.slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Pty { master: pair.master, slave: pair.slave })
}

/// Changes the size of a terminal. The kernel notifies its foreground process group with SIGWINCH.
///
/// # Errors
/// If the descriptor is not a terminal.
pub fn resize(terminal: impl AsFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = window(rows, cols);
    // SAFETY: the descriptor is open and `size` is readable during the call.
    if unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
