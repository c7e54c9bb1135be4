//! Writes one pack and its index: exactly the new objects of one checkpoint.
//!
//! Layout of a pack (git's version 2): `PACK`, version, number of objects, then per object a length header and its
//! content as one zlib stream, then the SHA-1 of all that. The index holds the sorted ids with checksums and offsets.
//! Nothing here knows what the objects mean, and no delta is ever written: consolidation is another room's work.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha1::{Digest, Sha1};

use super::beneath::sync_dir;
use super::oid::{ObjectHasher, ObjectKind, Oid};

const SIGNATURE: &[u8; 8] = b"PACK\0\0\0\x02";
const COPY_BUFFER: usize = 256 * 1024;

/// An object compressed in memory, ready to be appended.
#[derive(Debug)]
pub struct Packed {
    oid: Oid,
    bytes: Vec<u8>,
    crc: u32,
}

impl Packed {
    /// Compresses an object.
    ///
    /// # Errors
    /// Only memory can fail here.
    pub fn new(oid: Oid, kind: ObjectKind, content: &[u8]) -> io::Result<Packed> {
        let head = entry_header(kind, content.len() as u64);
        let mut encoder = ZlibEncoder::new(head, Compression::fast());
        encoder.write_all(content)?;
        let bytes = encoder.finish()?;
        Ok(Packed { oid, crc: crc_of(&bytes), bytes })
    }
}

/// A finished pack.
#[derive(Clone, Debug)]
pub struct FinishedPack {
    /// The name without extension, `pack-<checksum>`.
    pub name: String,
    /// How many objects are in it.
    pub objects: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// How appending a stream went.
#[derive(Debug)]
pub enum Streamed {
    /// The pack has the object.
    Stored,
    /// The stream turned out not to be that object.
    Different,
    /// The stream failed.
    Unreadable(io::Error),
}

struct Line {
    oid: Oid,
    crc: u32,
    offset: u64,
}

/// A pack that is being written.
pub struct PackWriter {
    dir: PathBuf,
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
    lines: Vec<Line>,
    seen: HashSet<Oid>,
}

impl PackWriter {
    /// Starts a pack in a directory of its own.
    pub fn create(dir: &Path) -> io::Result<PackWriter> {
        let path = dir.join("incoming.pack");
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o400).open(&path)?;
        let mut file = BufWriter::with_capacity(COPY_BUFFER, file);
        file.write_all(SIGNATURE)?;
        // The number of objects, filled in at the end.
        file.write_all(&[0; 4])?;
        Ok(PackWriter { dir: dir.to_owned(), path, file, length: 12, lines: Vec::new(), seen: HashSet::new() })
    }

    /// Says whether the object is already in this pack.
    pub fn holds(&self, oid: &Oid) -> bool {
        self.seen.contains(oid)
    }

    /// Appends an object, unless the pack has it.
    pub fn append(&mut self, packed: &Packed) -> io::Result<()> {
        if self.seen.insert(packed.oid) {
            self.file.write_all(&packed.bytes)?;
            self.lines.push(Line { oid: packed.oid, crc: packed.crc, offset: self.length });
            self.length += packed.bytes.len() as u64;
        }
        Ok(())
    }

