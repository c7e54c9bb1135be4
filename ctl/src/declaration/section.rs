//! Reads one table of a file: typed values, and a problem for every unknown key.
//!
//! Problems are collected, not returned, so that the whole file is checked; an invalid value counts as missing.
//! Durations and sizes are always strings with a unit.

use std::cell::RefCell;

use super::problems::Problem;
use super::tree::{Span, TomlEntry, TomlNode, TomlTable, TomlValue};
use crate::cli::values::split_words;
use crate::units::{millis, parse_bytes, parse_duration};

/// Words that only a shell interprets.
const SHELL_WORDS: &[&str] = &["&&", "||", "|", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>"];

/// The problems of one file, in the order of detection.
#[derive(Debug, Default)]
pub struct Problems(RefCell<Vec<Problem>>);

impl Problems {
    pub fn add(&self, problem: Problem) {
        self.0.borrow_mut().push(problem);
    }

    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    pub fn into_inner(self) -> Vec<Problem> {
        self.0.into_inner()
    }
}

/// A value with its location in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Located<T> {
    pub value: T,
    pub span: Span,
}

/// A table, the keys that were asked for so far, and the problems found.
#[derive(Debug)]
pub struct Section<'a> {
    path: String,
    span: Span,
    table: &'a TomlTable,
    known: Vec<&'static str>,
    problems: &'a Problems,
}

impl<'a> Section<'a> {
    /// `path` is the full path of the table, `span` the location of its name.
    pub fn new(path: String, span: Span, table: &'a TomlTable, problems: &'a Problems) -> Self {
        Self { path, span, table, known: Vec::new(), problems }
    }

    /// Returns `None`, and adds a problem, when the entry is not a table.
    pub fn of(path: String, member: &'a TomlEntry, problems: &'a Problems) -> Option<Self> {
        match &member.node.kind {
            TomlValue::Table(table) => Some(Self::new(path, member.key.clone(), table, problems)),
            other => {
                let message = format!("'{path}' must be a table, not {}", other.name());
                problems.add(Problem::new(member.node.span.clone(), path, message));
                None
            }
        }
    }

    /// Returns the location of the name of the table.
    pub fn span(&self) -> Span {
        self.span.clone()
    }

    /// Returns the full path of a key.
    pub fn path_of(&self, key: &str) -> String {
        path(&self.path, key)
    }

