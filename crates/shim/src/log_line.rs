//! The format of log files: single lines, and blocks of many lines that were read at once.
//!
//! ```text
//! 2026-01-02T03:04:05.123456789Z stdout F the whole line          F ends a line of the agent's
//! 2026-01-02T03:04:05.123456789Z stderr P as much of it as came   P does not
//! 2026-01-02T03:04:05.123456789Z stdout B 65490                   so many raw bytes follow, whole
//! …                                                               lines, the last newline included
//! E 65532 812                                                     bytes of header and block, lines
//! ```
//!
//! P marks a part of a line longer than [`MAX_PAYLOAD`], and a line at the end of a stream without a newline. A block
//! costs some 60 bytes however many lines it has, a single line 40. The end of a block repeats its length, so that a
//! file can be read backwards and an incomplete block is recognised.

/// The source of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// The agent's standard output.
    Stdout,
    /// The agent's standard error.
    Stderr,
    /// Fermata: output is missing here; the payload says how much and why.
    Gap,
    /// Fermata: an action beside the agent, for instance the start of a hook.
    Note,
}

impl Stream {
    /// The name of the stream in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Gap => "gap",
            Self::Note => "note",
        }
    }

    fn from_word(word: &[u8]) -> Option<Self> {
        match word {
            b"stdout" => Some(Self::Stdout),
            b"stderr" => Some(Self::Stderr),
            b"gap" => Some(Self::Gap),
            b"note" => Some(Self::Note),
            _ => None,
        }
    }

    /// Returns whether the line is output of the agent.
    pub fn is_output(self) -> bool {
        matches!(self, Self::Stdout | Self::Stderr)
    }
}

/// The longest payload of one line in bytes; longer lines of the agent are divided into partial ones.
pub const MAX_PAYLOAD: usize = 16 * 1024;

/// The longest payload of a block in bytes.
pub const MAX_BLOCK: usize = 64 * 1024;

/// The longest header plus end of a block in bytes.
pub const BLOCK_FRAME: usize = 80;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFileLine {
    /// When the shim read the line, in Unix nanoseconds.
    pub at_ns: i64,
    pub stream: Stream,
    /// Whether the agent's line continues in the next line of this stream, or ended without a newline.
    pub partial: bool,
    /// The payload, without a newline.
    pub bytes: Vec<u8>,
}

const STAMP_BYTES: usize = "2026-01-02T03:04:05.123456789Z".len();
const NS: i64 = 1_000_000_000;

/// Writes time stamps. Caches the text of the second, which most consecutive lines share.
#[derive(Debug, Default)]
pub struct Stamper {
    second: Option<i64>,
    text: [u8; STAMP_BYTES],
}

impl Stamper {
    /// Appends one line with its newline.
    pub fn append(&mut self, out: &mut Vec<u8>, at_ns: i64, stream: Stream, partial: bool, payload: &[u8]) {
        out.extend_from_slice(self.stamp(at_ns));
        out.push(b' ');
        out.extend_from_slice(stream.word().as_bytes());
        out.extend_from_slice(if partial { b" P " } else { b" F " });
        out.extend_from_slice(payload);
        out.push(b'\n');
    }

    /// Appends a time stamp.
    pub fn append_time(&mut self, out: &mut Vec<u8>, at_ns: i64) {
        out.extend_from_slice(self.stamp(at_ns));
    }

    /// Appends the header of a block with a payload of `bytes` bytes.
    pub fn append_block_header(&mut self, out: &mut Vec<u8>, at_ns: i64, stream: Stream, bytes: usize) {
        out.extend_from_slice(self.stamp(at_ns));
        out.extend_from_slice(format!(" {} B {bytes}\n", stream.word()).as_bytes());
    }

    fn stamp(&mut self, at_ns: i64) -> &[u8] {
        let (second, mut fraction) = (at_ns.div_euclid(NS), at_ns.rem_euclid(NS));
        if self.second != Some(second) {
            let (year, month, day) = civil_from_days(second.div_euclid(86_400));
            let of_day = second.rem_euclid(86_400);
            self.text = *b"0000-00-00T00:00:00.000000000Z";
            digits(&mut self.text[0..4], year);
            digits(&mut self.text[5..7], month);
            digits(&mut self.text[8..10], day);
            digits(&mut self.text[11..13], of_day / 3600);
            digits(&mut self.text[14..16], of_day / 60 % 60);
            digits(&mut self.text[17..19], of_day % 60);
            self.second = Some(second);
        }
        for place in self.text[20..29].iter_mut().rev() {
            *place = b'0' + (fraction % 10) as u8;
            fraction /= 10;
        }
        &self.text
    }
}

fn digits(places: &mut [u8], mut value: i64) {
    for place in places.iter_mut().rev() {
        *place = b'0' + value.rem_euclid(10) as u8;
        value /= 10;
    }
}

/// Converts days since 1970-01-01 to year, month and day in the proleptic Gregorian calendar. Counts in 400-year cycles
/// of 146,097 days that begin on 1 March, so that the leap day is the last day of a year.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let cycle = shifted.div_euclid(146_097);
    let day_of_cycle = shifted.rem_euclid(146_097);
    let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = cycle * 400 + year_of_cycle + i64::from(month <= 2);
    (year, month, day)
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let cycle = year.div_euclid(400);
    let year_of_cycle = year.rem_euclid(400);
    let month_from_march = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_cycle = year_of_cycle * 365 + year_of_cycle / 4 - year_of_cycle / 100 + day_of_year;
    cycle * 146_097 + day_of_cycle - 719_468
}

