//! Cuts what a program writes to its terminal into text and whole escape sequences.
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
//! A viewer can then join, and be left out, between any two pieces. The states are those of the
//! parser that terminals have had since the VT500; UTF-8 alone is read, as everywhere today.

/// The longest control sequence; those of terminals have less than a hundred bytes.
const MAX_CONTROL: usize = 256;

/// The longest string (title, clipboard, picture); longer ones are not for a screen that is shared.
const MAX_STRING: usize = 64 * 1024;

const ESC: u8 = 0x1b;

/// A piece of output.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Characters, line ends and other single control characters among them.
    Text(&'a str),
    /// One escape sequence, whole.
    Sequence(&'a [u8]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ground,
    Escape,
    Control,
    String,
    /// An ESC inside a string: its end, or the beginning of something else.
    StringEscape,
}

/// Cuts; keeps what is not whole yet.
#[derive(Debug)]
pub struct Splitter {
    state: State,
    /// The sequence so far, or the beginning of a character.
    buffered: Vec<u8>,
    /// Whether the sequence was too long and is being dropped.
    dropping: bool,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { state: State::Ground, buffered: Vec::new(), dropping: false }
    }
}

impl Splitter {
    /// Takes bytes as they come and hands out the pieces that are whole.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Piece<'_>)) {
        let mut rest = bytes;
        while let Some(&byte) = rest.first() {
            if self.state == State::Ground {
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
        self.state = State::Escape;
    }

    fn text(&mut self, text: &[u8], ends: bool, each: &mut impl FnMut(Piece<'_>)) {
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
                each(Piece::Text(chunk.valid()));
            }
            at += chunk.valid().len() + chunk.invalid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            let may_go_on = at == text.len() && !ends && begins_a_character(chunk.invalid());
            if may_go_on {
                self.buffered.extend_from_slice(chunk.invalid());
            } else {
                each(Piece::Text("\u{fffd}"));
            }
        }
    }

    fn step(&mut self, byte: u8, each: &mut impl FnMut(Piece<'_>)) {
        match (self.state, byte) {
            // CAN and SUB give a sequence up.
            (_, 0x18 | 0x1a) => self.give_up(),
            (State::Escape, b'[') => self.buffer(byte, State::Control),
            (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => self.buffer(byte, State::String),
            (State::Escape, 0x20..=0x2f) => self.buffer(byte, State::Escape),
            (State::Escape, 0x30..=0x7e) | (State::Control, 0x40..=0x7e) => self.finish(byte, each),
            (State::Escape | State::Control, ESC) => self.begin(),
            // Terminals carry these out in the middle of a sequence.
            (State::Escape | State::Control, 0x00..=0x1f) => each(Piece::Text(ascii(&[byte]))),
            (State::Control, 0x20..=0x3f) => self.buffer(byte, State::Control),
            (State::Escape | State::Control, _) => self.give_up(),
            (State::String, ESC) => self.state = State::StringEscape,
            (State::String, 0x07) if self.buffered.get(1) == Some(&b']') => self.finish(byte, each),
            (State::String, _) => self.buffer(byte, State::String),
            (State::StringEscape, b'\\') => {
                self.buffered.push(ESC);
                self.finish(byte, each);
            }
            (State::StringEscape, _) => {
                // The string ends without an end; what began instead is read as usual.
                self.begin();
                self.step(byte, each);
            }
            (State::Ground, _) => {}
        }
    }

    fn buffer(&mut self, byte: u8, next: State) {
        let limit = if next == State::String { MAX_STRING } else { MAX_CONTROL };
        if self.buffered.len() < limit {
            self.buffered.push(byte);
        } else {
            self.dropping = true;
        }
        self.state = next;
    }

    fn finish(&mut self, byte: u8, each: &mut impl FnMut(Piece<'_>)) {
        self.state = State::Ground;
        let mut whole = std::mem::take(&mut self.buffered);
        whole.push(byte);
        if !self.dropping {
            each(Piece::Sequence(&whole));
        }
        if whole.capacity() <= MAX_CONTROL {
            whole.clear();
            self.buffered = whole;
        }
    }

    fn give_up(&mut self) {
        self.state = State::Ground;
        self.buffered.clear();
    }
}

/// Says whether invalid bytes may become a character when more follow.
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
    /// The numbers; those left out are 0. Subparameters are not told apart.
    pub numbers: Vec<u16>,
    /// The bytes between the numbers and the last byte.
    pub between: &'a [u8],
    /// The last byte, which says what it is.
    pub last: u8,
}

impl<'a> Control<'a> {
    /// Reads a sequence; `None` when it is none of this kind.
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
                Piece::Text(text) => text.to_owned(),
                Piece::Sequence(bytes) => format!("<{}>", bytes.escape_ascii()),
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
    fn what_is_not_whole_is_held_back() {
        let mut splitter = Splitter::default();
        assert_eq!(pieces(&mut splitter, b"x\x1b[38;5"), ["x"]);
        assert_eq!(pieces(&mut splitter, b";1my\xe2\x82"), ["<\\x1b[38;5;1m>", "y"]);
        assert_eq!(pieces(&mut splitter, b"\xac"), ["\u{20ac}"]);
    }

    #[test]
    fn broken_and_endless_sequences_cost_only_themselves() {
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
        fn any_bytes_are_taken(bytes: Vec<u8>) {
            pieces(&mut Splitter::default(), &bytes);
        }
    }
}
