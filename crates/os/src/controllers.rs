//! Controllers of control groups: limits on the memory, processor time and processes of a tree.
//!
//! A group can be limited if its parent lists the controller in `cgroup.subtree_control`. A group with any controller
//! there may itself contain no process (cgroup-v2.rst, "No Internal Process Constraint"). Controllers are therefore
//! never enabled in the daemon's own group: systemd could not restart the daemon in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cgroup::{CgroupError, Group, Hierarchy};

/// The period of `cpu.max` in microseconds; the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The limits of a whole process tree; `None` means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TreeLimits {
    /// Memory, in bytes (`memory.max`).
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// Processor time, in percent of one core (`cpu.max`).
    #[serde(default)]
    pub cpu_max_percent: Option<u64>,
    /// Number of processes and threads (`pids.max`).
    #[serde(default)]
    pub pids_max: Option<u64>,
}

impl TreeLimits {
    /// Returns whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        self.controllers().is_empty()
    }

    /// Returns the controllers that the limits need.
    pub fn controllers(&self) -> Vec<&'static str> {
        let needed = [
            (self.cpu_max_percent.is_some(), "cpu"),
            (self.memory_max_bytes.is_some(), "memory"),
            (self.pids_max.is_some(), "pids"),
        ];
        needed.into_iter().filter(|(needed, _)| *needed).map(|(_, name)| name).collect()
    }

    /// Sets the limits of a group; a limit that is `None` is left unchanged.
    ///
    /// # Errors
    /// If the group lacks a controller, or the kernel rejects a value.
    pub fn set(&self, group: &Group) -> Result<(), CgroupError> {
        if let Some(bytes) = self.memory_max_bytes {
            let bytes = bytes.to_string();
            group.write("memory.max", &bytes)?;
            // Killing a single process would leave a tree in a state that its program does not expect.
            group.write("memory.oom.group", "1")?;
            // Unbounded swap would defeat the limit; no swap at all would keep a tree that is frozen for days in
            // memory. The file does not exist if the kernel has no swap.
            match group.write("memory.swap.max", &bytes) {
                Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        if let Some(percent) = self.cpu_max_percent {
            let quota = percent.saturating_mul(CPU_PERIOD_US / 100);
            group.write("cpu.max", &format!("{quota} {CPU_PERIOD_US}"))?;
        }
        if let Some(count) = self.pids_max {
            group.write("pids.max", &count.to_string())?;
        }
        Ok(())
    }
}

/// Why a controller cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// There is no cgroup v2, or its files cannot be read.
    #[error("control groups cannot be used")]
    NoGroups(#[source] CgroupError),
    /// An ancestor has not delegated these controllers to the group.
    #[error("{} does not have the {} controller", group.display(), names.join(" and the "))]
    NotGiven {
        names: Vec<&'static str>,
        /// The parent of the agents' groups.
        group: PathBuf,
        /// The controllers among them that are in use by cgroup v1, and so unavailable to v2.
        on_v1: Vec<&'static str>,
    },
    /// The group contains processes, most likely the daemon itself.
    #[error("{} holds processes, so that the groups below it cannot have controllers", group.display())]
    Occupied { group: PathBuf },
    /// The kernel refused to enable the controllers.
    #[error("the {} controller cannot be enabled in {}", names.join(" and the "), group.display())]
    Refused {
        names: Vec<&'static str>,
        group: PathBuf,
        #[source]
        source: CgroupError,
    },
}

/// Makes controllers available to the groups below `parent` (or the default parent) by enabling those that are not
/// enabled yet. Changes nothing if one of them is missing.
///
/// # Errors
/// If a controller is missing or cannot be enabled.
pub fn make_available(parent: Option<&Path>, needed: &[&'static str]) -> Result<(), Unavailable> {
    let group = Hierarchy::parent_group(parent).map_err(Unavailable::NoGroups)?;
    let read = |file: &str| {
        let path = group.join(file);
        fs::read_to_string(&path)
            .map_err(|source| Unavailable::NoGroups(CgroupError::Io { step: "read", path, source }))
    };
    let enabled = read("cgroup.subtree_control")?;
    let names = absent(needed, &enabled);
    if names.is_empty() {
        return Ok(());
    }
    let not_given = absent(&names, &read("cgroup.controllers")?);
    if !not_given.is_empty() {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let on_v1 = not_given.iter().copied().filter(|name| is_on_v1(name, &own)).collect();
        return Err(Unavailable::NotGiven { names: not_given, group, on_v1 });
    }
    if !read("cgroup.procs")?.trim().is_empty() {
        return Err(Unavailable::Occupied { group });
    }
    let wanted: Vec<String> = names.iter().map(|name| format!("+{name}")).collect();
    let enable = Group::open_parent(&group).write("cgroup.subtree_control", &wanted.join(" "));
    enable.map_err(|source| Unavailable::Refused { names, group, source })
}

/// Returns the names that are not among the words.
fn absent(names: &[&'static str], words: &str) -> Vec<&'static str> {
    names.iter().copied().filter(|name| !words.split_ascii_whitespace().any(|word| word == *name)).collect()
}

/// Returns whether `/proc/self/cgroup` lists the controller in a hierarchy of version 1: lines are
/// `id:controllers:path`, and the line of version 2 has no controllers (cgroups(7)).
fn is_on_v1(name: &str, own_groups: &str) -> bool {
    own_groups
        .lines()
        .filter_map(|line| line.split(':').nth(1))
        .any(|controllers| controllers.split(',').any(|other| other == name))
}

/// How often the kernel has killed processes of a tree for lack of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OutOfMemory {
    /// The number of killed processes.
    pub killed: u64,
    /// How often the tree reached its own limit.
    pub at_limit: u64,
}

impl OutOfMemory {
    /// Reads `memory.events` of a group; all zero if the group has no memory controller.
    pub fn of(group: &Group) -> Self {
        let text = fs::read_to_string(group.path().join("memory.events")).unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            lines.filter(|(key, _)| *key == name).find_map(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
        };
        Self { killed: field("oom_kill"), at_limit: field("oom") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_controllers_of_given_limits_are_needed() {
        let all = TreeLimits { memory_max_bytes: Some(1), cpu_max_percent: Some(1), pids_max: Some(1) };
        assert_eq!(all.controllers(), ["cpu", "memory", "pids"]);
        assert_eq!(TreeLimits { pids_max: Some(1), ..TreeLimits::default() }.controllers(), ["pids"]);
        assert!(TreeLimits::default().is_empty());
    }

    #[test]
    fn a_controller_counts_as_a_whole_word() {
        assert_eq!(absent(&["cpu", "memory"], "cpuset memory pids\n"), ["cpu"]);
        let hybrid = "4:cpu,cpuacct:/\n3:cpuset:/\n1:name=systemd:/\n0::/x\n";
        assert!(is_on_v1("cpu", hybrid));
        assert!(!is_on_v1("memory", hybrid));
    }

    #[test]
    fn a_directory_that_is_no_group_has_no_controllers() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(make_available(Some(dir.path()), &["memory"]), Err(Unavailable::NoGroups(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn memory_events_tell_a_kill_at_the_limit_from_one_of_the_whole_machine() {
        let text = "low 0\nhigh 0\nmax 71\noom 2\noom_kill 3\noom_group_kill 1\n";
        assert_eq!(OutOfMemory::parse(text), OutOfMemory { killed: 3, at_limit: 2 });
        assert_eq!(OutOfMemory::parse(""), OutOfMemory::default());
    }
}
