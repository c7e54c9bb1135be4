//! Reads an agent's logs while the shim writes and rotates them.
//!
//! Blocking and without threads, for a daemon's blocking pool or a command. The reader takes no locks: it holds the
//! file open, so that rotation cannot remove its content, and opens the successor by number once the file has been
//! rotated *and* read to its end.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use memchr::{memchr, memrchr};
use serde::{Deserialize, Serialize};

use super::log::{CURRENT, rotated_name, rotated_numbers};
use super::log_entry::{LogEntry, ParsedEntry};
use super::log_line::{BLOCK_FRAME, BlockEnd, BlockHeader, LogFileLine, MAX_BLOCK, MAX_PAYLOAD, Stream};

/// Where reading starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest remaining line.
    Begin,
    /// At a number of lines before the present end; partial lines count as lines.
    FromEnd {
        lines: usize,
        /// Skips lines older than this, in Unix milliseconds.
        since_ms: Option<i64>,
    },
    /// At the first line that is not older than this, in Unix milliseconds.
    Since(i64),
    /// At the position of an earlier reader.
    At(LogPosition),
}

/// A position between two lines, which stays valid when files are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPosition {
    /// The number that the file has or will get when it is rotated.
    pub number: u64,
    /// The file's inode, which differs if the log was started anew.
    pub inode: u64,
    /// Bytes from the beginning of the file.
    pub offset: u64,
}

/// The minimum read size in bytes: more than the longest line or block.
const CHUNK: usize = MAX_BLOCK + 2 * MAX_PAYLOAD;

#[derive(Debug)]
struct OpenLog {
    file: File,
    position: LogPosition,
}

impl OpenLog {
    fn new(file: File, number: u64) -> io::Result<Self> {
        let inode = file.metadata()?.ino();
        Ok(Self { file, position: LogPosition { number, inode, offset: 0 } })
    }

    fn numbered(dir: &Path, number: u64) -> io::Result<Option<Self>> {
        open_if_there(&dir.join(rotated_name(number)))?.map(|file| Self::new(file, number)).transpose()
    }

    /// Opens the current file and determines its future number, one more than the highest. Repeats if the file was
    /// rotated meanwhile.
    fn current(dir: &Path) -> io::Result<Option<Self>> {
        loop {
            let before = rotated_numbers(dir)?.last().copied();
            let Some(file) = open_if_there(&dir.join(CURRENT))? else {
                return Ok(None);
            };
            if rotated_numbers(dir)?.last().copied() == before {
                return Self::new(file, before.map_or(1, |last| last + 1)).map(Some);
            }
        }
    }

    /// Reads complete lines and blocks, starting at the position.
    fn read(&mut self, max_bytes: usize, skipped: &mut u64) -> io::Result<Vec<LogFileLine>> {
        let mut chunk = vec![0; max_bytes.max(CHUNK)];
        let mut lines = Vec::new();
        loop {
            let filled = read_full_at(&self.file, &mut chunk, self.position.offset)?;
            let mut at = 0;
            while at < filled {
                match LogEntry::parse(&chunk[at..filled]) {
                    ParsedEntry::Entry(entry, bytes) => {
                        entry.append_to(&mut lines);
                        at += bytes;
                    }
                    ParsedEntry::Damaged(bytes) => {
                        *skipped += 1;
                        at += bytes;
                    }
                    ParsedEntry::Incomplete => break,
                }
            }
            if at == 0 && filled == chunk.len() {
                // No entry is this long: skip the bytes instead of waiting for the end of an entry.
                *skipped += 1;
                at = filled;
            }
            self.position.offset += at as u64;
            if at == 0 || !lines.is_empty() {
                return Ok(lines);
            }
        }
    }

    /// Moves the position so that as few entries as possible, but at least `wanted` lines, follow it.
    fn seek_from_end(&mut self, wanted: usize) -> io::Result<FromEnd> {
        let end = self.file.metadata()?.len();
        let start = match self.back(end, wanted)? {
            Some(start) => start,
            // The end of the file is incomplete: entries can only be identified from the beginning.
            None => self.forth(end, wanted)?,
        };
        self.position.offset = start.offset;
        Ok(match start.lines.checked_sub(wanted) {
            Some(surplus) => FromEnd::Reached { surplus },
            None => FromEnd::Older { wanted: wanted - start.lines },
        })
    }

