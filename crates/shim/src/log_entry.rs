//! Finds lines and blocks in the bytes of a log file, whoever tore them.

use memchr::memchr;

use super::log::whole_characters;
use super::log_line::{BLOCK_FRAME, BlockEnd, BlockHeader, LogLine, MAX_PAYLOAD};

/// What stands at one place of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry<'a> {
    /// One line.
    Line(LogLine),
    /// Many lines that were read at once.
    Block {
        /// What is known of all of them.
        header: BlockHeader,
        /// The lines, each with its newline.
        bytes: &'a [u8],
        /// How many.
        lines: usize,
    },
}

/// What was found at the beginning of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// An entry of so many bytes.
    Entry(Entry<'a>, usize),
    /// So many bytes that are none of ours, or not whole.
    Damaged(usize),
    /// Perhaps the beginning of an entry.
    Incomplete,
}

impl<'a> Entry<'a> {
    /// Looks at what the bytes begin with.
    pub fn parse(bytes: &'a [u8]) -> Parsed<'a> {
        let Some(first) = memchr(b'\n', bytes) else { return Parsed::Incomplete };
        if let Some(line) = LogLine::parse(&bytes[..first]) {
            return Parsed::Entry(Self::Line(line), first + 1);
        }
        let Some(header) = BlockHeader::parse(&bytes[..first]) else { return Parsed::Damaged(first + 1) };
        let back = first + 1 + header.bytes;
        let Some(rest) = bytes.get(back..) else { return Parsed::Incomplete };
        match memchr(b'\n', &rest[..rest.len().min(BLOCK_FRAME)]) {
            None if rest.len() < BLOCK_FRAME => Parsed::Incomplete,
            found => match found.and_then(|end| Some((BlockEnd::parse(&rest[..end])?, end))) {
                Some((block, end)) if block.back == back => {
                    let bytes = &bytes[first + 1..back];
                    Parsed::Entry(Self::Block { header, bytes, lines: block.lines }, back + end + 1)
                }
                // Torn, and something was written behind it: its lines are looked at one by one.
                _ => Parsed::Damaged(first + 1),
            },
        }
    }

    /// How many lines it has; a part of a long line counts as one where it stands alone.
    pub fn lines(&self) -> usize {
        match self {
            Self::Line(_) => 1,
            Self::Block { lines, .. } => *lines,
        }
    }

    /// Appends its lines; long ones in parts.
    pub fn append_to(self, lines: &mut Vec<LogLine>) {
        match self {
            Self::Line(line) => lines.push(line),
            Self::Block { header: BlockHeader { at_ns, stream, .. }, bytes, .. } => {
                for mut rest in bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|&b| b == b'\n') {
                    while rest.len() > MAX_PAYLOAD {
                        let (part, more) = rest.split_at(whole_characters(&rest[..MAX_PAYLOAD]));
                        lines.push(LogLine { at_ns, stream, partial: true, bytes: part.to_vec() });
                        rest = more;
                    }
                    lines.push(LogLine { at_ns, stream, partial: false, bytes: rest.to_vec() });
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
            assert_eq!(Entry::parse(&whole[..end]), Parsed::Incomplete, "{end}");
        }
        let Parsed::Entry(entry, bytes) = Entry::parse(&whole) else { panic!("a block") };
        assert_eq!((bytes, entry.lines()), (whole.len(), 4));
        let mut lines = Vec::new();
        entry.append_to(&mut lines);
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| line.at_ns == 5 && line.stream == Stream::Stderr && !line.partial));
        let shown: Vec<_> = lines.iter().flat_map(|line| [&line.bytes[..], b"\n"].concat()).collect();
        assert_eq!(shown, payload);
    }

    #[test]
    fn a_torn_block_swallows_nothing_that_was_written_behind_it() {
        let mut bytes = block(&b"line\n".repeat(40), 40);
        bytes.truncate(120);
        bytes.push(b'\n');
        Stamper::default().append(&mut bytes, 6, Stream::Stdout, false, b"later");
        bytes.extend_from_slice(&block(&b"x\n".repeat(200), 200));
        let (mut at, mut lines, mut damaged) = (0, Vec::new(), 0);
        while at < bytes.len() {
            match Entry::parse(&bytes[at..]) {
                Parsed::Entry(entry, length) => {
                    entry.append_to(&mut lines);
                    at += length;
                }
                Parsed::Damaged(length) => {
                    damaged += 1;
                    at += length;
                }
                Parsed::Incomplete => panic!("all is there"),
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
        let Parsed::Entry(entry, _) = Entry::parse(&whole) else { panic!("a block") };
        let mut lines = Vec::new();
        entry.append_to(&mut lines);
        assert_eq!(lines.iter().map(|line| line.partial).collect::<Vec<_>>(), [true, true, false]);
        assert!(lines.iter().all(|line| std::str::from_utf8(&line.bytes).is_ok()));
    }
}
