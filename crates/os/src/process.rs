//! Processes: who they are, what state they are in, who descends from whom, and a signal that can
//! never reach the wrong one.
//!
//! A pid alone identifies nothing (small machines wrap at 32,768): pid + start time + boot id does.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::procfs;
use serde::{Deserialize, Serialize};

/// A process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    #[serde(rename = "start")]
    pub start_time_ticks: u64,
}

impl std::fmt::Display for ProcessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.pid, self.start_time_ticks)
    }
}

/// What a process does, from the state letter of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunState {
    /// Runs, sleeps, waits for a disk, or is frozen by its cgroup.
    Live,
    /// Stopped by a signal or a tracer (`T`, `t`).
    Stopped,
    /// Ended, perhaps not yet reaped (`Z`, `X`, `x`).
    Dead,
}

/// One line of `/proc/PID/stat`, as far as Fermata needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Who it is.
    pub id: ProcessId,
    /// The state letter as the kernel writes it.
    pub letter: u8,
    /// Its parent's pid.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub session: i32,
    /// How many threads it has, those that have ended and were not yet cleared away included.
    pub threads: u32,
}

impl Stat {
    /// The meaning of the state letter.
    pub fn state(&self) -> RunState {
        match self.letter {
            b'T' | b't' => RunState::Stopped,
            letter if is_dead(letter) => RunState::Dead,
            _ => RunState::Live,
        }
    }

    /// Parses a stat line. The command name may hold blanks and parentheses, so the fields are
    /// counted from the *last* closing one (proc(5)).
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
        // The state is field 3, the session field 6, the threads field 20, the start time field 22.
        let threads = fields.nth(13)?.parse().ok()?;
        let start_time_ticks = fields.nth(1)?.parse().ok()?;
        Some(Self { id: ProcessId { pid, start_time_ticks }, letter, ppid, pgid, session, threads })
    }
}

/// Reads the state of a process; `None` when there is none with that pid.
pub fn stat(pid: i32) -> io::Result<Option<Stat>> {
    match procfs::read(format!("/proc/{pid}/stat")) {
        Ok(line) => {
            let broken = || io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat"));
            let mut stat = Stat::parse(&line).ok_or_else(broken)?;
            // A process whose first thread has ended looks like a zombie while the others run on.
            if stat.letter == b'Z' && stat.threads > 1 {
                stat.letter = thread_letters(pid)?.into_iter().find(|letter| !is_dead(*letter)).unwrap_or(b'Z');
            }
            Ok(Some(stat))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The state letters of all threads of a process.
fn thread_letters(pid: i32) -> io::Result<Vec<u8>> {
    let tasks = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let letter =
        |task: fs::DirEntry| Stat::parse(&procfs::read(task.path().join("stat")).ok()?).map(|stat| stat.letter);
    Ok(tasks.flatten().filter_map(letter).collect())
}

/// Whether every thread of a process stands still. The letter of the process is only that of its
/// first thread, and the others may take a moment longer to obey SIGSTOP.
pub fn all_threads_stand(pid: i32) -> io::Result<bool> {
    Ok(thread_letters(pid)?.into_iter().all(|letter| is_dead(letter) || matches!(letter, b'T' | b't')))
}

fn is_dead(letter: u8) -> bool {
    matches!(letter, b'Z' | b'X' | b'x')
}

/// How much a process has run: a process that shows the same twice has not run in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// Time on a processor, nanoseconds.
    pub ns: u64,
    /// How often it was given a processor.
    pub times: u64,
}

/// Reads how much the first thread of a process has run (`/proc/PID/schedstat`, three numbers, see
/// the kernel's sched-stats document); `None` when it is gone or this kernel does not count.
pub fn ran(pid: i32) -> io::Result<Option<Ran>> {
    let text = match procfs::read_to_string(format!("/proc/{pid}/schedstat")) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut numbers = text.split_ascii_whitespace().map(|number| number.parse().ok());
    match (numbers.next().flatten(), numbers.nth(1).flatten()) {
        (Some(ns), Some(times)) if times > 0 => Ok(Some(Ran { ns, times })),
        // Switched off, every number is zero; but whoever exists has run at least once.
        _ => Ok(None),
    }
}

/// Says whether reading below `/proc/PID` failed because the process is no more.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Finds out who has that pid now.
pub fn identify(pid: i32) -> io::Result<Option<ProcessId>> {
    Ok(stat(pid)?.map(|stat| stat.id))
}

/// Returns the program that a process runs.
pub fn program(pid: i32) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe"))
}

/// Returns the first argument that a process was started with, after its own name.
pub fn first_argument(pid: i32) -> io::Result<Option<OsString>> {
    let line = procfs::read(format!("/proc/{pid}/cmdline"))?;
    Ok(line.split(|byte| *byte == 0).nth(1).map(|word| OsString::from_vec(word.to_vec())))
}

/// Reads the state of exactly this process; `None` when it is gone, also if its pid was recycled.
pub fn stat_of(id: ProcessId) -> io::Result<Option<Stat>> {
    Ok(stat(id.pid)?.filter(|stat| stat.id == id))
}

/// Whether exactly this process still runs (a zombie does not).
pub fn is_alive(id: ProcessId) -> io::Result<bool> {
    Ok(stat_of(id)?.is_some_and(|stat| stat.state() != RunState::Dead))
}

/// Reads the id of this boot, a UUID.
pub fn boot_id() -> io::Result<String> {
    boot_id_at(Path::new("/proc/sys/kernel/random/boot_id"))
}

/// Reads the id of a boot from a file, for tests that play a reboot.
pub fn boot_id_at(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

/// A descriptor that means one process for ever, even after its pid is recycled.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens the process; `None` when it is gone. The identity is checked *after* opening, so the
    /// descriptor cannot mean a successor.
    pub fn open(id: ProcessId) -> io::Result<Option<Self>> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, id.pid, 0) };
        if raw < 0 {
            let error = io::Error::last_os_error();
            return if is_gone(&error) { Ok(None) } else { Err(error) };
        }
        // SAFETY: the kernel has just returned this descriptor (an int), and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        Ok(stat_of(id)?.map(|_| Self(fd)))
    }

    /// Sends a signal; `false` when the process has ended.
    pub fn send(&self, signal: i32) -> io::Result<bool> {
        // SAFETY: the descriptor is owned by self; a null siginfo means "as kill(2) would fill it".
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

impl AsRawFd for Pidfd {
    /// Readable (POLLIN) from the moment at which the process has ended.
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Sends a signal to exactly this process; `false` when it is gone.
pub fn signal(id: ProcessId, number: i32) -> io::Result<bool> {
    match Pidfd::open(id)? {
        Some(fd) => fd.send(number),
        None => Ok(false),
    }
}

/// Reads the state of all processes that can be seen. Not atomic: who forks or ends meanwhile may
/// be missing, so callers look until nothing changes.
pub fn all() -> io::Result<Vec<Stat>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(stat) = stat(pid)? {
            found.push(stat);
        }
    }
    Ok(found)
}

