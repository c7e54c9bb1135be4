//! Parsers of argument values: references to numbered items, wire names, shell words, signals.

use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use fermata_protocol::ProjectName;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A reference to a numbered item of a project: `project/12`, or `12` in the project of the calling agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ItemRef {
    pub project: Option<ProjectName>,
    pub id: u64,
}

impl FromStr for ItemRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (project, id) = match text.rsplit_once('/') {
            Some((project, id)) => {
                let project = ProjectName::new(project).map_err(|e| e.to_string())?;
                (Some(project), id)
            }
            None => (None, text),
        };
        let id = id.parse().map_err(|_| format!("'{text}' is not PROJECT/NUMBER"))?;
        Ok(Self { project, id })
    }
}

/// Returns a parser for one of `words`, each a wire name of `T`.
pub fn word<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words).try_map(|word: String| serde_json::from_value::<T>(Value::String(word)))
}

pub const ITEM_TYPES: &[&str] = &["TASK", "CODE", "ERROR", "TEST_RESULT", "PRD_SECTION", "OTHER"];
pub const TIERS: &[&str] = &["hot", "warm", "cold"];
pub const PHASES: &[&str] = &["discovery", "planning", "active", "review", "complete"];
pub const MODES: &[&str] = &["freeze", "park", "image"];
pub const TASK_STATUSES: &[&str] = &["pending", "in_progress", "waiting_for_input", "completed", "failed", "cancelled"];

/// Splits a line into words as a shell does, with quotes and backslashes but without expansion.
///
/// # Errors
/// When a quote is not closed or the line ends in a backslash.
pub fn split_words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => word.push(c),
                        None => return Err("a single quote is not closed".into()),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('"') => break,
                        Some('\\') => match chars.next() {
                            Some('\n') => {}
                            Some(c @ ('"' | '\\' | '$' | '`')) => word.push(c),
                            Some(c) => word.extend(['\\', c]),
                            None => return Err("a double quote is not closed".into()),
                        },
                        Some(c) => word.push(c),
                        None => return Err("a double quote is not closed".into()),
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => {}
                Some(c) => word.get_or_insert_default().push(c),
                None => return Err("the line ends in a backslash".into()),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// Normalises a signal name for the protocol: upper case, without `SIG`; numbers stay.
///
/// # Errors
/// When the text is not a signal name or number.
pub fn signal(text: &str) -> Result<String, String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-');
    if name.is_empty() || !name.chars().all(good) {
        return Err(format!("'{text}' is not a signal, such as USR1 or SIGTERM"));
    }
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_as_a_shell_does() {
        for (line, words) in [
            ("", vec![]),
            ("  a  b ", vec!["a", "b"]),
            ("codex exec resume 'a b'", vec!["codex", "exec", "resume", "a b"]),
            (r#"x "a \"b\" \n" y"#, vec!["x", r#"a "b" \n"#, "y"]),
            (r"a\ b c\\", vec!["a b", r"c\"]),
            ("a'b'\"c\"", vec!["abc"]),
            ("'' \"\"", vec!["", ""]),
            ("$HOME *", vec!["$HOME", "*"]),
        ] {
            assert_eq!(
                split_words(line).as_deref(),
                Ok(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()[..]),
                "{line}"
            );
        }
        for bad in ["'a", "\"a", "\"a\\", "a\\"] {
            assert!(split_words(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn item_references_have_a_project_or_not() {
        let whole: ItemRef = "web/3".parse().expect("valid");
        assert_eq!((whole.project.as_ref().map(|p| p.as_str()), whole.id), (Some("web"), 3));
        let bare: ItemRef = "3".parse().expect("valid");
        assert_eq!(bare.project, None);
        for bad in ["web", "web/", "web/x", "/3", "-1"] {
            assert!(bad.parse::<ItemRef>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signal_names_are_normalised() {
        assert_eq!(signal("sigusr1").as_deref(), Ok("USR1"));
        assert_eq!(signal("TERM").as_deref(), Ok("TERM"));
        assert_eq!(signal("9").as_deref(), Ok("9"));
        assert!(signal("").is_err() && signal("a b").is_err());
    }
}
