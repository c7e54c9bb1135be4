//! Text on a terminal: safe to print, measured in columns, truncated.

/// Makes untrusted text safe to print on a terminal: one line, without control characters and bidirectional overrides.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\r' | '\t' => ' ',
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Truncates a text to a number of columns; an ellipsis marks the cut.
pub fn truncate(text: &str, width: usize) -> String {
    if text_width(text) <= width {
        return text.into();
    }
    let mut short = String::new();
    let mut used = 0;
    for c in text.chars() {
        if used + char_width(c) + 1 > width {
            break;
        }
        used += char_width(c);
        short.push(c);
    }
    if width > 0 {
        short.push('…');
    }
    short
}

/// Returns how many terminal columns a text takes.
pub fn text_width(text: &str) -> usize {
    text.chars().map(char_width).sum()
}

/// Returns 2 for the blocks of wide characters, 0 for combining marks, else 1.
fn char_width(c: char) -> usize {
    match u32::from(c) {
        0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_characters_count_twice() {
        assert_eq!(text_width("漢字"), 4);
        assert_eq!(truncate("漢字漢字", 5), "漢字…");
    }
}
