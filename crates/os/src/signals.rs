//! Signal dispositions of this process, and the shim's signals as a readable descriptor.

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that end or stop a process by default and can be ignored. Faults (SIGSEGV …) are excluded: ignoring them
/// would turn a bug into an endless loop.
const DEADLY: [Signal; 17] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGPIPE,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGXCPU,
    Signal::SIGXFSZ,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];

/// Ignores every signal that could end or stop this process, except SIGKILL, SIGSTOP and faults.
pub fn ignore_deadly() -> io::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in DEADLY {
        // SAFETY: SIG_IGN installs no handler, so no code runs in signal context.
        unsafe { sigaction(signal, &ignore) }?;
    }
    Ok(())
}

/// Resets every signal to its default action and unblocks all signals, for a child before its exec. Allocates no
/// memory.
///
/// systemd starts services with SIGPIPE ignored, and ignored signals survive an exec.
///
/// Uses the system call directly: the C library rejects its two private signals (32 and 33), which an ancestor may have
/// left ignored.
pub fn reset_all() {
    // All-zero means SIG_DFL, no flags, no restorer and an empty mask in the kernel's layout, which is at most this
    // long on all architectures.
    let default = [0u64; 8];
    let mask_bytes = size_of::<u64>();
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: the kernel reads at most the 64 bytes of `default` and installs no code. It rejects SIGKILL and
        // SIGSTOP, which always have their default action.
        unsafe {
            let no_old_action = std::ptr::null_mut::<libc::c_void>();
            libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), no_old_action, mask_bytes)
        };
    }
    // Fails only for an invalid argument, and there is none.
    unblock_all().ok();
}

/// Blocks SIGCHLD and SIGHUP and returns a descriptor that is readable while one of them is pending.
pub fn shim_signal_fd() -> io::Result<SignalFd> {
    // With an inherited, ignored SIGCHLD the kernel would reap children without notifying this process.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_DFL installs no handler.
    unsafe { sigaction(Signal::SIGCHLD, &default) }?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.add(Signal::SIGHUP);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Signals that this process takes one at a time with [`BlockedSignals::wait`], instead of in handlers.
///
/// Handlers run in no useful order: of two pending signals the kernel enters the handler of the lower number first and
/// then that of the other on top of it, so that the second one runs first. A waiting thread gets the lower number first
/// (`next_signal` in the kernel's `kernel/signal.c`).
#[derive(Debug)]
pub struct BlockedSignals(SigSet);

impl BlockedSignals {
    /// Blocks `signals` in the calling thread and in the threads and processes that it starts afterwards. A program
    /// calls it before it starts its first thread, and gives its children their mask back with [`unblock_all`].
    pub fn block(signals: impl IntoIterator<Item = Signal>) -> io::Result<Self> {
        let set = SigSet::from_iter(signals);
        set.thread_block()?;
        Ok(Self(set))
    }

    /// Waits until one of the signals is pending and takes it.
    pub fn wait(&self) -> io::Result<Signal> {
        Ok(self.0.wait()?)
    }
}

/// Unblocks every signal in the calling thread. Makes one system call, so that it may run between fork and exec.
pub fn unblock_all() -> io::Result<()> {
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

/// Makes the child of `command` start with no signal blocked, whatever this process blocks.
pub fn unblock_in_child(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(unblock_all) };
}

/// Returns the name of a signal, such as `SIGTERM` for 15; `None` for real-time and unknown signals.
pub fn name(number: i32) -> Option<&'static str> {
    Signal::try_from(number).ok().map(Signal::as_str)
}

/// Parses the name of a signal, with or without `SIG`, or its number.
pub fn parse(text: &str) -> Option<i32> {
    let upper = text.to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return (1..=libc::SIGRTMAX()).contains(&number).then_some(number);
    }
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    full.parse::<Signal>().ok().map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_found_by_name_and_number() {
        assert_eq!(parse("term"), Some(15));
        assert_eq!(parse("SIGKILL"), Some(9));
        assert_eq!(parse("19"), Some(19));
        assert_eq!(parse("65"), None);
        assert_eq!(parse("nonsense"), None);
        assert_eq!(name(15), Some("SIGTERM"));
    }

    #[test]
    fn of_two_pending_signals_the_lower_number_is_taken_first() {
        // Signals that are raised go to this thread, and no other test sees them.
        let blocked = BlockedSignals::block([Signal::SIGTERM, Signal::SIGCONT]).unwrap();
        for order in [[Signal::SIGTERM, Signal::SIGCONT], [Signal::SIGCONT, Signal::SIGTERM]] {
            for signal in order {
                nix::sys::signal::raise(signal).unwrap();
            }
            assert_eq!(blocked.wait().unwrap(), Signal::SIGTERM);
            assert_eq!(blocked.wait().unwrap(), Signal::SIGCONT);
        }
        unblock_all().unwrap();
    }

    #[test]
    fn a_child_starts_with_no_signal_blocked() {
        let _blocked = BlockedSignals::block([Signal::SIGTERM]).unwrap();
        let mask_of_child = |unblock: bool| {
            let mut command = std::process::Command::new("cat");
            command.arg("/proc/self/status");
            if unblock {
                unblock_in_child(&mut command);
            }
            let status = String::from_utf8(command.output().unwrap().stdout).unwrap();
            let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim().to_owned();
            u64::from_str_radix(&mask, 16).unwrap()
        };
        assert_eq!(mask_of_child(true), 0);
        assert_ne!(mask_of_child(false) & 1 << (libc::SIGTERM - 1), 0, "the standard library keeps the mask");
        unblock_all().unwrap();
    }
}
