//! Files whose changes the watcher of a workspace cannot see: files that a process has mapped shared and writable, and
//! files that it has open for writing.
//!
//! A write through a mapping causes no inotify event and need not change the modification time. A write to an open file
//! through memory, or by the kernel on behalf of the process (io_submit(2)), changes only the time; closing the last
//! descriptor causes an event again.
//!
//! Mappings are read from `/proc/<pid>/maps` (proc_pid_maps(5)): `address perms offset dev inode path`, with newlines
//! in the path written as `\012`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::process::is_gone;
use super::procfs;

/// A file that is mapped shared and writable.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// The device number, equal to that of `stat` on most file systems.
    pub dev: u64,
    pub ino: u64,
    /// The path as seen by the process.
    pub path: PathBuf,
}

/// A file that is open for writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenFile {
    /// The path as reported by the kernel.
    pub path: PathBuf,
    pub ino: u64,
    /// Whether the path still leads to this file.
    pub at_path: bool,
}

/// Lists the files that a process has mapped shared and writable; none if the process has ended.
///
/// # Errors
/// If the kernel denies access, for instance to a process of another user.
pub fn writable_shared(pid: i32) -> io::Result<Vec<Mapping>> {
    match procfs::read(format!("/proc/{pid}/maps")) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Lists the files below a directory that a process has open for writing; none if the process has ended.
///
/// # Errors
/// If the kernel denies access, for instance to a process of another user.
pub fn open_for_writing(pid: i32, below: &Path) -> io::Result<Vec<OpenFile>> {
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = match entry {
            Err(error) if is_gone(&error) => break,
            entry => entry?,
        };
        // A file that has been closed meanwhile has caused an event of its own.
        let Ok(path) = fs::read_link(entry.path()) else { continue };
        if !path.starts_with(below) {
            continue;
        }
        let info = procfs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().display()));
        let flags = info.ok().and_then(|text| {
            let octal = text.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
            i32::from_str_radix(octal, 8).ok()
        });
        let Ok(stat) = fs::metadata(entry.path()) else { continue };
        if stat.is_file() && stat.nlink() > 0 && flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY) {
            // The kernel appends ` (deleted)` to the path of a removed file, which is also a legal file name.
            let at_path =
                fs::symlink_metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (stat.dev(), stat.ino()));
            found.push(OpenFile { path, ino: stat.ino(), at_path });
        }
    }
    Ok(found)
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
    fn files_that_are_open_for_writing_are_told_with_what_became_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (kept, linked, gone, read) = (dir.join("kept"), dir.join("linked"), dir.join("gone"), dir.join("read"));
        let _open: Vec<fs::File> = [&kept, &linked, &gone].map(|path| fs::File::create(path).unwrap()).into();
        fs::write(&read, "").unwrap();
        let _read = fs::File::open(&read).unwrap();
        fs::hard_link(&linked, dir.join("another name")).unwrap();
        for path in [&linked, &gone] {
            fs::remove_file(path).unwrap();
        }
        let mut found = open_for_writing(std::process::id().cast_signed(), &dir).unwrap();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        let ino = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(found[0], OpenFile { path: kept.clone(), ino: ino(&kept), at_path: true });
        assert_eq!((found[1].ino, found[1].at_path), (ino(&dir.join("another name")), false));
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(open_for_writing(i32::MAX, &dir).unwrap(), []);
    }

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
