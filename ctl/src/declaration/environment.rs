//! The environment of a declared agent: `env`, `env_file` and `pass_env`.
//!
//! Values are taken literally, without expansion, and only the named files are read.

use std::collections::BTreeMap;
use std::path::Path;

use super::problems::Problem;
use super::section::{Located, Section, path};
use super::source_file;
use super::tree::TomlValue;
use crate::agent_environment::IDENTITY;

/// The environment that a file declares, without the inherited variables.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Environment {
    /// The variables of `env` and of the files in `env_file`.
    pub set: BTreeMap<String, String>,
    /// The variables inherited from the caller; all when `None`. A name may end in `*`.
    pub pass: Option<Vec<String>>,
}

impl Environment {
    /// Returns the complete environment of the agent, and the names in `pass_env` that the caller's environment lacks.
    pub fn resolve(&self, callers: &BTreeMap<String, String>) -> (BTreeMap<String, String>, Vec<String>) {
        let mut missing = Vec::new();
        let mut env: BTreeMap<String, String> = match &self.pass {
            None => callers.clone(),
            Some(patterns) => {
                let plain = patterns.iter().filter(|pattern| !pattern.ends_with('*'));
                missing.extend(plain.filter(|name| !callers.contains_key(*name)).cloned());
                let passed = |name: &str| {
                    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
                        Some(beginning) => name.starts_with(beginning),
                        None => name == pattern,
                    })
                };
                callers.iter().filter(|(name, _)| passed(name)).map(|(n, v)| (n.clone(), v.clone())).collect()
            }
        };
        env.extend(self.set.iter().map(|(name, value)| (name.clone(), value.clone())));
        missing.retain(|name| !self.set.contains_key(name));
        (env, missing)
    }
}

/// Reads `env`, `env_file` and `pass_env`.
pub fn read(agent: &mut Section<'_>, workspace: &Path) -> Environment {
    let mut set = BTreeMap::new();
    for file in agent.texts("env_file").unwrap_or_default() {
        match variables_of(&workspace.join(&file.value)) {
            Ok(variables) => {
                for (name, value) in variables {
                    if may_be_set(agent, &file, "env_file", &name) {
                        set.insert(name, value);
                    }
                }
            }
            Err(why) => agent.problem(&file.span, "env_file", why),
        }
    }
    if let Some(member) = agent.member("env")
        && let Some(table) = Section::of(agent.path_of("env"), member, agent.problems())
    {
        for (name, member) in table.members() {
            let key = Located { value: name.clone(), span: member.key.clone() };
            if !may_be_set(agent, &key, "env", name) {
                continue;
            }
            match &member.node.kind {
                TomlValue::Text(value) if !value.contains('\0') => {
                    set.insert(name.clone(), value.clone());
                }
                TomlValue::Text(_) => {
                    table.problem(&member.node.span, name, format!("'{}' holds a NUL character", table.path_of(name)));
                }
                other => {
                    let written = match other {
                        TomlValue::Integer(Some(number)) => number.to_string(),
                        TomlValue::Float(number) => number.to_string(),
                        TomlValue::Bool(yes) => yes.to_string(),
                        _ => "…".into(),
                    };
                    let message = format!("'{}' must be a text, not {}", table.path_of(name), other.name());
                    table.problem_with_hint(&member.node.span, name, message, format!("write \"{written}\""));
                }
            }
        }
    }
    let pass = agent.texts("pass_env").map(|names| {
        let mut good = Vec::new();
        for name in names {
            let plain = name.value.strip_suffix('*').unwrap_or(&name.value);
            if plain.contains(['*', '=']) {
                let message = format!("\"{}\" is not a variable name; '*' is allowed at the end only", name.value);
                agent.problem(&name.span, "pass_env", message);
            } else {
                good.push(name.value);
            }
        }
        good.sort_unstable();
        good.dedup();
        good
    });
    Environment { set, pass }
}

