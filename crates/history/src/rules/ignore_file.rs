//! The patterns of one ignore file, parsed and matched as git does: the last matching pattern decides.
//!
//! Most patterns are a name (`target`) or an extension (`*.o`). They are found in hash maps, so that only the
//! others are tried one by one.

use std::collections::HashMap;

use crate::rules::wildcard::Wildcard;

/// Characters with a special meaning; a pattern is plain text up to the first of them.
const SPECIAL: &[u8] = b"*?[\\";

/// One pattern.
#[derive(Clone, Debug)]
struct Pattern {
    /// Whether it re-includes what an earlier pattern ignores.
    negated: bool,
    /// Whether it matches directories only.
    only_dirs: bool,
    what: PatternKind,
}

/// The kind of a pattern with its text.
#[derive(Clone, Debug)]
enum PatternKind {
    /// The name equals the text, which is a key of `names`.
    Name,
    /// The name ends with the text.
    Ending(Vec<u8>),
    /// The name matches the wildcard.
    NameLike(Wildcard),
    /// The path from the directory of the file begins with the text, and the rest matches the wildcard; without
    /// one there is no rest.
    Path(Vec<u8>, Option<Wildcard>),
}

/// The patterns of one file.
#[derive(Clone, Debug, Default)]
pub(crate) struct IgnoreFile {
    patterns: Vec<Pattern>,
    /// The patterns that are a plain name, by that name, the last first.
    names: HashMap<Vec<u8>, Vec<usize>>,
    /// The patterns `*<ending>`, by the part of the ending after its last dot, the last first.
    endings: HashMap<Vec<u8>, Vec<usize>>,
    /// All other patterns, the last first.
    others: Vec<usize>,
}

impl IgnoreFile {
    /// Parses a file and counts the patterns that can match nothing.
    pub fn parse(text: &[u8]) -> (IgnoreFile, usize) {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let mut file = IgnoreFile::default();
        let mut useless = 0;
        for line in text.split(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            useless += usize::from(!file.add_line(line));
        }
        for list in file.names.values_mut().chain(file.endings.values_mut()).chain([&mut file.others]) {
            list.reverse();
        }
        (file, useless)
    }

    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Adds a line and returns whether it is valid. Blank lines and comments are valid.
    fn add_line(&mut self, line: &[u8]) -> bool {
        if line.is_empty() || line[0] == b'#' {
            return true;
        }
        let line = without_last_spaces(line);
        let (negated, line) = match line {
            [b'!', rest @ ..] => (true, rest),
            line => (false, line),
        };
        let (only_dirs, text) = match line {
            [rest @ .., b'/'] => (true, rest),
            line => (false, line),
        };
        if text.is_empty() {
            return true;
        }
        let plain = text.iter().take_while(|byte| !SPECIAL.contains(byte)).count();
        let place = self.patterns.len();
        let what = if text.contains(&b'/') {
            let (text, plain) = match text {
                [b'/', rest @ ..] => (rest, plain - 1),
                text => (text, plain),
            };
            let rest = match &text[plain..] {
                [] => None,
                // Compiled separately, as git does: stars that follow plain text are at the start.
                rest => match Wildcard::compile(rest) {
                    None => return false,
                    wildcard => wildcard,
                },
            };
            self.others.push(place);
            PatternKind::Path(text[..plain].to_vec(), rest)
        } else if plain == text.len() {
            self.names.entry(text.to_vec()).or_default().push(place);
            PatternKind::Name
        } else if text[0] == b'*' && !text[1..].iter().any(|byte| SPECIAL.contains(byte)) {
            match extension(&text[1..]) {
                Some(key) => self.endings.entry(key.to_vec()).or_default().push(place),
                None => self.others.push(place),
            }
            PatternKind::Ending(text[1..].to_vec())
        } else {
            let Some(wildcard) = Wildcard::compile(text) else { return false };
            self.others.push(place);
            PatternKind::NameLike(wildcard)
        };
        self.patterns.push(Pattern { negated, only_dirs, what });
        true
    }

