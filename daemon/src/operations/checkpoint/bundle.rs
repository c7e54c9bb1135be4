//! The file format of an exported checkpoint. It does not interpret the parts.
//!
//! ```text
//! fermata-checkpoint 1
//! <bytes of the header, decimal>
//! {"format":1, …, "parts":[{"name", "bytes", "sha256"}, …]}      the header, JSON on one line
//! <the bytes of every part, in that order>
//! <SHA-256 of all bytes before, hexadecimal>
//! ```
//! A reader trusts nothing: it refuses a file that is truncated or changed or whose parts have unsafe names.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use fermata_protocol::checkpoint::CheckpointView;
use fermata_protocol::{Code, Refusal, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::errors::Failure;
use crate::hashing::{HashingWriter, hash, hash_file};
use crate::operations::context::cancelled_by_request;
use crate::operations::directory;

/// The version of the format, raised when older programs could not read it.
pub const FORMAT: u32 = 1;
/// The part with the pack of the workspace's snapshot.
pub const PACK: &str = "history.pack";
/// The part with the index of that pack.
pub const INDEX: &str = "history.idx";

const MAGIC: &str = "fermata-checkpoint ";
/// The largest header that is read, bytes.
const MAX_HEADER: u64 = 64 << 20;
/// The length of the checksum and its line break, bytes.
const TRAILER: u64 = 65;

/// The header of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`] of the program that wrote the file.
    pub format: u32,
    /// Name and version of the program that wrote the file.
    pub program: String,
    pub exported_at: UnixMillis,
    /// The checkpoint's row in its project.
    pub checkpoint: CheckpointView,
    /// In the order in which their bytes follow.
    pub parts: Vec<BundlePart>,
}

/// One file within the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundlePart {
    /// Its path in the checkpoint's directory, or [`PACK`] or [`INDEX`].
    pub name: String,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// Writes a file from parts on disk, and returns its size and SHA-256.
///
/// # Errors
/// When a part cannot be read, or the file cannot be written.
pub fn write(
    to: &mut File,
    checkpoint: CheckpointView,
    exported_at: UnixMillis,
    parts: &[(String, PathBuf)],
) -> io::Result<(u64, String)> {
    let described = parts.iter().map(|(name, path)| {
        let (bytes, sha256) = hash_file(path)?;
        Ok(BundlePart { name: name.clone(), bytes, sha256 })
    });
    let header = Header {
        format: FORMAT,
        program: format!("fermata {}", env!("CARGO_PKG_VERSION")),
        exported_at,
        checkpoint,
        parts: described.collect::<io::Result<_>>()?,
    };
    let text = serde_json::to_string(&header)?;
    let mut out = HashingWriter::new(io::BufWriter::new(to));
    write!(out, "{MAGIC}{FORMAT}\n{}\n{text}\n", text.len())?;
    for ((_, path), part) in parts.iter().zip(&header.parts) {
        let copied = io::copy(&mut File::open(path)?.take(part.bytes), &mut out)?;
        if copied != part.bytes {
            return Err(io::Error::other(format!("{} has become shorter", path.display())));
        }
    }
    let sum = out.sha256();
    writeln!(out, "{sum}")?;
    out.flush()?;
    let (_, bytes, sha256) = out.into_parts();
    Ok((bytes, sha256))
}

fn refuse(why: impl std::fmt::Display) -> Failure {
    Refusal::new(Code::BundleRefused, format!("the file cannot be imported: {why}"))
        .hint("export the checkpoint again, and compare the checksums of both files")
        .into()
}

/// A file whose checksum and header were checked.
#[derive(Debug)]
pub struct Bundle {
    pub header: Header,
    file: File,
    /// The offset of the first part.
    begin: u64,
}