/// Reports names that are invalid or reserved by Fermata.
fn may_be_set(agent: &Section<'_>, at: &Located<String>, key: &str, name: &str) -> bool {
    let why = if IDENTITY.contains(&name) {
        format!("the variable {name} is reserved by Fermata")
    } else if !is_name(name) {
        format!("'{name}' is not a valid variable name")
    } else {
        return true;
    };
    let key = path(&agent.path_of(key), name);
    agent.problems().add(Problem::new(at.span.clone(), key, why));
    false
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0', ' ', '\n'])
}

/// Reads a file of `NAME=value` lines with comments and quoted values, without expansion.
fn variables_of(file: &Path) -> Result<Vec<(String, String)>, String> {
    let text = source_file::read_trusted(file).map_err(|refusal| refusal.message)?;
    parse(&text).map_err(|(line, why)| format!("{}, line {line}: {why}", file.display()))
}

fn parse(text: &str) -> Result<Vec<(String, String)>, (usize, String)> {
    let mut variables = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let Some((name, value)) = line.split_once('=') else {
            return Err((i + 1, "expected NAME=value".into()));
        };
        let name = name.trim_end();
        if !is_name(name) {
            return Err((i + 1, format!("'{name}' is not a valid variable name")));
        }
        let value = value_of(value.trim()).map_err(|why| (i + 1, why))?;
        if value.contains('\0') {
            return Err((i + 1, "the value holds a NUL character".into()));
        }
        variables.push((name.to_owned(), value));
    }
    Ok(variables)
}

/// Removes the quotes of a value; an unquoted value ends at a comment that follows a blank.
fn value_of(text: &str) -> Result<String, String> {
    let quote = match text.chars().next() {
        Some(quote @ ('"' | '\'')) => quote,
        _ => return Ok(text.split_once(" #").map_or(text, |(value, _)| value).trim_end().to_owned()),
    };
    let mut value = String::new();
    let mut chars = text[1..].chars();
    loop {
        match chars.next() {
            Some(c) if c == quote => break,
            Some('\\') if quote == '"' => match chars.next() {
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some(c @ ('"' | '\\' | '$')) => value.push(c),
                Some(c) => value.extend(['\\', c]),
                None => return Err("unterminated quote".into()),
            },
            Some(c) => value.push(c),
            None => return Err("unterminated quote".into()),
        }
    }
    let rest = chars.as_str().trim_start();
    if rest.is_empty() || rest.starts_with('#') {
        Ok(value)
    } else {
        Err(format!("unexpected '{rest}' after the closing quote"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_variables_are_read_literally() {
        let text = "# a comment\n\nA=1\nexport B = two words # and a comment\nC=\"x\\n\\\"y\\\" $A\" # c\nD='a # b\\n'\nE=\nF=a#b\n";
        let read = parse(text).expect("valid");
        let expected =
            [("A", "1"), ("B", "two words"), ("C", "x\n\"y\" $A"), ("D", "a # b\\n"), ("E", ""), ("F", "a#b")];
        let read: Vec<(&str, &str)> = read.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(read, expected);
        for (bad, line) in [("A=1\nno variable\n", 2), ("A=\"open\n", 1), ("A='x' y\n", 1), ("A B=1\n", 1)] {
            assert_eq!(parse(bad).expect_err(bad).0, line);
        }
    }

    #[test]
    fn set_variables_override_inherited_ones() {
        let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let callers = of(&[("PATH", "/bin"), ("LC_ALL", "C"), ("SECRET", "s")]);
        let all = Environment { set: of(&[("PATH", "/x")]), pass: None };
        assert_eq!(all.resolve(&callers).0, of(&[("PATH", "/x"), ("LC_ALL", "C"), ("SECRET", "s")]));
        let some = Environment { set: of(&[("A", "1")]), pass: Some(vec!["LC_*".into(), "A".into(), "GONE".into()]) };
        assert_eq!(some.resolve(&callers), (of(&[("LC_ALL", "C"), ("A", "1")]), vec!["GONE".to_owned()]));
    }
}
