//! Reads the contents of covered files and stores them as blobs, in parallel.
//!
//! Small files pass through memory. Large ones are streamed twice: once for their id, once into the pack if
//! that id is new. A file that changes while it is read is read again; after the last attempt its content is
//! stored as read and marked torn. Bytes are stored unchanged, without filter or conversion.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use rayon::prelude::*;

use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::scan::pool::{self, Urgency};
use crate::scan::scan_result::{ContentRead, FileContent, Unread};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::store::pack::{PackWriter, Packed, Streamed};
use crate::tree::confined_dir::{FileKind, FileStat, Root, is_resource_shortage, stat_fd};
use crate::tree::names::RelPath;
use crate::tree::skipped::SkipReason;
use crate::tree::xattrs::{self, Xattrs};

/// Files up to this size are read into memory.
const SMALL: u64 = 1024 * 1024;
const ATTEMPTS: u32 = 4;

/// The interval of progress reports in milliseconds.
const REPORT_INTERVAL_MS: u64 = 50;

/// The destination of new blobs.
pub(crate) struct BlobSink<'a> {
    /// The published objects.
    pub store: &'a ObjectStore,
    /// The pack of this snapshot.
    pub pack: &'a Mutex<PackWriter>,
}

impl BlobSink<'_> {
    fn is_new(&self, oid: &Oid) -> bool {
        !self.pack.lock().unwrap_or_else(PoisonError::into_inner).holds(oid) && !self.store.contains(oid)
    }

    fn put(&self, oid: Oid, content: &[u8]) -> io::Result<()> {
        if !self.is_new(&oid) {
            return Ok(());
        }
        let pack = || self.pack.lock().unwrap_or_else(PoisonError::into_inner);
        let uncompressed = pack().store_uncompressed(content.len());
        // Compression takes most of the time, so it runs outside the lock.
        let packed = match uncompressed {
            true => Packed::uncompressed(oid, ObjectKind::Blob, content),
            false => Packed::new(oid, ObjectKind::Blob, content)?,
        };
        pack().append(&packed)
    }

    fn put_stream(&self, oid: Oid, size: u64, source: &mut File) -> io::Result<Streamed> {
        if !self.is_new(&oid) {
            return Ok(Streamed::Stored);
        }
        if let Err(error) = source.seek(SeekFrom::Start(0)) {
            return Ok(Streamed::Unreadable(error));
        }
        let mut pack = self.pack.lock().unwrap_or_else(PoisonError::into_inner);
        pack.append_stream(oid, ObjectKind::Blob, size, source)
    }
}

/// The parameters of reading files.
pub(crate) struct Reading<'a> {
    pub root: &'a Root,
    /// The destination of new blobs; `None` to compute ids only.
    pub sink: Option<BlobSink<'a>>,
    /// An own directory for copies of files that keep changing.
    pub spool: &'a Path,
    /// Larger files are skipped.
    pub max_file_bytes: u64,
    pub urgency: Urgency,
    pub progress: OnProgress<'a>,
    /// Set by the caller to cancel the reading.
    pub cancel: &'a AtomicBool,
}

/// The result of one attempt to read a file.
enum ReadAttempt {
    Done(ContentRead),
    Changed,
}

