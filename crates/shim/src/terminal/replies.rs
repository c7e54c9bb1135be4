//! Answers the queries that programs send to their terminal.
//!
//! There may be no viewer or several: no viewer's terminal would answer, or all of them would, into the agent's input.
//! So queries are not sent to viewers, and each gets one answer from the model. Queries that many terminals do not
//! support stay unanswered.

use super::screen::Screen;
use super::sequences::Control;

/// What to do with a sequence.
#[derive(Debug, PartialEq, Eq)]
pub enum SequenceDecision {
    /// The sequence is applied to the screen.
    Show,
    /// The sequence is a query with this answer; empty for no answer.
    Answer(String),
}

/// Distinguishes queries from sequences to be shown.
pub fn judge(sequence: &[u8], screen: &Screen) -> SequenceDecision {
    if let Some(control) = Control::read(sequence) {
        return judge_control(&control, screen);
    }
    let is_question = match sequence {
        // Device control strings query settings and capabilities. Those that contain pictures are not supported.
        [0x1b, b'P', ..] => true,
        // Colours and the clipboard are queried with a question mark.
        [0x1b, b']', body @ ..] => {
            let body = body.strip_suffix(b"\x07").or_else(|| body.strip_suffix(b"\x1b\\")).unwrap_or(body);
            body.ends_with(b";?")
        }
        // DECID, the oldest query for the kind of terminal.
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
            // DECRPM: 1 is set, 2 is reset, 0 is not recognised.
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
        // Other window operations would move the windows of viewers. XTVERSION, the keyboard flags and other reports
        // stay unanswered.
        (None, b"", b't' | b'n') | (Some(_), b"", b'c' | b'n' | b'q') | (None, b"$", b'p') => String::new(),
        // With other key encodings viewers would not recognise the keys for detaching.
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
