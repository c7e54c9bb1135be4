//! Questions that programs ask their terminal, answered here.
//!
//! Nobody may be attached, or several: no terminal of a viewer could answer, or all would, into the
//! agent's input. So questions never reach viewers, and each has one answer. What is answered is
//! what the model knows; a question without an answer is one that many terminals do not know.

use super::screen::Screen;
use super::sequences::Control;

/// What becomes of a sequence.
#[derive(Debug, PartialEq, Eq)]
pub enum SequenceDecision {
    /// It is for the screen.
    Show,
    /// It is a question, and this is the answer; empty for none.
    Answer(String),
}

/// Tells questions from what is to be shown.
pub fn judge(sequence: &[u8], screen: &Screen) -> SequenceDecision {
    if let Some(control) = Control::read(sequence) {
        return judge_control(&control, screen);
    }
    let is_question = match sequence {
        // Device control strings ask for settings and capabilities; pictures have no place here.
        [0x1b, b'P', ..] => true,
        // Colours and the clipboard are asked for by a question mark.
        [0x1b, b']', body @ ..] => {
            let body = body.strip_suffix(b"\x07").or_else(|| body.strip_suffix(b"\x1b\\")).unwrap_or(body);
            body.ends_with(b";?")
        }
        // DECID, the oldest way to ask who is there.
        [0x1b, b'Z'] => return SequenceDecision::Answer(IDENTITY.to_owned()),
        _ => false,
    };
    if is_question { SequenceDecision::Answer(String::new()) } else { SequenceDecision::Show }
}

/// A VT220 with colours.
const IDENTITY: &str = "\x1b[?62;22c";

fn judge_control(control: &Control<'_>, screen: &Screen) -> SequenceDecision {
    let first = control.numbers.first().copied().unwrap_or(0);
    let answer = match (control.prefix, control.between, control.last) {
        (None, b"", b'c') => IDENTITY.to_owned(),
        (Some(b'>'), b"", b'c') => "\x1b[>1;10;0c".to_owned(),
        (None, b"", b'n') if first == 5 => "\x1b[0n".to_owned(),
        (prefix @ (None | Some(b'?')), b"", b'n') if first == 6 => {
            let (line, column) = screen.cursor();
            format!("\x1b[{}{line};{column}R", if prefix.is_some() { "?" } else { "" })
        }
        (Some(b'?'), b"$", b'p') => {
            // DECRPM: 1 is on, 2 is off, 0 is not known.
            let state = match screen.modes().private(first) {
                Some(true) => 1,
                Some(false) => 2,
                None => 0,
            };
            format!("\x1b[?{first};{state}$y")
        }
        (None, b"", b't') if first == 18 => {
            let size = screen.size();
            format!("\x1b[8;{};{}t", size.rows, size.cols)
        }
        // Other window operations would move the windows of viewers; XTVERSION, the keyboard's
        // flags and the rest of the reports stay without an answer.
        (None, b"", b't' | b'n') | (Some(_), b"", b'c' | b'n' | b'q') | (None, b"$", b'p') => String::new(),
        // Other encodings of keys would hide from viewers the keys that leave.
        (Some(_), b"", b'u') | (Some(b'>'), b"", b'm') => String::new(),
        _ => return SequenceDecision::Show,
    };
    SequenceDecision::Answer(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::supervision::TerminalSize;

    #[test]
    fn questions_are_answered_and_the_rest_is_shown() {
        let mut screen = Screen::new(TerminalSize { rows: 24, cols: 80 });
        screen.text("four");
        screen.sequence(b"\x1b[?2004h");
        let answer = |sequence: &str| judge(sequence.as_bytes(), &screen);
        let says = |text: &str| SequenceDecision::Answer(text.to_owned());
        assert_eq!(answer("\x1b[6n"), says("\x1b[1;5R"));
        assert_eq!(answer("\x1b[?6n"), says("\x1b[?1;5R"));
        assert_eq!(answer("\x1b[c"), says("\x1b[?62;22c"));
        assert_eq!(answer("\x1b[18t"), says("\x1b[8;24;80t"));
        assert_eq!(answer("\x1b[?2004$p"), says("\x1b[?2004;1$y"));
        assert_eq!(answer("\x1b[?2026$p"), says("\x1b[?2026;0$y"));
        for silent in [
            "\x1b]11;?\x1b\\",
            "\x1b]52;c;?\x07",
            "\x1bP+q544e\x1b\\",
            "\x1b[?u",
            "\x1b[>1u",
            "\x1b[>4;2m",
            "\x1b[>q",
            "\x1b[8;50;50t",
        ] {
            assert_eq!(answer(silent), says(""), "{silent:?}");
        }
        for shown in ["\x1b[31m", "\x1b[2J", "\x1b]0;what?\x07", "\x1b[?25h", "\x1b7", "\x1b[2 q", "\x1b[u"] {
            assert_eq!(answer(shown), SequenceDecision::Show, "{shown:?}");
        }
    }
}