    /// Says whether a path below the file's directory is ignored; `None` if no pattern matches.
    pub fn match_path(&self, path: &[u8], is_dir: bool) -> Option<bool> {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        let first = |places: Option<&Vec<usize>>, least: Option<usize>| {
            let later = places?.iter().copied().take_while(|place| least.is_none_or(|least| *place > least));
            later.into_iter().find(|place| self.matches(*place, path, name, is_dir))
        };
        let mut last = first(self.names.get(name), None);
        if let Some(key) = extension(name) {
            last = first(self.endings.get(key), last).or(last);
        }
        last = first(Some(&self.others), last).or(last);
        last.map(|place| !self.patterns[place].negated)
    }

    fn matches(&self, place: usize, path: &[u8], name: &[u8], is_dir: bool) -> bool {
        let pattern = &self.patterns[place];
        if pattern.only_dirs && !is_dir {
            return false;
        }
        match &pattern.what {
            PatternKind::Name => true,
            PatternKind::Ending(ending) => name.ends_with(ending),
            PatternKind::NameLike(wildcard) => wildcard.matches(name),
            PatternKind::Path(text, rest) => path.strip_prefix(&text[..]).is_some_and(|left| match rest {
                None => left.is_empty(),
                Some(wildcard) => wildcard.matches(left),
            }),
        }
    }
}

/// Returns the part after the last dot.
fn extension(name: &[u8]) -> Option<&[u8]> {
    name.iter().rposition(|byte| *byte == b'.').map(|dot| &name[dot + 1..])
}

/// Removes trailing spaces, except one after a backslash.
fn without_last_spaces(line: &[u8]) -> &[u8] {
    let mut end = None;
    let mut at = 0;
    while at < line.len() {
        match line[at] {
            b' ' => {
                end.get_or_insert(at);
            }
            b'\\' => {
                if at + 1 == line.len() {
                    return line;
                }
                at += 1;
                end = None;
            }
            _ => end = None,
        }
        at += 1;
    }
    &line[..end.unwrap_or(line.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn match_path(text: &str, path: &str, is_dir: bool) -> Option<bool> {
        IgnoreFile::parse(text.as_bytes()).0.match_path(path.as_bytes(), is_dir)
    }

    #[test]
    fn the_last_pattern_that_matches_counts_whatever_its_kind() {
        assert_eq!(match_path("*.o\n!a.o\n", "x/a.o", false), Some(false));
        assert_eq!(match_path("!a.o\n*.o\n", "x/a.o", false), Some(true));
        assert_eq!(match_path("a.o\n!?.o\n", "a.o", false), Some(false));
        assert_eq!(match_path("!?.o\nx/\na.o\n", "a.o", false), Some(true));
        assert_eq!(match_path("/x/*.o\n!*.o\n", "x/a.o", false), Some(false));
        assert_eq!(match_path("build/\n", "build", false), None);
        assert_eq!(match_path("build/\n", "a/build", true), Some(true));
        assert_eq!(match_path("/build\n", "a/build", true), None);
        assert_eq!(match_path("*.tar.gz", "a.tar.gz", false), Some(true));
        assert_eq!(match_path("*z", "a.tar.gz", false), Some(true));
    }

    #[test]
    fn spaces_comments_and_escapes_are_read_as_git_reads_them() {
        assert_eq!(match_path("a  \n", "a", false), Some(true));
        assert_eq!(match_path("a\\ \n", "a ", false), Some(true));
        assert_eq!(match_path("a\t\n", "a", false), None);
        assert_eq!(match_path("#a\n", "#a", false), None);
        assert_eq!(match_path("\\#a\n", "#a", false), Some(true));
        assert_eq!(match_path("\\!a\r\n", "!a", false), Some(true));
        assert_eq!(match_path("\u{feff}a\n", "a", false), Some(true));
        assert_eq!(IgnoreFile::parse(b"a[\n# b[\n\n!\n/\n").1, 1);
    }
}