    pub fn problems(&self) -> &'a Problems {
        self.problems
    }

    /// Adds a problem with a key of this table.
    pub fn problem(&self, span: &Span, key: &str, message: impl Into<String>) {
        self.problems.add(Problem::new(span.clone(), self.path_of(key), message));
    }

    pub fn problem_with_hint(&self, span: &Span, key: &str, message: impl Into<String>, hint: impl Into<String>) {
        self.problems.add(Problem::new(span.clone(), self.path_of(key), message).hint(hint));
    }

    /// Returns an entry, and records its key as known.
    pub fn member(&mut self, key: &'static str) -> Option<&'a TomlEntry> {
        self.known.push(key);
        self.table.get(key)
    }

    /// Returns all entries.
    pub fn members(&self) -> &'a TomlTable {
        self.table
    }

    /// Adds a problem for every key that was not asked for.
    pub fn finish(self) {
        for (name, member) in self.table {
            if self.known.contains(&name.as_str()) {
                continue;
            }
            let place = if self.path.is_empty() { "at the top level".into() } else { format!("in [{}]", self.path) };
            let mut problem =
                Problem::new(member.key.clone(), self.path_of(name), format!("unknown key '{name}' {place}"));
            problem.hint = Some(match nearest(name, &self.known) {
                Some(near) => format!("did you mean '{near}'?"),
                None => format!("known keys: {}", sorted(&self.known).join(", ")),
            });
            self.problems.add(problem);
        }
    }

    fn type_error(&self, key: &str, node: &TomlNode, wanted: &str) {
        let name = self.path_of(key);
        self.problem(&node.span, key, format!("'{name}' must be {wanted}, not {}", node.kind.name()));
    }

    /// Reads a string that is not empty.
    pub fn text(&mut self, key: &'static str) -> Option<Located<String>> {
        let node = &self.member(key)?.node;
        self.text_of(key, node)
    }

    fn text_of(&self, key: &str, node: &TomlNode) -> Option<Located<String>> {
        let TomlValue::Text(text) = &node.kind else {
            self.type_error(key, node, "a string");
            return None;
        };
        if text.is_empty() || text.contains('\0') {
            let what = if text.is_empty() { "is empty" } else { "contains a NUL character" };
            self.problem(&node.span, key, format!("'{}' {what}", self.path_of(key)));
            return None;
        }
        Some(Located { value: text.clone(), span: node.span.clone() })
    }

    /// Reads a boolean.
    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        let node = &self.member(key)?.node;
        match node.kind {
            TomlValue::Bool(yes) => Some(yes),
            _ => {
                self.type_error(key, node, "true or false");
                None
            }
        }
    }

    /// Reads a duration into milliseconds.
    pub fn duration(&mut self, key: &'static str) -> Option<Located<u64>> {
        let node = &self.member(key)?.node;
        self.duration_of(key, node)
    }

    fn duration_of(&self, key: &str, node: &TomlNode) -> Option<Located<u64>> {
        let read = |text: &str| parse_duration(text).map(millis);
        self.measure(key, node, "a duration with its unit, such as \"90s\", \"1h30m\" or \"250ms\"", "s", read)
    }

    /// Reads a size into bytes.
    pub fn size(&mut self, key: &'static str) -> Option<Located<u64>> {
        let node = &self.member(key)?.node;
        self.measure(key, node, "a size with its unit, such as \"512M\" or \"1.5G\"", "M", parse_bytes)
    }

    fn measure(
        &self,
        key: &str,
        node: &TomlNode,
        wanted: &str,
        unit: &str,
        read: impl Fn(&str) -> Result<u64, String>,
    ) -> Option<Located<u64>> {
        let text = match &node.kind {
            TomlValue::Text(text) => text,
            TomlValue::Integer(Some(number)) if *number >= 0 => {
                let message = format!("'{}' must be {wanted}", self.path_of(key));
                self.problem_with_hint(
                    &node.span,
                    key,
                    message,
                    format!("write \"{number}{unit}\" if that is intended"),
                );
                return None;
            }
            _ => {
                self.type_error(key, node, wanted);
                return None;
            }
        };
        let has_unit = text.chars().any(|c| c.is_ascii_alphabetic());
        match read(text) {
            Ok(value) if has_unit => Some(Located { value, span: node.span.clone() }),
            _ => {
                self.problem(&node.span, key, format!("'{}' must be {wanted}; \"{text}\" is not", self.path_of(key)));
                None
            }
        }
    }

    /// Reads an integer between two bounds, both included.
    pub fn count(&mut self, key: &'static str, least: u64, most: u64) -> Option<u64> {
        let node = &self.member(key)?.node;
        let number = match node.kind {
            TomlValue::Integer(number) => number.and_then(|number| u64::try_from(number).ok()),
            _ => {
                self.type_error(key, node, "an integer");
                return None;
            }
        };
        let good = number.filter(|number| (least..=most).contains(number));
        if good.is_none() {
            self.problem(&node.span, key, format!("'{}' must be from {least} to {most}", self.path_of(key)));
        }
        good
    }

    /// Reads a number greater than 0 and at most `most`.
    pub fn amount(&mut self, key: &'static str, most: f64) -> Option<f64> {
        let node = &self.member(key)?.node;
        let number = match node.kind {
            // Every permitted integer is exact as a float.
            TomlValue::Integer(number) => number.map_or(f64::INFINITY, |number| number as f64),
            TomlValue::Float(number) => number,
            _ => {
                self.type_error(key, node, "a number");
                return None;
            }
        };
        if number > 0.0 && number <= most {
            return Some(number);
        }
        self.problem(&node.span, key, format!("'{}' must be greater than 0 and at most {most}", self.path_of(key)));
        None
    }

    /// Reads one of several words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let node = &self.member(key)?.node;
        self.choice_of(key, node, choices)
    }

    /// Reads one of several words from a value.
    pub fn choice_of<T: Copy>(&self, key: &str, node: &TomlNode, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let wanted = format!("one of \"{}\"", words.join("\", \""));
        let TomlValue::Text(text) = &node.kind else {
            self.type_error(key, node, &wanted);
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

    /// Reads a list of strings; a single string is a list of one.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<Located<String>>> {
        let node = &self.member(key)?.node;
        match &node.kind {
            TomlValue::Text(_) => self.text_of(key, node).map(|text| vec![text]),
            TomlValue::List(items) => Some(items.iter().filter_map(|item| self.text_of(key, item)).collect()),
            _ => {
                self.type_error(key, node, "a string or a list of strings");
                None
            }
        }
    }

    /// Reads a command: a list of words, or a string that is split into words as a shell does.
    pub fn command(&mut self, key: &'static str) -> Option<Vec<String>> {
        let node = &self.member(key)?.node;
        self.command_of(key, node)
    }

    /// Reads a command from a value.
    pub fn command_of(&self, key: &str, node: &TomlNode) -> Option<Vec<String>> {
        let name = self.path_of(key);
        let words = match &node.kind {
            TomlValue::Text(line) => match split_words(line) {
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
            TomlValue::List(items) => {
                let mut words = Vec::new();
                for item in items {
                    let TomlValue::Text(word) = &item.kind else {
                        self.type_error(key, item, "a list of strings");
                        return None;
                    };
                    words.push(word.clone());
                }
                words
            }
            _ => {
                self.type_error(key, node, "a string or a list of strings");
                return None;
            }
        };
        let what = if words.first().is_none_or(String::is_empty) {
            "names no program"
        } else if words.iter().any(|word| word.contains('\0')) {
            "contains a NUL character"
        } else {
            return Some(words);
        };
        self.problem(&node.span, key, format!("'{name}' {what}"));
        None
    }

    /// Adds a problem for a line that only makes sense in a shell: it would pass words such as `&&` to the program.
    fn needs_no_shell(&self, key: &str, node: &TomlNode, line: &str, words: &[String]) -> bool {
        let name = self.path_of(key);
        if let Some(word) = words.iter().find(|word| SHELL_WORDS.contains(&word.as_str())) {
            self.problem_with_hint(
                &node.span,
                key,
                format!("'{name}' contains '{word}', but is not run by a shell"),
                format!("write [\"sh\", \"-c\", {line:?}], or a list of words to pass '{word}' to the program"),
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
                format!("'{name}' begins with a variable assignment, but is not run by a shell"),
                format!("write env = {{ {variable} = {value:?} }}"),
            );
            return false;
        }
        true
    }
}

/// Joins the path of a table and a key, quoted where TOML requires it.
pub fn path(table: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    let key = if plain { key.to_owned() } else { format!("{key:?}") };
    if table.is_empty() { key } else { format!("{table}.{key}") }
}

/// Returns the known word that is most similar, if one is similar enough.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let folded = word.to_ascii_lowercase().replace('-', "_");
    let near = |other: &str| {
        let other = other.to_ascii_lowercase().replace('-', "_");
        let distance = strsim::damerau_levenshtein(&folded, &other);
        // A third of the letters may differ. An abbreviation is far by distance, so a common prefix counts too.
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
    fn the_most_similar_word_is_found_and_dissimilar_ones_are_not() {
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
