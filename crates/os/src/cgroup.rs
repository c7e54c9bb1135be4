//! Control groups, version 2: freezing, thawing and killing a whole tree with one write.
//!
//! `cgroup.freeze` and `cgroup.kill` need no controller, and none is enabled here; see `controllers` for resource
//! limits.
//!
//! ```text
//! <mount>/<own group, "fermata", or a given parent>/fermata-<run>       the agent and its descendants
//! ```

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::mounts;
use super::procfs;

/// Why an operation on a control group failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// This machine (or container) has no cgroup v2 hierarchy.
    #[error("find a cgroup v2 mount")]
    NoHierarchy,
    /// The name or path is not valid for a group.
    #[error("use {} as a group", path.display())]
    BadPath { path: PathBuf },
    /// A group of that name exists and has members, so it is in use by another program.
    #[error("create {}: it has members already", path.display())]
    InUse { path: PathBuf },
    /// An operation on a file failed.
    #[error("{step} {}", path.display())]
    Io {
        /// The operation, as a verb.
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The kernel did not report the expected state in time.
    #[error("{step} {} within {waited_ms} ms", path.display())]
    Timeout {
        /// The operation, as a verb.
        step: &'static str,
        path: PathBuf,
        waited_ms: u64,
    },
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_path_buf();
    move |source| CgroupError::Io { step, path, source }
}

/// The name of the daemon's own group if its parent belongs to Fermata too. The parent then contains no process, so
/// that controllers can be enabled in it (systemd's `DelegateSubgroup=`).
pub const DAEMON_GROUP: &str = "fermata-daemon";

/// The mount of cgroup v2 and this process's position in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// The mount point.
    pub mount: PathBuf,
    /// The directory of this process's group.
    pub own: PathBuf,
}

impl Hierarchy {
    /// Finds the mount in `/proc/self/mountinfo` (unified and hybrid machines differ) and the own group in
    /// `/proc/self/cgroup`.
    pub fn find() -> Result<Self, CgroupError> {
        let mounts = Path::new("/proc/self/mountinfo");
        let groups = Path::new("/proc/self/cgroup");
        let mounts = fs::read(mounts).map_err(failed("read", mounts))?;
        let groups = fs::read(groups).map_err(failed("read", groups))?;
        Self::parse(&mounts, &groups).ok_or(CgroupError::NoHierarchy)
    }

    fn parse(mountinfo: &[u8], cgroup: &[u8]) -> Option<Self> {
        let own = cgroup.split(|&b| b == b'\n').find_map(|line| line.strip_prefix(b"0::"))?;
        let own = Path::new(std::ffi::OsStr::from_bytes(own));
        mountinfo.split(|&b| b == b'\n').find_map(|line| {
            let mut fields = line.split(|&b| b == b' ');
            let root = mounts::unescape(fields.nth(3)?);
            let mount = mounts::unescape(fields.next()?);
            // A single dash ends the optional fields; the file system type follows (proc(5)).
            fields.by_ref().find(|field| *field == b"-")?;
            if fields.next()? != b"cgroup2" {
                return None;
            }
            // The mount may expose only a part of the hierarchy, as in some containers.
            let below = own.strip_prefix(&root).ok()?;
            if below.components().any(|part| part == Component::ParentDir) {
                return None;
            }
            Some(Self { own: mount.join(below), mount })
        })
    }

    /// Returns the default parent of agents' groups: the own group; in the root group, a directory below it; and if the
    /// own group is named [`DAEMON_GROUP`], its parent.
    pub fn default_parent(&self) -> PathBuf {
        match self.own.parent() {
            _ if self.own == self.mount => self.mount.join("fermata"),
            Some(around) if self.own.file_name().is_some_and(|name| name == DAEMON_GROUP) => around.to_path_buf(),
            _ => self.own.clone(),
        }
    }

    /// Returns the parent of agents' groups, and creates it if it is missing.
    pub fn parent_group(given: Option<&Path>) -> Result<PathBuf, CgroupError> {
        let parent = match given {
            Some(given) => given.to_path_buf(),
            None => Self::find()?.default_parent(),
        };
        // A configured group is gone after a reboot. It is created only inside a cgroup file system, not as an ordinary
        // directory in a wrong place.
        if parent.parent().is_some_and(|around| around.join("cgroup.procs").exists()) {
            make_dir(&parent)?;
        }
        Ok(parent)
    }
}

/// The setting `agents.freezer`, also part of a launch spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezerSetting {
    /// A control group if one can be created, otherwise signals.
    #[default]
    Auto,
    /// Always signals.
    Signals,
}

/// The freezer of one agent's tree.
#[derive(Debug)]
pub enum Freezer {
    /// The control group that contains the tree.
    Cgroup(Group),
    /// SIGSTOP and SIGCONT.
    Signals {
        /// Why no control group is used, for people.
        why: String,
    },
}

