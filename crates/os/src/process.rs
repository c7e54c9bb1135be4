//! Processes: identity, state, descendants, and signals that cannot reach the wrong process.
//!
//! A pid identifies a process only together with its start time and the boot id: small machines reuse pids after 32,768
//! processes.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::procfs;
use serde::{Deserialize, Serialize};

/// Identifies a process within one boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// The start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    #[serde(rename = "start")]
    pub start_time_ticks: u64,
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.pid, self.start_time_ticks)
    }
}

/// The state of a process, derived from the state letter of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Runs, sleeps, waits for a disk, or is frozen by its cgroup.
    Live,
    /// Stopped by a signal or a tracer (`T`, `t`).
    Stopped,
    /// Ended, possibly not yet reaped (`Z`, `X`, `x`).
    Dead,
}

/// The used fields of `/proc/PID/stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessStat {
    pub id: ProcessId,
    /// The state letter, as written by the kernel.
    pub letter: u8,
    /// The pid of the parent.
    pub ppid: i32,
    /// The process group.
    pub pgid: i32,
    pub session: i32,
    /// The number of threads, including those that have ended and have not been removed yet.
    pub threads: u32,
}

impl ProcessStat {
    /// Returns the meaning of the state letter.
    pub fn state(&self) -> RunState {
        match self.letter {
            b'T' | b't' => RunState::Stopped,
            letter if is_dead(letter) => RunState::Dead,
            _ => RunState::Live,
        }
    }