impl LogFileLine {
    /// Parses a line without its newline; `None` if it is not a log line.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (at_ns, stream, kind, bytes) = parse_head(line)?;
        let partial = match kind {
            b'F' => false,
            b'P' => true,
            _ => return None,
        };
        Some(Self { at_ns, stream, partial, bytes: bytes.to_vec() })
    }
}

/// The header of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// When the shim read the block, in Unix nanoseconds.
    pub at_ns: i64,
    pub stream: Stream,
    /// The length of the payload in bytes.
    pub bytes: usize,
}

impl BlockHeader {
    /// Parses a line without its newline; `None` if it is not the header of a block.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (at_ns, stream, kind, rest) = parse_head(line)?;
        let bytes = parse_number(rest).filter(|&bytes| kind == b'B' && (1..=MAX_BLOCK).contains(&bytes))?;
        Some(Self { at_ns, stream, bytes })
    }
}

/// The end of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEnd {
    /// Bytes from the beginning of the header to the beginning of this end.
    pub back: usize,
    /// The number of lines in the block.
    pub lines: usize,
}

impl BlockEnd {
    pub fn append(self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("E {} {}\n", self.back, self.lines).as_bytes());
    }

    /// Parses a line without its newline; `None` if it is not the end of a block.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let rest = line.strip_prefix(b"E ")?;
        let space = rest.iter().position(|&b| b == b' ')?;
        let (back, lines) = (parse_number(&rest[..space])?, parse_number(&rest[space + 1..])?);
        (back <= MAX_BLOCK + BLOCK_FRAME).then_some(Self { back, lines })
    }
}

fn parse_number(digits: &[u8]) -> Option<usize> {
    let plain = (1..=9).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    plain.then(|| digits.iter().fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0')))
}

/// Parses time, stream and kind, with which every line but the end of a block begins; returns them and the rest.
fn parse_head(line: &[u8]) -> Option<(i64, Stream, u8, &[u8])> {
    let at_ns = parse_stamp(line.get(..STAMP_BYTES)?)?;
    let rest = line.get(STAMP_BYTES..)?.strip_prefix(b" ")?;
    let space = rest.iter().take(8).position(|&b| b == b' ')?;
    let stream = Stream::from_word(&rest[..space])?;
    match rest.get(space + 1..)? {
        [kind, b' ', bytes @ ..] => Some((at_ns, stream, *kind, bytes)),
        _ => None,
    }
}

fn parse_stamp(stamp: &[u8]) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| {
        stamp
            .get(range)?
            .iter()
            .try_fold(0i64, |sum, &digit| digit.is_ascii_digit().then(|| sum * 10 + i64::from(digit - b'0')))
    };
    let fixed = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':'), (19, b'.'), (29, b'Z')];
    if fixed.iter().any(|&(place, byte)| stamp.get(place) != Some(&byte)) {
        return None;
    }
    let days = days_from_civil(number(0..4)?, number(5..7)?, number(8..10)?);
    let second = days * 86_400 + number(11..13)? * 3600 + number(14..16)? * 60 + number(17..19)?;
    second.checked_mul(NS)?.checked_add(number(20..29)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_time_stream_kind_and_payload() {
        let mut out = Vec::new();
        let mut stamper = Stamper::default();
        stamper.append(&mut out, 1_709_210_096_000_000_007, Stream::Stderr, false, b"leap day");
        stamper.append(&mut out, 0, Stream::Gap, true, b"");
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "2024-02-29T12:34:56.000000007Z stderr F leap day\n1970-01-01T00:00:00.000000000Z gap P \n"
        );
    }

    #[test]
    fn a_block_has_a_header_and_an_end_that_are_not_lines() {
        let mut out = Vec::new();
        Stamper::default().append_block_header(&mut out, 7, Stream::Stdout, 12);
        let header = BlockHeader { at_ns: 7, stream: Stream::Stdout, bytes: 12 };
        assert_eq!(BlockHeader::parse(out.trim_ascii_end()), Some(header));
        assert_eq!(LogFileLine::parse(out.trim_ascii_end()), None);
        out.clear();
        let end = BlockEnd { back: 9, lines: 3 };
        end.append(&mut out);
        assert_eq!(out, b"E 9 3\n");
        assert_eq!(BlockEnd::parse(b"E 9 3"), Some(end));
        for bad in ["E 9", "E 9 ", "E  3", "E 9 3 ", "E 99999999 3", "E +9 3", "F 9 3"] {
            assert_eq!(BlockEnd::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest::proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn every_line_is_parsed_as_it_was_written(at_ns in 0..4_102_444_800_000_000_000i64, partial: bool, bytes: Vec<u8>) {
            let line = LogFileLine { at_ns, stream: Stream::Stdout, partial, bytes };
            let mut out = Vec::new();
            Stamper::default().append(&mut out, at_ns, line.stream, partial, &line.bytes);
            assert_eq!(out.pop(), Some(b'\n'));
            assert_eq!(LogFileLine::parse(&out), Some(line));
        }

        #[test]
        fn arbitrary_bytes_are_not_a_line(bytes: Vec<u8>) {
            assert_eq!(LogFileLine::parse(&bytes), None);
        }

        #[test]
        fn the_calendar_agrees_with_a_library(second in 0..4_102_444_800i64) {
            let mut stamper = Stamper::default();
            let text = String::from_utf8(stamper.stamp(second * NS).to_vec()).unwrap();
            let stamp: jiff::Timestamp = text.parse().unwrap();
            assert_eq!(stamp.as_second(), second);
        }
    }
}
