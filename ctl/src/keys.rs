//! Names of keys and the bytes that a terminal sends for them.

/// Reads a list like `ctrl-p,ctrl-q` or `C-c,Enter` and returns the bytes of each key.
///
/// # Errors
/// A fragment that names the key that is not known.
pub fn parse(list: &str) -> Result<Vec<Vec<u8>>, String> {
    if list.is_empty() {
        return Err("no key is named".into());
    }
    list.split(',').map(|name| key(name.trim())).collect()
}

/// The same as [`parse`], in one piece.
pub fn bytes(list: &str) -> Result<Vec<u8>, String> {
    parse(list).map(|keys| keys.concat())
}

fn key(name: &str) -> Result<Vec<u8>, String> {
    let mut characters = name.chars();
    if let (Some(only), None) = (characters.next(), characters.next()) {
        return Ok(only.to_string().into_bytes());
    }
    let lower = name.to_ascii_lowercase();
    for prefix in ["ctrl-", "c-", "^"] {
        if let Some(rest) = lower.strip_prefix(prefix) {
            return control(rest).map(|byte| vec![byte]).ok_or_else(|| unknown(name));
        }
    }
    for prefix in ["alt-", "m-"] {
        if let Some(rest) = lower.strip_prefix(prefix) {
            // The letter as it was typed: Alt with a capital one is another key.
            let typed = &name[name.len() - rest.len()..];
            return key(typed).map(|bytes| [b"\x1b", &bytes[..]].concat());
        }
    }
    let bytes: &[u8] = match lower.as_str() {
        "enter" | "return" => b"\r",
        "tab" => b"\t",
        "escape" | "esc" => b"\x1b",
        "space" => b" ",
        "comma" => b",",
        "backspace" => b"\x7f",
        "up" => b"\x1b[A",
        "down" => b"\x1b[B",
        "right" => b"\x1b[C",
        "left" => b"\x1b[D",
        "home" => b"\x1b[H",
        "end" => b"\x1b[F",
        "insert" => b"\x1b[2~",
        "delete" | "del" => b"\x1b[3~",
        "pageup" => b"\x1b[5~",
        "pagedown" => b"\x1b[6~",
        "backtab" => b"\x1b[Z",
        "f1" => b"\x1bOP",
        "f2" => b"\x1bOQ",
        "f3" => b"\x1bOR",
        "f4" => b"\x1bOS",
        "f5" => b"\x1b[15~",
        "f6" => b"\x1b[17~",
        "f7" => b"\x1b[18~",
        "f8" => b"\x1b[19~",
        "f9" => b"\x1b[20~",
        "f10" => b"\x1b[21~",
        "f11" => b"\x1b[23~",
        "f12" => b"\x1b[24~",
        _ => return Err(unknown(name)),
    };
    Ok(bytes.to_vec())
}

fn unknown(name: &str) -> String {
    format!(
        "'{name}' is no key; known are single characters, ctrl-x, alt-x, Enter, Tab, Escape, Space, Comma, Backspace, Delete, Insert, Up, Down, Left, Right, Home, End, PageUp, PageDown, F1 to F12"
    )
}

/// The control key of ASCII: the upper five bits are gone.
fn control(name: &str) -> Option<u8> {
    match name.as_bytes() {
        [byte @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_' | b'@')] => Some(byte & 0x1f),
        b"space" => Some(0),
        [b'?'] => Some(0x7f),
        _ => None,
    }
}

/// Looks for the keys that detach in what is typed.
#[derive(Debug)]
pub struct Watch {
    keys: Vec<u8>,
    matched: usize,
}

/// What is to be typed, and whether to detach after it.
#[derive(Debug, PartialEq, Eq)]
pub struct Scanned {
    /// The bytes for the agent.
    pub typed: Vec<u8>,
    /// Whether the keys were pressed.
    pub detached: bool,
}

impl Watch {
    /// Looks for these bytes; never finds any when there are none.
    pub fn new(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// Takes what was typed. The beginning of the keys is held back until it is clear that it is none.
    pub fn scan(&mut self, bytes: &[u8]) -> Scanned {
        let mut typed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            while self.matched > 0 && self.keys.get(self.matched) != Some(&byte) {
                // Give up the shortest beginning after which the rest may still be the keys.
                let held = &self.keys[..self.matched];
                let given = (1..=held.len()).find(|&cut| self.keys.starts_with(&held[cut..])).unwrap_or(held.len());
                typed.extend_from_slice(&held[..given]);
                self.matched -= given;
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return Scanned { typed, detached: true };
                }
            } else {
                typed.push(byte);
            }
        }
        Scanned { typed, detached: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_by_name() {
        assert_eq!(bytes("ctrl-p,ctrl-q").as_deref(), Ok(&[16, 17][..]));
        assert_eq!(bytes("ctrl-\\").as_deref(), Ok(&[0x1c][..]));
        assert_eq!(bytes("C-c, Enter").as_deref(), Ok(&b"\x03\r"[..]));
        assert_eq!(bytes("^],x,Comma,M-X,Up").as_deref(), Ok(&b"\x1d"[..]).map(|_| &b"\x1dx,\x1bX\x1b[A"[..]));
        for bad in ["", "ctrl-", "ctrl-é", "nonsense", "x,,y"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_keys_that_detach_are_found_across_reads_and_everything_else_is_typed() {
        let mut watch = Watch::new(vec![16, 16, 17]);
        assert_eq!(watch.scan(b"a\x10"), Scanned { typed: b"a".to_vec(), detached: false });
        assert_eq!(watch.scan(b"b"), Scanned { typed: b"\x10b".to_vec(), detached: false });
        assert_eq!(watch.scan(b"\x10\x10\x10"), Scanned { typed: b"\x10".to_vec(), detached: false });
        assert_eq!(watch.scan(b"\x11rest"), Scanned { typed: Vec::new(), detached: true });
        assert_eq!(Watch::new(Vec::new()).scan(b"abc"), Scanned { typed: b"abc".to_vec(), detached: false });
    }
}
