//! Determines the state of paths and compares it with the plan of a restore. Changes nothing.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use crate::restore::plan::{ContentKind, Operation, RestorePlan, StoredContent};
use crate::restore::report::{Mismatch, RestoreReport};
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::tree::confined_dir::{FileKind, FileStat, Root, Time, stat_at, stat_fd};
use crate::tree::names::RelPath;
use crate::tree::xattrs::{self, Xattrs};

/// The state of a path, as far as a restore distinguishes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PathState {
    /// The path does not exist.
    Nothing,
    Content(StoredContent),
    Directory,
    /// A FIFO, socket or device.
    Other,
}

/// The attributes that a path must have at the end.
struct Attributes<'a> {
    path: &'a RelPath,
    mode: Option<u32>,
    mtime: Time,
    xattrs: Option<&'a Xattrs>,
}

/// Compares each path with the state that the plan wants at the end, and reports the differences.
pub(crate) fn recheck(root: &Root, plan: &RestorePlan, report: &mut RestoreReport) {
    let mut found = std::mem::take(&mut report.mismatches);
    let mut mismatch = |path: &RelPath, problem: String| {
        found.push(Mismatch { path: path.clone(), problem });
    };
    // The last step of a path determines its state, except for attributes, which follow when a directory is
    // made.
    let mut last: BTreeMap<&RelPath, &Operation> = BTreeMap::new();
    let mut attributes = Vec::new();
    for step in &plan.operations {
        match step {
            Operation::SetAttributes { path, mode, mtime, xattrs, .. } => {
                attributes.push(Attributes { path, mode: *mode, mtime: *mtime, xattrs: xattrs.as_ref() });
            }
            Operation::MakeDirectory { .. }
            | Operation::WriteFile { .. }
            | Operation::WriteLink { .. }
            | Operation::RemoveFile { .. }
            | Operation::RemoveDirectory { .. } => {
                last.insert(step.path(), step);
            }
        }
    }
    for (path, step) in last {
        let problem = match step {
            Operation::MakeDirectory { .. } => recheck_kind(root, path, &PathState::Directory),
            Operation::WriteFile { oid, mode, mtime, xattrs, linked_to, .. } => {
                attributes.push(Attributes { path, mode: Some(*mode), mtime: *mtime, xattrs: Some(xattrs) });
                let wanted = PathState::Content(StoredContent { kind: ContentKind::File, oid: *oid });
                let linked = linked_to.as_ref().filter(|_| !report.unlinked.contains(path));
                recheck_kind(root, path, &wanted).or_else(|| recheck_link(root, path, linked?))
            }
            Operation::WriteLink { oid, mtime, .. } => {
                attributes.push(Attributes { path, mode: None, mtime: *mtime, xattrs: None });
                recheck_kind(root, path, &PathState::Content(StoredContent { kind: ContentKind::Symlink, oid: *oid }))
            }
            Operation::RemoveFile { .. } => recheck_kind(root, path, &PathState::Nothing),
            Operation::RemoveDirectory { .. } if report.kept.contains(path) => None,
            Operation::RemoveDirectory { .. } => recheck_kind(root, path, &PathState::Nothing),
            Operation::SetAttributes { .. } => None,
        };
        if let Some(problem) = problem {
            mismatch(path, problem);
        }
    }
    let mut times = Times::default();
    for Attributes { path, mode, mtime, xattrs } in attributes {
        match root.stat(path) {
            Ok(stat) if mode.is_some_and(|mode| mode != stat.permissions()) => {
                mismatch(path, format!("its mode is {:o}", stat.permissions()));
            }
            Ok(stat) => {
                times.compare(path, mtime, stat.mtime);
                let wanted = xattrs.filter(|_| !report.without_xattrs.contains(path));
                if wanted.is_some_and(|wanted| xattrs_at(root, path, &stat).is_some_and(|actual| actual != *wanted)) {
                    mismatch(path, "its extended attributes differ".to_owned());
                }
            }
            Err(errno) => mismatch(path, errno.desc().to_owned()),
        }
    }
    let (wrong, warning) = times.conclude();
    found.extend(wrong);
    // Each path is reported once, with its first problem.
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    report.mismatches = found;
    report.warnings.extend(warning);
    let (xattrs, unlinked) = (report.without_xattrs.len(), report.unlinked.len());
    if xattrs > 0 {
        report.warnings.push(format!("the file system does not support the extended attributes of {xattrs} paths"));
    }
    if unlinked > 0 {
        report.warnings.push(format!("{unlinked} hard links could not be created; these paths are separate files"));
    }
}

/// Reads the extended attributes of a file or directory; `None` if that fails.
fn xattrs_at(root: &Root, path: &RelPath, stat: &FileStat) -> Option<Xattrs> {
    match stat.kind() {
        FileKind::Directory => xattrs::read(root.open_dir(path).ok()?).ok(),
        FileKind::Regular => xattrs::read(root.open_file(path).ok()?).ok(),
        FileKind::Symlink | FileKind::Special(_) => None,
    }
}

fn recheck_link(root: &Root, path: &RelPath, leader: &RelPath) -> Option<String> {
    let file = |path: &RelPath| root.stat(path).ok().map(|stat| (stat.dev, stat.ino));
    (file(path) != file(leader)).then(|| format!("it is not the same file as {leader}"))
}

/// Compares times; a file system may store them only coarsely.
#[derive(Debug, Default)]
pub(crate) struct Times {
    differing: Vec<(RelPath, i128, i128)>,
    /// Every time that was found, in nanoseconds since 1970.
    found_times: Vec<i128>,
}

