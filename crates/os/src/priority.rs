//! The scheduling priority of a thread.

/// Added to the niceness of a background thread.
const INCREMENT: libc::c_int = 10;

/// The largest niceness, see setpriority(2).
const MAXIMUM: libc::c_int = 19;

/// Lowers the priority of the calling thread for the rest of its life. If the kernel refuses, the thread keeps its
/// priority.
pub fn stand_back() {
    // SAFETY: getpriority(2) takes no pointer. On Linux, process 0 is the calling thread alone. It cannot fail for that.
    let before = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // SAFETY: setpriority(2) takes no pointer.
    let refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, (before + INCREMENT).min(MAXIMUM)) };
    if refused != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "failed to lower the priority of a thread");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_calling_thread_stands_back() {
        // SAFETY: getpriority(2) takes no pointer.
        let niceness = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = niceness();
        let background = std::thread::spawn(move || {
            super::stand_back();
            niceness()
        });
        assert_eq!(background.join().unwrap(), (before + super::INCREMENT).min(super::MAXIMUM));
        assert_eq!(niceness(), before);
    }
}