impl Reading<'_> {
    /// Reads files and symbolic links in parallel and stores the result in each entry.
    pub fn read_all(&self, unread: &[&Unread]) -> Result<()> {
        let (done, total) = (AtomicU64::new(0), unread.len() as u64);
        let (clock, reported_at) = (Instant::now(), AtomicU64::new(0));
        (self.progress)(StoreProgress { phase: StorePhase::Read, done: 0, total });
        let read = |entry: &&Unread| {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            let content = self.read_one(entry)?;
            entry.content.get_or_init(|| content);
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            let (now, before) = (clock.elapsed().as_millis() as u64, reported_at.load(Ordering::Relaxed));
            // Only one of the threads reports.
            let reports = now >= before + REPORT_INTERVAL_MS
                && reported_at.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            if reports || done == total {
                (self.progress)(StoreProgress { phase: StorePhase::Read, done, total });
            }
            Ok(())
        };
        match unread.len() > pool::MANY {
            true => pool::on(self.urgency, || unread.par_iter().try_for_each(read)),
            false => unread.iter().try_for_each(read),
        }
    }

    fn read_one(&self, entry: &Unread) -> Result<ContentRead> {
        if entry.stat.kind() == FileKind::Symlink {
            return self.read_link(entry);
        }
        for attempt in 1..=ATTEMPTS {
            if let ReadAttempt::Done(content) = self.try_file(&entry.path, attempt == ATTEMPTS)? {
                return Ok(content);
            }
        }
        Ok(ContentRead::Skipped(SkipReason::Unsteady, "it changed at every attempt".to_owned()))
    }

    fn read_link(&self, entry: &Unread) -> Result<ContentRead> {
        let target = match self.root.read_link(&entry.path) {
            Ok(target) => target,
            Err(errno) if is_resource_shortage(errno) => {
                return Err(HistoryError::io("read", &self.root.show(&entry.path))(errno));
            }
            Err(errno) => return Ok(unopened(errno)),
        };
        let oid = Oid::of(ObjectKind::Blob, target.as_bytes());
        if let Some(sink) = &self.sink {
            sink.put(oid, target.as_bytes()).map_err(HistoryError::io("store", self.spool))?;
        }
        // The link may have been replaced since the walk; its fingerprint then says nothing about this target.
        let torn = self.root.stat(&entry.path).map(|stat| !stat.same_content(&entry.stat)).unwrap_or(true);
        Ok(ContentRead::Stored(FileContent {
            stat: entry.stat,
            oid,
            size: target.len() as u64,
            torn,
            xattrs: Xattrs::default(),
        }))
    }

    fn try_file(&self, path: &RelPath, last: bool) -> Result<ReadAttempt> {
        let mut file = match self.root.open_file(path) {
            Ok(file) => file,
            Err(errno) if is_resource_shortage(errno) => {
                return Err(HistoryError::io("open", &self.root.show(path))(errno));
            }
            Err(errno) => return Ok(ReadAttempt::Done(unopened(errno))),
        };
        let before = match stat_fd(&file) {
            Ok(stat) => stat,
            Err(errno) => return Ok(ReadAttempt::Done(unopened(errno))),
        };
        if before.kind() != FileKind::Regular {
            let detail = "the path changed its kind".to_owned();
            return Ok(ReadAttempt::Done(ContentRead::Skipped(SkipReason::Unsteady, detail)));
        }
        if before.size > self.max_file_bytes {
            let detail = format!("{} bytes", before.size);
            return Ok(ReadAttempt::Done(ContentRead::Skipped(SkipReason::TooLarge, detail)));
        }
        if before.size <= SMALL {
            self.try_small(file, before, last)
        } else if last {
            self.spool(file, before)
        } else {
            self.try_large(&mut file, before)
        }
    }

    fn try_small(&self, mut file: File, before: FileStat, last: bool) -> Result<ReadAttempt> {
        let mut content = Vec::with_capacity(before.size as usize + 1);
        // A file that keeps growing is cut at twice the size of a small one.
        if let Err(error) = (&mut file).take(2 * SMALL).read_to_end(&mut content) {
            return Ok(ReadAttempt::Done(ContentRead::Skipped(SkipReason::Unreadable, error.to_string())));
        }
        let steady = is_steady(&file, &before, content.len() as u64);
        if !steady && !last {
            return Ok(ReadAttempt::Changed);
        }
        let oid = Oid::of(ObjectKind::Blob, &content);
        if let Some(sink) = &self.sink {
            sink.put(oid, &content).map_err(HistoryError::io("store", self.spool))?;
        }
        let (stat, size, torn) = (before, content.len() as u64, !steady);
        Ok(done(&file, FileContent { stat, oid, size, torn, xattrs: Xattrs::default() }))
    }

    fn try_large(&self, file: &mut File, before: FileStat) -> Result<ReadAttempt> {
        let (oid, read) = match hash_stream(file, before.size) {
            Ok(hashed) => hashed,
            Err(error) => return Ok(unreadable(&error)),
        };
        if !is_steady(file, &before, read) {
            return Ok(ReadAttempt::Changed);
        }
        match self.store(oid, read, file)? {
            Streamed::Unreadable(error) => return Ok(unreadable(&error)),
            Streamed::Stored if is_steady(file, &before, read) => {}
            Streamed::Stored | Streamed::Different => return Ok(ReadAttempt::Changed),
        }
        let (stat, size, torn) = (before, read, false);
        Ok(done(file, FileContent { stat, oid, size, torn, xattrs: Xattrs::default() }))
    }

    fn store(&self, oid: Oid, size: u64, source: &mut File) -> Result<Streamed> {
        match &self.sink {
            Some(sink) => sink.put_stream(oid, size, source).map_err(HistoryError::io("store", self.spool)),
            None => Ok(Streamed::Stored),
        }
    }

    /// Copies a large file that keeps changing, so that its id and bytes come from one reading. Of a growing
    /// file, only its size at the start is copied.
    fn spool(&self, mut file: File, before: FileStat) -> Result<ReadAttempt> {
        let failed = |error| HistoryError::io("copy to", self.spool)(error);
        let mut copy = tempfile::tempfile_in(self.spool).map_err(failed)?;
        let mut source = (&mut file).take(before.size);
        let mut buffer = vec![0; 256 * 1024];
        let mut size = 0;
        loop {
            // A read error means that the file is skipped, a write error that the store failed.
            match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => copy.write_all(&buffer[..n]).map_err(failed)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(unreadable(&error)),
            }
            size = copy.stream_position().map_err(failed)?;
        }
        let steady = is_steady(&file, &before, size);
        copy.seek(SeekFrom::Start(0)).map_err(failed)?;
        let (oid, read) = hash_stream(&mut copy, size).map_err(failed)?;
        match self.store(oid, read, &mut copy)? {
            Streamed::Stored => {}
            Streamed::Different => {
                return Err(failed(io::Error::other("a private copy changed while it was read")));
            }
            Streamed::Unreadable(error) => return Err(failed(error)),
        }
        let (stat, torn) = (before, !steady);
        Ok(done(&file, FileContent { stat, oid, size: read, torn, xattrs: Xattrs::default() }))
    }
}

