//! Tables and lists of facts: aligned, cut to the terminal's width, never wrapped.
//!
//! Pure: a table becomes a string; what comes from outside is cleaned of control characters here.

/// How a cell is painted where colours are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Paint {
    /// Not at all.
    #[default]
    Plain,
    /// Runs, is good.
    Good,
    /// Is held or wants attention.
    Attention,
    /// Failed.
    Bad,
    /// Of lesser interest.
    Dim,
}

impl Paint {
    /// Wraps a text in the colour's escape sequences.
    pub fn apply(self, text: &str, color: bool) -> String {
        let code = match self {
            Self::Good => "32",
            Self::Attention => "33",
            Self::Bad => "31",
            Self::Dim => "2",
            Self::Plain => return text.into(),
        };
        if color && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
}

/// One cell: a text and its paint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    paint: Paint,
}

impl Cell {
    /// Makes a painted cell.
    pub fn painted(text: impl AsRef<str>, paint: Paint) -> Self {
        Self { text: clean(text.as_ref()), paint }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::painted(text, Paint::Plain)
    }
}

/// A table with headers; a header that begins with `>` has its column aligned to the right.
#[derive(Debug)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// Between two columns.
const GAP: usize = 2;

/// Down to this width the last column gives way before the others do.
const LAST: usize = 16;

impl Table {
    /// Makes an empty table.
    pub fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, which has one cell per header.
    pub fn row(&mut self, cells: impl Into<Vec<Cell>>) {
        let cells = cells.into();
        debug_assert_eq!(cells.len(), self.headers.len());
        self.rows.push(cells);
    }

    /// Writes the table; `width` is the terminal's, when there is one.
    pub fn render(&self, width: Option<usize>, color: bool) -> String {
        let header: Vec<Cell> =
            self.headers.iter().map(|h| Cell::painted(h.trim_start_matches('>'), Paint::Dim)).collect();
        let mut widths: Vec<usize> = header.iter().map(|c| text_width(&c.text)).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(text_width(&cell.text));
            }
        }
        if let Some(limit) = width {
            fit(&mut widths, limit);
        }
        let mut text = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            let last = row.len().saturating_sub(1);
            for (i, cell) in row.iter().enumerate() {
                let right = self.headers[i].starts_with('>');
                let cut = cut(&cell.text, widths[i]);
                let padding = " ".repeat(widths[i].saturating_sub(text_width(&cut)));
                let painted = cell.paint.apply(&cut, color);
                if right {
                    line.push_str(&padding);
                }
                line.push_str(&painted);
                if !right && i < last {
                    line.push_str(&padding);
                }
                if i < last {
                    line.push_str(&" ".repeat(GAP));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Narrows the columns until the table fits: the last one (free text) first, then the widest.
fn fit(widths: &mut [usize], limit: usize) {
    let gaps = GAP * widths.len().saturating_sub(1);
    let total = |widths: &[usize]| widths.iter().sum::<usize>() + gaps;
    while total(widths) > limit {
        let last = widths.len() - 1;
        let widest = widths.iter().enumerate().max_by_key(|(_, w)| **w);
        let victim = match widest {
            _ if widths[last] > LAST => last,
            Some((i, &width)) if width > 1 => i,
            _ => return,
        };
        widths[victim] -= 1;
    }
}

/// Facts about one thing, one per line with aligned names.
#[derive(Debug, Default)]
pub struct Facts {
    lines: Vec<(&'static str, Cell)>,
}

impl Facts {
    /// Adds a fact.
    #[must_use]
    pub fn add(mut self, name: &'static str, value: impl Into<Cell>) -> Self {
        self.lines.push((name, value.into()));
        self
    }

    /// Adds a fact when there is one.
    #[must_use]
    pub fn maybe(self, name: &'static str, value: Option<impl Into<Cell>>) -> Self {
        match value {
            Some(value) => self.add(name, value),
            None => self,
        }
    }

    /// Writes the facts.
    pub fn render(&self, color: bool) -> String {
        let widest = self.lines.iter().map(|(name, _)| name.len()).max();
        let width = widest.unwrap_or(0) + 1;
        let mut text = String::new();
        for (name, value) in &self.lines {
            let label = Paint::Dim.apply(&format!("{:<width$}", format!("{name}:")), color);
            let value = value.paint.apply(&value.text, color);
            text.push_str(format!("{label} {value}").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Makes a text from outside harmless on a terminal: one line, no control or direction characters.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Cuts a text to so many columns and shows that it did.
pub fn cut(text: &str, width: usize) -> String {
    if text_width(text) <= width {
        return text.into();
    }
    let mut short = String::new();
    let mut used = 0;
    for c in text.chars() {
        if used + char_width(c) + 1 > width {
            break;
        }
        used += char_width(c);
        short.push(c);
    }
    if width > 0 {
        short.push('…');
    }
    short
}

/// Returns how many columns a text takes.
pub fn text_width(text: &str) -> usize {
    text.chars().map(char_width).sum()
}

/// How many columns a character takes: the blocks that terminals draw over two, and marks over none.
fn char_width(c: char) -> usize {
    match u32::from(c) {
        0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        let mut table = Table::new(&["NAME", ">SIZE", "COMMAND"]);
        table.row(["web".into(), "7".into(), "codex exec".into()]);
        table.row(["api-server".into(), "1200".into(), "a very long command line".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_nothing_is_cut_off_a_terminal() {
        assert_eq!(
            sample().render(None, false),
            "NAME        SIZE  COMMAND\n\
             web            7  codex exec\n\
             api-server  1200  a very long command line\n"
        );
    }

    #[test]
    fn lines_never_exceed_the_terminal() {
        for width in [8, 14, 22, 30, 40] {
            for line in sample().render(Some(width), false).lines() {
                assert!(text_width(line) <= width, "{width}: {line}");
            }
        }
        assert!(sample().render(Some(36), false).contains("a very long comma…"));
    }

    #[test]
    fn wide_characters_count_twice() {
        assert_eq!(text_width("漢字"), 4);
        assert_eq!(cut("漢字漢字", 5), "漢字…");
    }

    #[test]
    fn escape_sequences_from_outside_do_not_reach_the_terminal() {
        let mut table = Table::new(&["TEXT"]);
        table.row(["\x1b[2Jgone\nnext\u{202e}".into()]);
        let text = table.render(None, true);
        assert!(text.contains("\u{fffd}[2Jgone next\u{fffd}"), "{text:?}");
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let mut table = Table::new(&["A", "B"]);
        table.row([Cell::painted("x", Paint::Good), "y".into()]);
        assert!(table.render(Some(10), true).contains("\x1b[32mx\x1b[0m  y\n"));
    }

    #[test]
    fn facts_are_aligned() {
        let facts = Facts::default().add("mode", "freeze").add("checkpoint", "3").maybe("reason", None::<&str>);
        assert_eq!(facts.render(false), "mode:       freeze\ncheckpoint: 3\n");
    }
}