/// The granularities of file systems in nanoseconds, with their names in messages.
const GRANULARITIES: [(i128, &str); 6] = [
    (2_000_000_000, "2 s"),
    (1_000_000_000, "1 s"),
    (10_000_000, "10 ms"),
    (1_000_000, "1 ms"),
    (1_000, "1 µs"),
    (100, "100 ns"),
];

impl Times {
    /// Adds the wanted and the actual time of a path.
    pub fn compare(&mut self, path: &RelPath, wanted: Time, found: Time) {
        let ns = |time: Time| i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
        let (wanted, found) = (ns(wanted), ns(found));
        self.found_times.push(found);
        if wanted != found {
            self.differing.push((path.clone(), wanted, found));
        }
    }

    /// Returns the times that are wrong, and a warning about those that were only rounded by the file system.
    /// Its granularity is the largest one that divides every time found on it.
    pub fn conclude(self) -> (Vec<Mismatch>, Option<String>) {
        let coarse = GRANULARITIES.iter().find(|(unit, _)| self.found_times.iter().all(|time| time % unit == 0));
        let (mut wrong, mut cut) = (Vec::new(), 0);
        for (path, wanted, found) in self.differing {
            match coarse {
                Some((unit, _)) if wanted.div_euclid(*unit) * unit == found => cut += 1,
                _ => wrong.push(Mismatch { path, problem: "its modification time differs".to_owned() }),
            }
        }
        let warning = coarse.filter(|_| cut > 0);
        let warning = warning.map(|(_, name)| {
            format!("the file system stores times with a granularity of {name}: {cut} times were rounded")
        });
        (wrong, warning)
    }
}

/// Returns the difference between the state of a path and the wanted one.
fn recheck_kind(root: &Root, path: &RelPath, wanted: &PathState) -> Option<String> {
    let found = match root.open_parent(path) {
        Ok((dir, name)) => path_state(&dir, name),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(PathState::Nothing),
        Err(errno) => Err(errno.into()),
    };
    match found {
        Ok(found) if found == *wanted => None,
        Ok(PathState::Nothing) => Some("it is missing".to_owned()),
        Ok(PathState::Content(_)) => Some("its content differs".to_owned()),
        Ok(PathState::Directory) => Some("it is a directory".to_owned()),
        Ok(PathState::Other) => Some("it is a special file".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// How often the state of a path that keeps changing is read.
pub(crate) const TRIES: usize = 8;

/// Says whether an entry is unchanged between two calls of `stat`.
pub(crate) fn same(before: Option<FileStat>, now: Option<FileStat>) -> bool {
    match (before, now) {
        (Some(before), Some(now)) => before.same_content(&now),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// Returns the state of a name after it did not change while it was read; `None` if it keeps changing. A caller
/// that removes the entry does so immediately.
pub(crate) fn steady_state<Fd: AsFd>(dir: Fd, name: &OsStr) -> io::Result<Option<PathState>> {
    for _ in 0..TRIES {
        let before = stat_at(&dir, name).ok();
        let found = path_state(&dir, name)?;
        if same(before, stat_at(&dir, name).ok()) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Returns the state of a name; the content of a file or link is hashed.
pub(crate) fn path_state<Fd: AsFd>(dir: Fd, name: &OsStr) -> io::Result<PathState> {
    let stat = match stat_at(&dir, name) {
        Ok(stat) => stat,
        Err(Errno::ENOENT) => return Ok(PathState::Nothing),
        Err(errno) => return Err(errno.into()),
    };
    match stat.kind() {
        FileKind::Directory => Ok(PathState::Directory),
        FileKind::Special(_) => Ok(PathState::Other),
        FileKind::Symlink => {
            let target = readlinkat(&dir, name)?;
            let oid = Oid::of(ObjectKind::Blob, target.as_bytes());
            Ok(PathState::Content(StoredContent { kind: ContentKind::Symlink, oid }))
        }
        FileKind::Regular => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let mut file = File::from(openat(&dir, name, flags, Mode::empty())?);
            let stat = stat_fd(&file)?;
            if stat.kind() != FileKind::Regular {
                return Ok(PathState::Other);
            }
            let mut hasher = ObjectHasher::new(ObjectKind::Blob, stat.size);
            let mut buffer = vec![0; 64 * 1024];
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => hasher.update(&buffer[..n]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(PathState::Content(StoredContent { kind: ContentKind::File, oid: hasher.finish() }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(sec: i64, nsec: u32) -> Time {
        Time { sec, nsec }
    }

    #[test]
    fn times_rounded_by_the_file_system_are_reported_and_others_are_wrong() {
        let path = |name: &str| RelPath::new(name).unwrap();
        let mut times = Times::default();
        times.compare(&path("a"), time(5, 123_456_789), time(5, 0));
        times.compare(&path("b"), time(-5, 1), time(-5, 0));
        times.compare(&path("c"), time(9, 5), time(7, 0));
        let (wrong, warning) = times.conclude();
        assert_eq!(wrong.iter().map(|one| one.path.to_string()).collect::<Vec<_>>(), ["c"]);
        assert_eq!(warning.unwrap(), "the file system stores times with a granularity of 1 s: 2 times were rounded");

        // A file system that has kept one time exactly keeps them all.
        let mut times = Times::default();
        times.compare(&path("a"), time(5, 123_456_789), time(5, 0));
        times.compare(&path("b"), time(6, 7), time(6, 7));
        let (wrong, warning) = times.conclude();
        assert_eq!((wrong.len(), warning), (1, None));
    }
}