impl Freezer {
    /// Creates the group `name` below `parent` (or the default parent), or falls back to signals. Only moving a process
    /// into the group proves that it can be used: see [`Group::procs_file`].
    pub fn prepare(parent: Option<&Path>, name: &str) -> Self {
        match Group::create(parent, name) {
            Ok(group) => Self::Cgroup(group),
            Err(error) => Self::signals_because(&error),
        }
    }

    /// Returns the fallback to signals, with the error and all its causes as the reason.
    pub fn signals_because(error: &dyn std::error::Error) -> Self {
        let mut why = format!("failed to {error}");
        let mut cause = error.source();
        while let Some(inner) = cause {
            why.push_str(&format!(": {inner}"));
            cause = inner.source();
        }
        Self::Signals { why }
    }
}

/// A control group without child groups of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// Returns the path of the group `name` below `parent` (or the default parent), whether or not the group exists.
    pub fn path_of(parent: Option<&Path>, name: &str) -> Result<PathBuf, CgroupError> {
        let single = Path::new(name).components().count() == 1 && !name.contains('/');
        if !single || name.starts_with('.') {
            return Err(CgroupError::BadPath { path: name.into() });
        }
        Ok(Hierarchy::parent_group(parent)?.join(name))
    }

    /// Creates the group and checks that it can be frozen.
    pub fn create(parent: Option<&Path>, name: &str) -> Result<Self, CgroupError> {
        let path = Self::path_of(parent, name)?;
        make_dir(&path)?;
        let group = Self { path };
        if group.populated().unwrap_or(false) {
            return Err(CgroupError::InUse { path: group.path });
        }
        // A group left by an earlier run may be frozen, and would freeze its next member.
        match group.thaw() {
            Ok(()) => Ok(group),
            Err(error) => {
                fs::remove_dir(&group.path).ok();
                Err(error)
            }
        }
    }

    /// Opens an existing group, for instance the one named by a run record.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let events = path.join("cgroup.events");
        fs::metadata(&events).map_err(failed("find", &events))?;
        Ok(Self { path: path.to_path_buf() })
    }

    /// Returns a group that contains other groups.
    pub(super) fn open_parent(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    /// The directory of the group.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `cgroup.procs`. A child writes `0` into it between fork and exec, and so becomes a member before it
    /// executes an instruction of the agent's program.
    pub fn procs_file(&self) -> Result<File, CgroupError> {
        let path = self.path.join("cgroup.procs");
        open_for_write(&path).map_err(failed("open", &path))
    }

    /// Starts freezing; [`Group::watch`] reports when the group is frozen.
    pub fn begin_freeze(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "1")
    }

    /// Freezes the group and waits for the kernel's confirmation. After a timeout the group is thawed again.
    pub fn freeze(&self, patience: Duration) -> Result<(), CgroupError> {
        self.begin_freeze()?;
        let frozen = self.wait("freeze", patience, |events| events.frozen);
        if frozen.is_err() {
            // Report the first error. A group that cannot be thawed cannot have been frozen either.
            self.thaw().ok();
        }
        frozen
    }

    /// Thaws the group. Has no effect on a group that is not frozen.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "0")
    }

    /// Kills all members, including those of child groups. In a frozen group no member executes another instruction.
    /// The group is thawed afterwards and can be reused; a frozen group would freeze its next member. Its members carry
    /// a SIGKILL by then, so that after the thaw they only die.
    pub fn kill(&self) -> Result<(), CgroupError> {
        match self.write("cgroup.kill", "1") {
            // Linux before 5.14. A frozen group cannot fork, so one listing is complete.
            Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                self.freeze(Duration::from_secs(2))?;
                for pid in self.procs()? {
                    if let Ok(Some(id)) = super::process::identify(pid) {
                        super::process::signal(id, libc::SIGKILL).map_err(failed("kill the members of", &self.path))?;
                    }
                }
            }
            other => other?,
        }
        self.thaw()
    }

    /// Lists the members, including those of child groups.
    pub fn procs(&self) -> Result<HashSet<i32>, CgroupError> {
        let mut pids = HashSet::new();
        collect_procs(&self.path, &mut pids)?;
        Ok(pids)
    }

    /// Returns whether the group or a child group has a member.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        Ok(self.watch()?.read()?.populated)
    }

    /// Opens `cgroup.events` for polling (POLLPRI) and reading.
    pub fn watch(&self) -> Result<GroupWatch, CgroupError> {
        let path = self.path.join("cgroup.events");
        let file = File::open(&path).map_err(failed("open", &path))?;
        Ok(GroupWatch { file, path })
    }

    /// Waits until the group has no member.
    pub fn wait_empty(&self, patience: Duration) -> Result<(), CgroupError> {
        self.wait("wait for the end of", patience, |events| !events.populated)
    }

    /// Removes the group and its child groups. Members that have just ended can keep it busy for a moment, so removal
    /// is retried for up to `patience`. Succeeds if the group does not exist.
    pub fn remove(&self, patience: Duration) -> Result<(), CgroupError> {
        let started = Instant::now();
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) || started.elapsed() >= patience => {
                    return Err(failed("remove", &self.path)(error));
                }
                // The kernel does not report when a dying member leaves the group.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    pub(super) fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        open_for_write(&path).and_then(|mut file| file.write_all(value.as_bytes())).map_err(failed("write", &path))
    }

    fn wait(
        &self,
        step: &'static str,
        patience: Duration,
        reached: impl Fn(Events) -> bool,
    ) -> Result<(), CgroupError> {
        let started = Instant::now();
        let mut watch = self.watch()?;
        loop {
            if reached(watch.read()?) {
                return Ok(());
            }
            let left = patience.saturating_sub(started.elapsed());
            if left.is_zero() {
                let waited_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
                return Err(CgroupError::Timeout { step, path: self.path.clone(), waited_ms });
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(watch.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(failed("poll", &watch.path)(errno.into())),
            }
        }
    }
}

