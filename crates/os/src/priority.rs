//! Lets a thread stand back behind all others.

/// How much later than others the thread runs; 19 would be the most.
const NICENESS: libc::c_int = 10;

/// Lowers the priority of the calling thread for the rest of its life. Fails never: what cannot be lowered goes on as it
/// is.
pub fn stand_back() {
    // SAFETY: setpriority(2) takes no pointer. On Linux the process 0 is the calling thread alone.
    let refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
    if refused != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "a thread keeps its priority");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_calling_thread_stands_back() {
        // SAFETY: getpriority(2) takes no pointer.
        let niceness = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let here = niceness();
        let there = std::thread::spawn(move || {
            super::stand_back();
            niceness()
        });
        assert_eq!(there.join().unwrap(), super::NICENESS.max(here));
        assert_eq!(niceness(), here);
    }
}