/// Adds the extended attributes of a file that was read.
fn done(file: &File, mut content: FileContent) -> ReadAttempt {
    ReadAttempt::Done(match xattrs::read(file) {
        Ok(found) => {
            content.xattrs = found;
            ContentRead::Stored(content)
        }
        Err(errno) => {
            ContentRead::Skipped(SkipReason::Unreadable, format!("its extended attributes: {}", errno.desc()))
        }
    })
}

fn unreadable(error: &io::Error) -> ReadAttempt {
    ReadAttempt::Done(ContentRead::Skipped(SkipReason::Unreadable, error.to_string()))
}

fn is_steady(file: &File, before: &FileStat, read: u64) -> bool {
    read == before.size && stat_fd(file).is_ok_and(|after| after.same_content(before))
}

/// Hashes up to `size + 1` bytes and returns the id with the number of bytes.
fn hash_stream(source: &mut impl Read, size: u64) -> io::Result<(Oid, u64)> {
    let mut hasher = ObjectHasher::new(ObjectKind::Blob, size);
    let mut buffer = vec![0; 256 * 1024];
    let mut source = source.take(size + 1);
    let mut total = 0;
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok((hasher.finish(), total)),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                total += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Returns the result for a file that cannot be opened.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error of the system has the same result")]
fn unopened(errno: Errno) -> ContentRead {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => ContentRead::Vanished,
        Errno::ELOOP | Errno::ENXIO | Errno::EINVAL => {
            ContentRead::Skipped(SkipReason::Unsteady, "the path changed its kind".to_owned())
        }
        errno => ContentRead::Skipped(SkipReason::Unreadable, errno.desc().to_owned()),
    }
}
