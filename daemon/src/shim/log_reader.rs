//! Reading an agent's logs while the shim writes and rotates them.
//!
//! Blocking and without threads; for a daemon's blocking pool or a command. The reader never locks
//! anything: it holds the file open (so rotation cannot take it away) and looks for the successor
//! by its number once the file has been rotated *and* read to its end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::log::{CURRENT, rotated_name, rotated_numbers};
use super::log_line::{LogLine, Stream};

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest line that is left.
    Begin,
    /// So many lines before the present end (partial ones count as lines).
    FromEnd(usize),
    /// At the first line that is not older than this, Unix milliseconds.
    Since(i64),
    /// Where an earlier reader stood.
    At(LogPosition),
}

/// A place between two lines that stays valid when files are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPosition {
    /// The number that the file has or will get when it is rotated.
    pub number: u64,
    /// The file's inode: tells a log that was begun anew.
    pub inode: u64,
    /// Bytes from the file's beginning.
    pub offset: u64,
}

/// The least that is read at once: more than the longest line.
const CHUNK: usize = 64 * 1024;

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

    /// Opens the current file and finds out which number it will get: one more than the highest,
    /// provided that no rotation came between the two looks.
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

    /// Reads complete lines from the position on.
    fn read(&mut self, max_bytes: usize, skipped: &mut u64) -> io::Result<Vec<LogLine>> {
        let mut chunk = vec![0; max_bytes.max(CHUNK)];
        let mut filled = 0;
        while filled < chunk.len() {
            match self.file.read_at(&mut chunk[filled..], self.position.offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let full = filled == chunk.len();
        chunk.truncate(filled);
        let Some(end) = chunk.iter().rposition(|&b| b == b'\n') else {
            if full {
                // No line of ours is that long: step over it instead of waiting for its end.
                *skipped += 1;
                self.position.offset += filled as u64;
                return self.read(max_bytes, skipped);
            }
            return Ok(Vec::new());
        };
        self.position.offset += end as u64 + 1;
        let mut lines = Vec::new();
        for line in chunk[..end].split(|&b| b == b'\n') {
            match LogLine::parse(line) {
                Some(line) => lines.push(line),
                None => *skipped += 1,
            }
        }
        Ok(lines)
    }

    /// Moves the position so that `wanted` lines follow it; returns how many are still wanted
    /// from older files.
    fn seek_from_end(&mut self, wanted: usize) -> io::Result<usize> {
        let mut end = self.file.metadata()?.len();
        let mut newlines = 0;
        let mut block = vec![0; CHUNK];
        while end > 0 {
            let begin = end.saturating_sub(CHUNK as u64);
            let part = &mut block[..usize::try_from(end - begin).unwrap_or(CHUNK)];
            self.file.read_exact_at(part, begin)?;
            for (place, _) in part.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
                if newlines == wanted {
                    self.position.offset = begin + place as u64 + 1;
                    return Ok(0);
                }
                newlines += 1;
            }
            end = begin;
        }
        self.position.offset = 0;
        Ok(wanted - newlines)
    }
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
    skipped: u64,
}

impl LogReader {
    /// Opens the logs in `dir`; fine when there are none yet.
    pub fn open(dir: &Path, start: Start) -> io::Result<Self> {
        let mut reader = Self { dir: dir.to_path_buf(), at: None, since_ns: None, skipped: 0 };
        match start {
            Start::Begin => reader.at = reader.oldest_after(0)?,
            Start::FromEnd(lines) => reader.seek_from_end(lines)?,
            Start::Since(ms) => reader.seek_since(ms)?,
            Start::At(position) => reader.seek_to(position)?,
        }
        Ok(reader)
    }

