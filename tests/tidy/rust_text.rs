//! Reads Rust as text: blanks comments and literals, finds words and `crate::` paths.
//!
//! This is no parser: it covers as much of the syntax as is needed to keep comments and strings from triggering a
//! rule.

/// Returns the text with comments and the content of literals replaced by spaces, line for line.
pub fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let skip = skipped(&bytes[at..], out.last().copied());
        if skip == 0 {
            out.push(bytes[at]);
            at += 1;
        } else {
            out.extend(bytes[at..at + skip].iter().map(|&b| if b == b'\n' { b'\n' } else { b' ' }));
            at += skip;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Returns the length of the comment or literal at the beginning of the text, in bytes.
fn skipped(rest: &[u8], before: Option<u8>) -> usize {
    let word_before = before.is_some_and(is_word);
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'"', ..] => quoted(rest, 0),
        [b'b' | b'c', b'"', ..] if !word_before => quoted(rest, 1),
        [b'r', b'"' | b'#', ..] if !word_before => raw(rest, 1),
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !word_before => raw(rest, 2),
        // A character literal, not a lifetime: 'x' or an escape.
        [b'\'', b'\\', _, more @ ..] => more.iter().position(|&b| b == b'\'').map_or(3, |end| end + 4),
        [b'\'', first, more @ ..] if *first != b'\'' => {
            let width = match first {
                0xF0.. => 4,
                0xE0.. => 3,
                0xC0.. => 2,
                _ => 1,
            };
            if more.get(width - 1) == Some(&b'\'') { width + 2 } else { 0 }
        }
        _ => 0,
    }
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Measures a literal with escapes whose opening quote is at `quote`.
fn quoted(rest: &[u8], quote: usize) -> usize {
    let mut at = quote + 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Measures a raw literal whose hashes begin at `start`; 0 for a raw identifier.
fn raw(rest: &[u8], start: usize) -> usize {
    let hashes = rest[start..].iter().take_while(|&&b| b == b'#').count();
    if rest.get(start + hashes) != Some(&b'"') {
        return 0;
    }
    let mut end = vec![b'"'];
    end.extend(std::iter::repeat_n(b'#', hashes));
    let body = start + hashes + 1;
    rest[body..].windows(end.len()).position(|w| w == end).map_or(rest.len(), |at| body + at + end.len())
}

/// Returns the text before the file's test module.
pub fn without_tests(text: &str) -> &str {
    let mut at = 0;
    let mut attribute = None;
    for line in text.split_inclusive('\n') {
        match (line.trim_end(), attribute) {
            ("#[cfg(test)]", _) => attribute = Some(at),
            (line, Some(start)) if line.starts_with("mod ") && line.ends_with('{') => return &text[..start],
            (line, Some(_)) if line.starts_with("#[") => {}
            _ => attribute = None,
        }
        at += line.len();
    }
    text
}

/// The definition of a type, a function or a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// The keyword: `struct`, `enum`, `union`, `trait`, `type`, `fn` or `mod`.
    pub kind: &'static str,
    pub name: String,
    /// The line, from 1.
    pub line: usize,
}

impl Definition {
    /// Says whether the name is that of a type or trait.
    pub fn is_type(&self) -> bool {
        !matches!(self.kind, "fn" | "mod")
    }
}

/// Lists the definitions in code without comments and literals, except associated types.
pub fn definitions(code: &str) -> Vec<Definition> {
    const KINDS: [&str; 7] = ["struct", "enum", "union", "trait", "type", "fn", "mod"];
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut words = line.split_whitespace().peekable();
        while let Some(word) = words.next() {
            let Some(kind) = KINDS.into_iter().find(|kind| *kind == word) else { continue };
            let is_associated = kind == "type" && line.starts_with(' ');
            if let Some(name) = words.peek().and_then(|next| first_word(next))
                && !is_associated
            {
                found.push(Definition { kind, name, line: number + 1 });
            }
        }
    }
    found
}

/// Says whether the code has a word, followed by `then`, and returns its line.
pub fn find_word(code: &str, word: &str, then: &str) -> Option<usize> {
    occurrences(code, word)
        .find(|&at| {
            code[at + word.len()..].starts_with(then) && !(then.is_empty() && is_word_at(code, at + word.len()))
        })
        .map(|at| line_of(code, at))
}

/// Lists the first names after `root::` (`crate::`, `super::`), also inside braces, each with its line.
pub fn paths_after(code: &str, root: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for at in occurrences(code, root) {
        let rest = &code[at + root.len()..];
        let line = line_of(code, at);
        match rest.strip_prefix('{') {
            None => found.extend(first_word(rest).map(|word| (word, line))),
            Some(group) => found.extend(group_heads(group).into_iter().map(|word| (word, line))),
        }
    }
    found
}

/// Returns the first word of every entry of a `{a::b, c::{d, e}}`, its opening brace removed.
fn group_heads(group: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let (mut depth, mut start) = (0_usize, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                heads.extend(first_word(group[start..at].trim_start()));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    heads
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.chars().take_while(|&c| c == '_' || c.is_ascii_alphanumeric()).collect();
    (!word.is_empty()).then_some(word)
}

/// Finds a text that begins at a word boundary.
fn occurrences<'a>(code: &'a str, text: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(text).map(|(at, _)| at).filter(|&at| at == 0 || !is_word(code.as_bytes()[at - 1]))
}

fn is_word_at(code: &str, at: usize) -> bool {
    code.as_bytes().get(at).copied().is_some_and(is_word)
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

#[test]
fn comments_and_literals_are_blanked_and_code_stays() {
    let code = code_only(
        "let a = \"unsafe \\\" x\"; // unsafe\n/* unsafe /* y */ */ fn f<'a>() { 'x'; '\\''; r#\"unsafe\"#; }\n",
    );
    assert!(!code.contains("unsafe"), "{code}");
    assert!(code.contains("fn f<'a>()") && code.ends_with("}\n"), "{code}");
    assert_eq!(code.matches('\n').count(), 2);
}

#[test]
fn words_end_where_they_end() {
    assert_eq!(find_word("#![deny(unsafe_code)]\nunsafe { }", "unsafe", ""), Some(2));
    assert_eq!(find_word("mytodo!() todo !()", "todo", "!"), None);
    assert_eq!(find_word("\n\ntodo!()", "todo", "!"), Some(3));
}

#[test]
fn paths_are_found_through_braces() {
    let heads = |code| paths_after(code, "crate::").into_iter().map(|(word, _)| word).collect::<Vec<_>>();
    assert_eq!(heads("use crate::store::Writer;"), ["store"]);
    assert_eq!(heads("use crate::{auth, store::{a, b},\n os};"), ["auth", "store", "os"]);
    assert_eq!(heads("mycrate::x"), Vec::<String>::new());
}

#[test]
fn definitions_are_found_with_their_kind() {
    let code =
        "pub struct A<T>(T);\n    pub(crate) enum B { }\n    type Item = u8;\npub type C = u8; const fn d() {}\n";
    let found: Vec<_> = definitions(code).into_iter().map(|d| (d.kind, d.name, d.line)).collect();
    let expected = [("struct", "A", 1), ("enum", "B", 2), ("type", "C", 4), ("fn", "d", 4)];
    assert_eq!(found, expected.map(|(kind, name, line)| (kind, name.to_owned(), line)));
}

#[test]
fn the_test_module_is_cut_off() {
    assert_eq!(without_tests("a\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n}\n"), "a\n");
    assert_eq!(without_tests("a\n#[cfg(test)]\nuse b;\nc\n"), "a\n#[cfg(test)]\nuse b;\nc\n");
}
