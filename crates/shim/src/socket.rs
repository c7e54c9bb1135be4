//! The shim's socket in the file system.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::launch_report::{LaunchCode, LaunchFailure};

/// Listens on a socket in a directory that only this user can enter.
pub(super) fn listen(path: &Path) -> Result<UnixListener, LaunchFailure> {
    // sun_path has 108 bytes, the last one is a NUL (unix(7)).
    if path.as_os_str().as_bytes().len() > 107 {
        return Err(LaunchFailure {
            code: LaunchCode::SocketPathTooLong,
            message: format!("the socket path {} has more than 107 bytes", path.display()),
        });
    }
    let failure = |what| LaunchFailure::io(LaunchCode::SocketFailed, what, path);
    if let Some(parent) = path.parent() {
        make_private_dir(parent).map_err(failure("create the directory of"))?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failure("replace")(error));
        }
        _ => {}
    }
    // The umask makes the mode 0600 from the start. Setting it as well covers file systems that ignore the umask.
    let listener = UnixListener::bind(path).map_err(failure("listen on"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failure("protect"))?;
    listener.set_nonblocking(true).map_err(failure("unblock"))?;
    Ok(listener)
}

pub(super) fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Identifies a file: device, inode and change time, since an inode number can be reused.
pub(super) type SocketFileId = (u64, u64, i64, i64);

/// Returns the identity of the file at a path; `None` if there is none.
pub(super) fn file_identity(path: &Path) -> Option<SocketFileId> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.ctime(), meta.ctime_nsec()))
}
