//! The terminal of this program in raw mode while it shows that of an agent.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use fermata_protocol::supervision::TerminalSize;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use terminal_size::{Height, Width, terminal_size_of};

use crate::errors::CommandError;
use crate::terminal_text::clean;

/// Resets the modes that an agent may have set: alternate screen, mouse and paste reports, margins, character sets,
/// colours, hidden cursor.
const RESET: &str = "\x1b[?1047l\x1b[?9;1000;1002;1003;1004;1005;1006;1015;2004l\x1b[?1l\x1b>\x1b[?7h\x1b[?25h\x1b[r\
                     \x1b(B\x0f\x1b[m\x1b[4l\x1b[0 q";

/// The signals that are read from a descriptor in raw mode.
const SIGNALS: [Signal; 6] =
    [Signal::SIGWINCH, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGCONT];

/// The terminal in raw mode; dropping this restores its mode.
pub struct RawTerminal {
    before: Termios,
    signals: SignalFd,
}

/// Returns the size of the terminal on stdout, else of that on stdin.
pub fn size() -> Option<TerminalSize> {
    let found = terminal_size_of(io::stdout()).or_else(|| terminal_size_of(io::stdin()));
    // A terminal of unknown size reports 0.
    found.map(|(Width(cols), Height(rows))| TerminalSize { rows, cols }).filter(|size| size.rows > 0 && size.cols > 0)
}

/// Says whether stdin and stdout are terminals.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

impl RawTerminal {
    /// Switches the terminal to raw mode, and blocks [`SIGNALS`].
    ///
    /// # Errors
    /// When stdin is not a terminal.
    pub fn enter() -> Result<Self, CommandError> {
        let failed = |error: nix::errno::Errno| CommandError::io("switch the terminal to raw mode", &error.into());
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        // Blocked signals cannot end this program in raw mode; they are read from the descriptor.
        let mut set = SigSet::empty();
        SIGNALS.into_iter().for_each(|signal| set.add(signal));
        set.thread_block().map_err(failed)?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(failed)?;
        let terminal = Self { before, signals };
        terminal.set_raw().map_err(failed)?;
        Ok(terminal)
    }

    /// Sets raw mode; also needed after another program has used the terminal.
    pub fn set_raw(&self) -> nix::Result<()> {
        let mut raw = self.before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
    }

    /// Returns the next pending signal.
    pub fn signal(&self) -> Option<Signal> {
        let info = self.signals.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }

    /// A descriptor that is readable while a signal is pending.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Writes bytes unchanged.
    ///
    /// # Errors
    /// When the terminal is closed.
    pub fn show(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }

    /// Shows a message on the last line, which the agent may overwrite.
    ///
    /// # Errors
    /// When the terminal is closed.
    pub fn show_message(&self, text: &str) -> io::Result<()> {
        let rows = size().map_or(24, |size| size.rows);
        let columns = usize::from(size().map_or(80, |size| size.cols)).saturating_sub(3);
        let text: String = clean(text).chars().take(columns).collect();
        self.show(format!("\x1b7\x1b[{rows};1H\x1b[0;7m {text} \x1b[0m\x1b[K\x1b8").as_bytes())
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let rows = size().map_or(24, |size| size.rows);
        // A closed terminal needs no reset.
        drop(self.show(format!("{RESET}\x1b[{rows};1H\r\n").as_bytes()));
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before).ok();
    }
}
