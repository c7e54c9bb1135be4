//! Resource usage of process trees, as counted by the kernel: per control group, or summed over the processes where the
//! group does not count.
//!
//! `cpu.stat` of a version 2 group needs no controller; `memory.current` and `io.stat` need theirs. With cgroup version
//! 1, and without groups, everything is summed over the processes.

use std::io;
use std::path::Path;

use super::cgroup::Group;
use super::process::{self, ProcScan};
use super::procfs;

/// The resource usage of one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TreeUsage {
    /// Processor time, in microseconds.
    pub cpu_us: u64,
    pub memory: Memory,
    /// Bytes read from disks; `None` if unavailable.
    pub io_read_bytes: Option<u64>,
    /// Bytes written to disks; `None` if unavailable.
    pub io_written_bytes: Option<u64>,
    /// The number of processes.
    pub processes: u64,
}

/// The memory of a tree, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// The amount charged to the group.
    Charged {
        /// The current amount.
        now: u64,
        /// The maximum so far; `None` before Linux 5.19.
        peak: Option<u64>,
    },
    /// The sum of the resident set sizes.
    Resident(u64),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Resident(0)
    }
}

/// Returns the usage of a group if there is one, otherwise that of the descendants of the shim.
///
/// # Errors
/// If neither can be read.
pub fn of_tree(group: Option<&Path>, shim: i32) -> io::Result<TreeUsage> {
    if let Some(usage) = group.and_then(of_group) {
        return Ok(usage);
    }
    let members: Vec<i32> = process::descendants(shim, ProcScan::Quick)?.into_iter().map(|stat| stat.id.pid).collect();
    let mut usage = sum(&members);
    // The shim reaps orphans of the tree, so their usage is added to its children's.
    if let Some(shim) = ProcessUsage::read(shim) {
        usage.cpu_us += shim.children_cpu_us;
    }
    Ok(usage)
}

/// Returns `None` if the group has been removed.
fn of_group(path: &Path) -> Option<TreeUsage> {
    let stat = procfs::read_to_string(path.join("cpu.stat")).ok()?;
    let members: Vec<i32> = Group::open(path).ok()?.procs().ok()?.into_iter().collect();
    let number = |file: &str| procfs::read_to_string(path.join(file)).ok()?.trim().parse::<u64>().ok();
    let charged = number("memory.current").map(|now| Memory::Charged { now, peak: number("memory.peak") });
    let disks = procfs::read_to_string(path.join("io.stat")).ok().map(|text| io_stat(&text));
    let mut usage = match (charged, disks) {
        (Some(_), Some(_)) => TreeUsage { processes: members.len() as u64, ..TreeUsage::default() },
        _ => sum(&members),
    };
    usage.cpu_us = keyed(&stat, "usage_usec")?;
    if let Some(memory) = charged {
        usage.memory = memory;
    }
    if let Some((read, written)) = disks {
        (usage.io_read_bytes, usage.io_written_bytes) = (Some(read), Some(written));
    }
    Some(usage)
}

