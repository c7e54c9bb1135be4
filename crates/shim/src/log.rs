//! Writes an agent's log files. There is one writer per run.
//!
//! ```text
//! logs/1.log  logs/2.log  …  logs/current.log        rotated by renaming current.log to <n>.log
//! ```
//!
//! A few lines are written one by one, each with its time; larger amounts are written as blocks, as they were read (see
//! `log_line` for the format). Nothing is delayed: the result of one read is in the file before the next read.
//!
//! The writer blocks its caller for no longer than a write to a file, and never fails: on a full disk output is
//! dropped, counted and reported by a `gap` line, and the agent continues.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memchr::{memchr, memchr_iter, memrchr};

use super::log_line::{BLOCK_FRAME, BlockEnd, LogFileLine, MAX_BLOCK, MAX_PAYLOAD, Stamper, Stream};
use super::spec::LogLimits;

/// At least this many bytes of complete lines are written as a block, which is cheaper; fewer are written as single
/// lines, which are easier to read for people.
const MIN_BLOCK: usize = 8 * 1024;

/// The file that is being written.
pub const CURRENT: &str = "current.log";

/// The name of a rotated file.
pub fn rotated_name(number: u64) -> String {
    format!("{number}.log")
}

/// Returns the numbers of the rotated files in ascending order.
pub fn rotated_numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".log"));
        numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Output that was lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loss {
    /// Includes newlines.
    pub bytes: u64,
    /// The number of newlines.
    pub lines: u64,
    /// When the first lost byte was read, in Unix nanoseconds.
    pub since_ns: i64,
}

impl Loss {
    /// Adds output that was read at `at_ns`.
    pub fn add(&mut self, bytes: u64, lines: u64, at_ns: i64) {
        if self.bytes == 0 {
            self.since_ns = at_ns;
        }
        self.bytes += bytes;
        self.lines += lines;
    }

    /// Returns the payload of a gap line.
    pub fn sentence(&self, reason: &str) -> Vec<u8> {
        let mut since = Vec::new();
        Stamper::default().append_time(&mut since, self.since_ns);
        let since = String::from_utf8_lossy(&since).into_owned();
        format!("{} bytes ({} lines) of output since {since} were lost: {reason}", self.bytes, self.lines).into_bytes()
    }
}

/// Writes an agent's output.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    file: File,
    /// Bytes of complete lines and blocks in the current file.
    size: u64,
    /// The time of the first entry of the current file, in Unix nanoseconds.
    born_ns: i64,
    next_number: u64,
    stamper: Stamper,
    /// Complete lines that have not been written yet.
    batch: Vec<u8>,
    /// The beginning of an incomplete line, by stream.
    stdout_pending: Vec<u8>,
    stderr_pending: Vec<u8>,
    /// Output lost since the last gap line.
    unreported: Loss,
    /// Bytes lost since the start.
    lost: u64,
}

impl LogWriter {
    /// Opens the current file in `dir`, which must exist; creates the file if it is missing.
    pub fn open(dir: &Path, limits: LogLimits) -> io::Result<Self> {
        let file = open_current(dir)?;
        let meta = file.metadata()?;
        let next_number = rotated_numbers(dir)?.last().map_or(1, |last| last + 1);
        Ok(Self {
            dir: dir.to_path_buf(),
            limits,
            file,
            size: meta.len(),
            born_ns: meta.mtime().saturating_mul(1_000_000_000),
            next_number,
            stamper: Stamper::default(),
            batch: Vec::new(),
            stdout_pending: Vec::new(),
            stderr_pending: Vec::new(),
            unreported: Loss::default(),
            lost: 0,
        })
    }

    /// Takes output that was read from a stream. Large amounts are written at once; single complete lines are kept
    /// until [`LogWriter::flush`].
    pub fn push(&mut self, stream: Stream, chunk: &[u8], now_ns: i64) {
        let rest = if chunk.len() >= MIN_BLOCK { self.push_blocks(stream, chunk, now_ns) } else { chunk };
        self.push_lines(stream, rest, now_ns);
    }

