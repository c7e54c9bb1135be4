//! The problems of a file, shown with their source lines.

use std::ops::Range;

use serde_json::{Value, json};

use crate::errors::{CommandError, Exit};
use crate::terminal_text::{clean, text_width};

/// Further problems are only counted.
const MAX_SHOWN: usize = 20;

/// How many characters of a long line are shown before and after a problem.
const CONTEXT_CHARS: usize = 60;

/// One error in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// The location, in bytes.
    pub span: Range<usize>,
    /// The full path of the key, `agents.db.command`; empty for a syntax error.
    pub key: String,
    /// One sentence, without a full stop.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl Problem {
    pub fn new(span: Range<usize>, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { span, key: key.into(), message: message.into(), hint: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A source line and the range of a problem in it. `line` and `column` count from 1.
struct SourceLine<'a> {
    line: usize,
    column: usize,
    text: &'a str,
    /// Start and end of the range in `text`, in bytes.
    start: usize,
    end: usize,
}

impl<'a> SourceLine<'a> {
    fn of(text: &'a str, span: &Range<usize>) -> Self {
        let mut at = span.start.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        let begin = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line_text = text[begin..].split('\n').next().unwrap_or_default().trim_end_matches('\r');
        // A problem at the end of a line is located after its last character.
        let start = (at - begin).min(line_text.len());
        let mut end = span.end.saturating_sub(begin).clamp(start, line_text.len());
        while !line_text.is_char_boundary(end) {
            end += 1;
        }
        Self {
            line: text[..begin].matches('\n').count() + 1,
            column: text[begin..begin + start].chars().count() + 1,
            text: line_text,
            start,
            end,
        }
    }

    /// Renders the line with carets below the range; a long line is cut on both sides.
    fn render(&self) -> String {
        let before: Vec<char> = self.text[..self.start].chars().collect();
        let cut = before.len().saturating_sub(CONTEXT_CHARS);
        let mut head: String = before[cut..].iter().collect();
        if cut > 0 {
            head.insert(0, '…');
        }
        let marked: String = self.text[self.start..self.end].chars().take(CONTEXT_CHARS).collect();
        let rest = &self.text[self.start + marked.len()..];
        let mut tail: String = rest.chars().take(CONTEXT_CHARS).collect();
        if tail.len() < rest.len() {
            tail.push('…');
        }
        let (head, marked, tail) = (clean(&head), clean(&marked), clean(&tail));
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        let indent = " ".repeat(text_width(&head));
        let carets = "^".repeat(text_width(&marked).max(1));
        format!("{number} | {head}{marked}{tail}\n{margin} | {indent}{carets}")
    }
}

/// Builds one error from all problems of a file, in the order of the file.
pub fn into_error(file: &str, text: &str, mut problems: Vec<Problem>) -> CommandError {
    problems.sort_by_key(|problem| (problem.span.start, problem.span.end));
    problems.dedup();
    let count = match problems.len() {
        1 => "one error".to_owned(),
        several => format!("{several} errors"),
    };
    let mut message = format!("{file} has {count}; nothing was changed");
    let mut details = Vec::new();
    for (i, problem) in problems.iter().enumerate() {
        let source_line = SourceLine::of(text, &problem.span);
        details.push(json!({
            "line": source_line.line, "column": source_line.column, "key": problem.key,
            "message": problem.message, "hint": problem.hint,
        }));
        if i >= MAX_SHOWN {
            continue;
        }
        message.push_str(&format!(
            "\n\nline {}, column {}: {}\n",
            source_line.line,
            source_line.column,
            clean(&problem.message)
        ));
        message.push_str(&source_line.render());
        if let Some(hint) = &problem.hint {
            message.push_str(&format!("\n  = {}", clean(hint)));
        }
    }
    if problems.len() > MAX_SHOWN {
        message.push_str(&format!("\n\n… and {} more", problems.len() - MAX_SHOWN));
    }
    CommandError::new(Exit::Usage, "invalid_file", message)
        .with_details(json!({ "file": file, "problems": Value::Array(details) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(text: &str, span: Range<usize>) -> String {
        let source_line = SourceLine::of(text, &span);
        format!("{}:{}\n{}", source_line.line, source_line.column, source_line.render())
    }

    #[test]
    fn the_line_is_shown_with_carets_below_the_problem() {
        assert_eq!(rendered("a = 1\nbcd = 2\n", 6..9), "2:1\n2 | bcd = 2\n  | ^^^");
        assert_eq!(rendered("a = 1\n", 4..5), "1:5\n1 | a = 1\n  |     ^");
    }

    #[test]
    fn problems_at_the_end_of_a_line_or_file_are_shown() {
        assert_eq!(rendered("a =\nb = 2\n", 3..3), "1:4\n1 | a =\n  |    ^");
        assert_eq!(rendered("a =", 90..99), "1:4\n1 | a =\n  |    ^");
        assert_eq!(rendered("", 0..0), "1:1\n1 | \n  | ^");
    }

    #[test]
    fn wide_characters_tabs_and_several_lines_keep_the_carets_in_place() {
        assert_eq!(rendered("\té漢 = 1\r\n", 9..10), "1:7\n1 |  é漢 = 1\n  |        ^");
        // A range over several lines is marked in the first one.
        assert_eq!(rendered("a = [\n1,\n]\n", 4..10), "1:5\n1 | a = [\n  |     ^");
        // A location inside a character is that character.
        assert_eq!(rendered("é", 1..2), "1:1\n1 | é\n  | ^");
    }

    #[test]
    fn a_long_line_is_cut_around_its_problem() {
        let text = format!("{} = 1", "k".repeat(500));
        let shown = rendered(&text, 503..504);
        assert!(shown.lines().all(|line| line.chars().count() < 140), "{shown}");
        assert!(shown.starts_with("1:504\n1 | …kkk") && shown.ends_with('^'), "{shown}");
    }

    #[test]
    fn many_problems_are_counted() {
        let problems = (0..25).map(|i| Problem::new(i..i + 1, "", format!("wrong {i}"))).collect();
        let error = into_error("/f", &"x".repeat(30), problems);
        let CommandError::Reported(report) = error else { panic!("not reported") };
        assert!(report.message.starts_with("/f has 25 errors; nothing was changed\n\nline 1, column 1: wrong 0\n"));
        assert!(report.message.ends_with("… and 5 more"), "{}", report.message);
        assert_eq!(report.details.expect("for programs")["problems"].as_array().map(Vec::len), Some(25));
        assert_eq!(report.exit, Exit::Usage);
    }
}
