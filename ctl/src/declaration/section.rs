//! Reading one table of a file: typed values, and a word on every key that is not known.
//!
//! Problems are collected, not returned: a file is read to its end, and a value that is wrong
//! counts as left out. One rule holds for all: durations and sizes are texts with a unit.

use std::cell::RefCell;

use super::problems::Problem;
use super::tree::{Kind, Member, Node, Span, Table};
use crate::cli::values::split_words;
use crate::units::{millis, parse_bytes, parse_duration};

/// Words that only a shell understands.
const SHELL_WORDS: &[&str] = &["&&", "||", "|", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>"];

/// The problems of one file, in the order in which they were found.
#[derive(Debug, Default)]
pub struct Problems(RefCell<Vec<Problem>>);

impl Problems {
    /// Adds a problem.
    pub fn add(&self, problem: Problem) {
        self.0.borrow_mut().push(problem);
    }

    /// Says whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Hands them out.
    pub fn into_inner(self) -> Vec<Problem> {
        self.0.into_inner()
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub span: Span,
}

/// A table that is being read.
#[derive(Debug)]
pub struct Section<'a> {
    path: String,
    span: Span,
    table: &'a Table,
    known: Vec<&'static str>,
    problems: &'a Problems,
}

impl<'a> Section<'a> {
    /// Begins to read a table; `path` is its name with those that it is in, `span` where that stands.
    pub fn new(path: String, span: Span, table: &'a Table, problems: &'a Problems) -> Self {
        Self { path, span, table, known: Vec::new(), problems }
    }

    /// Begins to read the table that a member is; a problem when it is none.
    pub fn of(path: String, member: &'a Member, problems: &'a Problems) -> Option<Self> {
        match &member.node.kind {
            Kind::Table(table) => Some(Self::new(path, member.key.clone(), table, problems)),
            other => {
                let message = format!("'{path}' must be a table, not {}", other.name());
                problems.add(Problem::new(member.node.span.clone(), path, message));
                None
            }
        }
    }

    /// Returns where the table's name stands.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// Returns the name of a key with the tables that it is in.
    pub fn path_of(&self, key: &str) -> String {
        path(&self.path, key)
    }

    /// Returns the problems of the file.
    pub fn problems(&self) -> &'a Problems {
        self.problems
    }

    /// Adds a problem with a key.
    pub fn problem(&self, span: &Span, key: &str, message: impl Into<String>) {
        self.problems.add(Problem::new(span.clone(), self.path_of(key), message));
    }

    /// Adds a problem with a key, and what to write instead.
    pub fn problem_with_hint(&self, span: &Span, key: &str, message: impl Into<String>, hint: impl Into<String>) {
        self.problems.add(Problem::new(span.clone(), self.path_of(key), message).hint(hint));
    }

    /// Returns a member, and notes that there may be one of that name.
    pub fn member(&mut self, key: &'static str) -> Option<&'a Member> {
        self.known.push(key);
        self.table.get(key)
    }

    /// Returns all members, whatever their names.
    pub fn members(&self) -> &'a Table {
        self.table
    }

    /// Says of every key that nobody has asked for that it is not known.
    pub fn finish(self) {
        for (name, member) in self.table {
            if self.known.contains(&name.as_str()) {
                continue;
            }
            let place = if self.path.is_empty() { "at the top".into() } else { format!("in [{}]", self.path) };
            let mut problem =
                Problem::new(member.key.clone(), self.path_of(name), format!("there is no key '{name}' {place}"));
            problem.hint = Some(match nearest(name, &self.known) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("known are: {}", sorted(&self.known).join(", ")),
            });
            self.problems.add(problem);
        }
    }

    fn wrong(&self, key: &str, node: &Node, wanted: &str) {
        let name = self.path_of(key);
        self.problem(&node.span, key, format!("'{name}' must be {wanted}, not {}", node.kind.name()));
    }

    /// Reads a text that is not empty.
    pub fn text(&mut self, key: &'static str) -> Option<At<String>> {
        let node = &self.member(key)?.node;
        self.text_of(key, node)
    }

    fn text_of(&self, key: &str, node: &Node) -> Option<At<String>> {
        let Kind::Text(text) = &node.kind else {
            self.wrong(key, node, "a text");
            return None;
        };
        if text.is_empty() || text.contains('\0') {
            let what = if text.is_empty() { "is empty" } else { "holds a NUL character" };
            self.problem(&node.span, key, format!("'{}' {what}", self.path_of(key)));
            return None;
        }
        Some(At { value: text.clone(), span: node.span.clone() })
    }

    /// Reads true or false.
    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        let node = &self.member(key)?.node;
        match node.kind {
            Kind::Bool(yes) => Some(yes),
            _ => {
                self.wrong(key, node, "true or false");
                None
            }
        }
    }

    /// Reads a duration into milliseconds.
    pub fn duration(&mut self, key: &'static str) -> Option<At<u64>> {
        let node = &self.member(key)?.node;
        self.duration_of(key, node)
    }

    fn duration_of(&self, key: &str, node: &Node) -> Option<At<u64>> {
        let read = |text: &str| parse_duration(text).map(millis);
        self.measure(key, node, "a duration with its unit, such as \"90s\", \"1h30m\" or \"250ms\"", "s", read)
    }

    /// Reads a size into bytes.
    pub fn size(&mut self, key: &'static str) -> Option<At<u64>> {
        let node = &self.member(key)?.node;
        self.measure(key, node, "a size with its unit, such as \"512M\" or \"1.5G\"", "M", parse_bytes)
    }

    fn measure(
        &self,
        key: &str,
        node: &Node,
        wanted: &str,
        unit: &str,
        read: impl Fn(&str) -> Result<u64, String>,
    ) -> Option<At<u64>> {
        let text = match &node.kind {
            Kind::Text(text) => text,
            Kind::Integer(Some(number)) if *number >= 0 => {
                let message = format!("'{}' must be {wanted}", self.path_of(key));
                self.problem_with_hint(&node.span, key, message, format!("write \"{number}{unit}\", if that is meant"));
                return None;
            }
            _ => {
                self.wrong(key, node, wanted);
                return None;
            }
        };
        let has_unit = text.chars().any(|c| c.is_ascii_alphabetic());
        match read(text) {
            Ok(value) if has_unit => Some(At { value, span: node.span.clone() }),
            _ => {
                self.problem(&node.span, key, format!("'{}' must be {wanted}; \"{text}\" is none", self.path_of(key)));
                None
            }
        }
    }

    /// Reads a whole number between two others.
    pub fn count(&mut self, key: &'static str, least: u64, most: u64) -> Option<u64> {
        let node = &self.member(key)?.node;
        let number = match node.kind {
            Kind::Integer(number) => number.and_then(|number| u64::try_from(number).ok()),
            _ => {
                self.wrong(key, node, "a whole number");
                return None;
            }
        };
        let good = number.filter(|number| (least..=most).contains(number));
        if good.is_none() {
            self.problem(&node.span, key, format!("'{}' must be from {least} to {most}", self.path_of(key)));
        }
        good
    }

    /// Reads a number, with or without a fraction, that is more than 0 and at most `most`.
    pub fn amount(&mut self, key: &'static str, most: f64) -> Option<f64> {
        let node = &self.member(key)?.node;
        let number = match node.kind {
            // Whatever is precise enough to be allowed is exact as a float.
            Kind::Integer(number) => number.map_or(f64::INFINITY, |number| number as f64),
            Kind::Float(number) => number,
            _ => {
                self.wrong(key, node, "a number");
                return None;
            }
        };
        if number > 0.0 && number <= most {
            return Some(number);
        }
        self.problem(&node.span, key, format!("'{}' must be more than 0 and at most {most}", self.path_of(key)));
        None
    }

    /// Reads one word of several.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let node = &self.member(key)?.node;
        self.choice_of(key, node, choices)
    }

    /// Reads a value as one word of several.
    pub fn choice_of<T: Copy>(&self, key: &str, node: &Node, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let wanted = format!("one of \"{}\"", words.join("\", \""));
        let Kind::Text(text) = &node.kind else {
            self.wrong(key, node, &wanted);
            return None;
        };
        if let Some((_, value)) = choices.iter().find(|(word, _)| word == text) {
            return Some(*value);
        }
        let mut problem = Problem::new(
            node.span.clone(),
            self.path_of(key),
            format!("'{}' must be {wanted}, not \"{text}\"", self.path_of(key)),
        );
        problem.hint = nearest(text, &words).map(|near| format!("did you mean \"{near}\"?"));
        self.problems.add(problem);
        None
    }

    /// Reads a list of texts; one text alone is a list of one.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<At<String>>> {
        let node = &self.member(key)?.node;
        match &node.kind {
            Kind::Text(_) => self.text_of(key, node).map(|text| vec![text]),
            Kind::List(items) => Some(items.iter().filter_map(|item| self.text_of(key, item)).collect()),
            _ => {
                self.wrong(key, node, "a text or a list of texts");
                None
            }
        }
    }

    /// Reads a command: a list of words, or one text that is split into words as a shell would.
    pub fn command(&mut self, key: &'static str) -> Option<Vec<String>> {
        let node = &self.member(key)?.node;
        self.command_of(key, node)
    }

    /// Reads a value as a command.
    pub fn command_of(&self, key: &str, node: &Node) -> Option<Vec<String>> {
        let name = self.path_of(key);
        let words = match &node.kind {
            Kind::Text(line) => match split_words(line) {
                Ok(words) => {
                    if !self.needs_no_shell(key, node, line, &words) {
                        return None;
                    }
                    words
                }
                Err(why) => {
                    self.problem(&node.span, key, format!("'{name}' cannot be split into words: {why}"));
                    return None;
                }
            },
            Kind::List(items) => {
                let mut words = Vec::new();
                for item in items {
                    let Kind::Text(word) = &item.kind else {
                        self.wrong(key, item, "a list of texts");
                        return None;
                    };
                    words.push(word.clone());
                }
                words
            }
            _ => {
                self.wrong(key, node, "a text or a list of texts");
                return None;
            }
        };
        let what = if words.first().is_none_or(String::is_empty) {
            "names no program"
        } else if words.iter().any(|word| word.contains('\0')) {
            "holds a NUL character"
        } else {
            return Some(words);
        };
        self.problem(&node.span, key, format!("'{name}' {what}"));
        None
    }

    /// A line with `&&` in it would hand `&&` to the program as an argument, which nobody means.
    fn needs_no_shell(&self, key: &str, node: &Node, line: &str, words: &[String]) -> bool {
        let name = self.path_of(key);
        if let Some(word) = words.iter().find(|word| SHELL_WORDS.contains(&word.as_str())) {
            self.problem_with_hint(
                &node.span,
                key,
                format!("'{name}' has '{word}', and no shell reads it"),
                format!(
                    "write [\"sh\", \"-c\", {line:?}], or a list of words when the program itself is to get '{word}'"
                ),
            );
            return false;
        }
        let variable = words.first().and_then(|word| word.split_once('=')).filter(|(variable, _)| {
            !variable.is_empty() && variable.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        });
        if let Some((variable, value)) = variable {
            self.problem_with_hint(
                &node.span,
                key,
                format!("'{name}' begins with a variable, and no shell reads it"),
                format!("write env = {{ {variable} = {value:?} }}"),
            );
            return false;
        }
        true
    }
}

