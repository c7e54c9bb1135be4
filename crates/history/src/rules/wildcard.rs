//! One pattern of git, compiled for matching bytes.
//!
//! The results are git's, even where they are surprising: patterns match bytes, not characters; a `[` without
//! its end, an unknown class and a `\` at the end match nothing. `**` matches directories only between slashes
//! or ends; elsewhere it is `*`.

/// One element of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    /// Any byte except a slash.
    Any,
    /// A byte of the set, except a slash.
    Set(Box<Set>),
    /// Any number of bytes other than slashes.
    Star,
    /// Any number of directories, each with its slash: `**/`.
    Directories,
    /// Anything: `**` at the end, or before an escaped slash.
    Everything,
}

/// The bytes of a `[…]`, as a bit set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Set([u64; 4]);

impl Set {
    fn add(&mut self, byte: u8) {
        self.0[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }

    fn holds(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] & (1 << (byte & 63)) != 0
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wildcard(Vec<Token>);

impl Wildcard {
    /// Compiles a pattern; `None` if it can match nothing.
    pub fn compile(pattern: &[u8]) -> Option<Wildcard> {
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(&byte) = pattern.get(at) {
            at += 1;
            match byte {
                b'\\' => {
                    tokens.push(Token::Byte(*pattern.get(at)?));
                    at += 1;
                }
                b'?' => tokens.push(Token::Any),
                b'[' => {
                    let (set, end) = set(pattern, at)?;
                    tokens.push(Token::Set(Box::new(set)));
                    at = end;
                }
                b'*' => {
                    let start = at - 1;
                    at += pattern[at..].iter().take_while(|byte| **byte == b'*').count();
                    let (token, end) = stars(pattern, start, at);
                    tokens.push(token);
                    at = end;
                }
                other => tokens.push(Token::Byte(other)),
            }
        }
        Some(Wildcard(tokens))
    }

    /// Says whether the whole text matches.
    pub fn matches(&self, text: &[u8]) -> bool {
        let tokens = &self.0;
        let (mut token, mut at) = (0, 0);
        // Where to continue after a mismatch: at the token after a star, one byte (or directory) further. Only
        // the last star of each kind matters: an earlier one cannot match more than the last one.
        let mut star: Option<(usize, usize)> = None;
        let mut deep: Option<(usize, usize)> = None;
        loop {
            let step = match tokens.get(token) {
                None if at == text.len() => return true,
                None => false,
                Some(Token::Star) => {
                    star = Some((token + 1, at));
                    token += 1;
                    continue;
                }
                Some(Token::Directories | Token::Everything) => {
                    if token + 1 == tokens.len() && tokens[token] == Token::Everything {
                        return true;
                    }
                    (deep, star) = (Some((token, at)), None);
                    token += 1;
                    continue;
                }
                Some(one) => text.get(at).is_some_and(|byte| match one {
                    Token::Byte(wanted) => wanted == byte,
                    Token::Any => *byte != b'/',
                    Token::Set(set) => *byte != b'/' && set.holds(*byte),
                    Token::Star | Token::Directories | Token::Everything => false,
                }),
            };
            if step {
                (token, at) = (token + 1, at + 1);
                continue;
            }
            if let Some((next, from)) = star
                && text.get(from).is_some_and(|byte| *byte != b'/')
            {
                star = Some((next, from + 1));
                (token, at) = (next, from + 1);
                continue;
            }
            let Some((place, from)) = deep else { return false };
            let further = match tokens[place] {
                Token::Directories => match text[from..].iter().position(|byte| *byte == b'/') {
                    Some(slash) => from + slash + 1,
                    None => return false,
                },
                Token::Everything if from < text.len() => from + 1,
                Token::Everything | Token::Byte(_) | Token::Any | Token::Set(_) | Token::Star => return false,
            };
            (deep, star) = (Some((place, further)), None);
            (token, at) = (place + 1, further);
        }
    }
}

/// Returns the token for the stars from `start` to `end`, and the position after it.
fn stars(pattern: &[u8], start: usize, end: usize) -> (Token, usize) {
    let stands_apart = start == 0 || pattern[start - 1] == b'/';
    if end - start < 2 || !stands_apart {
        return (Token::Star, end);
    }
    match pattern[end..] {
        [] | [b'\\', b'/', ..] => (Token::Everything, end),
        [b'/', ..] => (Token::Directories, end + 1),
        _ => (Token::Star, end),
    }
}

/// Parses the set after a `[`; `None` if it has no end. Returns the position after it.
fn set(pattern: &[u8], start: usize) -> Option<(Set, usize)> {
    let mut set = Set([0; 4]);
    let negated = matches!(pattern.get(start)?, b'!' | b'^');
    let mut at = start + usize::from(negated);
    let first = at;
    // The possible start of a range; `None` after a range or a class.
    let mut before: Option<u8> = None;
    loop {
        let mut byte = *pattern.get(at)?;
        if byte == b']' && at > first {
            break;
        }
        at += 1;
        let range_end = pattern.get(at).filter(|end| **end != b']');
        if byte == b'-'
            && let (Some(low), Some(&end)) = (before, range_end)
        {
            let mut high = end;
            at += 1;
            if high == b'\\' {
                high = *pattern.get(at)?;
                at += 1;
            }
            (low..=high).for_each(|byte| set.add(byte));
            before = None;
            continue;
        }
        if byte == b'[' && pattern.get(at) == Some(&b':') {
            let name = at + 1;
            let end = name + pattern[name..].iter().position(|byte| *byte == b']')?;
            if end > name && pattern[end - 1] == b':' {
                let class = class(&pattern[name..end - 1])?;
                (0..=u8::MAX).filter(class).for_each(|byte| set.add(byte));
                before = None;
                at = end + 1;
                continue;
            }
        }
        if byte == b'\\' {
            byte = *pattern.get(at)?;
            at += 1;
        }
        set.add(byte);
        before = Some(byte);
    }
    if negated {
        set.0.iter_mut().for_each(|bits| *bits = !*bits);
    }
    Some((set, at + 1))
}

/// Returns a named class, as the C library defines it for bytes below 128.
fn class(name: &[u8]) -> Option<fn(&u8) -> bool> {
    Some(match name {
        b"alnum" => u8::is_ascii_alphanumeric,
        b"alpha" => u8::is_ascii_alphabetic,
        b"blank" => |byte| matches!(byte, b' ' | b'\t'),
        b"cntrl" => u8::is_ascii_control,
        b"digit" => u8::is_ascii_digit,
        b"graph" => u8::is_ascii_graphic,
        b"lower" => u8::is_ascii_lowercase,
        b"print" => |byte| (b' '..=b'~').contains(byte),
        b"punct" => u8::is_ascii_punctuation,
        b"space" => |byte| byte.is_ascii_whitespace() || *byte == 0x0b,
        b"upper" => u8::is_ascii_uppercase,
        b"xdigit" => u8::is_ascii_hexdigit,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Wildcard::compile(pattern.as_bytes()).is_some_and(|wildcard| wildcard.matches(text.as_bytes()))
    }

    #[test]
    fn stars_stop_at_slashes_and_double_stars_stand_for_directories() {
        for (pattern, yes, no) in [
            ("*.o", "a.o", "a/b.o"),
            ("a*b*c", "aXbYbZc", "aXcYb"),
            ("a/**/b", "a/b", "ab"),
            ("a/**/b", "a/x/y/b", "a/xb"),
            ("**/b/*", "x/y/b/c", "b"),
            ("a/**", "a/b/c", "a"),
            ("a**/b", "ax/b", "a/x/b"),
            ("**/a/**/b*d/**/e", "x/a/bcd/e", "x/a/b/e"),
            ("?b", "ab", "/b"),
            ("", "", "a"),
        ] {
            assert!(matches(pattern, yes), "{pattern} {yes}");
            assert!(!matches(pattern, no), "{pattern} {no}");
        }
    }

    #[test]
    fn sets_are_those_of_git() {
        for (pattern, yes, no) in [
            ("[ab]", "a", "c"),
            ("[!ab]", "c", "a"),
            ("[^ab]", "c", "b"),
            ("[]a]", "]", "b"),
            ("[!]a]", "b", "]"),
            ("[a-c]", "b", "d"),
            ("[a-]", "-", "b"),
            ("[\\]]", "]", "a"),
            ("[[:digit:]x]", "7", "a"),
            ("[[:x]", ":", "a"),
            ("[!a]", "b", "/"),
        ] {
            assert!(matches(pattern, yes), "{pattern} {yes}");
            assert!(!matches(pattern, no), "{pattern} {no}");
        }
        for never in ["[", "a[", "[a", "[[:nothing:]]", "a\\", "[\\"] {
            assert_eq!(Wildcard::compile(never.as_bytes()), None, "{never}");
        }
    }

    #[test]
    fn many_stars_take_no_time() {
        let pattern = format!("{}b", "a*".repeat(60));
        assert!(!matches(&pattern, &"a".repeat(20_000)));
        assert!(!matches(&format!("{}b", "**/a*/".repeat(40)), &"a/".repeat(2_000)));
    }
}