    /// Parses a stat line. The command name may contain blanks and parentheses, so fields are counted from the *last*
    /// closing parenthesis (proc(5)).
    fn parse(line: &[u8]) -> Option<Self> {
        let close = line.iter().rposition(|&b| b == b')')?;
        let open = line.iter().position(|&b| b == b'(')?;
        let pid = std::str::from_utf8(&line[..open]).ok()?.trim().parse().ok()?;
        let rest = std::str::from_utf8(line.get(close + 2..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let letter = *fields.next()?.as_bytes().first()?;
        let ppid = fields.next()?.parse().ok()?;
        let pgid = fields.next()?.parse().ok()?;
        let session = fields.next()?.parse().ok()?;
        // State is field 3, session 6, threads 20, start time 22.
        let threads = fields.nth(13)?.parse().ok()?;
        let start_time_ticks = fields.nth(1)?.parse().ok()?;
        Some(Self { id: ProcessId { pid, start_time_ticks }, letter, ppid, pgid, session, threads })
    }
}

/// Reads the state of a process; `None` if no process has that pid.
pub fn stat(pid: i32) -> io::Result<Option<ProcessStat>> {
    match procfs::read(format!("/proc/{pid}/stat")) {
        Ok(line) => {
            let broken = || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat"));
            let mut stat = ProcessStat::parse(&line).ok_or_else(broken)?;
            // A process whose first thread has ended is shown as a zombie while its other threads run.
            if stat.letter == b'Z' && stat.threads > 1 {
                stat.letter = thread_letters(pid)?.into_iter().find(|letter| !is_dead(*letter)).unwrap_or(b'Z');
            }
            Ok(Some(stat))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the state letters of all threads of a process.
fn thread_letters(pid: i32) -> io::Result<Vec<u8>> {
    let tasks = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let letter =
        |task: fs::DirEntry| ProcessStat::parse(&procfs::read(task.path().join("stat")).ok()?).map(|stat| stat.letter);
    Ok(tasks.flatten().filter_map(letter).collect())
}

/// Returns whether every thread of a process is stopped or dead. The letter of the process is that of its first thread;
/// the others may take a moment longer to handle SIGSTOP.
pub fn all_threads_stopped(pid: i32) -> io::Result<bool> {
    Ok(thread_letters(pid)?.into_iter().all(|letter| is_dead(letter) || matches!(letter, b'T' | b't')))
}

fn is_dead(letter: u8) -> bool {
    matches!(letter, b'Z' | b'X' | b'x')
}

/// The execution counters of a process. If two readings are equal, the process has not run in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// Time on a processor, in nanoseconds.
    pub ns: u64,
    /// How often it was scheduled on a processor.
    pub times: u64,
}

/// Reads the execution counters of a process's first thread from `/proc/PID/schedstat` (three numbers, see the kernel's
/// sched-stats document); `None` if the process has ended or the kernel does not count.
pub fn ran(pid: i32) -> io::Result<Option<Ran>> {
    let text = match procfs::read_to_string(format!("/proc/{pid}/schedstat")) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut numbers = text.split_ascii_whitespace().map(|number| number.parse().ok());
    match (numbers.next().flatten(), numbers.nth(1).flatten()) {
        (Some(ns), Some(times)) if times > 0 => Ok(Some(Ran { ns, times })),
        // All numbers are zero if counting is switched off; every existing process has been scheduled at least once.
        _ => Ok(None),
    }
}

/// Returns whether reading below `/proc/PID` failed because the process has ended.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Returns the identity of the process that has this pid now; `None` if there is none.
pub fn identify(pid: i32) -> io::Result<Option<ProcessId>> {
    Ok(stat(pid)?.map(|stat| stat.id))
}

/// Returns the path of the program that a process executes.
pub fn program(pid: i32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe"))
}

/// Returns the first command-line argument of a process, after the program's name.
pub fn first_argument(pid: i32) -> io::Result<Option<OsString>> {
    let line = procfs::read(format!("/proc/{pid}/cmdline"))?;
    Ok(line.split(|byte| *byte == 0).nth(1).map(|word| OsString::from_vec(word.to_vec())))
}

/// Reads the state of exactly this process; `None` if it has ended, even if its pid has been reused.
pub fn stat_of(id: ProcessId) -> io::Result<Option<ProcessStat>> {
    Ok(stat(id.pid)?.filter(|stat| stat.id == id))
}

/// Returns whether exactly this process still runs. A zombie does not.
pub fn is_alive(id: ProcessId) -> io::Result<bool> {
    Ok(stat_of(id)?.is_some_and(|stat| stat.state() != RunState::Dead))
}

/// Returns the id of this boot, a UUID.
pub fn boot_id() -> io::Result<String> {
    boot_id_at(Path::new("/proc/sys/kernel/random/boot_id"))
}

/// Reads a boot id from a file, for tests that simulate a reboot.
pub fn boot_id_at(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// A descriptor of one process, which never refers to another one, even after its pid is reused.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens the process; `None` if it has ended. The identity is checked *after* opening, so that the descriptor
    /// cannot refer to a later process with the same pid.
    pub fn open(id: ProcessId) -> io::Result<Option<Self>> {
        // SAFETY: pidfd_open takes two integers and accesses no memory of this process.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, id.pid, 0) };
        if raw < 0 {
            let error = io::Error::last_os_error();
            return if is_gone(&error) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just returned this descriptor (an int), and no other value owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        Ok(stat_of(id)?.map(|_| Self(fd)))
    }

    /// Sends a signal; returns `false` if the process has ended.
    pub fn send(&self, signal: i32) -> io::Result<bool> {
        // SAFETY: the descriptor is owned by `self`; with a null siginfo the kernel fills it in as for kill(2).
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        if is_gone(&error) { Ok(false) } else { Err(error) }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Pidfd {
    /// Readable (POLLIN) once the process has ended.
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Sends a signal to exactly this process; returns `false` if it has ended.
pub fn signal(id: ProcessId, number: i32) -> io::Result<bool> {
    match Pidfd::open(id)? {
        Some(fd) => fd.send(number),
        None => Ok(false),
    }
}

/// Reads the state of all visible processes. Not atomic: a process that is forked or ends meanwhile may be missing, so
/// callers repeat until nothing changes.
pub fn all() -> io::Result<Vec<ProcessStat>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(stat) = stat(pid)? {
            processes.push(stat);
        }
    }
    Ok(processes)
}

/// How thoroughly descendants are searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcScan {
    /// Reads `/proc/PID/task/*/children`. The cost grows with the tree, not with the machine. The kernel may skip a
    /// child whose sibling ends meanwhile (proc(5)).
    Quick,
    /// Reads the children files until two walks in a row agree, which finds all descendants of a tree whose processes
    /// neither fork nor reap any more. If the walks do not agree, reads every process of the machine as well.
    ///
    /// A walk skips a child only if an elder sibling is reaped while the list is being read (`get_children_proc` in the
    /// kernel's `fs/proc/array.c` counts positions from the front then). That sibling was seen by the previous walk or
    /// vanished under this one, so the two do not agree.
    Thorough,
}

/// How many walks are made before the whole machine is read.
const WALKS: usize = 4;

/// Returns the descendants of a process, without the process itself, parents before their children.
pub fn descendants(root: i32, scan: ProcScan) -> io::Result<Vec<ProcessStat>> {
    let Some(mut last) = walk(root)? else { return Ok(below(root, all()?)) };
    if scan == ProcScan::Quick {
        return Ok(last.found);
    }
    for _ in 1..WALKS {
        let Some(next) = walk(root)? else { break };
        if next.agrees_with(&last) {
            return Ok(next.found);
        }
        last = next;
    }
    let mut processes = all()?;
    let mut pids: std::collections::HashSet<i32> = processes.iter().map(|stat| stat.id.pid).collect();
    for stat in walk(root)?.map(|walk| walk.found).unwrap_or_default() {
        if pids.insert(stat.id.pid) {
            processes.push(stat);
        }
    }
    Ok(below(root, processes))
}

/// The result of one walk of the children files.
struct TreeWalk {
    /// Parents before their children.
    found: Vec<ProcessStat>,
    /// Whether a listed process had ended, or had another parent, when its state was read.
    vanished: bool,
}

impl TreeWalk {
    fn agrees_with(&self, other: &Self) -> bool {
        let ids = |walk: &Self| {
            let mut ids: Vec<ProcessId> = walk.found.iter().map(|stat| stat.id).collect();
            ids.sort_unstable();
            ids
        };
        !self.vanished && !other.vanished && ids(self) == ids(other)
    }
}

/// Walks the children files; `None` if this kernel has none.
fn walk(root: i32) -> io::Result<Option<TreeWalk>> {
    let mut found: Vec<ProcessStat> = Vec::new();
    let mut vanished = false;
    let mut parents = vec![root];
    let mut any_file = false;
    while let Some(parent) = parents.pop() {
        let tasks = match fs::read_dir(format!("/proc/{parent}/task")) {
            Ok(tasks) => tasks,
            Err(error) if is_gone(&error) => {
                // Its children have another parent now, whose list may have been read already.
                vanished |= parent != root;
                continue;
            }
            Err(error) => return Err(error),
        };
        for task in tasks {
            let Ok(task) = task else { continue };
            let text = match procfs::read_to_string(task.path().join("children")) {
                Ok(text) => text,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            any_file = true;
            for pid in text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()) {
                match stat(pid)? {
                    Some(stat) if stat.ppid == parent => {
                        parents.push(pid);
                        found.push(stat);
                    }
                    // The process has ended or has been adopted, or its pid belongs to a process outside of the tree by
                    // now, which must not be treated as a member.
                    Some(_) | None => vanished = true,
                }
            }
        }
    }
    // A root that has ended has neither tasks nor children.
    Ok((any_file || stat(root)?.is_none()).then_some(TreeWalk { found, vanished }))
}

/// Selects the descendants of `root` from a list, breadth first.
fn below(root: i32, processes: Vec<ProcessStat>) -> Vec<ProcessStat> {
    let mut children: HashMap<i32, Vec<ProcessStat>> = HashMap::new();
    for stat in processes {
        children.entry(stat.ppid).or_default().push(stat);
    }
    let mut found: Vec<ProcessStat> = children.remove(&root).unwrap_or_default();
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|stat| stat.id.pid) {
        next += 1;
        // Removing the entry also ends a cycle, which an inconsistent listing might contain.
        found.extend(children.remove(&parent).unwrap_or_default());
    }
    found
}

/// A change of a child's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildChange {
    /// The child has exited with this code.
    Exited(i32),
    /// A signal has ended the child.
    Signaled {
        /// The signal's number, which may be that of a real-time signal.
        signal: i32,
        core_dumped: bool,
    },
    /// A signal has stopped the child.
    Stopped(i32),
    /// SIGCONT has continued the child.
    Continued,
}

/// Returns the next state change of any child, and reaps the child if it has ended; `None` if there is none.
///
/// For the shim, which has no other handling of children. Must not be used beside that of an async runtime.
pub fn next_child_change() -> io::Result<Option<(i32, ChildChange)>> {
    let mut status = 0;
    let flags = libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED;
    loop {
        // SAFETY: `status` is a writable int during the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        if pid == 0 {
            return Ok(None);
        }
        if pid < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ECHILD) => return Ok(None),
                Some(libc::EINTR) => continue,
                _ => return Err(error),
            }
        }
        let change = if libc::WIFEXITED(status) {
            ChildChange::Exited(libc::WEXITSTATUS(status))
        } else if libc::WIFSIGNALED(status) {
            ChildChange::Signaled { signal: libc::WTERMSIG(status), core_dumped: libc::WCOREDUMP(status) }
        } else if libc::WIFSTOPPED(status) {
            ChildChange::Stopped(libc::WSTOPSIG(status))
        } else {
            ChildChange::Continued
        };
        return Ok(Some((pid, change)));
    }
}

