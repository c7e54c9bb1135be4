//! The scheduling priority of a thread.

/// Added to the niceness of a background thread; the maximum is 19.
const NICENESS: libc::c_int = 10;

/// Lowers the priority of the calling thread for the rest of its life. If the kernel refuses, the thread keeps its
/// priority.
pub fn stand_back() {
    // SAFETY: setpriority(2) takes no pointer. On Linux, process 0 is the calling thread alone.
    let refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
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
        assert_eq!(background.join().unwrap(), super::NICENESS.max(before));
        assert_eq!(niceness(), before);
    }
}
