//! The mount table of this process (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Decodes a field: the kernel writes blanks, line breaks and backslashes as a backslash and three octal digits.
pub fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        if let Some(digits) = digits {
            let value = digits.iter().fold(0u32, |sum, d| sum * 8 + u32::from(d - b'0'));
            bytes.push(u8::try_from(value).unwrap_or(b'?'));
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Returns the mount point of a line of the table.
pub fn place(line: &[u8]) -> Option<PathBuf> {
    line.split(|byte| *byte == b' ').nth(4).map(unescape)
}

/// Returns the lines of the table whose mount point is below a directory; none if the table cannot be read.
pub fn below(dir: &Path) -> Vec<String> {
    let table = super::procfs::read("/proc/self/mountinfo").unwrap_or_default();
    below_in(&table, dir)
}

fn below_in(table: &[u8], dir: &Path) -> Vec<String> {
    let is_below = |line: &&[u8]| place(line).is_some_and(|place| place != dir && place.starts_with(dir));
    let lines = table.split(|byte| *byte == b'\n').filter(is_below);
    lines.map(|line| String::from_utf8_lossy(line).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_below_a_directory_are_found_as_the_kernel_writes_them() {
        let line = |place: &str| format!("36 35 98:0 /mnt1 {place} rw,noatime master:1 - ext3 /dev/root rw");
        let inside = [r"/work/a\040b/c\134d/e\011f", r"/work/a\040b/x\9y"];
        let outside = ["/", "/work", r"/work/a\040b", r"/work/a\040bc/d"];
        let table: Vec<String> = inside.iter().chain(&outside).map(|place| line(place)).collect();
        let found = below_in(table.join("\n").as_bytes(), Path::new("/work/a b"));
        assert_eq!(found, inside.map(line));
        let places: Vec<_> = found.iter().filter_map(|line| place(line.as_bytes())).collect();
        assert_eq!(places, [Path::new("/work/a b/c\\d/e\tf"), Path::new("/work/a b/x\\9y")]);
        assert_eq!(place(b"36 35"), None);
    }
}
