//! Extended attributes of the `user` namespace: what people and tools attach to files.
//!
//! The other namespaces belong to the system (capabilities, labels, ACLs) and are neither read nor set.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;
use rustix::fs::{fgetxattr, flistxattr};

use super::meta::Xattrs;

const PREFIX: &[u8] = b"user.";

/// Reads the attributes of an open file or directory, sorted by name; none where the file system has none.
pub(super) fn read<Fd: AsFd>(fd: Fd) -> nix::Result<Xattrs> {
    let mut buffer = [0u8; 512];
    let mut longer = Vec::new();
    let names: &[u8] = match flistxattr(&fd, &mut buffer) {
        Ok(0) => return Ok(Xattrs::default()),
        Ok(n) => &buffer[..n],
        Err(rustix::io::Errno::RANGE) => {
            longer = whole(|room| flistxattr(&fd, room))?;
            &longer
        }
        Err(errno) if is_unsupported(errno) => return Ok(Xattrs::default()),
        Err(errno) => return Err(Errno::from_raw(errno.raw_os_error())),
    };
    let mut found = Vec::new();
    for name in names.split_inclusive(|b| *b == 0).filter(|name| name.starts_with(PREFIX)) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        match whole(|room| fgetxattr(&fd, name, room)) {
            Ok(value) => found.push((name.to_bytes().into(), value.into())),
            // Removed since it was listed.
            Err(Errno::ENODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    found.sort();
    drop(longer);
    Ok(found.into())
}

fn is_unsupported(errno: rustix::io::Errno) -> bool {
    errno == rustix::io::Errno::OPNOTSUPP || errno == rustix::io::Errno::NOTSUP || errno == rustix::io::Errno::NOSYS
}

/// Calls with more room until all fits.
fn whole(call: impl Fn(&mut Vec<u8>) -> rustix::io::Result<usize>) -> nix::Result<Vec<u8>> {
    // The kernel's limit for a value and for a list of names is 64 KiB.
    let mut room = vec![0; 64 * 1024];
    match call(&mut room) {
        Ok(n) => {
            room.truncate(n);
            Ok(room)
        }
        Err(errno) => Err(Errno::from_raw(errno.raw_os_error())),
    }
}