/// Joins the name of a table and that of a key in it.
pub fn path(table: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    let key = if plain { key.to_owned() } else { format!("{key:?}") };
    if table.is_empty() { key } else { format!("{table}.{key}") }
}

/// Returns the word that was probably meant.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let folded = word.to_ascii_lowercase().replace('-', "_");
    let near = |other: &str| {
        let other = other.to_ascii_lowercase().replace('-', "_");
        let distance = strsim::damerau_levenshtein(&folded, &other);
        // A third of the letters may be wrong; `cmd` is meant for `command`, which no distance tells.
        let allowed = (folded.len().max(other.len()) / 3).max(1);
        let begins = folded.len() >= 3 && (other.starts_with(&folded) || folded.starts_with(&other));
        (distance <= allowed || begins).then_some(distance)
    };
    known.iter().filter_map(|other| Some((near(other)?, *other))).min().map(|(_, other)| other)
}

fn sorted<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let mut words = words.to_vec();
    words.sort_unstable();
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_found_and_strangers_are_not() {
        let known = ["command", "cwd", "env", "depends_on", "memory_max", "on-failure"];
        for (word, near) in [
            ("comand", Some("command")),
            ("Command", Some("command")),
            ("depends-on", Some("depends_on")),
            ("depend_on", Some("depends_on")),
            ("memory", Some("memory_max")),
            ("on_failure", Some("on-failure")),
            ("cdw", Some("cwd")),
            ("image", None),
            ("x", None),
        ] {
            assert_eq!(nearest(word, &known), near, "{word}");
        }
    }

    #[test]
    fn keys_are_written_as_toml_writes_them() {
        assert_eq!(path("agents", "db"), "agents.db");
        assert_eq!(path("agents", "a.b"), "agents.\"a.b\"");
        assert_eq!(path("", "project"), "project");
    }
}
