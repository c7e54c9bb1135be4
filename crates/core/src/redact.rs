//! Redacts secrets in texts before they are stored or sent: tokens of well-known forms, private
//! keys, and the values of an agent's own secret variables.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::Value;

/// A well-known form of a token: its prefix, and the fewest characters that follow.
struct TokenForm {
    prefix: &'static str,
    least: usize,
    kind: &'static str,
}

const fn form(prefix: &'static str, least: usize, kind: &'static str) -> TokenForm {
    TokenForm { prefix, least, kind }
}

/// The forms that issuers document; a longer prefix precedes a shorter one.
const FORMS: &[TokenForm] = &[
    form("sk-", 20, "api_key"),
    form("github_pat_", 22, "github_token"),
    form("ghp_", 30, "github_token"),
    form("gho_", 30, "github_token"),
    form("ghu_", 30, "github_token"),
    form("ghs_", 30, "github_token"),
    form("ghr_", 30, "github_token"),
    form("glpat-", 20, "gitlab_token"),
    form("xoxb-", 20, "slack_token"),
    form("xoxp-", 20, "slack_token"),
    form("xoxa-", 20, "slack_token"),
    form("xoxs-", 20, "slack_token"),
    form("npm_", 36, "npm_token"),
    form("hf_", 30, "hugging_face_token"),
    form("AIza", 35, "google_api_key"),
    form("AKIA", 16, "aws_access_key"),
    form("ASIA", 16, "aws_access_key"),
];

/// Endings of the names of variables whose values are secrets.
const SECRET_NAMES: &[&str] = &["_KEY", "_TOKEN", "_SECRET", "_PASSWORD"];

/// Shorter values occur as ordinary words: redacting them would reveal more than it hides.
const LEAST_VALUE: usize = 8;

const KEY_BEGIN: &str = "-----BEGIN ";
const KEY_END: &str = "-----END ";
const KEY_LABEL: &str = "PRIVATE KEY-----";

/// The values of an agent's own secret variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Secrets {
    /// Longest first, so that a value that contains another one is redacted completely.
    values: Vec<String>,
}

impl Secrets {
    /// Collects the secret values of an environment by the variables' names.
    pub fn of(env: &BTreeMap<String, String>) -> Self {
        let secret = |name: &str| SECRET_NAMES.iter().any(|end| name.to_ascii_uppercase().ends_with(end));
        let mut values: Vec<String> = env
            .iter()
            .filter(|(name, value)| secret(name) && value.len() >= LEAST_VALUE)
            .map(|(_, value)| value.clone())
            .collect();
        values.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        values.dedup();
        Self { values }
    }

    /// Replaces each secret in a text by `[redacted:<kind>]`.
    pub fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut out: Option<String> = None;
        let mut copied = 0;
        let mut at = 0;
        while at < text.len() {
            match self.secret_at(text, at) {
                Some((end, kind)) => {
                    let out = out.get_or_insert_with(String::new);
                    out.push_str(&text[copied..at]);
                    out.push_str("[redacted:");
                    out.push_str(kind);
                    out.push(']');
                    (at, copied) = (end, end);
                }
                None => at += text[at..].chars().next().map_or(1, char::len_utf8),
            }
        }
        match out {
            None => Cow::Borrowed(text),
            Some(mut out) => {
                out.push_str(&text[copied..]);
                Cow::Owned(out)
            }
        }
    }

    /// Redacts every text of a JSON value.
    pub fn redact_json(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Cow::Owned(redacted) = self.redact(text) {
                    *text = redacted;
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.redact_json(value)),
            Value::Object(members) => members.values_mut().for_each(|value| self.redact_json(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Returns the end and the kind of the secret that begins at `at`.
    fn secret_at(&self, text: &str, at: usize) -> Option<(usize, &'static str)> {
        let rest = &text[at..];
        if let Some(value) = self.values.iter().find(|value| rest.starts_with(value.as_str())) {
            return Some((at + value.len(), "variable"));
        }
        if rest.starts_with(KEY_BEGIN) {
            return private_key(rest).map(|length| (at + length, "private_key"));
        }
        // A token does not begin in the middle of a word.
        if text[..at].chars().next_back().is_some_and(|c| c.is_ascii_alphanumeric()) {
            return None;
        }
        for form in FORMS {
            if let Some(body) = rest.strip_prefix(form.prefix) {
                let length = body.bytes().take_while(|b| is_token_byte(*b)).count();
                if length >= form.least {
                    return Some((at + form.prefix.len() + length, form.kind));
                }
            }
        }
        web_token(rest).map(|length| (at + length, "json_web_token"))
    }
}

fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// Returns the length of a private key in PEM form; one without an end reaches to the text's end.
fn private_key(text: &str) -> Option<usize> {
    let first_line = text.lines().next()?;
    if !first_line.contains(KEY_LABEL) {
        return None;
    }
    let Some(end) = text.find(KEY_END) else { return Some(text.len()) };
    let last_line = text[end..].find(KEY_LABEL).map_or(text.len(), |at| end + at + KEY_LABEL.len());
    Some(last_line)
}

/// Returns the length of a JSON web token: three parts of base64url, of which the first begins as
/// a JSON object does.
fn web_token(text: &str) -> Option<usize> {
    if !text.starts_with("eyJ") {
        return None;
    }
    let mut length = 0;
    for part in 0..3 {
        let size = text[length..].bytes().take_while(|b| is_token_byte(*b)).count();
        if size < 10 {
            return None;
        }
        length += size;
        if part < 2 {
            text[length..].strip_prefix('.')?;
            length += 1;
        }
    }
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(text: &str) -> String {
        Secrets::default().redact(text).into_owned()
    }

    #[test]
    fn tokens_of_well_known_forms_are_taken_out() {
        let body = "a1B2".repeat(12);
        for (prefix, kind) in [("sk-proj-", "api_key"), ("ghp_", "github_token"), ("npm_", "npm_token")] {
            assert_eq!(plain(&format!("use {prefix}{body}, please")), format!("use [redacted:{kind}], please"));
        }
        assert_eq!(plain("key=AKIAABCDEFGHIJKLMNOP."), "key=[redacted:aws_access_key].");
        let web = format!("eyJ{body}.{body}.{body}");
        assert_eq!(plain(&format!("Bearer {web}\n")), "Bearer [redacted:json_web_token]\n");
    }

    #[test]
    fn private_keys_are_taken_out_whole() {
        let text = "a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nb";
        assert_eq!(plain(text), "a\n[redacted:private_key]\nb");
        assert_eq!(plain("-----BEGIN PRIVATE KEY-----\nMIIE"), "[redacted:private_key]");
        let public = "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----";
        assert_eq!(plain(public), public);
    }

    #[test]
    fn values_of_secret_variables_are_taken_out() {
        let env = [("DB_PASSWORD", "correct horse"), ("api_key", "short"), ("HOME", "/home/someone")];
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let secrets = Secrets::of(&env);
        assert_eq!(secrets.redact("it is 'correct horse'"), "it is '[redacted:variable]'");
        assert_eq!(secrets.redact("short, in /home/someone"), "short, in /home/someone");
    }

    #[test]
    fn ordinary_words_stay() {
        for text in ["task-sk-ill", "the sk-ating rink", "AKIA", "risk-averse-and-careful-planning-ahead", "eyJ.a.b"] {
            assert!(matches!(Secrets::default().redact(text), Cow::Borrowed(_)), "{text}");
        }
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn invariant_redacting_twice_changes_nothing_more(text in ".{0,200}") {
            let once = plain(&text);
            prop_assert_eq!(plain(&once), once);
        }
    }
}
