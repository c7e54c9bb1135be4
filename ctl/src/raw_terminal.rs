//! This program's own terminal while it belongs to an agent: raw, and restored on every way out.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use fermata_protocol::supervision::TerminalSize;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use terminal_size::{Height, Width, terminal_size_of};

use crate::errors::Failure;

/// Brings the terminal out of whatever the agent has asked of it: the other screen, mouse and paste
/// reports, margins, character sets, colours, a hidden cursor.
const LEAVE: &str = "\x1b[?1047l\x1b[?9;1000;1002;1003;1004;1005;1006;1015;2004l\x1b[?1l\x1b>\x1b[?7h\x1b[?25h\x1b[r\
                     \x1b(B\x0f\x1b[m\x1b[4l\x1b[0 q";

/// What ends or concerns a program at a terminal.
const SIGNALS: [Signal; 6] =
    [Signal::SIGWINCH, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGCONT];

/// The terminal in raw mode; dropping it restores it.
pub struct RawTerminal {
    before: Termios,
    signals: SignalFd,
}

/// Returns the size of the terminal that stdout is, else of stdin's.
pub fn size() -> Option<TerminalSize> {
    let found = terminal_size_of(io::stdout()).or_else(|| terminal_size_of(io::stdin()));
    // A terminal that does not know its size says 0.
    found.map(|(Width(cols), Height(rows))| TerminalSize { rows, cols }).filter(|size| size.rows > 0 && size.cols > 0)
}

/// Says whether a person sits at both ends.
pub fn is_there() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

impl RawTerminal {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// When stdin is no terminal.
    pub fn enter() -> Result<Self, Failure> {
        let what = |error: nix::errno::Errno| Failure::io("take the terminal over", &error.into());
        let before = tcgetattr(io::stdin()).map_err(what)?;
        // From here on signals wait to be read: none of them can end this program in raw mode.
        let mut set = SigSet::empty();
        SIGNALS.into_iter().for_each(|signal| set.add(signal));
        set.thread_block().map_err(what)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(what)?;
        let terminal = Self { before, signals };
        terminal.make_raw().map_err(what)?;
        Ok(terminal)
    }

    /// Makes it raw, again after somebody else had it.
    pub fn make_raw(&self) -> nix::Result<()> {
        let mut raw = self.before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
    }

    /// Takes the next signal that has come.
    pub fn signal(&self) -> Option<Signal> {
        let info = self.signals.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }

    /// What becomes readable when a signal comes.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Shows bytes as they are.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn show(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }

    /// Says something on the last line, which the agent may write over.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn say(&self, text: &str) -> io::Result<()> {
        let rows = size().map_or(24, |size| size.rows);
        let columns = usize::from(size().map_or(80, |size| size.cols)).saturating_sub(3);
        let text: String = crate::output::clean(text).chars().take(columns).collect();
        self.show(format!("\x1b7\x1b[{rows};1H\x1b[0;7m {text} \x1b[0m\x1b[K\x1b8").as_bytes())
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let rows = size().map_or(24, |size| size.rows);
        // A terminal that is gone needs no restoring.
        drop(self.show(format!("{LEAVE}\x1b[{rows};1H\r\n").as_bytes()));
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before).ok();
    }
}
