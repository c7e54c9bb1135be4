//! Writer and reader of logs together: every line is read exactly once and complete.

use super::super::log::LogWriter;
use super::super::spec::LogLimits;
use super::*;

fn text(lines: &[LogFileLine]) -> Vec<String> {
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
    let limits = LogLimits { max_bytes: 300, max_files: 0, max_age_ms: 0 };
    let mut log = LogWriter::open(dir.path(), limits).unwrap();
    let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
    let mut read = Vec::new();
    for round in 0..50 {
        write(&mut log, round * 7..(round + 1) * 7);
        if round % 3 == 0 {
            read.extend(drain(&mut reader));
        }
    }
    read.extend(drain(&mut reader));
    assert_eq!(read, numbers(0..350));
}

#[test]
fn the_last_lines_are_found_across_files() {
    let dir = tempfile::tempdir().unwrap();
    let limits = LogLimits { max_bytes: 300, max_files: 0, max_age_ms: 0 };
    let mut log = LogWriter::open(dir.path(), limits).unwrap();
    write(&mut log, 0..100);
    for wanted in [0, 1, 5, 6, 7, 50, 99, 100, 1000] {
        let mut reader =
            LogReader::open(dir.path(), Start::FromEnd { lines: wanted as usize, since_ms: None }).unwrap();
        assert_eq!(drain(&mut reader), numbers((100 - wanted).max(0)..100), "{wanted}");
    }
    let mut reader = LogReader::open(dir.path(), Start::FromEnd { lines: 0, since_ms: None }).unwrap();
    write(&mut log, 100..120);
    assert_eq!(drain(&mut reader), numbers(100..120));
}

#[test]
fn since_skips_what_is_older() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes: 300, max_files: 0, max_age_ms: 0 }).unwrap();
    write(&mut log, 0..100);
    let mut reader = LogReader::open(dir.path(), Start::Since(60)).unwrap();
    assert_eq!(drain(&mut reader), numbers(60..100));
}

#[test]
fn a_position_survives_rotation_and_a_slow_reader_gets_a_gap_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes: 300, max_files: 2, max_age_ms: 0 }).unwrap();
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
    let mut reader = LogReader::open(&dir.path().join("logs"), Start::FromEnd { lines: 3, since_ms: None }).unwrap();
    assert!(reader.next_batch(1).unwrap().is_empty());
    fs::create_dir(dir.path().join("logs")).unwrap();
    let mut log = LogWriter::open(&dir.path().join("logs"), LogLimits::default()).unwrap();
    write(&mut log, 0..1);
    assert_eq!(drain(&mut reader), ["0"]);
}

/// Lines of many lengths, some longer than the payload of a log line.
fn text_of(seed: usize, bytes: usize) -> Vec<u8> {
    let mut text = Vec::new();
    let mut number = seed;
    while text.len() < bytes {
        let length = [0, 3, 20, 100, 4000, 17_000, 70_000][number * 7919 % 7];
        text.extend_from_slice(format!("{number} ").as_bytes());
        text.resize(text.len() + length, b'a' + (number % 26) as u8);
        text.push(b'\n');
        number += 1;
    }
    text
}

fn joined(lines: &[LogFileLine], stream: Stream) -> Vec<u8> {
    let mut all = Vec::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        all.extend_from_slice(&line.bytes);
        if !line.partial {
            all.push(b'\n');
        }
    }
    all
}

fn all_lines(reader: &mut LogReader) -> Vec<LogFileLine> {
    let mut all = Vec::new();
    loop {
        let batch = reader.next_batch(1).unwrap();
        if batch.is_empty() {
            return all;
        }
        all.extend(batch);
    }
}

#[test]
fn bulk_of_two_streams_comes_back_byte_by_byte_whatever_the_chunks_and_files() {
    let (out, err) = (text_of(1, 3 << 20), text_of(4, 1 << 20));
    for (max_bytes, chunk) in
        [(0, 262_144), (0, 65_536), (40_000, 65_536), (200_000, 262_144), (1 << 20, 9_000), (3_000, 70_000)]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes, max_files: 0, max_age_ms: 0 }).unwrap();
        let (mut left_out, mut left_err) = (&out[..], &err[..]);
        while !(left_out.is_empty() && left_err.is_empty()) {
            for (stream, left) in [(Stream::Stdout, &mut left_out), (Stream::Stderr, &mut left_err)] {
                let (now, later) = left.split_at(chunk.min(left.len()));
                log.push(stream, now, 5);
                *left = later;
            }
            log.flush(5);
        }
        log.finish(6);
        let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
        let lines = all_lines(&mut reader);
        assert_eq!(reader.skipped(), 0);
        assert!(joined(&lines, Stream::Stdout) == out, "{max_bytes} {chunk}");
        assert!(joined(&lines, Stream::Stderr) == err, "{max_bytes} {chunk}");
        assert!(lines.iter().all(|line| line.bytes.len() <= MAX_PAYLOAD));
        for number in rotated_numbers(dir.path()).unwrap() {
            let size = fs::metadata(dir.path().join(rotated_name(number))).unwrap().len();
            // A single line may be larger than a very small file.
            assert!(max_bytes == 0 || size <= max_bytes.max(MAX_PAYLOAD as u64 + 100), "{size} of {max_bytes}");
        }
    }
}

#[test]
fn the_last_lines_are_found_in_blocks_too_and_before_an_incomplete_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = LogWriter::open(dir.path(), LogLimits { max_bytes: 300_000, max_files: 0, max_age_ms: 0 }).unwrap();
    let mut number = 0;
    for round in 0..20 {
        let lines = if round % 3 == 0 { 3 } else { 10_000 };
        let chunk: String = (number..number + lines).map(|n| format!("{n}\n")).collect();
        log.push(Stream::Stdout, chunk.as_bytes(), round);
        log.flush(round);
        number += lines;
    }
    for torn in [false, true] {
        if torn {
            use std::io::Write;
            let mut file = fs::OpenOptions::new().append(true).open(dir.path().join(CURRENT)).unwrap();
            file.write_all(b"1970-01-01T00:00:00.000000001Z stdout B 9000\nhalf a bl").unwrap();
        }
        for wanted in [0, 1, 2, 3, 4, 5_000, 9_999, 10_000, 10_004, 60_000, number, number + 7] {
            let mut reader =
                LogReader::open(dir.path(), Start::FromEnd { lines: wanted as usize, since_ms: None }).unwrap();
            assert_eq!(drain(&mut reader), numbers((number - wanted).max(0)..number), "{wanted} {torn}");
        }
    }
}

#[test]
fn a_file_is_rotated_by_age_when_more_comes() {
    let dir = tempfile::tempdir().unwrap();
    let limits = LogLimits { max_bytes: 0, max_files: 0, max_age_ms: 1_000 };
    let mut log = LogWriter::open(dir.path(), limits).unwrap();
    let second = 1_000_000_000;
    for (at_ns, files) in
        [(second, 0), (second + 999_999_999, 0), (2 * second, 1), (5 * second, 2), (5 * second + 1, 2)]
    {
        log.push(Stream::Stdout, b"a line\n", at_ns);
        log.flush(at_ns);
        assert_eq!(rotated_numbers(dir.path()).unwrap().len(), files, "{at_ns}");
    }
    log.push(Stream::Stdout, &b"many lines\n".repeat(10_000), 9 * second);
    assert_eq!(rotated_numbers(dir.path()).unwrap().len(), 3);
    let mut reader = LogReader::open(dir.path(), Start::Begin).unwrap();
    assert_eq!(all_lines(&mut reader).len(), 10_005);
}
