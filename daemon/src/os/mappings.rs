//! Files that processes have mapped writable and shared: what is written to them shows in no event and in no time.
//!
//! The kernel tells of a mapping in `/proc/<pid>/maps` (proc_pid_maps(5)): `address perms offset dev inode path`, with
//! newlines in the path written as `\012`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A file that somebody can write to through memory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// Its device, as `stat` would tell on most file systems.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// Its path, as the process sees it.
    pub path: PathBuf,
}

/// Lists the files that a process has mapped shared and writable; none when it is gone.
///
/// # Errors
/// When the kernel does not tell, for instance of a process of another user.
pub fn writable_shared(pid: i32) -> io::Result<Vec<Mapping>> {
    match fs::read(format!("/proc/{pid}/maps")) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn parse(text: &[u8]) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = text.split(|b| *b == b'\n').filter_map(line).collect();
    found.sort();
    found.dedup();
    found
}

fn line(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.splitn(6, |b| *b == b' ');
    let (_, perms, _, dev, ino) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    if perms.get(1) != Some(&b'w') || perms.get(3) != Some(&b's') {
        return None;
    }
    let path = fields.next()?.trim_ascii_start();
    if path.first() != Some(&b'/') {
        return None;
    }
    let (major, minor) = std::str::from_utf8(dev).ok()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let dev = libc::makedev(number(major)?, number(minor)?);
    let ino = std::str::from_utf8(ino).ok()?.parse().ok()?;
    Some(Mapping { dev, ino, path: OsString::from_vec(unescape(path)).into() })
}

fn unescape(path: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((first, after)) = rest.split_first() {
        match after.strip_prefix(b"012").filter(|_| *first == b'\\') {
            Some(after) => {
                bytes.push(b'\n');
                rest = after;
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_shared_and_writable_is_listed() {
        let text = b"55d0-55d1 r--p 00000000 fd:00 1234                       /usr/bin/cat\n\
            7f00-7f01 rw-s 00000000 08:02 77                         /work/a b\\012c\n\
            7f01-7f02 rw-s 00000000 08:02 77                         /work/a b\\012c\n\
            7f02-7f03 r--s 00000000 08:02 78                         /work/read-only\n\
            7f03-7f04 rw-p 00000000 08:02 79                         /work/private\n\
            7f04-7f05 rw-s 00000000 00:01 80                         anon_inode:[perf]\n\
            7ffc-7ffd rw-p 00000000 00:00 0                          [stack]\n\
            garbage\n";
        let found = parse(text);
        assert_eq!(found, [Mapping { dev: libc::makedev(8, 2), ino: 77, path: "/work/a b\nc".into() }]);
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        assert_eq!(writable_shared(i32::MAX).unwrap(), []);
    }
}
