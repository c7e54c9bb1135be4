//! Starts a child with a socket as its descriptor 3 and in a session of its own; and the child's side of this
//! arrangement.
//!
//! The session matters as much as the socket: descendants may create their own process groups but remain in the
//! session, so that [`kill_session`] finds all of them. This module knows nothing of plugins and waits for no process.

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// The descriptor of the child's socket.
pub const CONTROL_FD: RawFd = 3;

/// Starts `command` in a session of its own with no signal blocked, and with `socket` as its descriptor 3.
pub fn spawn_with_fd3(command: &mut Command, socket: OwnedFd) -> io::Result<Child> {
    let _occupied = occupy_fd3()?;
    let source = socket.as_raw_fd();
    // SAFETY: the closure only makes system calls that are safe between fork and exec, and `socket` is open until `spawn`
    // has returned.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() == -1 {
                return Err(io::Error::last_os_error());
            }
            crate::signals::unblock_all()?;
            // dup2 onto the same descriptor would leave close-on-exec set.
            let result = if source == CONTROL_FD {
                libc::fcntl(source, libc::F_SETFD, 0)
            } else {
                libc::dup2(source, CONTROL_FD)
            };
            if result == -1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn();
    drop(socket);
    child
}

/// Opens files until descriptor 3 is in use in this process.
///
/// The standard library reports a failed exec through a pipe. If descriptor 3 were free, the pipe could become 3, and
/// the child would overwrite it with its socket.
fn occupy_fd3() -> io::Result<Vec<std::fs::File>> {
    let mut placeholders = Vec::new();
    // SAFETY: F_GETFD on a number changes nothing, whether it is open or not.
    while unsafe { libc::fcntl(CONTROL_FD, libc::F_GETFD) } == -1 {
        placeholders.push(OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open("/dev/null")?);
    }
    Ok(placeholders)
}

/// Takes ownership of the socket that [`spawn_with_fd3`] has left at descriptor 3, and marks it close-on-exec. Must be
/// called once, at the very start of the child.
pub fn inherited_fd3() -> io::Result<UnixStream> {
    // SAFETY: F_GETFD on a number changes nothing, whether it is open or not.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and it was inherited, so no value in this process owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let stream = UnixStream::from(socket);
    // Fails for a regular file or a terminal that happens to be descriptor 3.
    stream.local_addr()?;
    Ok(stream)
}

/// Kills (SIGKILL) every process whose session is `leader`, except the calling process, and returns their number.
///
/// Repeats until no new process appears, since a process may fork while the list is read. The caller must not have
/// reaped the leader yet, unless it *is* the leader: the number could have been reused by another process.
pub fn kill_session(leader: u32) -> usize {
    let me = std::process::id();
    let mut killed = std::collections::BTreeSet::new();
    // A fork bomb that outlasts these rounds is left to limits on pids.
    for _ in 0..64 {
        let mut new = 0;
        for pid in session_members(leader) {
            let is_new = pid != me && killed.insert(pid);
            if is_new && let Ok(raw) = i32::try_from(pid) {
                // Fails if the process has ended already.
                kill(Pid::from_raw(raw), Signal::SIGKILL).ok();
                new += 1;
            }
        }
        if new == 0 {
            break;
        }
    }
    killed.len()
}

/// Lists the live processes of a session, without zombies.
fn session_members(leader: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| session_of(*pid) == Some(leader))
        .collect()
}

/// Reads the session of a live process from `/proc/<pid>/stat` (proc_pid_stat(5)).
fn session_of(pid: u32) -> Option<u32> {
    let stat = super::procfs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command name in parentheses, which may itself contain blanks and parentheses.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::process::{self, Pidfd};
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd as _;
    use std::process::Stdio;

    #[test]
    fn the_child_speaks_on_descriptor_3() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "read line <&3; echo \"got $line\" >&3"]);
        let mut child = spawn_with_fd3(&mut command, theirs.into()).unwrap();
        ours.write_all(b"hello\n").unwrap();
        let mut reply = String::new();
        ours.read_to_string(&mut reply).unwrap();
        assert_eq!(reply, "got hello\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("/nonexistent/program");
        let error = spawn_with_fd3(&mut command, theirs.into()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn children_in_groups_of_their_own_die_with_the_session() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("bash");
        // Job control (-m) puts the background job into a process group of its own.
        command
            .args(["-c", "set -m; sleep 1000 & echo $! >&3; exec 3>&-; wait"])
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut child = spawn_with_fd3(&mut command, theirs.into()).unwrap();
        let mut line = String::new();
        let mut byte = [0];
        while ours.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(char::from(byte[0]));
        }
        let job: i32 = line.parse().unwrap();
        let job = process::identify(job).unwrap().unwrap();
        let pidfd = Pidfd::open(job).unwrap().unwrap();
        assert!(kill_session(child.id()) >= 2);
        child.wait().unwrap();
        let mut fds = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut fds, 10_000u16).unwrap(), 1);
    }
}
