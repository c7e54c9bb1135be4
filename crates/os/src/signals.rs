//! Signal dispositions of this process, and the shim's signals as a readable descriptor.

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What ends or stops a process by default and can be ignored. Faults (SIGSEGV …) are not in it:
/// ignoring those would hide a bug in an endless loop.
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

/// Ignores every signal that could end or stop this process, but for SIGKILL, SIGSTOP and faults.
pub fn ignore_deadly() -> io::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in DEADLY {
        // SAFETY: SIG_IGN installs no handler code, so nothing can run in signal context.
        unsafe { sigaction(signal, &ignore) }?;
    }
    Ok(())
}

/// Gives every signal its default action and unblocks all of them, for a child before its exec.
///
/// systemd starts services with SIGPIPE ignored, and ignored signals survive an exec. Allocates
/// nothing.
///
/// By the system call itself: the C library refuses its two private signals (32 and 33), which an
/// ancestor may have left ignored all the same.
pub fn reset_all() {
    // All-zero is SIG_DFL, no flags, no restorer and an empty mask in the kernel's own layout,
    // which is nowhere longer than this.
    let default = [0u64; 8];
    let mask_bytes = size_of::<u64>();
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: the kernel reads at most the 64 bytes of `default` and installs no code. It
        // refuses SIGKILL and SIGSTOP, which have no other action anyway.
        unsafe {
            let nowhere = std::ptr::null_mut::<libc::c_void>();
            libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), nowhere, mask_bytes)
        };
    }
    // Fails only for an invalid `how`.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).ok();
}

/// Blocks SIGCHLD and SIGHUP and returns a descriptor that polls readable when one is pending.
pub fn shim_signal_fd() -> io::Result<SignalFd> {
    // An ignored SIGCHLD (inherited) would make the kernel reap children without telling us.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_DFL installs no handler code.
    unsafe { sigaction(Signal::SIGCHLD, &default) }?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.add(Signal::SIGHUP);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// The name of a signal, `SIGTERM` for 15; `None` for real-time and unknown ones.
pub fn name(number: i32) -> Option<&'static str> {
    Signal::try_from(number).ok().map(Signal::as_str)
}

/// The number of a signal by name, with or without `SIG`, or written as a number.
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
}
