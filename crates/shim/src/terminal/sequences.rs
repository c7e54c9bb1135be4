//! Splits the output of a program into text and complete escape sequences.
//!
//! ```text
//!              ESC              [                0x40..0x7e
//!  Ground ──────────> Escape ──────> Control ───────────────> a sequence
//!    ^                  │  ] P X ^ _             BEL, ESC \
//!    │                  ├──────────> String ────────────────> a sequence
//!    │                  └── another byte ───────────────────> a sequence
//!    └── too long: everything up to its end is dropped
//! ```
//!
//! A viewer can be added or left out between any two pieces. The states are those of the parser that terminals have
//! used since the VT500; the only encoding is UTF-8.

/// The longest control sequence in bytes; those in use are shorter than a hundred bytes.
const MAX_CONTROL: usize = 256;

/// The longest string (title, clipboard, picture) in bytes; longer ones are dropped.
const MAX_STRING: usize = 64 * 1024;

const ESC: u8 = 0x1b;

/// A piece of output.
#[derive(Debug, PartialEq, Eq)]
pub enum OutputPiece<'a> {
    /// Characters, including line ends and other single control characters.
    Text(&'a str),
    /// A complete escape sequence.
    Sequence(&'a [u8]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SplitterState {
    Ground,
    Escape,
    Control,
    String,
    /// After an ESC inside a string, which either ends the string or starts another sequence.
    StringEscape,
}

/// Splits output and keeps incomplete pieces.
#[derive(Debug)]
pub struct Splitter {
    state: SplitterState,
    /// The beginning of a sequence or of a character.
    buffered: Vec<u8>,
    /// Whether the present sequence is too long and is being dropped.
    dropping: bool,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: SplitterState::Ground, buffered: Vec::new(), dropping: false }
    }
}

