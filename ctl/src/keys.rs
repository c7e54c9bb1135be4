//! Key names, the bytes that a terminal sends for them, and the detection of detach keys in input.

/// Parses a list such as `ctrl-p,ctrl-q` or `C-c,Enter` and returns the bytes of each key.
///
/// # Errors
/// A fragment that names the unknown key.
pub fn parse(list: &str) -> Result<Vec<Vec<u8>>, String> {
    if list.is_empty() {
        return Err("no key is given".into());
    }
    list.split(',').map(|name| key(name.trim())).collect()
}

/// Like [`parse`], with the keys concatenated.
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
            // With its case: Alt with a capital letter is another key.
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
        "'{name}' is not a key; use a single character, ctrl-x, alt-x, Enter, Tab, Escape, Space, Comma, Backspace, Delete, Insert, Up, Down, Left, Right, Home, End, PageUp, PageDown, F1 to F12"
    )
}

/// Returns the ASCII control character of a key: its lower five bits.
fn control(name: &str) -> Option<u8> {
    match name.as_bytes() {
        [byte @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_' | b'@')] => Some(byte & 0x1f),
        b"space" => Some(0),
        [b'?'] => Some(0x7f),
        _ => None,
    }
}

/// Finds the detach keys in terminal input.
#[derive(Debug)]
pub struct DetachScanner {
    keys: Vec<u8>,
    matched: usize,
}

/// Input to forward, and whether the detach keys followed it.
#[derive(Debug, PartialEq, Eq)]
pub struct ScannedKeys {
    pub typed: Vec<u8>,
    pub detached: bool,
}

impl DetachScanner {
    /// `keys` are the bytes of the detach keys; an empty list never matches.
    pub fn new(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// Scans input. A prefix of the detach keys is withheld until it is clear that the rest does not follow.
    pub fn scan(&mut self, bytes: &[u8]) -> ScannedKeys {
        let mut typed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            while self.matched > 0 && self.keys.get(self.matched) != Some(&byte) {
                // Release the shortest prefix after which the rest may still begin the detach keys.
                let withheld = &self.keys[..self.matched];
                let released =
                    (1..=withheld.len()).find(|&cut| self.keys.starts_with(&withheld[cut..])).unwrap_or(withheld.len());
                typed.extend_from_slice(&withheld[..released]);
                self.matched -= released;
            }
            if self.keys.get(self.matched) == Some(&byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    self.matched = 0;
                    return ScannedKeys { typed, detached: true };
                }
            } else {
                typed.push(byte);
            }
        }
        ScannedKeys { typed, detached: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_names_are_parsed() {
        assert_eq!(bytes("ctrl-p,ctrl-q").as_deref(), Ok(&[16, 17][..]));
        assert_eq!(bytes("ctrl-\\").as_deref(), Ok(&[0x1c][..]));
        assert_eq!(bytes("C-c, Enter").as_deref(), Ok(&b"\x03\r"[..]));
        assert_eq!(bytes("^],x,Comma,M-X,Up").as_deref(), Ok(&b"\x1d"[..]).map(|_| &b"\x1dx,\x1bX\x1b[A"[..]));
        for bad in ["", "ctrl-", "ctrl-é", "nonsense", "x,,y"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn detach_keys_are_found_across_reads_and_all_other_input_is_forwarded() {
        let mut scanner = DetachScanner::new(vec![16, 16, 17]);
        assert_eq!(scanner.scan(b"a\x10"), ScannedKeys { typed: b"a".to_vec(), detached: false });
        assert_eq!(scanner.scan(b"b"), ScannedKeys { typed: b"\x10b".to_vec(), detached: false });
        assert_eq!(scanner.scan(b"\x10\x10\x10"), ScannedKeys { typed: b"\x10".to_vec(), detached: false });
        assert_eq!(scanner.scan(b"\x11rest"), ScannedKeys { typed: Vec::new(), detached: true });
        assert_eq!(
            DetachScanner::new(Vec::new()).scan(b"abc"),
            ScannedKeys { typed: b"abc".to_vec(), detached: false }
        );
    }
}