/// How hard to look for descendants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcScan {
    /// Walks `/proc/PID/task/*/children`: its cost grows with the tree, not with the machine. The
    /// kernel may skip a child whose sibling ends meanwhile (proc(5)).
    Quick,
    /// Walks until two walks in a row saw the same, which finds everybody below those who neither fork
    /// nor reap any more; where they do not agree, reads every process of the machine as well.
    ///
    /// A walk passes over a child only when an elder sibling is reaped while the list is being read
    /// (`get_children_proc` in the kernel's `fs/proc/array.c` counts places from the front then). That
    /// sibling was seen by the walk before or vanished under this one, so the two do not agree.
    Thorough,
}

/// How often two walks are compared before the whole machine is read.
const WALKS: usize = 4;

/// Finds the descendants of a process, parents before their children, without the process itself.
pub fn descendants(root: i32, look: ProcScan) -> io::Result<Vec<Stat>> {
    let Some(mut last) = walk(root)? else { return Ok(below(root, all()?)) };
    if look == ProcScan::Quick {
        return Ok(last.found);
    }
    for _ in 1..WALKS {
        let Some(next) = walk(root)? else { break };
        if next.agrees_with(&last) {
            return Ok(next.found);
        }
        last = next;
    }
    let mut everyone = all()?;
    let mut known: std::collections::HashSet<i32> = everyone.iter().map(|stat| stat.id.pid).collect();
    for stat in walk(root)?.map(|walk| walk.found).unwrap_or_default() {
        if known.insert(stat.id.pid) {
            everyone.push(stat);
        }
    }
    Ok(below(root, everyone))
}

/// What one walk of the children files saw.
struct Walk {
    /// Parents before their children.
    found: Vec<Stat>,
    /// Whether somebody who was listed was gone, or another's child, when it was looked at.
    vanished: bool,
}

impl Walk {
    fn agrees_with(&self, other: &Self) -> bool {
        let ids = |walk: &Self| {
            let mut ids: Vec<ProcessId> = walk.found.iter().map(|stat| stat.id).collect();
            ids.sort_unstable();
            ids
        };
        !self.vanished && !other.vanished && ids(self) == ids(other)
    }
}