/// Returns the value of the line `name value`.
fn keyed(text: &str, name: &str) -> Option<u64> {
    text.lines().filter_map(|line| line.split_once(' ')).find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

/// Sums `rbytes=` and `wbytes=` over the devices of an `io.stat`.
fn io_stat(text: &str) -> (u64, u64) {
    let total = |name: &str| -> u64 {
        let words = text.split_ascii_whitespace().filter_map(|word| word.split_once('='));
        words.filter(|(key, _)| *key == name).filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
    };
    (total("rbytes"), total("wbytes"))
}

/// Sums over processes; those that end meanwhile are not counted.
fn sum(members: &[i32]) -> TreeUsage {
    let mut usage = TreeUsage::default();
    let mut resident = 0;
    for pid in members {
        let Some(one) = ProcessUsage::read(*pid) else { continue };
        usage.processes += 1;
        usage.cpu_us += one.cpu_us + one.children_cpu_us;
        resident += one.resident_bytes;
        if let Some((read, written)) = process_io(*pid) {
            usage.io_read_bytes = Some(usage.io_read_bytes.unwrap_or(0) + read);
            usage.io_written_bytes = Some(usage.io_written_bytes.unwrap_or(0) + written);
        }
    }
    usage.memory = Memory::Resident(resident);
    usage
}

/// The usage of one process, from `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
struct ProcessUsage {
    cpu_us: u64,
    /// Includes only children that have been waited for, and theirs.
    children_cpu_us: u64,
    resident_bytes: u64,
}

impl ProcessUsage {
    /// Returns `None` for a process that has ended.
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&procfs::read_to_string(format!("/proc/{pid}/stat")).ok()?, ticks_per_second(), page_size())
    }

    /// Reads fields 3 (state), 14 to 17 (utime, stime, cutime, cstime) and 24 (rss in pages) of proc(5), counted from
    /// the last parenthesis: the command name before it may contain any character.
    fn parse(line: &str, ticks_per_second: u64, page_size: u64) -> Option<Self> {
        let mut fields = line.rsplit_once(") ")?.1.split_ascii_whitespace();
        if matches!(fields.next()?, "Z" | "X" | "x") {
            return None;
        }
        let mut times = [0_u64; 4];
        let mut fields = fields.skip(10);
        for time in &mut times {
            *time = fields.next()?.parse().ok()?;
        }
        let resident: u64 = fields.nth(6)?.parse().ok()?;
        let [user, system, children_user, children_system] = times;
        let microseconds = |ticks: u64| ticks * 1_000_000 / ticks_per_second;
        Some(Self {
            cpu_us: microseconds(user + system),
            children_cpu_us: microseconds(children_user + children_system),
            resident_bytes: resident * page_size,
        })
    }
}

/// Returns the bytes read from and written to disks, including those of waited-for children; `None` if access is
/// denied.
fn process_io(pid: i32) -> Option<(u64, u64)> {
    let text = procfs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let field = |name: &str| keyed(&text, name);
    // Data that was deleted before it reached a disk does not count as written.
    let written = field("write_bytes:")?.saturating_sub(field("cancelled_write_bytes:").unwrap_or(0));
    Some((field("read_bytes:")?, written))
}

fn ticks_per_second() -> u64 {
    system_constant(nix::unistd::SysconfVar::CLK_TCK, 100)
}

fn page_size() -> u64 {
    system_constant(nix::unistd::SysconfVar::PAGE_SIZE, 4096)
}

fn system_constant(name: nix::unistd::SysconfVar, usual: u64) -> u64 {
    let value = nix::unistd::sysconf(name).ok().flatten();
    value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_counted_from_the_last_parenthesis() {
        let line = "42 (a) b (c) S 1 2 3 0 -1 4194304 1 0 0 0 250 50 7 3 20 0 1 0 777 9999 25 18446744073709551615 1\n";
        let usage = ProcessUsage::parse(line, 100, 4096).unwrap();
        assert_eq!(usage, ProcessUsage { cpu_us: 3_000_000, children_cpu_us: 100_000, resident_bytes: 25 * 4096 });
        assert_eq!(ProcessUsage::parse(&line.replace(") S", ") Z"), 100, 4096), None);
        assert_eq!(ProcessUsage::parse("garbage", 100, 4096), None);
    }

    #[test]
    fn io_is_summed_over_the_devices() {
        let text = "8:0 rbytes=100 wbytes=7 rios=1 wios=1 dbytes=0 dios=0\n254:0 rbytes=11 wbytes=1 rios=9\n";
        assert_eq!(io_stat(text), (111, 8));
        assert_eq!(io_stat(""), (0, 0));
    }

    #[test]
    fn this_process_uses_memory_and_time() {
        let own = ProcessUsage::read(std::process::id() as i32).unwrap();
        assert!(own.resident_bytes > 100_000, "{own:?}");
        assert_eq!(keyed("nr_periods 0\nusage_usec 12345\n", "usage_usec"), Some(12_345));
    }
}
