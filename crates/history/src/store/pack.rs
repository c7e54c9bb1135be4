//! Writes one pack and its index: the new objects of one checkpoint.
//!
//! A pack (git's version 2) consists of `PACK`, the version, the number of objects, then per object a header
//! and its content as a zlib stream, then the SHA-1 of everything before. The index has the sorted ids with
//! checksums and offsets. Which objects are good delta bases is decided by consolidation.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha1::{Digest, Sha1};

use crate::store::deflate::{Effort, deflate, store};
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::store::pack_entry::{Stored, bad, encode_header};
use crate::store::pack_index::{self, IndexLine};
use crate::store::pack_reader::PackReader;
use fermata_os::fsync::{begin_to_write, sync_together};

const SIGNATURE: &[u8; 8] = b"PACK\0\0\0\x02";
const COPY_BUFFER: usize = 256 * 1024;

/// Larger trees are compressed immediately, since consolidation copies very large objects unchanged.
const MAX_WRAPPED: usize = 1 << 20;

/// The number of bytes per pack that are stored uncompressed. Agents are frozen while the few files of a small
/// change are read, and compression would take longer than everything else. Consolidation compresses them
/// later.
const MAX_UNCOMPRESSED: u64 = 1 << 20;

/// An encoded pack entry in memory.
#[derive(Debug)]
pub struct Packed {
    oid: Oid,
    bytes: Vec<u8>,
    crc: u32,
}

impl Packed {
    /// Encodes an object, compressed unless consolidation can do that later.
    ///
    /// # Errors
    /// Fails only if the compression library does.
    pub fn new(oid: Oid, kind: ObjectKind, content: &[u8]) -> io::Result<Packed> {
        let mut bytes = encode_header(Stored::Complete(kind), content.len() as u64);
        match kind {
            ObjectKind::Tree if content.len() <= MAX_WRAPPED => store(content, &mut bytes),
            ObjectKind::Tree | ObjectKind::Blob | ObjectKind::Commit => deflate(content, Effort::Fast, &mut bytes)?,
        }
        Ok(Packed { oid, crc: crc_of(&bytes), bytes })
    }

    /// Encodes an object without compression.
    pub fn uncompressed(oid: Oid, kind: ObjectKind, content: &[u8]) -> Packed {
        let mut bytes = encode_header(Stored::Complete(kind), content.len() as u64);
        store(content, &mut bytes);
        Packed { oid, crc: crc_of(&bytes), bytes }
    }
}

#[derive(Clone, Debug)]
pub struct FinishedPack {
    /// The name without extension, `pack-<checksum>`.
    pub name: String,
    /// The number of objects.
    pub objects: u64,
    /// The size in bytes.
    pub bytes: u64,
}

/// The result of appending a stream.
#[derive(Debug)]
pub enum Streamed {
    /// The pack contains the object.
    Stored,
    /// The content of the stream does not match the id.
    Different,
    /// Reading the stream failed.
    Unreadable(io::Error),
}

pub struct PackWriter {
    dir: PathBuf,
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
    lines: Vec<IndexLine>,
    offsets: HashMap<Oid, u64>,
    /// The bytes that were stored uncompressed.
    uncompressed: u64,
}