    /// Reads on: some lines, or none when there are none *now*. About `max_bytes` are read from
    /// the file at once, at least 64 KiB.
    pub fn next_batch(&mut self, max_bytes: usize) -> io::Result<Vec<LogLine>> {
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
                // It was rotated, perhaps with new lines since the look above.
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
            if let Some(since_ns) = self.since_ns {
                match lines.iter().position(|line| line.at_ns >= since_ns) {
                    // From here on everything counts, also when the clock is set back.
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

    /// Where the next line will be read; `None` before the first file was there.
    pub fn position(&self) -> Option<LogPosition> {
        self.at.as_ref().map(|at| at.position)
    }

    /// How many lines were stepped over because they are not log lines (a torn line after a crash).
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

    /// The file after the present one, with a gap line if files between were pruned. `None` while
    /// the writer is between renaming the old and creating the new file.
    fn successor(&self) -> io::Result<Option<(OpenLog, Option<LogLine>)>> {
        let Some(at) = &self.at else { return Ok(None) };
        let wanted = at.position.number + 1;
        // Twice, because the successor can itself be rotated between the two questions.
        for _ in 0..2 {
            if let Some(next) = OpenLog::numbered(&self.dir, wanted)? {
                return Ok(Some((next, None)));
            }
            match OpenLog::current(&self.dir)? {
                None => return Ok(None),
                // The writer could not begin a new file and went on with ours.
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
        let gap = (missing > 0).then(|| LogLine {
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
            // Between two files, or a run without logs.
            self.at = self.oldest_after(0)?;
            return Ok(());
        };
        let mut wanted = log.seek_from_end(lines)?;
        while wanted > 0 && log.position.number > 1 {
            let Some(older) = OpenLog::numbered(&self.dir, log.position.number - 1)? else {
                break;
            };
            log = older;
            wanted = log.seek_from_end(wanted)?;
        }
        self.at = Some(log);
        Ok(())
    }

    fn seek_since(&mut self, ms: i64) -> io::Result<()> {
        self.since_ns = Some(ms.saturating_mul(1_000_000));
        let mut number = 0;
        self.at = loop {
            match self.oldest_after(number)? {
                // Nothing in it is younger than its last write.
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
            // Pruned meanwhile: go on with the oldest that is left.
            None => self.oldest_after(position.number)?,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::log::LogWriter;
    use super::super::spec::LogLimits;
    use super::*;

    fn text(lines: &[LogLine]) -> Vec<String> {
        lines.iter().map(|line| String::from_utf8_lossy(&line.bytes).into_owned()).collect()
    }

    fn drain(reader: &mut LogReader) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let batch = reader.next_batch(1).unwrap();
            if batch.is_empty() {
                return all;
            }
            all.extend(text(&batch));
        }
    }

    fn write(log: &mut LogWriter, range: std::ops::Range<i64>) {
        for number in range {
            log.push(Stream::Stdout, format!("{number}\n").as_bytes(), number * 1_000_000);
        }
        log.flush(0);
    }

    fn numbers(range: std::ops::Range<i64>) -> Vec<String> {
        range.map(|number| number.to_string()).collect()
    }

    #[test]
    fn a_follower_sees_every_line_once_while_files_are_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_bytes: 300, max_files: 0 };
        let mut log = LogWriter::open(dir.path(), limits).unwrap();
        let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
        let mut seen = Vec::new();
        for round in 0..50 {
            write(&mut log, round * 7..(round + 1) * 7);
            if round % 3 == 0 {
                seen.extend(drain(&mut reader));
            }
        }
        seen.extend(drain(&mut reader));
        assert_eq!(seen, numbers(0..350));
    }

    #[test]
    fn the_last_lines_are_found_across_files() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_bytes: 300, max_files: 0 };
        let mut log = LogWriter::open(dir.path(), limits).unwrap();
        write(&mut log, 0..100);
        for wanted in [0, 1, 5, 6, 7, 50, 99, 100, 1000] {
            let mut reader = LogReader::open(dir.path(), Start::FromEnd(wanted as usize)).unwrap();
            assert_eq!(drain(&mut reader), numbers((100 - wanted).max(0)..100), "{wanted}");
        }
        let mut reader = LogReader::open(dir.path(), Start::FromEnd(0)).unwrap();
        write(&mut log, 100..120);
        assert_eq!(drain(&mut reader), numbers(100..120));
    }

    #[test]
    fn since_skips_what_is_older() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes: 300, max_files: 0 }).unwrap();
        write(&mut log, 0..100);
        let mut reader = LogReader::open(dir.path(), Start::Since(60)).unwrap();
        assert_eq!(drain(&mut reader), numbers(60..100));
    }

    #[test]
    fn a_position_survives_rotation_and_a_slow_reader_is_told_what_it_missed() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes: 300, max_files: 2 }).unwrap();
        write(&mut log, 0..3);
        let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
        assert_eq!(drain(&mut reader), numbers(0..3));
        let position = reader.position().unwrap();
        write(&mut log, 3..12);
        let mut later = LogReader::open(dir.path(), Start::At(position)).unwrap();
        assert_eq!(drain(&mut later), numbers(3..12));
        write(&mut log, 12..100);
        let rest = drain(&mut later);
        assert!(rest.iter().any(|line| line.contains("were removed")), "{rest:?}");
        assert_eq!(rest.last().unwrap(), "99");
    }

    #[test]
    fn a_line_that_is_being_written_is_not_shown_in_halves() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::create(dir.path().join(CURRENT)).unwrap();
        file.write_all(b"2026-01-01T00:00:00.000000000Z stdout F hal").unwrap();
        let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
        assert!(reader.next_batch(1).unwrap().is_empty());
        file.write_all(b"ves\n").unwrap();
        assert_eq!(drain(&mut reader), ["halves"]);
    }

    #[test]
    fn a_folder_without_logs_is_an_empty_log_until_the_first_file_comes() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = LogReader::open(&dir.path().join("logs"), Start::FromEnd(3)).unwrap();
        assert!(reader.next_batch(1).unwrap().is_empty());
        fs::create_dir(dir.path().join("logs")).unwrap();
        let mut log = LogWriter::open(&dir.path().join("logs"), LogLimits::default()).unwrap();
        write(&mut log, 0..1);
        assert_eq!(drain(&mut reader), ["0"]);
    }
}