fn open_for_write(path: &Path) -> io::Result<File> {
    // Does not create the file: in a directory that is not a group this must fail.
    OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(path)
}

fn make_dir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", path)(error)),
        _ => Ok(()),
    }
}

fn collect_procs(dir: &Path, pids: &mut HashSet<i32>) -> Result<(), CgroupError> {
    let file = dir.join("cgroup.procs");
    match procfs::read_to_string(&file) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        // The group was removed meanwhile, or it is threaded and its parent lists its processes.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(error) => return Err(failed("read", &file)(error)),
    }
    for child in child_dirs(dir).map_err(failed("list", dir))? {
        collect_procs(&child, pids)?;
    }
    Ok(())
}

fn child_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(children),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for child in child_dirs(dir)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The content of `cgroup.events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events {
    /// The group or a child group has a member.
    pub populated: bool,
    /// All members are frozen.
    pub frozen: bool,
}

/// An open `cgroup.events`.
#[derive(Debug)]
pub struct GroupWatch {
    file: File,
    path: PathBuf,
}

impl GroupWatch {
    /// Reads the present state, and arms the descriptor for the next change.
    pub fn read(&mut self) -> Result<Events, CgroupError> {
        let mut text = String::new();
        self.file.rewind().and_then(|()| self.file.read_to_string(&mut text)).map_err(failed("read", &self.path))?;
        let flag = |name: &str| {
            text.lines().filter_map(|line| line.split_once(' ')).any(|(key, value)| key == name && value == "1")
        };
        Ok(Events { populated: flag("populated"), frozen: flag("frozen") })
    }
}

impl AsFd for GroupWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unified_hybrid_and_namespaced_mounts_are_found() {
        let hybrid = b"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let found = Hierarchy::parse(hybrid, b"4:memory:/x\n0::/\n").unwrap();
        assert_eq!(found.mount, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(found.default_parent(), Path::new("/sys/fs/cgroup/unified/fermata"));

        let unified = b"30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchy::parse(unified, b"0::/user.slice/u.service\n").unwrap();
        assert_eq!(found.default_parent(), Path::new("/sys/fs/cgroup/user.slice/u.service"));

        let found = Hierarchy::parse(unified, b"0::/system.slice/fermatad.service/fermata-daemon\n").unwrap();
        assert_eq!(found.default_parent(), Path::new("/sys/fs/cgroup/system.slice/fermatad.service"));

        let part = b"30 23 0:27 /box /mnt/my\\040groups rw - cgroup2 cgroup2 rw\n";
        let found = Hierarchy::parse(part, b"0::/box/a\n").unwrap();
        assert_eq!(found.own, Path::new("/mnt/my groups/a"));
        assert_eq!(Hierarchy::parse(part, b"0::/elsewhere\n"), None);
        assert_eq!(Hierarchy::parse(b"1 2 0:1 / / rw - ext4 x rw\n", b"0::/\n"), None);
    }

    #[test]
    fn a_directory_that_is_no_group_falls_back_to_signals_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        match Freezer::prepare(Some(dir.path()), "fermata-test") {
            Freezer::Signals { why } => assert!(why.contains("cgroup.freeze"), "{why}"),
            Freezer::Cgroup(group) => panic!("took {} for a group", group.path().display()),
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        match Freezer::prepare(None, "../escape") {
            Freezer::Signals { .. } => {}
            Freezer::Cgroup(group) => panic!("left its parent: {}", group.path().display()),
        }
    }
}