/// Returns whether the process is blocked in vfork(2) by a child that is stopped. `others` are searched for its
/// children.
///
/// Such a parent sleeps uninterruptibly (`D`) until its child calls exec or exit, and never shows `T`, however often it
/// is stopped. It executes nothing until the child is continued, so it is as good as stopped. Shells and posix_spawn(3)
/// use vfork, so this is not rare.
pub fn waits_for_stopped_child(stat: &ProcessStat, others: &[ProcessStat]) -> bool {
    stat.letter == b'D'
        && others.iter().any(|child| {
            child.ppid == stat.id.pid && child.state() == RunState::Stopped && share_memory(stat.id.pid, child.id.pid)
        })
}

/// Returns whether two processes share one address space, as between vfork(2) and exec.
fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: kcmp compares two processes and accesses no memory of this process.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    // If the kernel lacks or forbids kcmp, an uninterruptible parent of a stopped child is assumed to be in vfork.
    order == 0 || (order < 0 && !is_gone(&io::Error::last_os_error()))
}

/// Returns whether the process was started with exactly this `NAME=value` in its environment.
pub fn started_with(pid: i32, variable: &[u8]) -> bool {
    // If the environment is unreadable, the process belongs to another user and so to no agent.
    procfs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|block| block.split(|&b| b == 0).any(|entry| entry == variable))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_command_name_with_blanks_and_parentheses_is_parsed() {
        let line = b"42 (a) b (c) S 1 2 3 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 777 1 2\n";
        let stat = ProcessStat::parse(line).unwrap();
        assert_eq!(stat.id, ProcessId { pid: 42, start_time_ticks: 777 });
        assert_eq!((stat.letter, stat.ppid, stat.pgid, stat.session), (b'S', 1, 2, 3));
        assert_eq!(ProcessStat::parse(b"garbage"), None);
    }

    #[test]
    fn a_recycled_pid_is_never_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = identify(child.id() as i32).unwrap().unwrap();
        let other = ProcessId { start_time_ticks: id.start_time_ticks + 1, ..id };
        assert!(!signal(other, libc::SIGKILL).unwrap());
        assert!(is_alive(id).unwrap());
        assert!(!is_alive(other).unwrap());
        assert!(signal(id, libc::SIGKILL).unwrap());
        child.wait().unwrap();
        assert!(!signal(id, libc::SIGKILL).unwrap());
    }

    #[test]
    fn both_scans_find_children_and_grandchildren_parents_first() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'sleep 60 & echo; wait' & read x; kill %1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0u8; 1];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let root = child.id() as i32;
        for scan in [ProcScan::Quick, ProcScan::Thorough] {
            let found = descendants(root, scan).unwrap();
            assert_eq!(found.len(), 2, "{scan:?}: {found:?}");
            assert_eq!(found[0].ppid, root);
            assert_eq!(found[1].ppid, found[0].id.pid);
        }
        let tree = descendants(root, ProcScan::Thorough).unwrap();
        for stat in tree.iter().rev() {
            signal(stat.id, libc::SIGKILL).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_boot_id_can_be_simulated_for_a_test() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("boot_id");
        std::fs::write(&path, "abc\n").unwrap();
        assert_eq!(boot_id_at(&path).unwrap(), "abc");
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
