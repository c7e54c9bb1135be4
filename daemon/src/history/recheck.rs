//! Looks what stands at a path, and compares it with what a restore wanted there.
//!
//! Must not change anything.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::beneath::{FileKind, Root, stat_at, stat_fd};
use super::names::RelPath;
use super::oid::{ObjectHasher, ObjectKind, Oid};
use super::plan::{Held, HeldKind, Operation, RestorePlan};
use super::restore::Mismatch;

/// What stands at a path, as far as a restore cares.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing.
    Nothing,
    /// A file or link with this content.
    Content(Held),
    /// A directory.
    Directory,
    /// A FIFO, socket or device.
    Other,
}

/// Compares each path with what the plan wanted at the end.
pub(super) fn recheck(root: &Root, plan: &RestorePlan, kept: &[RelPath]) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let mut mismatch = |path: &RelPath, problem: String| {
        found.push(Mismatch { path: path.clone(), problem });
    };
    // The last step about a path says what it must be: attributes apart, which come after a directory is made.
    let mut last: BTreeMap<&RelPath, &Operation> = BTreeMap::new();
    let mut attributes = Vec::new();
    for step in &plan.operations {
        match step {
            Operation::SetAttributes { path, mode, mtime } => attributes.push((path, *mode, *mtime)),
            _ => {
                last.insert(step.path(), step);
            }
        }
    }
    for (path, step) in last {
        let problem = match step {
            Operation::MakeDirectory { .. } => recheck_kind(root, path, &Standing::Directory),
            Operation::WriteFile { oid, mode, mtime, .. } => {
                attributes.push((path, Some(*mode), *mtime));
                recheck_kind(root, path, &Standing::Content(Held { kind: HeldKind::File, oid: *oid }))
            }
            Operation::WriteLink { oid, mtime, .. } => {
                attributes.push((path, None, *mtime));
                recheck_kind(root, path, &Standing::Content(Held { kind: HeldKind::Symlink, oid: *oid }))
            }
            Operation::RemoveFile { .. } => recheck_kind(root, path, &Standing::Nothing),
            Operation::RemoveDirectory { .. } if kept.contains(path) => None,
            Operation::RemoveDirectory { .. } => recheck_kind(root, path, &Standing::Nothing),
            Operation::SetAttributes { .. } => None,
        };
        if let Some(problem) = problem {
            mismatch(path, problem);
        }
    }
    for (path, mode, mtime) in attributes {
        match root.stat(path) {
            Ok(stat) if mode.is_some_and(|mode| mode != stat.permissions()) => {
                mismatch(path, format!("its mode is {:o}", stat.permissions()));
            }
            Ok(stat) if stat.mtime != mtime => mismatch(path, "its time is another one".to_owned()),
            Ok(_) => {}
            Err(errno) => mismatch(path, errno.desc().to_owned()),
        }
    }
    found
}

/// Says in which way a path is not what is wanted.
fn recheck_kind(root: &Root, path: &RelPath, wanted: &Standing) -> Option<String> {
    let found = match root.open_parent(path) {
        Ok((dir, name)) => standing(&dir, name),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(Standing::Nothing),
        Err(errno) => Err(errno.into()),
    };
    match found {
        Ok(found) if found == *wanted => None,
        Ok(Standing::Nothing) => Some("it is not there".to_owned()),
        Ok(Standing::Content(_)) => Some("its content is another one".to_owned()),
        Ok(Standing::Directory) => Some("it is a directory".to_owned()),
        Ok(Standing::Other) => Some("it is a special file".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// Looks what stands at a name and, for a file or link, hashes it.
pub(super) fn standing<Fd: AsFd>(dir: Fd, name: &OsStr) -> io::Result<Standing> {
    let stat = match stat_at(&dir, name) {
        Ok(stat) => stat,
        Err(Errno::ENOENT) => return Ok(Standing::Nothing),
        Err(errno) => return Err(errno.into()),
    };
    match stat.kind() {
        FileKind::Directory => Ok(Standing::Directory),
        FileKind::Special(_) => Ok(Standing::Other),
        FileKind::Symlink => {
            let target = readlinkat(&dir, name)?;
            let oid = Oid::of(ObjectKind::Blob, target.as_bytes());
            Ok(Standing::Content(Held { kind: HeldKind::Symlink, oid }))
        }
        FileKind::Regular => {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let mut file = File::from(openat(&dir, name, flags, Mode::empty())?);
            let stat = stat_fd(&file)?;
            if stat.kind() != FileKind::Regular {
                return Ok(Standing::Other);
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
            Ok(Standing::Content(Held { kind: HeldKind::File, oid: hasher.finish() }))
        }
    }
}