    /// Searches from the end of the file backwards; `None` if an entry is incomplete.
    fn back(&self, end: u64, wanted: usize) -> io::Result<Option<TailStart>> {
        let mut start = TailStart { offset: end, lines: 0 };
        let mut window = Window::default();
        while start.offset > 0 && start.lines < wanted {
            let Some(line) = window.line_before(&self.file, start.offset)? else { return Ok(None) };
            let bytes = line.len() as u64 + 1;
            if LogFileLine::parse(line).is_some() {
                start.lines += 1;
                start.offset -= bytes;
                continue;
            }
            let Some(block) = BlockEnd::parse(line) else { return Ok(None) };
            let Some(begin) = (start.offset - bytes).checked_sub(block.back as u64) else { return Ok(None) };
            let mut head = [0; BLOCK_FRAME];
            let filled = read_full_at(&self.file, &mut head, begin)?;
            let header = memchr(b'\n', &head[..filled])
                .and_then(|end| Some((BlockHeader::parse(&head[..end])?, end)))
                .filter(|(header, end)| end + 1 + header.bytes == block.back);
            if header.is_none() {
                return Ok(None);
            }
            start.lines += block.lines;
            start.offset = begin;
        }
        Ok(Some(start))
    }

    /// Reads the whole file and remembers where its last entries begin.
    fn forth(&self, end: u64, wanted: usize) -> io::Result<TailStart> {
        let mut entries: VecDeque<(u64, usize)> = VecDeque::new();
        let (mut offset, mut lines) = (0, 0);
        let mut chunk = vec![0; CHUNK];
        while offset < end {
            let filled = read_full_at(&self.file, &mut chunk, offset)?;
            let mut at = 0;
            while at < filled {
                match LogEntry::parse(&chunk[at..filled]) {
                    ParsedEntry::Entry(entry, bytes) => {
                        entries.push_back((offset + at as u64, entry.lines()));
                        lines += entry.lines();
                        at += bytes;
                    }
                    ParsedEntry::Damaged(bytes) => at += bytes,
                    ParsedEntry::Incomplete => break,
                }
                while entries.front().is_some_and(|(_, first)| lines - first >= wanted) {
                    lines -= entries.pop_front().map_or(0, |(_, first)| first);
                }
            }
            if at == 0 {
                // An incomplete entry at the end of the file, or bytes longer than any entry.
                at = filled.max(1);
            }
            offset += at as u64;
        }
        Ok(TailStart { offset: entries.front().map_or(offset, |(offset, _)| *offset), lines })
    }
}

/// The position of a search from the end.
#[derive(Debug, Clone, Copy)]
struct TailStart {
    offset: u64,
    lines: usize,
}

/// Whether one file has enough lines.
#[derive(Debug, Clone, Copy)]
enum FromEnd {
    /// The file has enough lines, and `surplus` more than wanted, since blocks are not divided.
    Reached { surplus: usize },
    /// This many lines are still wanted from older files.
    Older { wanted: usize },
}

/// A part of a file that is read backwards line by line.
#[derive(Debug, Default)]
struct Window {
    begin: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// Returns the line that ends, with its newline, right before `end`.
    fn line_before(&mut self, file: &File, end: u64) -> io::Result<Option<&[u8]>> {
        for _ in 0..2 {
            let inside = end.checked_sub(self.begin).and_then(|inside| usize::try_from(inside).ok());
            let range = match inside.filter(|&inside| inside > 0 && inside <= self.bytes.len()) {
                Some(inside) if self.bytes[inside - 1] != b'\n' => return Ok(None),
                Some(inside) => match memrchr(b'\n', &self.bytes[..inside - 1]) {
                    Some(before) => Some(before + 1..inside - 1),
                    None => (self.begin == 0).then_some(0..inside - 1),
                },
                None => None,
            };
            if let Some(range) = range {
                return Ok(self.bytes.get(range));
            }
            self.begin = end.saturating_sub(CHUNK as u64);
            self.bytes.resize(usize::try_from(end - self.begin).unwrap_or(CHUNK), 0);
            file.read_exact_at(&mut self.bytes, self.begin)?;
        }
        Ok(None)
    }
}

fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn open_if_there(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the logs of one run.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    at: Option<OpenLog>,
    since_ns: Option<i64>,
    /// The number of lines to skip, since reading cannot start inside a block.
    surplus: usize,
    skipped: u64,
}

/// The lines of one read.
#[derive(Debug, Default)]
pub struct Batch {
    pub lines: Vec<LogFileLine>,
    /// Where the next read continues; `None` before there is a log.
    pub position: Option<LogPosition>,
    /// The number of damaged lines that were skipped.
    pub skipped: u64,
}

/// Reads about `max_bytes` of a log. A run that is being started has no log yet, which is not an error.
///
/// # Errors
/// If the log cannot be read.
pub fn read_once(dir: &Path, start: Start, max_bytes: usize) -> io::Result<Batch> {
    let mut reader = match LogReader::open(dir, start) {
        Ok(reader) => reader,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Batch::default()),
        Err(error) => return Err(error),
    };
    match reader.next_batch(max_bytes) {
        Ok(lines) => Ok(Batch { lines, position: reader.position(), skipped: reader.skipped() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Batch::default()),
        Err(error) => Err(error),
    }
}

impl LogReader {
    /// Opens the logs in `dir`, which need not exist yet.
    pub fn open(dir: &Path, start: Start) -> io::Result<Self> {
        let mut reader = Self { dir: dir.to_path_buf(), at: None, since_ns: None, surplus: 0, skipped: 0 };
        match start {
            Start::Begin => reader.at = reader.oldest_after(0)?,
            Start::FromEnd { lines, since_ms } => {
                reader.since_ns = since_ms.map(|ms| ms.saturating_mul(1_000_000));
                reader.seek_from_end(lines)?;
            }
            Start::Since(ms) => reader.seek_since(ms)?,
            Start::At(position) => reader.seek_to(position)?,
        }
        Ok(reader)
    }

    /// Reads the next lines; none if there are none at present. About `max_bytes`, but at least 64 KiB, are read from
    /// the file at once.
    pub fn next_batch(&mut self, max_bytes: usize) -> io::Result<Vec<LogFileLine>> {
        loop {
            if self.at.is_none() {
                self.at = self.oldest_after(0)?;
            }
            let Some(at) = &mut self.at else {
                return Ok(Vec::new());
            };
            let mut lines = at.read(max_bytes, &mut self.skipped)?;
            if lines.is_empty() {
                if self.is_current()? {
                    return Ok(lines);
                }
                // The file was rotated, and may have got more lines since it was read above.
                if let Some(at) = &mut self.at {
                    lines = at.read(max_bytes, &mut self.skipped)?;
                }
            }
            if lines.is_empty() {
                match self.successor()? {
                    Some((next, missing)) => {
                        self.at = Some(next);
                        lines.extend(missing);
                    }
                    None => return Ok(lines),
                }
            }
            if self.surplus > 0 {
                let surplus = self.surplus.min(lines.len());
                lines.drain(..surplus);
                self.surplus -= surplus;
            }
            if let Some(since_ns) = self.since_ns {
                match lines.iter().position(|line| line.at_ns >= since_ns) {
                    // All later lines count, even if the clock was set back.
                    Some(first) => {
                        lines.drain(..first);
                        self.since_ns = None;
                    }
                    None => lines.clear(),
                }
            }
            if !lines.is_empty() {
                return Ok(lines);
            }
        }
    }

    /// Where the next line will be read; `None` before the first file exists.
    pub fn position(&self) -> Option<LogPosition> {
        self.at.as_ref().map(|at| at.position)
    }