impl PackWriter {
    /// Begins a pack in an own directory.
    pub fn create(dir: &Path) -> io::Result<PackWriter> {
        let path = dir.join("incoming.pack");
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o400).open(&path)?;
        let mut file = BufWriter::with_capacity(COPY_BUFFER, file);
        file.write_all(SIGNATURE)?;
        // The number of objects, set at the end.
        file.write_all(&[0; 4])?;
        Ok(PackWriter {
            dir: dir.to_owned(),
            path,
            file,
            length: 12,
            lines: Vec::new(),
            offsets: HashMap::new(),
            uncompressed: 0,
        })
    }

    /// Says whether to store this many bytes of a file uncompressed, and if so counts them.
    pub fn store_uncompressed(&mut self, bytes: usize) -> bool {
        let uncompressed = self.uncompressed + bytes as u64;
        let fits = uncompressed <= MAX_UNCOMPRESSED;
        if fits {
            self.uncompressed = uncompressed;
        }
        fits
    }

    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub fn holds(&self, oid: &Oid) -> bool {
        self.offsets.contains_key(oid)
    }

    /// Appends an object unless the pack contains it.
    pub fn append(&mut self, packed: &Packed) -> io::Result<()> {
        if !self.holds(&packed.oid) {
            self.file.write_all(&packed.bytes)?;
            self.enter(packed.oid, packed.crc, packed.bytes.len() as u64);
        }
        Ok(())
    }

    fn enter(&mut self, oid: Oid, crc: u32, length: u64) {
        self.offsets.insert(oid, self.length);
        self.lines.push(IndexLine { oid, crc, offset: self.length });
        self.length += length;
    }

    /// Returns how to store an object: completely, or as a delta to one that the pack contains.
    fn stored(&self, kind: ObjectKind, base: Option<&Oid>) -> io::Result<Stored> {
        let Some(base) = base else { return Ok(Stored::Complete(kind)) };
        let at = self.offsets.get(base).ok_or_else(|| bad(format!("the base {base} is not in the pack yet")))?;
        Ok(Stored::DeltaAt(self.length - at))
    }

    /// Appends an object, or its delta to a base that the pack contains, compressed by the caller. `size` is
    /// the size before compression.
    pub(crate) fn append_deflated(
        &mut self,
        oid: Oid,
        kind: ObjectKind,
        base: Option<&Oid>,
        size: u64,
        zlib: &[u8],
    ) -> io::Result<()> {
        let header = encode_header(self.stored(kind, base)?, size);
        let mut crc = flate2::Crc::new();
        crc.update(&header);
        crc.update(zlib);
        self.file.write_all(&header)?;
        self.file.write_all(zlib)?;
        self.enter(oid, crc.sum(), (header.len() + zlib.len()) as u64);
        Ok(())
    }

    /// Appends an entry of another pack without decompressing it: `length` bytes at `at` with the CRC-32
    /// `expected`.
    ///
    /// # Errors
    /// Fails when the other pack is damaged there; this pack is then unusable.
    pub(crate) fn append_copy(
        &mut self,
        oid: Oid,
        kind: ObjectKind,
        base: Option<&Oid>,
        from: &PackReader,
        (at, length, expected): (u64, u64, u32),
    ) -> io::Result<()> {
        let header = from.header(at)?;
        let old_header = header.length;
        let new_header = encode_header(self.stored(kind, base)?, header.size);
        let (mut old, mut new) = (flate2::Crc::new(), flate2::Crc::new());
        let mut buffer = vec![0; COPY_BUFFER.min(length as usize)];
        let first = buffer.len();
        if first <= old_header {
            return Err(bad(format!("the entry of {oid} has no content")));
        }
        from.bytes_at(&mut buffer, at)?;
        old.update(&buffer);
        new.update(&new_header);
        new.update(&buffer[old_header..]);
        self.file.write_all(&new_header)?;
        self.file.write_all(&buffer[old_header..])?;
        let mut done = first as u64;
        while done < length {
            let n = buffer.len().min((length - done) as usize);
            from.bytes_at(&mut buffer[..n], at + done)?;
            old.update(&buffer[..n]);
            new.update(&buffer[..n]);
            self.file.write_all(&buffer[..n])?;
            done += n as u64;
        }
        if old.sum() != expected {
            return Err(bad(format!("the entry of {oid} in {} does not match its index", from.index.name)));
        }
        self.enter(oid, new.sum(), new_header.len() as u64 + length - old_header as u64);
        Ok(())
    }

    /// Appends an object of `size` bytes from a stream. Unless the result is `Stored`, the pack is unchanged.
    ///
    /// # Errors
    /// Fails when the pack cannot be written. A failure of the source is a result.
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
        sink.get_mut().write_all(&encode_header(Stored::Complete(kind), size))?;
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
        self.enter(oid, crc, count);
        Ok(Streamed::Stored)
    }

    fn rewind(&mut self, to: u64) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_mut().set_len(to)?;
        self.file.seek(SeekFrom::Start(to)).map(drop)
    }

    /// Completes pack and index and flushes both.
    pub fn finish(mut self) -> io::Result<FinishedPack> {
        self.file.flush()?;
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        let count = u32::try_from(self.lines.len()).map_err(|_| io::Error::other("too many objects for one pack"))?;
        file.write_all_at(&count.to_be_bytes(), 8)?;

        // The disk writes while the checksum is computed.
        begin_to_write(&file);
        // The checksum covers the number of objects, so the pack is read again.
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

        let name = format!("pack-{}", Oid::from_raw(checksum));
        let index = pack_index::encode(&mut self.lines, &checksum);
        let index_path = self.dir.join(format!("{name}.idx"));
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o400).open(index_path)?;
        out.write_all(&index)?;
        // Their names become durable in the directory that they are moved to.
        sync_together(&[&file, &out])?;
        std::fs::rename(&self.path, self.dir.join(format!("{name}.pack")))?;
        Ok(FinishedPack { name, objects: u64::from(count), bytes: self.length + 20 })
    }
}

/// Counts the bytes that pass through and computes their checksum.
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
