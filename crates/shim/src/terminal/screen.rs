//! The content of an agent's terminal, and the bytes that draw it on another terminal.
//!
//! The model is the crate avt. A bug in it costs the screen content, never the agent.

use std::panic::{AssertUnwindSafe, catch_unwind};

use avt::{Cell, Color, Line, Pen, Terminal};
use fermata_protocol::supervision::TerminalSize;

use super::modes::{Modes, RESET};
use super::sequences::{Control, OutputPiece, Splitter};

/// How many lines that have left the screen are kept.
const SCROLLBACK: usize = 500;

/// The content and the modes of one terminal.
pub struct Screen {
    terminal: Terminal,
    modes: Modes,
    size: TerminalSize,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("size", &self.size).field("modes", &self.modes).finish_non_exhaustive()
    }
}

/// A size of zero is treated as one character.
fn blank(size: TerminalSize) -> Terminal {
    let (cols, rows) = (usize::from(size.cols).max(1), usize::from(size.rows).max(1));
    match Terminal::with_scrollback(cols, rows, Some(SCROLLBACK)) {
        Ok(terminal) => terminal,
        Err(error) => unreachable!("the size is at least 1 x 1: {error}"),
    }
}

impl Screen {
    pub fn new(size: TerminalSize) -> Self {
        Self { terminal: blank(size), modes: Modes::default(), size }
    }

    pub fn size(&self) -> TerminalSize {
        self.size
    }

    pub fn modes(&self) -> &Modes {
        &self.modes
    }

    /// Returns line and column of the cursor, counted from 1.
    pub fn cursor(&self) -> (usize, usize) {
        let cursor = self.terminal.cursor();
        (cursor.row + 1, cursor.col.min(usize::from(self.size.cols).saturating_sub(1)) + 1)
    }

    /// Shows text.
    pub fn text(&mut self, text: &str) {
        self.safely(|terminal| terminal.feed(text));
    }

    /// Applies an escape sequence.
    pub fn sequence(&mut self, sequence: &[u8]) {
        self.modes.note(sequence);
        let text = String::from_utf8_lossy(sequence);
        self.safely(|terminal| terminal.feed(&*text));
    }

    pub fn resize(&mut self, size: TerminalSize) {
        self.size = size;
        self.safely(|terminal| terminal.resize(usize::from(size.cols), usize::from(size.rows)));
    }

    /// Returns the bytes that draw the same content on a terminal of the same size, whatever that shows now.
    pub fn draw(&self, scrollback: bool) -> Vec<u8> {
        let drawn = catch_unwind(AssertUnwindSafe(|| self.draw_all(scrollback)));
        drawn.unwrap_or_else(|_| format!("{RESET}\x1b[H\x1b[2J")).into_bytes()
    }

    fn draw_all(&self, scrollback: bool) -> String {
        let mut text = format!("{RESET}\x1b[H\x1b[2J");
        if scrollback {
            let lines: Vec<&Line> = self.terminal.primary_screen().all_lines().collect();
            let left = lines.len().saturating_sub(self.terminal.primary_screen().visible_lines().len());
            for line in &lines[..left] {
                draw_line(line, &mut text);
            }
            if left > 0 {
                // Scrolls these lines into the scrollback of the viewer's terminal.
                text.push_str(&"\r\n".repeat(usize::from(self.size.rows)));
                text.push_str("\x1b[H\x1b[2J");
            }
        }
        spell_out(&self.terminal.dump(), &mut text);
        text.push_str(&self.modes.restore());
        text
    }

    fn safely(&mut self, work: impl FnOnce(&mut Terminal)) {
        if catch_unwind(AssertUnwindSafe(|| work(&mut self.terminal))).is_err() {
            eprintln!("fermata-shim: the model of the terminal failed; the screen is cleared");
            self.terminal = blank(self.size);
        }
    }
}

/// Replaces the repetition sequence (`REP`), which the Linux console and others do not support, by the repeated
/// characters.
fn spell_out(drawn: &str, text: &mut String) {
    let mut last = None;
    Splitter::default().feed(drawn.as_bytes(), |piece| match piece {
        OutputPiece::Text(piece) => {
            last = piece.chars().last();
            text.push_str(piece);
        }
        OutputPiece::Sequence(sequence) => match (Control::read(sequence), last) {
            (Some(Control { prefix: None, numbers, between: b"", last: b'b' }), Some(character)) => {
                let count = usize::from(numbers.first().copied().unwrap_or(1)).max(1);
                text.extend(std::iter::repeat_n(character, count));
            }
            _ => text.push_str(&String::from_utf8_lossy(sequence)),
        },
    });
}

/// Draws a line that has left the screen, with a line end unless it continues in the next one.
fn draw_line(line: &Line, text: &mut String) {
    let cells = line.cells();
    let end =
        if line.is_wrapped() { cells.len() } else { cells.iter().rposition(is_visible).map_or(0, |last| last + 1) };
    let mut pen = Pen::default();
    // The second half of a wide character has no width and is not drawn.
    for cell in cells[..end].iter().filter(|cell| cell.width() > 0) {
        if *cell.pen() != pen {
            pen = *cell.pen();
            draw_pen(&pen, text);
        }
        text.push(cell.char());
    }
    if !pen.is_default() {
        text.push_str("\x1b[m");
    }
    if !line.is_wrapped() {
        text.push_str("\r\n");
    }
}

fn is_visible(cell: &Cell) -> bool {
    cell.char() != ' ' || !cell.pen().is_default()
}

