//! Memory pressure, as reported by the kernel's pressure stall information (Documentation/accounting/psi.rst).

use std::fs;
use std::io;
use std::path::Path;

use super::cgroup::Hierarchy;

/// The pressure of the whole machine.
pub const MACHINE: &str = "/proc/pressure/memory";

/// Returns `some avg10`: the percentage of the last ten seconds during which at least one task waited for memory. The
/// result is the maximum of the whole machine's value and that of the group that contains all agents' groups: in a
/// container with a memory limit of its own, the group is under pressure when the machine is not.
///
/// # Errors
/// If neither value can be read. The kernel may lack the interface, or need `psi=1` on its command line.
pub fn memory_some_avg10(parent: Option<&Path>) -> io::Result<f64> {
    let machine = read(Path::new(MACHINE));
    let group = match parent {
        Some(parent) => Some(parent.to_path_buf()),
        None => Hierarchy::find().ok().map(|hierarchy| hierarchy.default_parent()),
    };
    let group = group.and_then(|group| read(&group.join("memory.pressure")).ok());
    match (machine, group) {
        (Ok(machine), Some(group)) => Ok(machine.max(group)),
        (Err(_), Some(group)) => Ok(group),
        (machine, None) => machine,
    }
}

fn read(path: &Path) -> io::Result<f64> {
    let text = fs::read_to_string(path)?;
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, path.display().to_string()))
}

fn parse(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_of_some_is_read_and_not_that_of_full() {
        let text = "full avg10=9.00 avg60=0.00 avg300=0.00 total=1\nsome avg10=12.34 avg60=5.00 avg300=0.12 total=2\n";
        assert_eq!(parse(text), Some(12.34));
        assert_eq!(parse("full avg10=1.00\n"), None);
    }
}
