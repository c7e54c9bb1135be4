//! The command that continues a tool's session: the pure half of a profile.
//!
//! `codex exec --json -m x "do it"` with session `0199…` becomes
//! `codex exec --json -m x resume 0199… "<prompt>"`: the profile says which words lead, which
//! flags are kept, and what follows them.

use serde::{Deserialize, Serialize};

/// The part of a profile that makes the resume command.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeTemplate {
    /// The subcommand that the original must have right after the program, for instance `exec`;
    /// it leads the new command too.
    #[serde(default)]
    pub subcommand: Option<String>,
    /// Flags without value that are kept.
    #[serde(default)]
    pub flags: Vec<String>,
    /// Flags with a value that are kept, as `--flag value` or `--flag=value`.
    #[serde(default)]
    pub valued_flags: Vec<String>,
    /// What follows; `{session}` stands for the session's id.
    pub tail: Vec<String>,
}

impl ResumeTemplate {
    /// Makes the resume command of `argv` for a session.
    ///
    /// Returns `None` when `argv` does not have the template's form.
    pub fn command(&self, argv: &[String], session: &str) -> Option<Vec<String>> {
        let (program, mut rest) = argv.split_first()?;
        let mut command = vec![program.clone()];
        let mut lead = Vec::new();
        if let Some(subcommand) = &self.subcommand {
            let at = position_of(rest, subcommand, &self.valued_flags)?;
            lead = self.kept(&rest[..at]);
            rest = &rest[at + 1..];
        }
        command.extend(lead);
        command.extend(self.subcommand.clone());
        command.extend(self.kept(rest));
        command.extend(self.tail.iter().map(|word| word.replace("{session}", session)));
        Some(command)
    }

    fn kept(&self, words: &[String]) -> Vec<String> {
        let mut kept = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if word == "--" {
                break;
            }
            if self.flags.contains(word) {
                kept.push(word.clone());
            } else if self.valued_flags.contains(word) {
                kept.push(word.clone());
                kept.extend(words.next().cloned());
            } else if let Some((flag, _)) = word.split_once('=')
                && self.valued_flags.iter().any(|f| f == flag)
            {
                kept.push(word.clone());
            }
        }
        kept
    }
}

/// Finds the subcommand among leading flags.
fn position_of(words: &[String], subcommand: &str, valued_flags: &[String]) -> Option<usize> {
    let mut at = 0;
    while let Some(word) = words.get(at) {
        if word == subcommand {
            return Some(at);
        }
        if !word.starts_with('-') {
            return None;
        }
        at += if valued_flags.contains(word) { 2 } else { 1 };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn codex() -> ResumeTemplate {
        ResumeTemplate {
            subcommand: Some("exec".into()),
            flags: words("--json --skip-git-repo-check"),
            valued_flags: words("-m --model -c"),
            tail: vec!["resume".into(), "{session}".into(), "Continue.".into()],
        }
    }

    #[test]
    fn flags_are_kept_and_the_prompt_is_replaced() {
        let command = codex().command(&words("codex -c a=b exec --json -m x --model=y fix it"), "id7");
        assert_eq!(command, Some(words("codex -c a=b exec --json -m x --model=y resume id7 Continue.")));
    }

    #[test]
    fn another_form_is_not_guessed_at() {
        assert_eq!(codex().command(&words("codex login"), "id7"), None);
        assert_eq!(codex().command(&words("codex"), "id7"), None);
        assert_eq!(codex().command(&[], "id7"), None);
    }
}
