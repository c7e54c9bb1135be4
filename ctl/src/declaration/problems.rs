//! What is wrong with a file: every problem with its place, shown with the line that it is in.

use std::ops::Range;

use serde_json::{Value, json};

use crate::errors::{Exit, Failure};
use crate::output::table::{clean, text_width};

/// More problems than this are counted, not shown: the first ones are the ones to mend.
const SHOWN: usize = 20;

/// So many characters of a long line are shown before and after its problem.
const AROUND: usize = 60;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Where, in bytes of the file.
    pub span: Range<usize>,
    /// The key with its tables, `agents.db.command`; empty where the file is no TOML.
    pub key: String,
    /// One sentence without a full stop.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl Problem {
    /// Makes a problem without a hint.
    pub fn new(span: Range<usize>, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { span, key: key.into(), message: message.into(), hint: None }
    }

    /// Adds what to write instead.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A place in a text: line and column, from 1, and the line itself.
struct Place<'a> {
    line: usize,
    column: usize,
    text: &'a str,
    /// Where the problem begins in `text`, bytes.
    start: usize,
    /// Where it ends there.
    end: usize,
}

impl<'a> Place<'a> {
    fn of(text: &'a str, span: &Range<usize>) -> Self {
        let mut at = span.start.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        let begin = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line_text = text[begin..].split('\n').next().unwrap_or_default().trim_end_matches('\r');
        // A problem at the end of a line points behind its last character.
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

    /// Writes the line with carets below what is meant; a long line is cut on both sides.
    fn drawn(&self) -> String {
        let before: Vec<char> = self.text[..self.start].chars().collect();
        let cut = before.len().saturating_sub(AROUND);
        let mut head: String = before[cut..].iter().collect();
        if cut > 0 {
            head.insert(0, '…');
        }
        let marked: String = self.text[self.start..self.end].chars().take(AROUND).collect();
        let rest = &self.text[self.start + marked.len()..];
        let mut tail: String = rest.chars().take(AROUND).collect();
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

/// Makes the failure that tells all problems of a file, in the order of the file.
pub fn failure(file: &str, text: &str, mut problems: Vec<Problem>) -> Failure {
    problems.sort_by_key(|problem| (problem.span.start, problem.span.end));
    problems.dedup();
    let count = match problems.len() {
        1 => "one error".to_owned(),
        several => format!("{several} errors"),
    };
    let mut message = format!("{file} has {count}; nothing was changed");
    let mut details = Vec::new();
    for (i, problem) in problems.iter().enumerate() {
        let place = Place::of(text, &problem.span);
        details.push(json!({
            "line": place.line, "column": place.column, "key": problem.key,
            "message": problem.message, "hint": problem.hint,
        }));
        if i >= SHOWN {
            continue;
        }
        message.push_str(&format!("\n\nline {}, column {}: {}\n", place.line, place.column, clean(&problem.message)));
        message.push_str(&place.drawn());
        if let Some(hint) = &problem.hint {
            message.push_str(&format!("\n  = {}", clean(hint)));
        }
    }
    if problems.len() > SHOWN {
        message.push_str(&format!("\n\n… and {} more", problems.len() - SHOWN));
    }
    Failure::new(Exit::Usage, "invalid_file", message)
        .with_details(json!({ "file": file, "problems": Value::Array(details) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(text: &str, span: Range<usize>) -> String {
        let place = Place::of(text, &span);
        format!("{}:{}\n{}", place.line, place.column, place.drawn())
    }

    #[test]
    fn the_line_is_shown_with_carets_below_what_is_meant() {
        assert_eq!(drawn("a = 1\nbcd = 2\n", 6..9), "2:1\n2 | bcd = 2\n  | ^^^");
        assert_eq!(drawn("a = 1\n", 4..5), "1:5\n1 | a = 1\n  |     ^");
    }

    #[test]
    fn the_end_of_a_line_and_of_the_file_are_places_too() {
        assert_eq!(drawn("a =\nb = 2\n", 3..3), "1:4\n1 | a =\n  |    ^");
        assert_eq!(drawn("a =", 90..99), "1:4\n1 | a =\n  |    ^");
        assert_eq!(drawn("", 0..0), "1:1\n1 | \n  | ^");
    }

    #[test]
    fn wide_characters_tabs_and_several_lines_keep_the_carets_in_place() {
        assert_eq!(drawn("\té漢 = 1\r\n", 9..10), "1:7\n1 |  é漢 = 1\n  |        ^");
        // What goes over several lines is marked in its first one.
        assert_eq!(drawn("a = [\n1,\n]\n", 4..10), "1:5\n1 | a = [\n  |     ^");
        // A place inside of a character is that character.
        assert_eq!(drawn("é", 1..2), "1:1\n1 | é\n  | ^");
    }

    #[test]
    fn a_long_line_is_cut_around_its_problem() {
        let text = format!("{} = 1", "k".repeat(500));
        let shown = drawn(&text, 503..504);
        assert!(shown.lines().all(|line| line.chars().count() < 140), "{shown}");
        assert!(shown.starts_with("1:504\n1 | …kkk") && shown.ends_with('^'), "{shown}");
    }

    #[test]
    fn many_problems_are_counted() {
        let problems = (0..25).map(|i| Problem::new(i..i + 1, "", format!("wrong {i}"))).collect();
        let failure = failure("/f", &"x".repeat(30), problems);
        let Failure::Said(report) = failure else { panic!("it is said") };
        assert!(report.message.starts_with("/f has 25 errors; nothing was changed\n\nline 1, column 1: wrong 0\n"));
        assert!(report.message.ends_with("… and 5 more"), "{}", report.message);
        assert_eq!(report.details.expect("for programs")["problems"].as_array().map(Vec::len), Some(25));
        assert_eq!(report.exit, Exit::Usage);
    }
}