impl Splitter {
    /// Takes bytes as they arrive and passes each complete piece to `each`.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(OutputPiece<'_>)) {
        let mut rest = bytes;
        while let Some(&byte) = rest.first() {
            if self.state == SplitterState::Ground {
                let end = rest.iter().position(|&b| b == ESC);
                let (text, after) = rest.split_at(end.unwrap_or(rest.len()));
                self.text(text, end.is_some(), &mut each);
                rest = after;
                if end.is_some() {
                    self.begin();
                    rest = &rest[1..];
                }
                continue;
            }
            rest = &rest[1..];
            self.step(byte, &mut each);
        }
    }

    fn begin(&mut self) {
        self.buffered.clear();
        self.buffered.push(ESC);
        self.dropping = false;
        self.state = SplitterState::Escape;
    }

    fn text(&mut self, text: &[u8], ends: bool, each: &mut impl FnMut(OutputPiece<'_>)) {
        let joined;
        let text = if self.buffered.is_empty() {
            text
        } else {
            joined = [std::mem::take(&mut self.buffered).as_slice(), text].concat();
            &joined
        };
        let mut at = 0;
        for chunk in text.utf8_chunks() {
            if !chunk.valid().is_empty() {
                each(OutputPiece::Text(chunk.valid()));
            }
            at += chunk.valid().len() + chunk.invalid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            let may_go_on = at == text.len() && !ends && begins_a_character(chunk.invalid());
            if may_go_on {
                self.buffered.extend_from_slice(chunk.invalid());
            } else {
                each(OutputPiece::Text("\u{fffd}"));
            }
        }
    }

    fn step(&mut self, byte: u8, each: &mut impl FnMut(OutputPiece<'_>)) {
        match (self.state, byte) {
            // CAN and SUB cancel a sequence.
            (_, 0x18 | 0x1a) => self.give_up(),
            (SplitterState::Escape, b'[') => self.buffer(byte, SplitterState::Control),
            (SplitterState::Escape, b']' | b'P' | b'X' | b'^' | b'_') => self.buffer(byte, SplitterState::String),
            (SplitterState::Escape, 0x20..=0x2f) => self.buffer(byte, SplitterState::Escape),
            (SplitterState::Escape, 0x30..=0x7e) | (SplitterState::Control, 0x40..=0x7e) => self.finish(byte, each),
            (SplitterState::Escape | SplitterState::Control, ESC) => self.begin(),
            // Terminals execute these in the middle of a sequence.
            (SplitterState::Escape | SplitterState::Control, 0x00..=0x1f) => each(OutputPiece::Text(ascii(&[byte]))),
            (SplitterState::Control, 0x20..=0x3f) => self.buffer(byte, SplitterState::Control),
            (SplitterState::Escape | SplitterState::Control, _) => self.give_up(),
            (SplitterState::String, ESC) => self.state = SplitterState::StringEscape,
            (SplitterState::String, 0x07) if self.buffered.get(1) == Some(&b']') => self.finish(byte, each),
            (SplitterState::String, _) => self.buffer(byte, SplitterState::String),
            (SplitterState::StringEscape, b'\\') => {
                self.buffered.push(ESC);
                self.finish(byte, each);
            }
            (SplitterState::StringEscape, _) => {
                // The string ends without a terminator, and the bytes start another sequence.
                self.begin();
                self.step(byte, each);
            }
            (SplitterState::Ground, _) => {}
        }
    }

    fn buffer(&mut self, byte: u8, next: SplitterState) {
        let limit = if next == SplitterState::String { MAX_STRING } else { MAX_CONTROL };
        if self.buffered.len() < limit {
            self.buffered.push(byte);
        } else {
            self.dropping = true;
        }
        self.state = next;
    }

    fn finish(&mut self, byte: u8, each: &mut impl FnMut(OutputPiece<'_>)) {
        self.state = SplitterState::Ground;
        let mut sequence = std::mem::take(&mut self.buffered);
        sequence.push(byte);
        if !self.dropping {
            each(OutputPiece::Sequence(&sequence));
        }
        if sequence.capacity() <= MAX_CONTROL {
            sequence.clear();
            self.buffered = sequence;
        }
    }

    fn give_up(&mut self) {
        self.state = SplitterState::Ground;
        self.buffered.clear();
    }
}

/// Returns whether invalid bytes may be the beginning of a character.
fn begins_a_character(bytes: &[u8]) -> bool {
    let width = match bytes.first() {
        Some(0xc2..=0xdf) => 2,
        Some(0xe0..=0xef) => 3,
        Some(0xf0..=0xf4) => 4,
        _ => return false,
    };
    bytes.len() < width
}

fn ascii(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// The parts of a control sequence (`ESC [ …`).
#[derive(Debug, PartialEq, Eq)]
pub struct Control<'a> {
    /// `?`, `>`, `<` or `=` before the parameters.
    pub prefix: Option<u8>,
    /// The parameters; omitted ones are 0. Subparameters are not distinguished from parameters.
    pub numbers: Vec<u16>,
    /// The bytes between the parameters and the last byte.
    pub between: &'a [u8],
    /// The last byte, which identifies the function.
    pub last: u8,
}

impl<'a> Control<'a> {
    /// Parses a sequence; `None` if it is not a control sequence.
    pub fn read(sequence: &'a [u8]) -> Option<Self> {
        let body = sequence.strip_prefix(b"\x1b[")?;
        let (&last, body) = body.split_last()?;
        let prefix = body.first().copied().filter(|byte| (0x3c..=0x3f).contains(byte));
        let body = if prefix.is_some() { &body[1..] } else { body };
        let end = body.iter().position(|byte| (0x20..=0x2f).contains(byte)).unwrap_or(body.len());
        let (numbers, between) = body.split_at(end);
        let numbers = ascii(numbers).split([';', ':']).map(|number| number.parse().unwrap_or(0)).collect();
        Some(Self { prefix, numbers, between, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(splitter: &mut Splitter, bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        splitter.feed(bytes, |piece| {
            found.push(match piece {
                OutputPiece::Text(text) => text.to_owned(),
                OutputPiece::Sequence(bytes) => format!("<{}>", bytes.escape_ascii()),
            });
        });
        found
    }

    const SAMPLE: &[u8] = b"a\xc3\xbc\x1b[1;31mred\x1b]0;title\x07\x1bP+q\x1b\\z\x1b(B\x1b7\xffend";

    #[test]
    fn pieces_are_the_same_however_the_bytes_arrive() {
        let whole = pieces(&mut Splitter::default(), SAMPLE).concat();
        assert_eq!(
            whole,
            "a\u{fc}<\\x1b[1;31m>red<\\x1b]0;title\\x07><\\x1bP+q\\x1b\\\\>z<\\x1b(B><\\x1b7>\u{fffd}end"
        );
        for size in 1..SAMPLE.len() {
            let mut splitter = Splitter::default();
            let cut: Vec<String> = SAMPLE.chunks(size).flat_map(|chunk| pieces(&mut splitter, chunk)).collect();
            assert_eq!(cut.concat(), whole, "in pieces of {size}");
        }
    }

    #[test]
    fn incomplete_pieces_are_kept_back() {
        let mut splitter = Splitter::default();
        assert_eq!(pieces(&mut splitter, b"x\x1b[38;5"), ["x"]);
        assert_eq!(pieces(&mut splitter, b";1my\xe2\x82"), ["<\\x1b[38;5;1m>", "y"]);
        assert_eq!(pieces(&mut splitter, b"\xac"), ["\u{20ac}"]);
    }

    #[test]
    fn invalid_and_endless_sequences_cost_only_themselves() {
        let mut splitter = Splitter::default();
        assert_eq!(pieces(&mut splitter, b"\x1b[1\x18a\x1b]0;t\x1b[2Jb"), ["a", "<\\x1b[2J>", "b"]);
        let mut long = b"\x1b]1337;".to_vec();
        long.resize(3 * MAX_STRING, b'x');
        assert_eq!(pieces(&mut splitter, &long), [""; 0]);
        assert!(splitter.buffered.len() <= MAX_STRING);
        assert_eq!(pieces(&mut splitter, b"\x07after"), ["after"]);
        assert_eq!(pieces(&mut splitter, b"\x1b[1\n2m"), ["\n", "<\\x1b[12m>"]);
    }

    #[test]
    fn control_sequences_are_read() {
        let control = Control::read(b"\x1b[?1049;2004h").unwrap();
        assert_eq!((control.prefix, control.last), (Some(b'?'), b'h'));
        assert_eq!(control.numbers, [1049, 2004]);
        let control = Control::read(b"\x1b[2 q").unwrap();
        assert_eq!((control.numbers, control.between, control.last), (vec![2], &b" "[..], b'q'));
        assert_eq!(Control::read(b"\x1b7"), None);
    }

    proptest::proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn any_bytes_are_accepted(bytes: Vec<u8>) {
            pieces(&mut Splitter::default(), &bytes);
        }
    }
}
