//! Identifies the peer of a Unix socket by what the kernel has recorded.
//!
//! Grants nothing: `auth` decides what a peer may do.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// The peer's identity at the time it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process that connected; 0 if it is in a pid namespace that is invisible to this process.
    pub pid: i32,
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

impl PeerCredentials {
    /// Returns whether the peer's effective group or one of its supplementary groups is `gid`.
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

/// Reads `SO_PEERCRED` and `SO_PEERGROUPS` of a connected Unix stream.
pub fn credentials(stream: &impl AsFd) -> io::Result<PeerCredentials> {
    let cred = getsockopt(&stream.as_fd(), sockopt::PeerCredentials)?;
    Ok(PeerCredentials { pid: cred.pid(), uid: cred.uid(), gid: cred.gid(), groups: peer_groups(stream)? })
}

/// Returns whether the peer has closed the connection. A peer that has only shut down its sending direction may still
/// read and is not gone.
pub fn is_gone(stream: &impl AsFd) -> bool {
    // POLLHUP is always reported, and only when both directions are closed.
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)),
        Err(_) => false,
    }
}

fn peer_groups(stream: &impl AsFd) -> io::Result<Vec<u32>> {
    let fd = stream.as_fd().as_raw_fd();
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut len = libc::socklen_t::try_from(size_of_val(groups.as_slice()))
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // SAFETY: `groups` owns `len` writable bytes, and `fd` is borrowed during the call.
        let result = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), &raw mut len)
        };
        let count = len as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // With ERANGE the kernel stores the length it needs. NGROUPS_MAX is 65,536.
        if error.raw_os_error() == Some(libc::ERANGE) && count > groups.len() && count <= 65_536 {
            groups.resize(count, 0);
            continue;
        }
        return Err(error);
    }
}

/// Returns the number of the group with this name; `None` if there is none.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_pair_shows_this_process() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = credentials(&a).unwrap();
        assert_eq!(peer.pid, std::process::id() as i32);
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.in_group(nix::unistd::getegid().as_raw()));
        for group in nix::unistd::getgroups().unwrap() {
            assert!(peer.in_group(group.as_raw()));
        }
    }

    #[test]
    fn groups_are_found_by_name_or_not_at_all() {
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_eq!(group_id("no-such-group-here").unwrap(), None);
    }
}
