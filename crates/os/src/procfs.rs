//! Reads the kernel's own small files, those below `/proc`.
//!
//! Their size says 0, so that a reader who goes by it reads in small steps that grow: some nine system calls for one
//! file. With room from the start it is four, and most files come in one piece, made in one instant.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// The kernel makes most files page by page.
const ROOM: usize = 4096;

/// Reads a file whole.
///
/// # Errors
/// When it cannot be opened or read, for instance because its process is gone.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(ROOM);
    // Without the limit, which is none, the size would be asked for.
    File::open(path)?.take(u64::MAX).read_to_end(&mut content)?;
    Ok(content)
}

/// Reads a file whole, as text.
///
/// # Errors
/// As [`read`], and when it is not UTF-8.
pub fn read_to_string(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_whole_whatever_they_are_as_large_as() {
        assert_eq!(read("/proc/self/cmdline").unwrap(), std::fs::read("/proc/self/cmdline").unwrap());
        let many = read("/proc/kallsyms").unwrap_or_default();
        assert_eq!(many.len(), std::fs::read("/proc/kallsyms").unwrap_or_default().len());
        assert_eq!(read_to_string("/proc/4194305/stat").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