/// Walks the children files; `None` when this kernel has none.
fn walk(root: i32) -> io::Result<Option<Walk>> {
    let mut found: Vec<Stat> = Vec::new();
    let mut vanished = false;
    let mut parents = vec![root];
    let mut any_file = false;
    while let Some(parent) = parents.pop() {
        let tasks = match fs::read_dir(format!("/proc/{parent}/task")) {
            Ok(tasks) => tasks,
            Err(error) if is_gone(&error) => {
                // Its children have another parent now, whose list may have been read before.
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
                    // Gone, or adopted by another meanwhile; or the pid is a stranger's by now, who
                    // must not be taken for one of the tree.
                    Some(_) | None => vanished = true,
                }
            }
        }
    }
    // A root that ended has neither tasks nor children.
    Ok((any_file || stat(root)?.is_none()).then_some(Walk { found, vanished }))
}

/// Picks the descendants of `root` out of a list, breadth first.
fn below(root: i32, everyone: Vec<Stat>) -> Vec<Stat> {
    let mut children: HashMap<i32, Vec<Stat>> = HashMap::new();
    for stat in everyone {
        children.entry(stat.ppid).or_default().push(stat);
    }
    let mut found: Vec<Stat> = children.remove(&root).unwrap_or_default();
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|stat| stat.id.pid) {
        next += 1;
        // Taking the entry out also ends any circle that a torn view might show.
        found.extend(children.remove(&parent).unwrap_or_default());
    }
    found
}

/// What happened to a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It called exit.
    Exited(i32),
    /// A signal ended it.
    Signaled {
        /// Which one; real-time signals too.
        signal: i32,
        /// Whether a core dump was written.
        core_dumped: bool,
    },
    /// A signal stopped it.
    Stopped(i32),
    /// SIGCONT continued it.
    Continued,
}

/// Takes one change of any child, reaping it if it has ended; `None` when there is no news.
///
/// For the shim, which has no other child handling; never beside an async runtime's.
pub fn next_child_change() -> io::Result<Option<(i32, Change)>> {
    let mut status = 0;
    let flags = libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED;
    loop {
        // SAFETY: `status` is a writable int for the whole call.
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
            Change::Exited(libc::WEXITSTATUS(status))
        } else if libc::WIFSIGNALED(status) {
            Change::Signaled { signal: libc::WTERMSIG(status), core_dumped: libc::WCOREDUMP(status) }
        } else if libc::WIFSTOPPED(status) {
            Change::Stopped(libc::WSTOPSIG(status))
        } else {
            Change::Continued
        };
        return Ok(Some((pid, change)));
    }
}

/// Whether the process stands in vfork(2) and waits for a child that is stopped.
///
/// Such a parent sleeps uninterruptibly (`D`) and cannot show `T`, however often it is stopped,
/// until its child calls exec or exit. It runs nothing until the child is continued, so it stands
/// as still as a stopped one. Shells and posix_spawn(3) use vfork, so this is no rare sight.
/// `others` are processes among which its children are looked for.
pub fn waits_for_stopped_child(stat: &Stat, others: &[Stat]) -> bool {
    stat.letter == b'D'
        && others.iter().any(|child| {
            child.ppid == stat.id.pid && child.state() == RunState::Stopped && share_memory(stat.id.pid, child.id.pid)
        })
}

/// Whether two processes have one address space, as after vfork(2) and before exec.
fn share_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: kcmp compares two processes and touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    // Where the kernel has no kcmp or forbids it, an uninterruptible parent of a stopped child is
    // most likely just that.
    order == 0 || (order < 0 && !is_gone(&io::Error::last_os_error()))
}

/// Whether the process was started with this exact `NAME=value` in its environment.
pub fn started_with(pid: i32, variable: &[u8]) -> bool {
    // Unreadable means another user's process, which is none of ours.
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
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat.id, ProcessId { pid: 42, start_time_ticks: 777 });
        assert_eq!((stat.letter, stat.ppid, stat.pgid, stat.session), (b'S', 1, 2, 3));
        assert_eq!(Stat::parse(b"garbage"), None);
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
    fn both_looks_find_children_and_grandchildren_parents_first() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'sleep 60 & echo; wait' & read x; kill %1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0u8; 1];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let root = child.id() as i32;
        for look in [ProcScan::Quick, ProcScan::Thorough] {
            let found = descendants(root, look).unwrap();
            assert_eq!(found.len(), 2, "{look:?}: {found:?}");
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
    fn the_boot_id_can_be_played_for_a_test() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("boot_id");
        std::fs::write(&path, "abc\n").unwrap();
        assert_eq!(boot_id_at(&path).unwrap(), "abc");
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
