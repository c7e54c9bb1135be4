//! The writer of an agent's log files; its owner is the shim, and there is one per run.
//!
//! ```text
//! logs/1.log  logs/2.log  …  logs/current.log        rotated by renaming current.log to <n>.log
//! ```
//!
//! The writer never blocks its caller for longer than a write to a file and never fails it: a full
//! disk costs output, which is counted and reported by a `gap` line, but never the agent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::log_line::{LogLine, MAX_PAYLOAD, Stamper, Stream};
use super::spec::LogLimits;

/// The file that is being written.
pub const CURRENT: &str = "current.log";

/// The name of a rotated file.
pub fn rotated_name(number: u64) -> String {
    format!("{number}.log")
}

/// The numbers of the rotated files, ascending.
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

/// Writes an agent's output.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    file: File,
    /// Bytes of complete lines in the current file.
    size: u64,
    next_number: u64,
    stamper: Stamper,
    /// Complete lines that are not yet written.
    batch: Vec<u8>,
    /// The beginning of a line, by stream.
    stdout_pending: Vec<u8>,
    stderr_pending: Vec<u8>,
    /// Payload bytes lost since the last gap line, and altogether.
    unreported: u64,
    lost: u64,
}

impl LogWriter {
    /// Opens (and creates) the current file in `dir`, which must exist.
    pub fn open(dir: &Path, limits: LogLimits) -> io::Result<Self> {
        let file = open_current(dir)?;
        let size = file.metadata()?.len();
        let next_number = rotated_numbers(dir)?.last().map_or(1, |last| last + 1);
        Ok(Self {
            dir: dir.to_path_buf(),
            limits,
            file,
            size,
            next_number,
            stamper: Stamper::default(),
            batch: Vec::new(),
            stdout_pending: Vec::new(),
            stderr_pending: Vec::new(),
            unreported: 0,
            lost: 0,
        })
    }

    /// Takes what was read from a stream; complete lines wait for [`LogWriter::flush`].
    pub fn push(&mut self, stream: Stream, chunk: &[u8], now_ns: i64) {
        let mut pending = std::mem::take(self.pending(stream));
        let mut rest = chunk;
        while !rest.is_empty() {
            let room = MAX_PAYLOAD - pending.len();
            // A newline right behind a full payload still ends that line.
            let window = &rest[..rest.len().min(room + 1)];
            match window.iter().position(|&b| b == b'\n') {
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

    /// Notes that a stream has ended: what came without a newline becomes a partial line.
    pub fn end(&mut self, stream: Stream, now_ns: i64) {
        let pending = std::mem::take(self.pending(stream));
        if !pending.is_empty() {
            self.append(stream, true, &pending, now_ns);
        }
    }

    /// Payload bytes that were lost so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes all complete lines with one system call (a rotation needs more). Never fails: what
    /// cannot be written is dropped and counted.
    pub fn flush(&mut self, now_ns: i64) {
        if self.batch.is_empty() {
            return;
        }
        let mut data = Vec::new();
        let gap = self.unreported;
        if gap > 0 {
            let text = format!("{gap} bytes of output were lost: the log could not be written");
            self.stamper.append(&mut data, now_ns, Stream::Gap, false, text.as_bytes());
        }
        let gap_line = data.len();
        if gap_line == 0 {
            std::mem::swap(&mut data, &mut self.batch);
        } else {
            data.append(&mut self.batch);
        }
        let written = write_all_counting(&mut self.file, &data);
        let kept = if written == data.len() {
            written
        } else {
            // A torn line would merge with the next one: cut it off.
            data[..written].iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1)
        };
        self.size += kept as u64;
        if kept < written && self.file.set_len(self.size).is_err() {
            // Then at least let the torn line end; readers skip it.
            self.batch.push(b'\n');
        }
        if kept >= gap_line && gap > 0 {
            self.unreported = 0;
        }
        if kept < data.len() {
            let dropped: u64 = data[kept..]
                .split(|&b| b == b'\n')
                .filter_map(LogLine::parse)
                .filter(|line| line.stream != Stream::Gap)
                .map(|line| line.bytes.len() as u64 + u64::from(!line.partial))
                .sum();
            self.unreported += dropped;
            self.lost += dropped;
        }
        if self.batch.is_empty() {
            // Gives the buffer back, so that a steady agent does not allocate for ever.
            data.clear();
            self.batch = data;
        }
    }

    /// Writes what is left and waits until the disk has it.
    pub fn finish(&mut self, now_ns: i64) {
        self.end(Stream::Stdout, now_ns);
        self.end(Stream::Stderr, now_ns);
        self.flush(now_ns);
        // A failing disk has already cost what it costs, and the exit must still be recorded.
        self.file.sync_all().ok();
    }

    fn pending(&mut self, stream: Stream) -> &mut Vec<u8> {
        match stream {
            Stream::Stderr => &mut self.stderr_pending,
            Stream::Stdout | Stream::Gap => &mut self.stdout_pending,
        }
    }

    fn append(&mut self, stream: Stream, partial: bool, payload: &[u8], now_ns: i64) {
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

    /// Begins a new file. When that is impossible the old one goes on, larger than it should be.
    fn rotate(&mut self) {
        let current = self.dir.join(CURRENT);
        let rotated = self.dir.join(rotated_name(self.next_number));
        if fs::rename(&current, &rotated).is_err() {
            return;
        }
        match open_current(&self.dir) {
            Ok(file) => {
                self.file = file;
                self.size = 0;
                self.next_number += 1;
                self.prune();
            }
            Err(_) => {
                // Readers follow the name: the file that is written must be the current one. If
                // this fails too, they still find it under its number.
                fs::rename(&rotated, &current).ok();
            }
        }
    }

    fn prune(&self) {
        let keep = self.limits.max_files as usize;
        // What cannot be listed or removed now is tried again at the next rotation.
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

fn open_current(dir: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join(CURRENT))
}

/// Returns how many of the bytes come before a UTF-8 character that is not whole: readers show each
/// part of a long line by itself, and must not be given half a character. Other bytes are cut anywhere.
fn whole_characters(bytes: &[u8]) -> usize {
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

/// Writes as much as possible and returns how much that was.
fn write_all_counting(file: &mut impl Write, data: &[u8]) -> usize {
    let mut written = 0;
    while written < data.len() {
        match file.write(&data[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<LogLine> {
        fs::read(path)
            .unwrap()
            .split_inclusive(|&b| b == b'\n')
            .map(|line| LogLine::parse(&line[..line.len() - 1]).unwrap())
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
        let limits = LogLimits { max_bytes: 200, max_files: 2 };
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
