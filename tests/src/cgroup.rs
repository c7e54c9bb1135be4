//! A cgroup around a sandbox, through which every process that its daemon started is found and ended. Only
//! `cgroup.procs` and `cgroup.kill` are used, no controller. Where cgroup v2 is not writable, a sandbox has no group
//! and can only clean up the processes whose pids it recorded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::waiting::poll_for;

const MOMENT: Duration = Duration::from_secs(10);

/// A cgroup below that of the test process, removed together with its processes.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Group {
    /// Creates a group; `None` where cgroup v2 is not writable.
    pub fn create(name: &str) -> Option<Self> {
        let path = own_group()?.join(name);
        fs::create_dir(&path).ok()?;
        let group = Self { path };
        // Before Linux 5.14 there is no cgroup.kill, without which a group is of no use.
        if group.path.join("cgroup.kill").exists() {
            return Some(group);
        }
        // The group is empty; the tests work whether or not it can be removed.
        group.remove().ok();
        None
    }

    /// Returns the file that a process writes its pid to in order to join the group.
    pub fn procs_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Returns all processes in the group and below it.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for group in self.groups() {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        found
    }

    /// Lists the groups below this one, including empty ones.
    pub fn below(&self) -> Vec<PathBuf> {
        self.groups().split_off(1)
    }

    /// Kills all processes in the group and below it, frozen or not, and waits until they are gone.
    ///
    /// # Errors
    /// Returns what could not be killed as text: destructors call this function, which therefore must not panic.
    pub fn kill(&self) -> Result<(), String> {
        fs::write(self.path.join("cgroup.kill"), "1").map_err(|e| format!("kill {}: {e}", self.path.display()))?;
        poll_for(MOMENT, || self.processes().is_empty().then_some(()))
            .ok_or_else(|| format!("{:?} outlived the kill of {}", self.processes(), self.path.display()))
    }

    /// Removes the group and the empty groups below it.
    ///
    /// # Errors
    /// Names the group that could not be removed.
    pub fn remove(&self) -> Result<(), String> {
        for group in self.groups().iter().rev() {
            // A group whose last process has just been reaped is busy for a moment.
            let removed = poll_for(MOMENT, || match fs::remove_dir(group) {
                Ok(()) => Some(()),
                Err(error) => (error.kind() == io::ErrorKind::NotFound).then_some(()),
            });
            removed.ok_or_else(|| format!("{} cannot be removed", group.display()))?;
        }
        Ok(())
    }

    /// Lists this group and all groups below it, parents first.
    fn groups(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(group) = found.get(next).cloned() {
            next += 1;
            let Ok(entries) = fs::read_dir(group) else { continue };
            found.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        found
    }
}

/// Finds the directory of the cgroup v2 group that this process is in.
fn own_group() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let inside = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    // Fields before " - ": id, parent, device, root, mount point; after it the type.
    let mount = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4))?
    })?;
    Some(Path::new(mount).join(inside.trim_start_matches('/')))
}