fn draw_pen(pen: &Pen, text: &mut String) {
    text.push_str("\x1b[0");
    for (on, number) in [
        (pen.is_bold(), 1),
        (pen.is_faint(), 2),
        (pen.is_italic(), 3),
        (pen.is_underline(), 4),
        (pen.is_blink(), 5),
        (pen.is_inverse(), 7),
        (pen.is_strikethrough(), 9),
    ] {
        if on {
            text.push_str(&format!(";{number}"));
        }
    }
    for (color, base) in [(pen.foreground(), 38), (pen.background(), 48)] {
        match color {
            Some(Color::Indexed(index)) => text.push_str(&format!(";{base};5;{index}")),
            Some(Color::RGB(rgb)) => text.push_str(&format!(";{base};2;{};{};{}", rgb.r, rgb.g, rgb.b)),
            None => {}
        }
    }
    text.push('m');
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: TerminalSize = TerminalSize { rows: 5, cols: 20 };

    fn show(screen: &mut Screen, bytes: &[u8]) {
        let mut splitter = Splitter::default();
        splitter.feed(bytes, |piece| match piece {
            OutputPiece::Text(text) => screen.text(text),
            OutputPiece::Sequence(sequence) => screen.sequence(sequence),
        });
    }

    fn lines(screen: &Screen) -> Vec<String> {
        screen.terminal.screen().visible_lines().map(|line| line.text().trim_end().to_owned()).collect()
    }

    #[test]
    fn a_screen_is_drawn_again_on_a_terminal_that_showed_something_else() {
        let mut first = Screen::new(SIZE);
        show(&mut first, b"shell$ vi\r\n\x1b[?1049h\x1b[2J\x1b[2;3H\x1b[1;32mINSERT\x1b[?2004h\x1b[?25l\x1b[4;5H");
        let mut second = Screen::new(SIZE);
        show(&mut second, b"junk\r\njunk\x1b[?1049hmore junk\x1b[3;4r\x1b[?1000h\x1b[7m");
        show(&mut second, &first.draw(true));
        assert_eq!(lines(&second), ["", "  INSERT", "", "", ""]);
        assert_eq!(second.cursor(), (4, 5));
        assert_eq!((second.modes().private(2004), second.modes().private(1000)), (Some(true), Some(false)));
        assert_eq!(second.terminal.cursor().position(), None, "the cursor is hidden");
        // The primary screen behind the alternate screen is restored as well.
        show(&mut second, b"\x1b[?1049l");
        assert_eq!(lines(&second)[0], "shell$ vi");
    }

    #[test]
    fn repetitions_are_written_out() {
        let mut screen = Screen::new(SIZE);
        show(&mut screen, b"xxxxxxxxxxxxxxx");
        assert!(screen.terminal.dump().contains("\x1b[14b"), "the model repeats by a sequence");
        let drawn = screen.draw(false);
        assert!(String::from_utf8_lossy(&drawn).contains("xxxxxxxxxxxxxxx"));
    }

    #[test]
    fn lines_that_have_left_the_screen_come_first() {
        let mut first = Screen::new(SIZE);
        for number in 0..2000 {
            show(&mut first, format!("\x1b[3{}mline {number}\x1b[m\r\n", number % 8).as_bytes());
        }
        let mut second = Screen::new(SIZE);
        show(&mut second, &first.draw(true));
        let text = second.terminal.primary_screen().text().join("\n");
        assert!(text.contains("line 1500\nline 1501\n"), "{text}");
        assert!(!text.contains("line 1000\n"), "more lines are kept than SCROLLBACK");
        assert_eq!(lines(&second)[..2], ["line 1996", "line 1997"]);
        assert!(!String::from_utf8_lossy(&first.draw(false)).contains("line 1500"));
    }

    #[test]
    fn a_line_that_was_longer_than_the_screen_stays_one_line() {
        let mut first = Screen::new(SIZE);
        show(&mut first, "ü€".repeat(15).as_bytes());
        show(&mut first, b"\r\n\r\n\r\n\r\n\r\n\r\n");
        let mut second = Screen::new(SIZE);
        show(&mut second, &first.draw(true));
        assert!(second.terminal.primary_screen().text().contains(&"ü€".repeat(15)));
    }

    #[test]
    fn sizes_from_nothing_to_much_are_survived() {
        let mut screen = Screen::new(TerminalSize { rows: 0, cols: 0 });
        for (rows, cols) in [(1, 1), (1000, 1000), (2, 3), (0, 5), (24, 80)] {
            screen.resize(TerminalSize { rows, cols });
            show(&mut screen, "some text, 漢字 and\r\nlines\x1b[5;5Hx".as_bytes());
            assert!(!screen.draw(true).is_empty());
        }
    }

    proptest::proptest! {
        #![proptest_config(fermata_test_seeds::cases(64))]
        #[test]
        fn any_output_is_drawn_again_as_it_was(
            pieces in proptest::collection::vec(proptest::sample::select(vec![
                "word ", "a", "\r\n", "\n", "\t", "漢", "\x1b[31m", "\x1b[m", "\x1b[2;4H", "\x1b[K", "\x1b[2J", "\x1b[L",
                "\x1b[?1049h", "\x1b[?1049l", "\x1b7", "\x1b8", "\x1b[2;4r", "\x1b[?6h", "\x1b[?25l", "\x1bM", "\x1b[3S",
            ]), 0..60),
        ) {
            let mut first = Screen::new(SIZE);
            show(&mut first, pieces.concat().as_bytes());
            let mut second = Screen::new(SIZE);
            show(&mut second, &first.draw(false));
            proptest::prop_assert_eq!(lines(&first), lines(&second));
            proptest::prop_assert_eq!(first.cursor(), second.cursor());
        }
    }
}
