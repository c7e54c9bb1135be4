//! TOML as a tree of owned values that know where in the file they stand.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problems::Problem;

/// A place in the file, bytes.
pub type Span = Range<usize>;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where it stands.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
}

/// What a value is.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A text.
    Text(String),
    /// A whole number; none when it is too large.
    Integer(Option<i64>),
    /// A number with a fraction.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A date or a time, as it is written.
    Time(String),
    /// A list.
    List(Vec<Node>),
    /// A table.
    Table(Table),
}

impl Kind {
    /// Returns what to call it in a sentence.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Integer(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::Time(_) => "a date or time",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

/// A table: by name, where the name stands and the value.
pub type Table = BTreeMap<String, Member>;

/// One member of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Where its name stands.
    pub key: Span,
    /// Its value.
    pub node: Node,
}

/// Reads a file's text.
///
/// # Errors
/// Everything that keeps it from being TOML, each with its place.
pub fn parse(text: &str) -> Result<Table, Vec<Problem>> {
    let (root, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(table(root.into_inner()));
    }
    Err(errors.iter().map(|error| Problem::new(error.span().unwrap_or(0..0), "", error.message())).collect())
}

fn table(table: DeTable<'_>) -> Table {
    table
        .into_iter()
        .map(|(key, value)| {
            let span = key.span();
            (key.into_inner().into_owned(), Member { key: span, node: node(value) })
        })
        .collect()
}

fn node(value: Spanned<DeValue<'_>>) -> Node {
    let span = value.span();
    let kind = match value.into_inner() {
        DeValue::String(text) => Kind::Text(text.into_owned()),
        DeValue::Integer(number) => Kind::Integer(i64::from_str_radix(number.as_str(), number.radix()).ok()),
        DeValue::Float(number) => Kind::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(yes) => Kind::Bool(yes),
        DeValue::Datetime(time) => Kind::Time(time.to_string()),
        DeValue::Array(items) => Kind::List(items.into_iter().map(node).collect()),
        DeValue::Table(members) => Kind::Table(table(members)),
    };
    Node { span, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_keeps_its_place() {
        let text = "a = \"x\"\nb = 0x1F\nc = 1_000.5\nd = true\ne = 2026-01-02\nf = [1, \"y\"]\n[g.h]\ni = {j = inf}\n";
        let root = parse(text).expect("valid");
        let kinds: Vec<_> = root.iter().map(|(name, member)| (name.as_str(), member.node.kind.name())).collect();
        let expected = ["a text", "a whole number", "a number", "true or false", "a date or time", "a list", "a table"];
        assert_eq!(kinds.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(), expected);
        assert_eq!(root["b"].node.kind, Kind::Integer(Some(31)));
        assert_eq!(root["c"].node.kind, Kind::Float(1000.5));
        assert_eq!(&text[root["b"].key.clone()], "b");
        assert_eq!(&text[root["a"].node.span.clone()], "\"x\"");
    }

    #[test]
    fn all_errors_of_the_syntax_are_told_at_once() {
        let problems = parse("a = \nb = 1\nb = 2\n[c\n").expect_err("broken");
        let lines: Vec<_> = problems.iter().map(|p| p.span.start).collect();
        assert!(problems.len() >= 3, "{problems:?}");
        assert!(lines.iter().all(|start| *start <= 21), "{problems:?}");
    }

    #[test]
    fn a_number_that_is_too_large_is_not_another_one() {
        let root = parse("a = 99999999999999999999").expect("the form is good");
        assert_eq!(root["a"].node.kind, Kind::Integer(None));
    }
}