impl Bundle {
    /// Reads the file once to compare it with its checksum, and parses its header.
    ///
    /// # Errors
    /// Refuses a file of another kind, of a newer format, truncated, changed, or with unsafe names.
    pub fn open(mut file: File) -> Result<Bundle, Failure> {
        let failed = |e: io::Error| Failure::fault("read the file", &e);
        let length = file.metadata().map_err(failed)?.len();
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut reader = io::BufReader::new(&file);
        let first = line(&mut reader, 64)?;
        let format = first.strip_prefix(MAGIC).and_then(|text| text.parse::<u32>().ok());
        let format = format.ok_or_else(|| refuse("it is not an exported checkpoint"))?;
        if format > FORMAT {
            return Err(Refusal::new(
                Code::BundleRefused,
                format!(
                    "the file cannot be imported: its format is {format}, and this program reads formats up to {FORMAT}"
                ),
            )
            .hint("import it with the release of Fermata that exported it, or a later one")
            .into());
        }
        let second = line(&mut reader, 32)?;
        let size: u64 = second.parse().map_err(|_| refuse("its header has no size"))?;
        let begin = (first.len() + second.len()) as u64 + 2 + size.saturating_add(1);
        if size > MAX_HEADER || length < begin.saturating_add(TRAILER) {
            return Err(refuse("it is truncated"));
        }
        check_sum(&mut file, length)?;
        file.seek(SeekFrom::Start(begin - size - 1)).map_err(failed)?;
        let mut text = vec![0; size as usize];
        file.read_exact(&mut text).map_err(failed)?;
        let header: Header =
            serde_json::from_slice(&text).map_err(|e| refuse(format!("its header is not valid: {e}")))?;
        let total = header.parts.iter().try_fold(begin + TRAILER, |sum, part| sum.checked_add(part.bytes));
        if total != Some(length) {
            return Err(refuse("the sizes of its parts differ from its header"));
        }
        let mut names = std::collections::HashSet::new();
        for part in &header.parts {
            if !is_safe(&part.name) || !names.insert(&part.name) {
                return Err(refuse(format!("a part has the unsafe name {:?}", part.name)));
            }
        }
        Ok(Bundle { header, file, begin })
    }

    /// Writes every part to the path that `path_of` returns, and compares its hash with the header. `report` gets the
    /// number of bytes written so far.
    ///
    /// # Errors
    /// Refuses a part with another hash; fails when a file cannot be written.
    pub fn unpack(
        &mut self,
        path_of: impl Fn(&BundlePart) -> PathBuf,
        mut report: impl FnMut(u64),
        cancelled: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let failed = |e: io::Error| Failure::fault("read the file", &e);
        self.file.seek(SeekFrom::Start(self.begin)).map_err(failed)?;
        let mut done = 0;
        let mut buffer = vec![0; 256 << 10];
        for part in &self.header.parts {
            let path = path_of(part);
            let writing = |e: io::Error| Failure::fault(&format!("write {}", path.display()), &e);
            let mut to = HashingWriter::new(create(&path).map_err(writing)?);
            let mut left = part.bytes;
            while left > 0 {
                if cancelled() {
                    return Err(cancelled_by_request());
                }
                let n = buffer.len().min(left as usize);
                self.file.read_exact(&mut buffer[..n]).map_err(failed)?;
                to.write_all(&buffer[..n]).map_err(writing)?;
                left -= n as u64;
                done += n as u64;
                report(done);
            }
            let (file, _, sha256) = to.into_parts();
            file.sync_all().map_err(writing)?;
            if sha256 != part.sha256 {
                return Err(refuse(format!("the hash of the part {} differs from its header", part.name)));
            }
        }
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        directory::create(parent)?;
    }
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn line(reader: &mut impl io::BufRead, max: u64) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let mut limited = reader.take(max);
    io::BufRead::read_until(&mut limited, b'\n', &mut bytes).map_err(|e| Failure::fault("read the file", &e))?;
    let text = bytes.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
    text.map(str::to_owned).ok_or_else(|| refuse("it is not an exported checkpoint"))
}

fn check_sum(file: &mut File, length: u64) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::fault("read the file", &e);
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let (bytes, sha256) = hash((&*file).take(length - TRAILER)).map_err(failed)?;
    if bytes < length - TRAILER {
        return Err(refuse("it is truncated"));
    }
    let mut trailer = String::new();
    file.take(TRAILER).read_to_string(&mut trailer).map_err(|_| refuse("it has no checksum at its end"))?;
    if trailer == format!("{sha256}\n") {
        Ok(())
    } else {
        Err(refuse("it is truncated or has changed: its checksum differs"))
    }
}

/// Returns whether a path stays in the directory that it is joined to: plain components, none of them hidden.
fn is_safe(name: &str) -> bool {
    name.len() < 4096
        && name.split('/').all(|part| !part.is_empty() && part.len() < 256 && !part.starts_with('.'))
        && !name.contains(|c: char| c.is_control() || c == '\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_unsafe() {
        for good in ["manifest.json", "transcripts/a/b.jsonl", "plugins/x y"] {
            assert!(is_safe(good), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a\nb", "a\0b", "./a"] {
            assert!(!is_safe(bad), "{bad:?}");
        }
    }
}
