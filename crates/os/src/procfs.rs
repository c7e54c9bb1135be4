//! Reads the kernel's small virtual files, such as those below `/proc`.
//!
//! Their reported size is 0, so that a reader that relies on it starts with small, growing reads: some nine system
//! calls per file. With a buffer allocated in advance there are four, and most files arrive in one read, generated at
//! one instant.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// The kernel generates most files page by page.
const ROOM: usize = 4096;

/// Reads the whole file.
///
/// # Errors
/// If it cannot be opened or read, for instance because its process has ended.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(ROOM);
    // The limit has no effect but to keep `read_to_end` from asking for the size.
    File::open(path)?.take(u64::MAX).read_to_end(&mut content)?;
    Ok(content)
}

/// Reads the whole file as text.
///
/// # Errors
/// Those of [`read`], and if the content is not UTF-8.
pub fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_completely_whatever_their_size() {
        assert_eq!(read("/proc/self/cmdline").unwrap(), std::fs::read("/proc/self/cmdline").unwrap());
        let many = read("/proc/kallsyms").unwrap_or_default();
        assert_eq!(many.len(), std::fs::read("/proc/kallsyms").unwrap_or_default().len());
        assert_eq!(read_to_string("/proc/4194305/stat").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