    fn push_lines(&mut self, stream: Stream, chunk: &[u8], now_ns: i64) {
        let mut pending = std::mem::take(self.pending(stream));
        let mut rest = chunk;
        while !rest.is_empty() {
            let room = MAX_PAYLOAD - pending.len();
            // Includes a newline after a payload of the maximum length, which still ends that line.
            let window = &rest[..rest.len().min(room + 1)];
            match memchr(b'\n', window) {
                Some(end) if pending.is_empty() => {
                    self.append(stream, false, &rest[..end], now_ns);
                    rest = &rest[end + 1..];
                }
                Some(end) => {
                    pending.extend_from_slice(&rest[..end]);
                    self.append(stream, false, &pending, now_ns);
                    pending.clear();
                    rest = &rest[end + 1..];
                }
                None if window.len() > room => {
                    pending.extend_from_slice(&rest[..room]);
                    let cut = whole_characters(&pending);
                    self.append(stream, true, &pending[..cut], now_ns);
                    pending.drain(..cut);
                    rest = &rest[room..];
                }
                None => {
                    pending.extend_from_slice(rest);
                    rest = &[];
                }
            }
        }
        *self.pending(stream) = pending;
    }

    /// Writes the complete lines of a chunk as blocks, without copying them, as far as blocks are cheaper; returns the
    /// rest.
    fn push_blocks<'a>(&mut self, stream: Stream, chunk: &'a [u8], now_ns: i64) -> &'a [u8] {
        // Such small files occur in tests of rotation only; they are written line by line.
        if self.limits.max_bytes > 0 && self.limits.max_bytes < 4 * MIN_BLOCK as u64 {
            return chunk;
        }
        let mut rest = chunk;
        loop {
            if self.is_old(now_ns) {
                self.flush(now_ns);
                self.rotate();
            }
            let pending = std::mem::take(self.pending(stream));
            let plan = self.plan(stream, &pending, rest, now_ns);
            if !plan.blocks.is_empty() {
                self.flush(now_ns);
                self.write_blocks(&plan.blocks, &pending, now_ns);
                rest = plan.rest;
            } else {
                *self.pending(stream) = pending;
            }
            if !plan.wants_file || self.size == 0 {
                return rest;
            }
            self.flush(now_ns);
            if !self.rotate() {
                return rest;
            }
        }
    }

    /// Divides the beginning of a chunk into blocks that fit into the current file.
    fn plan<'a>(&mut self, stream: Stream, pending: &[u8], chunk: &'a [u8], now_ns: i64) -> Plan<'a> {
        let mut room = match self.limits.max_bytes {
            0 => usize::MAX,
            max => usize::try_from(max.saturating_sub(self.size + self.batch.len() as u64)).unwrap_or(usize::MAX),
        };
        let mut plan = Plan { blocks: Vec::new(), rest: chunk, wants_file: false };
        let mut head = pending.len();
        while plan.rest.len() >= MIN_BLOCK {
            let cut = |most: usize| {
                let last = memrchr(b'\n', &plan.rest[..most.min(plan.rest.len())]);
                last.map(|last| last + 1).filter(|&bytes| bytes >= MIN_BLOCK)
            };
            let Some(wanted) = cut(MAX_BLOCK - head) else { break };
            let most = room.saturating_sub(BLOCK_FRAME + head);
            let Some(bytes) = (if wanted <= most { Some(wanted) } else { cut(most) }) else {
                plan.wants_file = true;
                break;
            };
            let (lines, rest) = plan.rest.split_at(bytes);
            let mut header = Vec::with_capacity(BLOCK_FRAME);
            self.stamper.append_block_header(&mut header, now_ns, stream, head + bytes);
            let count = memchr_iter(b'\n', lines).count();
            let mut end = Vec::with_capacity(BLOCK_FRAME);
            BlockEnd { back: header.len() + head + bytes, lines: count }.append(&mut end);
            room = room.saturating_sub(header.len() + head + bytes + end.len());
            plan.blocks.push(Block { header, lines, end, count });
            (plan.rest, head) = (rest, 0);
        }
        plan
    }

    /// Writes blocks, the first of which begins with the pending beginning of a line.
    fn write_blocks(&mut self, blocks: &[Block<'_>], pending: &[u8], now_ns: i64) {
        let gap = self.gap_line(now_ns);
        let mut slices = vec![IoSlice::new(&gap)];
        // The end of each block in the written bytes, and its amount of the agent's output.
        let mut ends = Vec::with_capacity(blocks.len());
        let mut total = gap.len();
        for (number, block) in blocks.iter().enumerate() {
            let head = if number == 0 { pending } else { &[] };
            slices.extend([&block.header, head, block.lines, &block.end].map(IoSlice::new));
            let bytes = head.len() + block.lines.len();
            total += block.header.len() + bytes + block.end.len();
            ends.push((total, bytes as u64, block.count as u64));
        }
        if self.size == 0 {
            self.born_ns = now_ns;
        }
        let written = write_counting(&mut self.file, &mut slices);
        let complete = ends.iter().take_while(|(end, ..)| *end <= written);
        let kept = complete.last().map_or(if written >= gap.len() { gap.len() } else { 0 }, |(end, ..)| *end);
        self.settle(kept, written, gap.len());
        for (_, bytes, lines) in ends.iter().filter(|(end, ..)| *end > kept) {
            self.lose(*bytes, *lines, now_ns);
        }
    }

    /// Marks the end of a stream: an incomplete line is written as a partial line.
    pub fn end(&mut self, stream: Stream, now_ns: i64) {
        let pending = std::mem::take(self.pending(stream));
        if !pending.is_empty() {
            self.append(stream, true, &pending, now_ns);
        }
    }

    /// Writes a line of Fermata's after everything that was pushed before.
    pub fn say(&mut self, stream: Stream, text: &[u8], now_ns: i64) {
        self.append(stream, false, text, now_ns);
        self.flush(now_ns);
    }

    /// Returns the number of bytes lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Counts bytes that were lost before they reached this writer.
    pub fn count_lost(&mut self, bytes: u64) {
        self.lost += bytes;
    }

    /// Writes all complete lines with one system call (or several, if a file is rotated). Never fails: output that
    /// cannot be written is dropped and counted.
    pub fn flush(&mut self, now_ns: i64) {
        if !self.batch.is_empty() {
            self.write_batch(now_ns);
        }
    }

    fn write_batch(&mut self, now_ns: i64) {
        let (gap, mut data) = (self.gap_line(now_ns), std::mem::take(&mut self.batch));
        if self.size == 0 {
            self.born_ns = now_ns;
        }
        let written = write_counting(&mut self.file, &mut [IoSlice::new(&gap), IoSlice::new(&data)]);
        let of_data = written.saturating_sub(gap.len());
        let kept = match written {
            _ if written < gap.len() => 0,
            _ if of_data == data.len() => written,
            // An incomplete line would merge with the next one, so it is removed.
            _ => gap.len() + memrchr(b'\n', &data[..of_data]).map_or(0, |end| end + 1),
        };
        self.settle(kept, written, gap.len());
        for bytes in data[kept.saturating_sub(gap.len())..].split(|&b| b == b'\n') {
            let Some(line) = LogFileLine::parse(bytes) else { continue };
            if line.stream.is_output() {
                let newline = u64::from(!line.partial);
                self.lose(line.bytes.len() as u64 + newline, newline, line.at_ns);
            } else if self.batch.len() < MAX_PAYLOAD {
                // The report of another loss must not be lost itself.
                self.batch.extend_from_slice(bytes);
                self.batch.push(b'\n');
            }
        }
        if self.batch.is_empty() {
            // Reuses the buffer, so that a steady agent causes no allocations.
            data.clear();
            self.batch = data;
        }
    }

    /// Returns the line that reports earlier losses; empty if there are none.
    fn gap_line(&mut self, now_ns: i64) -> Vec<u8> {
        let mut line = Vec::new();
        if self.unreported.bytes > 0 {
            let text = self.unreported.sentence("the log could not be written");
            self.stamper.append(&mut line, now_ns, Stream::Gap, false, &text);
        }
        line
    }

    /// Accounts for a write of which the first `kept` bytes are complete lines and blocks.
    fn settle(&mut self, kept: usize, written: usize, gap: usize) {
        self.size += kept as u64;
        if kept < written && self.file.set_len(self.size).is_err() {
            // At least end the incomplete line; readers skip it.
            self.batch.push(b'\n');
        }
        if kept >= gap {
            self.unreported = Loss::default();
        }
    }

    fn lose(&mut self, bytes: u64, lines: u64, at_ns: i64) {
        self.unreported.add(bytes, lines, at_ns);
        self.lost += bytes;
    }

    /// Writes the remaining lines and syncs the file.
    pub fn finish(&mut self, now_ns: i64) {
        self.end(Stream::Stdout, now_ns);
        self.end(Stream::Stderr, now_ns);
        self.flush(now_ns);
        if self.unreported.bytes > 0 {
            self.write_batch(now_ns);
        }
        // The exit must be recorded even if the disk fails.
        self.file.sync_all().ok();
    }

    fn pending(&mut self, stream: Stream) -> &mut Vec<u8> {
        match stream {
            Stream::Stderr => &mut self.stderr_pending,
            Stream::Stdout | Stream::Gap | Stream::Note => &mut self.stdout_pending,
        }
    }

    fn append(&mut self, stream: Stream, partial: bool, payload: &[u8], now_ns: i64) {
        if self.is_old(now_ns) {
            self.flush(now_ns);
            self.rotate();
        }
        let start = self.batch.len();
        self.stamper.append(&mut self.batch, now_ns, stream, partial, payload);
        let full = self.limits.max_bytes > 0
            && self.size + self.batch.len() as u64 > self.limits.max_bytes
            && self.size + start as u64 > 0;
        if full {
            let line = self.batch.split_off(start);
            self.flush(now_ns);
            self.rotate();
            self.batch.extend_from_slice(&line);
        }
    }

    /// Returns whether the first entry of the current file is older than the limit.
    fn is_old(&self, now_ns: i64) -> bool {
        let age_ms = u64::try_from(now_ns.saturating_sub(self.born_ns) / 1_000_000).unwrap_or(0);
        self.limits.max_age_ms > 0 && self.size > 0 && age_ms >= self.limits.max_age_ms
    }

    /// Starts a new file. If that is impossible the old file grows larger than the limit.
    fn rotate(&mut self) -> bool {
        let current = self.dir.join(CURRENT);
        let rotated = self.dir.join(rotated_name(self.next_number));
        if fs::rename(&current, &rotated).is_err() {
            return false;
        }
        match open_current(&self.dir) {
            Ok(file) => {
                self.file = file;
                self.size = 0;
                self.next_number += 1;
                self.prune();
                true
            }
            Err(_) => {
                // Readers open the current file by name, so the file being written must have that name. If the renaming
                // fails too, readers still find the file by its number.
                fs::rename(&rotated, &current).ok();
                false
            }
        }
    }

    fn prune(&self) {
        let keep = self.limits.max_files as usize;
        // A file that cannot be listed or removed now is tried again at the next rotation.
        if keep > 0
            && let Ok(numbers) = rotated_numbers(&self.dir)
        {
            let surplus = numbers.len().saturating_sub(keep);
            for number in &numbers[..surplus] {
                fs::remove_file(self.dir.join(rotated_name(*number))).ok();
            }
        }
    }
}

