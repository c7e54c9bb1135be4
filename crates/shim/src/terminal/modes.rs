//! The modes that a program has set in its terminal and that the screen's model does not keep: mouse, paste and focus
//! reports, keypad, cursor shape, title.

use super::sequences::Control;

/// The private modes (`ESC [ ? n h`) that must also be set in a viewer's terminal: mouse reports and their encodings,
/// focus reports, scrolling by keys, bracketed paste. See "DEC Private Mode Set" in xterm's control sequences.
const PRIVATE: [u16; 10] = [9, 1000, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 2004];

/// The longest title that is kept, in characters.
const MAX_TITLE: usize = 1024;

/// Resets a terminal in any state to the state that programs expect: leaves the alternate screen, resets modes,
/// margins, character sets and colours.
pub const RESET: &str = "\x1b[?1047l\x1b[!p\x1b[?9;1000;1002;1003;1004;1005;1006;1015;2004l\x1b[?7h\x1b[?25h\
                         \x1b[r\x1b(B\x0f\x1b[m\x1b>\x1b[0 q";

/// The modes that are set.
#[derive(Debug, Default)]
pub struct Modes {
    private: Vec<u16>,
    keypad: bool,
    cursor_shape: u16,
    title: Option<String>,
}

impl Modes {
    /// Applies a sequence.
    pub fn note(&mut self, sequence: &[u8]) {
        match sequence {
            b"\x1bc" => *self = Self { title: self.title.take(), ..Self::default() },
            b"\x1b=" => self.keypad = true,
            b"\x1b>" => self.keypad = false,
            _ => match Control::read(sequence) {
                Some(control) => self.note_control(&control),
                None => self.note_title(sequence),
            },
        }
    }

    fn note_control(&mut self, control: &Control<'_>) {
        match (control.prefix, control.between, control.last) {
            (Some(b'?'), b"", b'h' | b'l') => {
                for number in control.numbers.iter().filter(|number| PRIVATE.contains(number)) {
                    self.private.retain(|on| on != number);
                    if control.last == b'h' {
                        self.private.push(*number);
                    }
                }
            }
            (None, b" ", b'q') => self.cursor_shape = control.numbers.first().copied().unwrap_or(0),
            (None, b"!", b'p') => self.keypad = false,
            _ => {}
        }
    }

    fn note_title(&mut self, sequence: &[u8]) {
        let Some(body) = sequence.strip_prefix(b"\x1b]0;").or_else(|| sequence.strip_prefix(b"\x1b]2;")) else {
            return;
        };
        let text = body.strip_suffix(b"\x07").or_else(|| body.strip_suffix(b"\x1b\\")).unwrap_or(body);
        let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(MAX_TITLE).collect();
        self.title = Some(text);
    }

    /// Returns whether a private mode is set; `None` if this mode is not tracked.
    pub fn private(&self, number: u16) -> Option<bool> {
        PRIVATE.contains(&number).then(|| self.private.contains(&number))
    }

    /// Returns the sequences that set the same modes in a terminal after [`RESET`].
    pub fn restore(&self) -> String {
        let mut text = String::new();
        for number in &self.private {
            text.push_str(&format!("\x1b[?{number}h"));
        }
        if self.keypad {
            text.push_str("\x1b=");
        }
        if self.cursor_shape != 0 {
            text.push_str(&format!("\x1b[{} q", self.cursor_shape));
        }
        if let Some(title) = &self.title {
            text.push_str(&format!("\x1b]2;{title}\x07"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_that_were_set_are_restored() {
        let mut modes = Modes::default();
        for sequence in
            ["\x1b[?1000h", "\x1b[?1006;2004;25h", "\x1b=", "\x1b[5 q", "\x1b]0;work\x1b\\", "\x1b[?1000l", "\x1b[31m"]
        {
            modes.note(sequence.as_bytes());
        }
        assert_eq!(modes.restore(), "\x1b[?1006h\x1b[?2004h\x1b=\x1b[5 q\x1b]2;work\x07");
        assert_eq!((modes.private(2004), modes.private(1000), modes.private(25)), (Some(true), Some(false), None));
        modes.note(b"\x1bc");
        assert_eq!(modes.restore(), "\x1b]2;work\x07");
    }

    #[test]
    fn a_title_cannot_smuggle_sequences() {
        let mut modes = Modes::default();
        modes.note(b"\x1b]2;a\x1b[2Jb\x07");
        assert_eq!(modes.restore(), "\x1b]2;a[2Jb\x07");
    }
}
