//! Extended attributes of the `user` namespace, which users and tools attach to files.
//!
//! The other namespaces belong to the system (capabilities, labels, ACLs) and are neither read nor changed.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};

/// The name and value of an extended attribute.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// Extended attributes of the `user` namespace, sorted by name.
pub type Xattrs = Box<[Xattr]>;

const PREFIX: &[u8] = b"user.";
/// The kernel's limit for a name in bytes.
const MAX_NAME: usize = 255;
/// The kernel's limit for a value in bytes.
pub(crate) const MAX_VALUE: usize = 64 * 1024;

/// Says whether the name is in the `user` namespace and valid for the kernel.
pub(crate) fn is_ours(name: &[u8]) -> bool {
    name.starts_with(PREFIX) && (PREFIX.len() + 1..=MAX_NAME).contains(&name.len()) && !name.contains(&0)
}

/// Reads the attributes of an open file or directory, sorted by name; empty if the file system does not support
/// them.
pub(crate) fn read<Fd: AsFd>(fd: Fd) -> nix::Result<Xattrs> {
    let mut buffer = [0u8; 512];
    let mut long_list = Vec::new();
    let names: &[u8] = match flistxattr(&fd, &mut buffer) {
        Ok(0) => return Ok(Xattrs::default()),
        Ok(n) => &buffer[..n],
        Err(rustix::io::Errno::RANGE) => {
            long_list = read_all(|buffer| flistxattr(&fd, buffer))?;
            &long_list
        }
        Err(errno) if is_unsupported(errno) => return Ok(Xattrs::default()),
        Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
    };
    let mut attributes = Vec::new();
    for name in names.split_inclusive(|b| *b == 0).filter(|name| name.starts_with(PREFIX)) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        match read_all(|buffer| fgetxattr(&fd, name, buffer)) {
            Ok(value) => attributes.push((name.to_bytes().into(), value.into())),
            // The attribute was removed after the listing.
            Err(Errno::ENODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    attributes.sort();
    drop(long_list);
    Ok(attributes.into())
}

/// The result of setting attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XattrsRead {
    Set,
    /// The file system does not support attributes, or has not enough room for these.
    NotKept,
}

/// Replaces the attributes of an open file or directory.
pub(crate) fn set<Fd: AsFd>(fd: Fd, wanted: &Xattrs) -> nix::Result<XattrsRead> {
    let existing = read(&fd)?;
    for (name, _) in existing.iter().filter(|(name, _)| !wanted.iter().any(|(other, _)| other == name)) {
        match fremovexattr(&fd, &name[..]) {
            Ok(()) | Err(rustix::io::Errno::NODATA) => {}
            Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
        }
    }
    let mut result = XattrsRead::Set;
    for pair in wanted.iter().filter(|pair| !existing.contains(pair)) {
        match fsetxattr(&fd, &pair.0[..], &pair.1, XattrFlags::empty()).map_err(|e| Errno::from_raw(e.raw_os_error())) {
            Ok(()) => {}
            // The file system may differ from the original one. A lack of room concerns the inode, not the
            // disk: writing the content would have failed before.
            Err(Errno::EOPNOTSUPP | Errno::ENOSPC | Errno::EDQUOT | Errno::E2BIG | Errno::ERANGE | Errno::EPERM) => {
                result = XattrsRead::NotKept;
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(result)
}

fn is_unsupported(errno: rustix::io::Errno) -> bool {
    errno == rustix::io::Errno::OPNOTSUPP || errno == rustix::io::Errno::NOTSUP || errno == rustix::io::Errno::NOSYS
}

/// Calls with a buffer of the largest possible size.
fn read_all(call: impl Fn(&mut Vec<u8>) -> rustix::io::Result<usize>) -> nix::Result<Vec<u8>> {
    // The kernel's limit for a value and for a list of names is 64 KiB.
    let mut buffer = vec![0; 64 * 1024];
    match call(&mut buffer) {
        Ok(n) => {
            buffer.truncate(n);
            Ok(buffer)
        }
        Err(errno) => Err(Errno::from_raw(errno.raw_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(pairs: &[(&str, &[u8])]) -> Xattrs {
        pairs.iter().map(|(name, value)| (Box::from(name.as_bytes()), Box::from(*value))).collect()
    }

    #[test]
    fn attributes_are_set_changed_and_removed() {
        // Not every file system of a temporary directory supports attributes.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = std::fs::File::create(dir.path().join("a")).unwrap();
        let long = vec![7; 2_000];
        let wanted = list(&[("user.a", b"1"), ("user.b.ä", b""), ("user.long", &long)]);
        if set(&file, &wanted).unwrap() == XattrsRead::NotKept {
            return;
        }
        assert_eq!(read(&file).unwrap(), wanted);
        let wanted = list(&[("user.a", b"2"), ("user.c", b"\0\xff")]);
        assert_eq!(set(&file, &wanted).unwrap(), XattrsRead::Set);
        assert_eq!(read(&file).unwrap(), wanted);
        let dir = std::fs::File::open(dir.path()).unwrap();
        assert_eq!(set(&dir, &wanted).unwrap(), XattrsRead::Set);
        assert_eq!(read(&dir).unwrap(), wanted);
        assert_eq!(set(&dir, &list(&[])).unwrap(), XattrsRead::Set);
        assert_eq!(read(&dir).unwrap(), list(&[]));
    }
}
