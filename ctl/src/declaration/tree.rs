//! A parsed TOML file: owned values with their locations.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problems::Problem;

/// A range of bytes in the file.
pub type Span = Range<usize>;

/// A value with its location.
#[derive(Debug, Clone, PartialEq)]
pub struct TomlNode {
    pub span: Span,
    pub kind: TomlValue,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TomlValue {
    Text(String),
    /// `None` when it does not fit.
    Integer(Option<i64>),
    Float(f64),
    Bool(bool),
    /// A date or time, as written.
    Time(String),
    List(Vec<TomlNode>),
    Table(TomlTable),
}

impl TomlValue {
    /// Returns the name of the type, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::Time(_) => "a date or time",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

pub type TomlTable = BTreeMap<String, TomlEntry>;

#[derive(Debug, Clone, PartialEq)]
pub struct TomlEntry {
    /// The location of the key.
    pub key: Span,
    pub node: TomlNode,
}

/// Parses the text of a file.
///
/// # Errors
/// All syntax errors, each with its location.
pub fn parse(text: &str) -> Result<TomlTable, Vec<Problem>> {
    let (root, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(table(root.into_inner()));
    }
    Err(errors.iter().map(|error| Problem::new(error.span().unwrap_or(0..0), "", error.message())).collect())
}

fn table(table: DeTable<'_>) -> TomlTable {
    table
        .into_iter()
        .map(|(key, value)| {
            let span = key.span();
            (key.into_inner().into_owned(), TomlEntry { key: span, node: node(value) })
        })
        .collect()
}

fn node(value: Spanned<DeValue<'_>>) -> TomlNode {
    let span = value.span();
    let kind = match value.into_inner() {
        DeValue::String(text) => TomlValue::Text(text.into_owned()),
        DeValue::Integer(number) => TomlValue::Integer(i64::from_str_radix(number.as_str(), number.radix()).ok()),
        DeValue::Float(number) => TomlValue::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(yes) => TomlValue::Bool(yes),
        DeValue::Datetime(time) => TomlValue::Time(time.to_string()),
        DeValue::Array(items) => TomlValue::List(items.into_iter().map(node).collect()),
        DeValue::Table(members) => TomlValue::Table(table(members)),
    };
    TomlNode { span, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_value_keeps_its_location() {
        let text = "a = \"x\"\nb = 0x1F\nc = 1_000.5\nd = true\ne = 2026-01-02\nf = [1, \"y\"]\n[g.h]\ni = {j = inf}\n";
        let root = parse(text).expect("valid");
        let kinds: Vec<_> = root.iter().map(|(name, member)| (name.as_str(), member.node.kind.name())).collect();
        let expected = ["a string", "an integer", "a number", "true or false", "a date or time", "a list", "a table"];
        assert_eq!(kinds.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(), expected);
        assert_eq!(root["b"].node.kind, TomlValue::Integer(Some(31)));
        assert_eq!(root["c"].node.kind, TomlValue::Float(1000.5));
        assert_eq!(&text[root["b"].key.clone()], "b");
        assert_eq!(&text[root["a"].node.span.clone()], "\"x\"");
    }

    #[test]
    fn all_syntax_errors_are_reported_at_once() {
        let problems = parse("a = \nb = 1\nb = 2\n[c\n").expect_err("broken");
        let lines: Vec<_> = problems.iter().map(|p| p.span.start).collect();
        assert!(problems.len() >= 3, "{problems:?}");
        assert!(lines.iter().all(|start| *start <= 21), "{problems:?}");
    }

    #[test]
    fn an_integer_that_does_not_fit_has_no_value() {
        let root = parse("a = 99999999999999999999").expect("valid syntax");
        assert_eq!(root["a"].node.kind, TomlValue::Integer(None));
    }
}