/// The part of a chunk that is written as blocks into the current file.
struct Plan<'a> {
    blocks: Vec<Block<'a>>,
    rest: &'a [u8],
    /// The rest would also be written as blocks if the current file had room.
    wants_file: bool,
}

/// Complete lines, written as they were read, between a header and an end.
struct Block<'a> {
    header: Vec<u8>,
    lines: &'a [u8],
    end: Vec<u8>,
    /// The number of lines.
    count: usize,
}

fn open_current(dir: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join(CURRENT))
}

/// Returns how many of the bytes precede an incomplete UTF-8 character at the end: readers show each part of a long
/// line by itself and must not receive half a character. Bytes that are not UTF-8 are divided anywhere.
pub(super) fn whole_characters(bytes: &[u8]) -> usize {
    for (back, byte) in bytes.iter().rev().take(3).enumerate() {
        let width = match byte {
            0xf0..=0xf7 => 4,
            0xe0..=0xef => 3,
            0xc0..=0xdf => 2,
            0x80..=0xbf => continue,
            _ => break,
        };
        return if width > back + 1 { bytes.len() - back - 1 } else { bytes.len() };
    }
    bytes.len()
}

/// Writes as much as possible and returns the number of written bytes.
fn write_counting(file: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> usize {
    let mut written = 0;
    // Removes empty slices from the front: a write of 0 bytes would be mistaken for a full disk.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) => break,
            Ok(count) => {
                written += count;
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<LogFileLine> {
        fs::read(path)
            .unwrap()
            .split_inclusive(|&b| b == b'\n')
            .map(|line| LogFileLine::parse(&line[..line.len() - 1]).unwrap())
            .collect()
    }

    #[test]
    fn lines_are_cut_at_16_kib_and_an_unfinished_one_is_partial() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogLimits::default()).unwrap();
        let exact = vec![b'x'; MAX_PAYLOAD];
        log.push(Stream::Stdout, &exact, 1);
        log.push(Stream::Stdout, b"\n", 2);
        log.push(Stream::Stdout, &vec![b'y'; MAX_PAYLOAD + 5], 3);
        log.push(Stream::Stderr, b"bin\0ary\xff\nab", 4);
        log.push(Stream::Stderr, b"c", 4);
        log.finish(5);
        let found: Vec<_> = lines(&dir.path().join(CURRENT))
            .into_iter()
            .map(|line| (line.stream, line.partial, line.bytes.len()))
            .collect();
        assert_eq!(
            found,
            [
                (Stream::Stdout, false, MAX_PAYLOAD),
                (Stream::Stdout, true, MAX_PAYLOAD),
                (Stream::Stderr, false, 8),
                (Stream::Stdout, true, 5),
                (Stream::Stderr, true, 3),
            ]
        );
    }

    #[test]
    fn a_full_disk_costs_output_that_is_counted_and_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogLimits::default()).unwrap();
        log.push(Stream::Stdout, b"kept\n", 1);
        log.flush(1);
        let good = std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.push(Stream::Stdout, b"12345\n", 2);
        log.flush(2);
        log.push(Stream::Stdout, b"1\n", 3);
        log.flush(3);
        assert_eq!(log.lost(), 8);
        log.file = good;
        log.push(Stream::Stdout, b"again\n", 4);
        log.finish(4);
        let found = lines(&dir.path().join(CURRENT));
        assert_eq!(found.len(), 3);
        assert_eq!(found[1].stream, Stream::Gap);
        assert!(found[1].bytes.starts_with(b"8 bytes"));
        assert_eq!(found[2].bytes, b"again");
    }

    #[test]
    fn rotation_keeps_the_newest_files_and_never_cuts_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LogLimits { max_bytes: 200, max_files: 2, max_age_ms: 0 };
        let mut log = LogWriter::open(dir.path(), limits).unwrap();
        for number in 0..40 {
            log.push(Stream::Stdout, format!("line {number}\n").as_bytes(), number);
        }
        log.finish(41);
        let numbers = rotated_numbers(dir.path()).unwrap();
        assert_eq!(numbers.len(), 2);
        let mut all = Vec::new();
        for number in numbers {
            let path = dir.path().join(rotated_name(number));
            assert!(fs::metadata(&path).unwrap().len() <= 200);
            all.extend(lines(&path));
        }
        all.extend(lines(&dir.path().join(CURRENT)));
        let last: Vec<_> = (40 - all.len() as i64..40).collect();
        assert_eq!(all.iter().map(|line| line.at_ns).collect::<Vec<_>>(), last);
    }
}
