//! Paths as text: bytes that are not UTF-8, control characters and `%` itself are written as `%XX`.
//!
//! Every path inside a workspace crosses the wire like this, so that none is lost and none steers a terminal.

/// Writes bytes as text without losing any.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    escape_into(bytes, &mut text);
    text
}

/// Appends what [`escape`] returns.
pub fn escape_into(bytes: &[u8], text: &mut String) {
    let hex = |text: &mut String, bytes: &[u8]| bytes.iter().for_each(|b| text.push_str(&format!("%{b:02X}")));
    for chunk in bytes.utf8_chunks() {
        if !chunk.valid().bytes().any(|byte| byte < b' ' || byte == b'%' || byte > b'~') {
            text.push_str(chunk.valid());
            hex(text, chunk.invalid());
            continue;
        }
        for c in chunk.valid().chars() {
            if c.is_control() || c == '%' {
                hex(text, c.encode_utf8(&mut [0; 4]).as_bytes());
            } else {
                text.push(c);
            }
        }
        hex(text, chunk.invalid());
    }
}

/// Reads what [`escape`] wrote; `None` when it cannot have written it.
pub fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || (rest.next()? as char).to_digit(16);
            bytes.push((digit()? * 16 + digit()?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_or_a_text_cannot_hold_is_written_out() {
        for (bytes, text) in [
            (&b"plain name.txt"[..], "plain name.txt"),
            ("grüße".as_bytes(), "grüße"),
            (b"50%\n\x1b[0m", "50%25%0A%1B[0m"),
            (b"bad \xff\xfe end", "bad %FF%FE end"),
            ("\u{85}".as_bytes(), "%C2%85"),
            (b"\x7f", "%7F"),
        ] {
            assert_eq!(escape(bytes), text);
            assert_eq!(unescape(text).as_deref(), Some(bytes));
        }
        assert_eq!(unescape("%4"), None);
        assert_eq!(unescape("%zz"), None);
    }
}
