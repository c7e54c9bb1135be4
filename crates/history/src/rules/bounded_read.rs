//! Reads files of the user's `.git` with a limit of their size.

use std::fs;
use std::io::Read;
use std::path::Path;

const MAX_SMALL_FILE: u64 = 64 * 1024;

/// Reads a small regular file; `None` for anything else.
pub(crate) fn read_small(path: &Path) -> Option<Vec<u8>> {
    read_at_most(path, MAX_SMALL_FILE)
}

/// Reads a regular file of at most `limit` bytes; `None` for anything else.
pub(crate) fn read_at_most(path: &Path, limit: u64) -> Option<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    // Opening a FIFO must not block the daemon.
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    let meta = file.metadata().ok()?;
    if !meta.is_file() || meta.len() > limit {
        return None;
    }
    let mut content = Vec::with_capacity(meta.len() as usize);
    file.take(limit).read_to_end(&mut content).ok()?;
    Some(content)
}