    /// The number of skipped lines that are not log lines, for instance an incomplete line after a crash.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn is_current(&self) -> io::Result<bool> {
        let Some(at) = &self.at else { return Ok(false) };
        match fs::metadata(self.dir.join(CURRENT)) {
            Ok(meta) => Ok(meta.ino() == at.position.inode),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the file after the present one, and a gap line if files between them were removed. `None` while the
    /// writer is between renaming the old file and creating the new one.
    fn successor(&self) -> io::Result<Option<(OpenLog, Option<LogFileLine>)>> {
        let Some(at) = &self.at else { return Ok(None) };
        let wanted = at.position.number + 1;
        // Twice, because the successor can itself be rotated between the two lookups.
        for _ in 0..2 {
            if let Some(next) = OpenLog::numbered(&self.dir, wanted)? {
                return Ok(Some((next, None)));
            }
            match OpenLog::current(&self.dir)? {
                None => return Ok(None),
                // The writer could not create a new file and continues with this one.
                Some(current) if current.position.inode == at.position.inode => return Ok(None),
                Some(current) if current.position.number == wanted => {
                    return Ok(Some((current, None)));
                }
                Some(_) => {}
            }
        }
        let Some(next) = self.oldest_after(at.position.number)? else {
            return Ok(None);
        };
        let missing = next.position.number - wanted;
        let gap = (missing > 0).then(|| LogFileLine {
            at_ns: next.file.metadata().map_or(0, |meta| meta.mtime() * 1_000_000_000),
            stream: Stream::Gap,
            partial: false,
            bytes: format!("{missing} log files were removed before they could be read").into_bytes(),
        });
        Ok(Some((next, gap)))
    }

    fn oldest_after(&self, number: u64) -> io::Result<Option<OpenLog>> {
        if !self.dir.exists() {
            return Ok(None);
        }
        for candidate in rotated_numbers(&self.dir)?.into_iter().filter(|&n| n > number) {
            if let Some(log) = OpenLog::numbered(&self.dir, candidate)? {
                return Ok(Some(log));
            }
        }
        OpenLog::current(&self.dir)
    }

    fn seek_from_end(&mut self, lines: usize) -> io::Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        let Some(mut log) = OpenLog::current(&self.dir)? else {
            // The writer is between two files, or the run has no logs.
            self.at = self.oldest_after(0)?;
            return Ok(());
        };
        let mut wanted = lines;
        loop {
            match log.seek_from_end(wanted)? {
                FromEnd::Reached { surplus } => {
                    self.surplus = surplus;
                    break;
                }
                FromEnd::Older { wanted: more } if log.position.number > 1 => {
                    let Some(older) = OpenLog::numbered(&self.dir, log.position.number - 1)? else { break };
                    (log, wanted) = (older, more);
                }
                FromEnd::Older { .. } => break,
            }
        }
        self.at = Some(log);
        Ok(())
    }

    fn seek_since(&mut self, ms: i64) -> io::Result<()> {
        self.since_ns = Some(ms.saturating_mul(1_000_000));
        let mut number = 0;
        self.at = loop {
            match self.oldest_after(number)? {
                // No line in the file is newer than its last write.
                Some(log) if log.file.metadata()?.mtime() < ms.div_euclid(1000) - 1 => {
                    let inode = log.position.inode;
                    number = log.position.number;
                    self.at = Some(log);
                    if fs::metadata(self.dir.join(CURRENT)).is_ok_and(|meta| meta.ino() == inode) {
                        return Ok(());
                    }
                }
                other => break other,
            }
        };
        Ok(())
    }

    fn seek_to(&mut self, position: LogPosition) -> io::Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        let numbered = OpenLog::numbered(&self.dir, position.number)?;
        let same = match numbered {
            Some(log) => Some(log),
            None => OpenLog::current(&self.dir)?,
        }
        .filter(|log| log.position.inode == position.inode);
        self.at = match same {
            Some(mut log) => {
                log.position.offset = position.offset.min(log.file.metadata()?.len());
                Some(log)
            }
            // The file was removed meanwhile: continue with the oldest remaining one.
            None => self.oldest_after(position.number)?,
        };
        Ok(())
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
