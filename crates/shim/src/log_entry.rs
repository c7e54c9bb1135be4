//! Parses the bytes of a log file into lines and blocks, including files with incomplete entries.

use memchr::memchr;

use super::log::whole_characters;
use super::log_line::{BLOCK_FRAME, BlockEnd, BlockHeader, LogFileLine, MAX_PAYLOAD};

/// An entry of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEntry<'a> {
    Line(LogFileLine),
    /// Many lines that were read at once.
    Block {
        /// Applies to all lines.
        header: BlockHeader,
        /// The lines, each with its newline.
        bytes: &'a [u8],
        /// The number of lines.
        lines: usize,
    },
}

/// The result of parsing the beginning of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum ParsedEntry<'a> {
    /// An entry and its length in bytes.
    Entry(LogEntry<'a>, usize),
    /// This many bytes do not belong to a complete entry.
    Damaged(usize),
    /// The bytes may be the beginning of an entry.
    Incomplete,
}

impl<'a> LogEntry<'a> {
    /// Parses the entry at the beginning of the bytes.
    pub fn parse(bytes: &'a [u8]) -> ParsedEntry<'a> {
        let Some(first) = memchr(b'\n', bytes) else { return ParsedEntry::Incomplete };
        if let Some(line) = LogFileLine::parse(&bytes[..first]) {
            return ParsedEntry::Entry(Self::Line(line), first + 1);
        }
        let Some(header) = BlockHeader::parse(&bytes[..first]) else { return ParsedEntry::Damaged(first + 1) };
        let back = first + 1 + header.bytes;
        let Some(rest) = bytes.get(back..) else { return ParsedEntry::Incomplete };
        match memchr(b'\n', &rest[..rest.len().min(BLOCK_FRAME)]) {
            None if rest.len() < BLOCK_FRAME => ParsedEntry::Incomplete,
            found => match found.and_then(|end| Some((BlockEnd::parse(&rest[..end])?, end))) {
                Some((block, end)) if block.back == back => {
                    let bytes = &bytes[first + 1..back];
                    ParsedEntry::Entry(Self::Block { header, bytes, lines: block.lines }, back + end + 1)
                }
                // The block is incomplete and another entry follows. Its lines are parsed one by one.
                _ => ParsedEntry::Damaged(first + 1),
            },
        }
    }

    /// Returns the number of lines. A part of a long line counts as one if it is an entry of its own.
    pub fn lines(&self) -> usize {
        match self {
            Self::Line(_) => 1,
            Self::Block { lines, .. } => *lines,
        }
    }

    /// Appends the lines to `lines`; long lines are divided into parts.
    pub fn append_to(self, lines: &mut Vec<LogFileLine>) {
        match self {
            Self::Line(line) => lines.push(line),
            Self::Block { header: BlockHeader { at_ns, stream, .. }, bytes, .. } => {
                for mut rest in bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|&b| b == b'\n') {
                    while rest.len() > MAX_PAYLOAD {
                        let (part, more) = rest.split_at(whole_characters(&rest[..MAX_PAYLOAD]));
                        lines.push(LogFileLine { at_ns, stream, partial: true, bytes: part.to_vec() });
                        rest = more;
                    }
                    lines.push(LogFileLine { at_ns, stream, partial: false, bytes: rest.to_vec() });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::log_line::{Stamper, Stream};
    use super::*;

    fn block(payload: &[u8], lines: usize) -> Vec<u8> {
        let mut out = Vec::new();
        Stamper::default().append_block_header(&mut out, 5, Stream::Stderr, payload.len());
        out.extend_from_slice(payload);
        BlockEnd { back: out.len(), lines }.append(&mut out);
        out
    }

    #[test]
    fn a_block_gives_its_lines_and_waits_for_its_last_byte() {
        let payload = b"one\n\nE 3 1\n1970-01-01T00:00:00.000000000Z stdout F not me\n";
        let whole = block(payload, 4);
        for end in 0..whole.len() {
            assert_eq!(LogEntry::parse(&whole[..end]), ParsedEntry::Incomplete, "{end}");
        }
        let ParsedEntry::Entry(entry, bytes) = LogEntry::parse(&whole) else { panic!("a block") };
        assert_eq!((bytes, entry.lines()), (whole.len(), 4));
        let mut lines = Vec::new();
        entry.append_to(&mut lines);
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line.at_ns == 5 && line.stream == Stream::Stderr && !line.partial));
        let shown: Vec<_> = lines.iter().flat_map(|line| [&line.bytes[..], b"\n"].concat()).collect();
        assert_eq!(shown, payload);
    }

    #[test]
    fn an_incomplete_block_hides_no_entry_written_after_it() {
        let mut bytes = block(&b"line\n".repeat(40), 40);
        bytes.truncate(120);
        bytes.push(b'\n');
        Stamper::default().append(&mut bytes, 6, Stream::Stdout, false, b"later");
        bytes.extend_from_slice(&block(&b"x\n".repeat(200), 200));
        let (mut at, mut lines, mut damaged) = (0, Vec::new(), 0);
        while at < bytes.len() {
            match LogEntry::parse(&bytes[at..]) {
                ParsedEntry::Entry(entry, length) => {
                    entry.append_to(&mut lines);
                    at += length;
                }
                ParsedEntry::Damaged(length) => {
                    damaged += 1;
                    at += length;
                }
                ParsedEntry::Incomplete => panic!("the last entry is complete"),
            }
        }
        assert_eq!(lines.len(), 201);
        assert_eq!(lines[0].bytes, b"later");
        assert!(damaged > 1);
    }

    #[test]
    fn a_long_line_in_a_block_comes_in_parts() {
        let mut payload = format!("a{}", "ü".repeat(MAX_PAYLOAD)).into_bytes();
        payload.push(b'\n');
        let whole = block(&payload, 1);
        let ParsedEntry::Entry(entry, _) = LogEntry::parse(&whole) else { panic!("a block") };
        let mut lines = Vec::new();
        entry.append_to(&mut lines);
        assert_eq!(lines.iter().map(|line| line.partial).collect::<Vec<_>>(), [true, true, false]);
        assert!(lines.iter().all(|line| std::str::from_utf8(&line.bytes).is_ok()));
    }
}