    /// Appends an object of `size` bytes from a stream; unless it is stored, the pack stays as it was.
    ///
    /// # Errors
    /// Fails when the pack cannot be written; a failing source is an outcome.
    pub fn append_stream(
        &mut self,
        oid: Oid,
        kind: ObjectKind,
        size: u64,
        source: &mut dyn Read,
    ) -> io::Result<Streamed> {
        if self.holds(&oid) {
            return Ok(Streamed::Stored);
        }
        let start = self.length;
        let mut sink =
            ZlibEncoder::new(Counted { inner: &mut self.file, crc: flate2::Crc::new(), count: 0 }, Compression::fast());
        sink.get_mut().write_all(&entry_header(kind, size))?;
        let mut hasher = ObjectHasher::new(kind, size);
        let mut buffer = vec![0; COPY_BUFFER];
        let mut total = 0;
        loop {
            let n = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    sink.finish()?;
                    self.rewind(start)?;
                    return Ok(Streamed::Unreadable(error));
                }
            };
            hasher.update(&buffer[..n]);
            sink.write_all(&buffer[..n])?;
            total += n as u64;
            if total > size {
                break;
            }
        }
        let counted = sink.finish()?;
        let (crc, count) = (counted.crc.sum(), counted.count);
        if total != size || hasher.finish() != oid {
            self.rewind(start)?;
            return Ok(Streamed::Different);
        }
        self.seen.insert(oid);
        self.lines.push(Line { oid, crc, offset: start });
        self.length += count;
        Ok(Streamed::Stored)
    }

    fn rewind(&mut self, to: u64) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_mut().set_len(to)?;
        self.file.seek(SeekFrom::Start(to)).map(drop)
    }

    /// Completes pack and index and makes both durable.
    pub fn finish(mut self) -> io::Result<FinishedPack> {
        self.file.flush()?;
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        let count = u32::try_from(self.lines.len()).map_err(|_| io::Error::other("too many objects for one pack"))?;
        file.write_all_at(&count.to_be_bytes(), 8)?;

        // The trailer covers the count, which was unknown until now, so that the pack is read once more.
        file.seek(SeekFrom::Start(0))?;
        let mut hasher = Sha1::new();
        let mut reader = BufReader::with_capacity(COPY_BUFFER, &file);
        let mut buffer = vec![0; COPY_BUFFER];
        loop {
            let n = reader.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
        }
        let checksum: [u8; 20] = hasher.finalize().into();
        file.seek(SeekFrom::End(0))?;
        file.write_all(&checksum)?;
        file.sync_all()?;

        let name = format!("pack-{}", Oid::from_raw(checksum));
        let index = index_bytes(&mut self.lines, &checksum);
        let index_path = self.dir.join(format!("{name}.idx"));
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o400).open(index_path)?;
        out.write_all(&index)?;
        out.sync_all()?;
        std::fs::rename(&self.path, self.dir.join(format!("{name}.pack")))?;
        sync_dir(&self.dir)?;
        Ok(FinishedPack { name, objects: u64::from(count), bytes: self.length + 20 })
    }
}

/// Counts and checksums what passes through.
struct Counted<W> {
    inner: W,
    crc: flate2::Crc,
    count: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.crc.update(&bytes[..n]);
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn crc_of(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Encodes type and size: four bits of the size beside the type, then seven per byte, low bits first.
fn entry_header(kind: ObjectKind, size: u64) -> Vec<u8> {
    let kind = match kind {
        ObjectKind::Commit => 1,
        ObjectKind::Tree => 2,
        ObjectKind::Blob => 3,
    };
    let mut bytes = vec![(kind << 4) | (size & 0x0f) as u8];
    let mut rest = size >> 4;
    while rest > 0 {
        if let Some(last) = bytes.last_mut() {
            *last |= 0x80;
        }
        bytes.push((rest & 0x7f) as u8);
        rest >>= 7;
    }
    bytes
}

fn index_bytes(lines: &mut [Line], pack_checksum: &[u8; 20]) -> Vec<u8> {
    lines.sort_unstable_by_key(|line| line.oid);
    let mut index = Vec::with_capacity(8 + 1024 + lines.len() * 28 + 40);
    index.extend_from_slice(b"\xfftOc\0\0\0\x02");
    let mut below = 0;
    for first in 0..=255u8 {
        below += lines[below..].iter().take_while(|line| line.oid.raw()[0] == first).count();
        index.extend_from_slice(&(below as u32).to_be_bytes());
    }
    lines.iter().for_each(|line| index.extend_from_slice(line.oid.raw()));
    lines.iter().for_each(|line| index.extend_from_slice(&line.crc.to_be_bytes()));
    let mut large = Vec::new();
    for line in lines.iter() {
        // Offsets of 2 GiB and more go to a table of their own, marked by the highest bit.
        let short = match u32::try_from(line.offset) {
            Ok(offset) if offset < 0x8000_0000 => offset,
            _ => {
                large.push(line.offset);
                0x8000_0000 | (large.len() - 1) as u32
            }
        };
        index.extend_from_slice(&short.to_be_bytes());
    }
    large.iter().for_each(|offset| index.extend_from_slice(&offset.to_be_bytes()));
    index.extend_from_slice(pack_checksum);
    let checksum: [u8; 20] = Sha1::digest(&index).into();
    index.extend_from_slice(&checksum);
    index
}
