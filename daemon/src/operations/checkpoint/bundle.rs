//! The file of an exported checkpoint: its bytes, and nothing about what they mean to a project.
//!
//! ```text
//! fermata-checkpoint 1
//! <bytes of the header, decimal>
//! {"format":1, …, "parts":[{"name", "bytes", "sha256"}, …]}      the header, JSON on one line
//! <the bytes of every part, in that order>
//! <SHA-256 of everything before, hexadecimal>
//! ```
//! A reader believes nothing: what is cut off, changed or named unsafely is refused with one sentence.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use fermata_protocol::checkpoint::CheckpointView;
use fermata_protocol::{Code, Refusal, UnixMillis};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::errors::Failure;
use crate::hashing::{HashingWriter, hash_file, hex};

/// The version of the file, raised when an older program could not read it.
pub const FORMAT: u32 = 1;
/// The part that is the pack of the workspace's snapshot.
pub const PACK: &str = "history.pack";
/// The part that is its index.
pub const INDEX: &str = "history.idx";

const MAGIC: &str = "fermata-checkpoint ";
const MAX_HEADER: u64 = 64 << 20;
const TRAILER: u64 = 65;

/// What the file begins with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    /// The version of the file.
    pub format: u32,
    /// The program that wrote it.
    pub program: String,
    /// When it was written.
    pub exported_at: UnixMillis,
    /// The checkpoint, as its project has it.
    pub checkpoint: CheckpointView,
    /// What follows.
    pub parts: Vec<Part>,
}

/// One file within the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its path in the checkpoint's directory, or [`PACK`] or [`INDEX`].
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
}

/// Writes a file from parts that lie on the disk, and returns its size and SHA-256.
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
        Ok(Part { name: name.clone(), bytes, sha256 })
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

/// A file whose checksum and header are good.
#[derive(Debug)]
pub struct Bundle {
    /// What it begins with.
    pub header: Header,
    file: File,
    begin: u64,
}

impl Bundle {
    /// Reads the whole file once, compares it with its checksum, and reads its header.
    ///
    /// # Errors
    /// Refuses a file of another kind, of a newer format, cut off, changed, or with unsafe names.
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
                    "the file cannot be imported: its format {format} is newer than this program, which knows {FORMAT}"
                ),
            )
            .hint("import it with the release of Fermata that exported it, or a later one")
            .into());
        }
        let second = line(&mut reader, 32)?;
        let size: u64 = second.parse().map_err(|_| refuse("its header has no size"))?;
        let begin = (first.len() + second.len()) as u64 + 2 + size.saturating_add(1);
        if size > MAX_HEADER || length < begin.saturating_add(TRAILER) {
            return Err(refuse("it is cut off"));
        }
        check_sum(&mut file, length)?;
        file.seek(SeekFrom::Start(begin - size - 1)).map_err(failed)?;
        let mut text = vec![0; size as usize];
        file.read_exact(&mut text).map_err(failed)?;
        let header: Header =
            serde_json::from_slice(&text).map_err(|e| refuse(format!("its header makes no sense: {e}")))?;
        let total = header.parts.iter().try_fold(begin + TRAILER, |sum, part| sum.checked_add(part.bytes));
        if total != Some(length) {
            return Err(refuse("its parts do not have the sizes that its header names"));
        }
        let mut names = std::collections::HashSet::new();
        for part in &header.parts {
            if !is_safe(&part.name) || !names.insert(&part.name) {
                return Err(refuse(format!("a part has the unsafe name {:?}", part.name)));
            }
        }
        Ok(Bundle { header, file, begin })
    }

    /// Writes every part to the place that `place` names for it, and compares it with its hash.
    ///
    /// # Errors
    /// Refuses a part with another hash; fails when a place cannot be written.
    pub fn unpack(
        &mut self,
        place: impl Fn(&Part) -> PathBuf,
        mut tell: impl FnMut(u64),
        cancelled: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let failed = |e: io::Error| Failure::fault("read the file", &e);
        self.file.seek(SeekFrom::Start(self.begin)).map_err(failed)?;
        let mut done = 0;
        let mut buffer = vec![0; 256 << 10];
        for part in &self.header.parts {
            let path = place(part);
            let writing = |e: io::Error| Failure::fault(&format!("write {}", path.display()), &e);
            let mut to = create(&path).map_err(writing)?;
            let mut hash = Sha256::new();
            let mut left = part.bytes;
            while left > 0 {
                if cancelled() {
                    return Err(crate::operations::context::cancelled_by_request());
                }
                let n = buffer.len().min(left as usize);
                self.file.read_exact(&mut buffer[..n]).map_err(failed)?;
                hash.update(&buffer[..n]);
                to.write_all(&buffer[..n]).map_err(writing)?;
                left -= n as u64;
                done += n as u64;
                tell(done);
            }
            to.sync_all().map_err(writing)?;
            if hex(&hash.finalize()) != part.sha256 {
                return Err(refuse(format!("the part {} has another hash than the header names", part.name)));
            }
        }
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
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
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut left = length - TRAILER;
    while left > 0 {
        let n = buffer.len().min(left as usize);
        file.read_exact(&mut buffer[..n]).map_err(failed)?;
        hash.update(&buffer[..n]);
        left -= n as u64;
    }
    let mut trailer = String::new();
    file.take(TRAILER).read_to_string(&mut trailer).map_err(|_| refuse("it has no checksum at its end"))?;
    if trailer == format!("{}\n", hex(&hash.finalize())) {
        Ok(())
    } else {
        Err(refuse("it is cut off or has changed: its checksum is another"))
    }
}

/// Says whether a name stays in the directory that it is put into: plain components, none of them hidden.
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
