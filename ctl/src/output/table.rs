//! Tables and lists of fields: aligned, truncated to the terminal's width, never wrapped.
//!
//! Pure: a table becomes a string. Control characters in cells are replaced here.

use crate::terminal_text::{clean, text_width, truncate};

/// The colour of a cell, by what the cell says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Paint {
    /// No colour.
    #[default]
    Plain,
    /// Green: running, intact.
    Good,
    /// Yellow: paused, in transition, or waiting for a person.
    Attention,
    /// Red: failed, damaged.
    Bad,
    /// Grey: of lesser interest.
    Dim,
}

impl Paint {
    /// Wraps a text in the escape sequences of the colour when `color` is set.
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

/// A text, free of control characters, and its colour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    paint: Paint,
}

impl Cell {
    pub fn painted(text: impl AsRef<str>, paint: Paint) -> Self {
        Self { text: clean(text.as_ref()), paint }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::painted(text, Paint::Plain)
    }
}

/// A table with headers; the column of a header that begins with `>` is aligned to the right.
#[derive(Debug)]
pub struct TextTable {
    headers: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// Blanks between two columns.
const GAP: usize = 2;

/// The last column (free text) is narrowed first, down to this width.
const MIN_LAST_WIDTH: usize = 16;

impl TextTable {
    pub fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, which has one cell per header.
    pub fn row(&mut self, cells: impl Into<Vec<Cell>>) {
        let cells = cells.into();
        debug_assert_eq!(cells.len(), self.headers.len());
        self.rows.push(cells);
    }

    /// Renders the table, one line per row; `width` is that of the terminal, when stdout is one.
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
                let cut = truncate(&cell.text, widths[i]);
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
        let narrowed = match widest {
            _ if widths[last] > MIN_LAST_WIDTH => last,
            Some((i, &width)) if width > 1 => i,
            _ => return,
        };
        widths[narrowed] -= 1;
    }
}

/// The fields of one object, one per line with aligned names.
#[derive(Debug, Default)]
pub struct FieldList {
    lines: Vec<(&'static str, Cell)>,
}

impl FieldList {
    /// Adds a field.
    #[must_use]
    pub fn add(mut self, name: &'static str, value: impl Into<Cell>) -> Self {
        self.lines.push((name, value.into()));
        self
    }

    /// Adds a field when it has a value.
    #[must_use]
    pub fn add_some(self, name: &'static str, value: Option<impl Into<Cell>>) -> Self {
        match value {
            Some(value) => self.add(name, value),
            None => self,
        }
    }

    /// Renders the fields, one line each.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> TextTable {
        let mut table = TextTable::new(&["NAME", ">SIZE", "COMMAND"]);
        table.row(["web".into(), "7".into(), "codex exec".into()]);
        table.row(["api-server".into(), "1200".into(), "a very long command line".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_nothing_is_truncated_without_a_terminal() {
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
    fn escape_sequences_from_outside_do_not_reach_the_terminal() {
        let mut table = TextTable::new(&["TEXT"]);
        table.row(["\x1b[2Jgone\nnext\u{202e}".into()]);
        let text = table.render(None, true);
        assert!(text.contains("\u{fffd}[2Jgone next\u{fffd}"), "{text:?}");
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let mut table = TextTable::new(&["A", "B"]);
        table.row([Cell::painted("x", Paint::Good), "y".into()]);
        assert!(table.render(Some(10), true).contains("\x1b[32mx\x1b[0m  y\n"));
    }

    #[test]
    fn fields_are_aligned() {
        let fields = FieldList::default().add("mode", "freeze").add("checkpoint", "3").add_some("reason", None::<&str>);
        assert_eq!(fields.render(false), "mode:       freeze\ncheckpoint: 3\n");
    }
}
