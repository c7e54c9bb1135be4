//! The metadata tree: the properties of a directory that a git tree cannot hold.
//!
//! The root tree of a checkpoint consists of `files/`, `meta/` and `manifest`. `meta/` has the shape of the
//! workspace: for each directory a tree with the blob `entries` and a subtree `d.<name>` per subdirectory (the
//! prefix prevents collisions with `entries` and keeps names such as `.git` valid). The blob:
//!
//! ```text
//! fermata-meta 1
//! . 755 1700000000.000000005 0 -             the directory itself
//! f 640 1700000000.123456789 4096 - name     a file: mode, mtime, size, remarks, escaped name
//! l 777 1700000000.000000000 11 - name       a symbolic link
//! s 600 1700000000.000000000 0 fifo name     a special file and its kind
//! x 0 0.000000000 0 too_large name           covered, but skipped: the reason
//! ```
//!
//! Remarks, separated by commas: `torn`; `ino=<n>`, equal for the names of one hard-linked file; `sparse`, for
//! a file with holes; `x:<name>=<value>`, both in hexadecimal, one per extended attribute (of a directory,
//! too).

use std::borrow::Cow;
use std::fmt::Write as _;

use fermata_protocol::paths::{escape_into, unescape};

use crate::tree::confined_dir::Time;
use crate::tree::names::{is_git, is_safe_name};
use crate::tree::skipped::SkipReason;
use crate::tree::xattrs::{self, Xattr, Xattrs};

const HEADER: &str = "fermata-meta 1";

/// One metadata line: an entry of a directory, or the directory itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MetaLine<'a> {
    pub kind: MetaKind<'a>,
    pub mode: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Stored bytes.
    pub size: u64,
    /// Extended attributes of a file or directory.
    pub xattrs: Cow<'a, [Xattr]>,
    /// The name; empty for the directory itself.
    pub name: Cow<'a, [u8]>,
}

/// The kind of a metadata line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MetaKind<'a> {
    /// The directory itself.
    Itself,
    File {
        /// Whether the file changed while it was read.
        torn: bool,
        /// The inode number, if the file has several names.
        ino: Option<u64>,
        /// Whether the file has holes.
        sparse: bool,
    },
    Link,
    /// A special file: its kind.
    Special(Cow<'a, str>),
    /// A path that is covered but not stored.
    Skipped(SkipReason),
}

/// A metadata blob that cannot be parsed, with the number of the line.
#[derive(Debug, thiserror::Error)]
#[error("line {0} of the metadata cannot be parsed")]
pub(crate) struct BadMeta(usize);

/// Encodes the metadata of one directory, at most `most` lines: first the directory's own, then the others in
/// the order of their names.
pub(crate) fn encode<'a>(most: usize, lines: impl IntoIterator<Item = MetaLine<'a>>) -> String {
    // The length of a line for a file with a name of ordinary length and without remarks.
    let mut text = String::with_capacity(HEADER.len() + 1 + most * 64);
    text.push_str(HEADER);
    text.push('\n');
    lines.into_iter().for_each(|line| encode_line(&line, &mut text));
    text
}

fn encode_line(line: &MetaLine<'_>, text: &mut String) {
    text.push(match &line.kind {
        MetaKind::Itself => '.',
        MetaKind::File { .. } => 'f',
        MetaKind::Link => 'l',
        MetaKind::Special(_) => 's',
        MetaKind::Skipped(_) => 'x',
    });
    let Time { sec, nsec } = line.mtime;
    // Writing to a string cannot fail.
    let _always_ok = write!(text, " {:o} {sec}.{nsec:09} {} ", line.mode, line.size);
    let before = text.len();
    let mut remark = |remark: std::fmt::Arguments<'_>| {
        if text.len() > before {
            text.push(',');
        }
        let _always_ok = text.write_fmt(remark);
    };
    match &line.kind {
        MetaKind::Itself | MetaKind::Link => {}
        MetaKind::File { torn, ino, sparse } => {
            if *torn {
                remark(format_args!("torn"));
            }
            if let Some(ino) = ino {
                remark(format_args!("ino={ino}"));
            }
            if *sparse {
                remark(format_args!("sparse"));
            }
        }
        MetaKind::Special(kind) => remark(format_args!("{kind}")),
        MetaKind::Skipped(reason) => remark(format_args!("{}", word_of(*reason))),
    }
    for (name, value) in &*line.xattrs {
        remark(format_args!("x:{}={}", to_hex(name), to_hex(value)));
    }
    if text.len() == before {
        text.push('-');
    }
    text.push(' ');
    escape_into(&line.name, text);
    text.push('\n');
}

/// Decodes the metadata of one directory.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<MetaLine<'static>>, BadMeta> {
    let text = std::str::from_utf8(bytes).map_err(|_| BadMeta(0))?;
    let mut lines = text.strip_suffix('\n').unwrap_or(text).split('\n').enumerate();
    if lines.next().map(|(_, line)| line) != Some(HEADER) {
        return Err(BadMeta(1));
    }
    lines.map(|(n, line)| decode_line(line).ok_or(BadMeta(n + 1))).collect()
}

fn decode_line(line: &str) -> Option<MetaLine<'static>> {
    let mut fields = line.splitn(6, ' ');
    let letter = fields.next()?;
    let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
    let (sec, nsec) = fields.next()?.split_once('.')?;
    let mtime = Time { sec: sec.parse().ok()?, nsec: nsec.parse().ok()? };
    let size = fields.next()?.parse().ok()?;
    let remark = fields.next()?;
    let name = unescape(fields.next()?)?;
    let kind = match letter {
        "." => MetaKind::Itself,
        "f" => {
            let has = |wanted: &str| remark.split(',').any(|one| one == wanted);
            let ino = remark.split(',').find_map(|one| one.strip_prefix("ino="));
            MetaKind::File { torn: has("torn"), ino: ino.and_then(|n| n.parse().ok()), sparse: has("sparse") }
        }
        "l" => MetaKind::Link,
        "s" => MetaKind::Special(remark.to_owned().into()),
        "x" => MetaKind::Skipped(reason_of(remark)?),
        _ => return None,
    };
    let named = kind != MetaKind::Itself;
    // A reserved name is recorded only as skipped.
    let reserved = kind == MetaKind::Skipped(SkipReason::Reserved) && is_git(&name);
    let good_name = if named { is_safe_name(&name) || reserved } else { name.is_empty() };
    let xattrs = remark.split(',').filter_map(|one| one.strip_prefix("x:"));
    let xattrs: Option<Xattrs> = xattrs
        .map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let (name, value) = (from_hex(name)?, from_hex(value)?);
            // The bundle may come from an untrusted source: attributes of other namespaces grant rights.
            (xattrs::is_ours(&name) && value.len() <= xattrs::MAX_VALUE).then_some((name, value))
        })
        .collect();
    let (xattrs, name) = (xattrs?.into_vec().into(), name.into());
    (good_name && mtime.nsec < 1_000_000_000).then_some(MetaLine {
        kind,
        mode: mode & 0o7777,
        mtime,
        size,
        xattrs,
        name,
    })
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _always_ok = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Box<[u8]>> {
    let digits = text.as_bytes();
    let digit = |byte: u8| (byte as char).to_digit(16).map(|value| value as u8);
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks(2).map(|pair| Some(digit(pair[0])? * 16 + digit(pair[1])?)).collect()
}

fn word_of(reason: SkipReason) -> &'static str {
    match reason {
        SkipReason::TooLarge => "too_large",
        SkipReason::Unreadable => "unreadable",
        SkipReason::Special => "special",
        SkipReason::Unsteady => "unsteady",
        SkipReason::Reserved => "reserved",
    }
}

fn reason_of(word: &str) -> Option<SkipReason> {
    let all =
        [SkipReason::TooLarge, SkipReason::Unreadable, SkipReason::Special, SkipReason::Unsteady, SkipReason::Reserved];
    all.into_iter().find(|reason| word_of(*reason) == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_is_read_back() {
        let mtime = Time { sec: -3, nsec: 5 };
        let line = |kind, name: &[u8]| {
            let xattrs: Vec<Xattr> = match &kind {
                MetaKind::File { torn: true, .. } | MetaKind::Itself => {
                    vec![((*b"user.a").into(), (*b"").into()), ((*b"user.b,=\n").into(), (*b"\0 ,\xff").into())]
                }
                _ => Vec::new(),
            };
            MetaLine { kind, mode: 0o4755, mtime, size: 12, xattrs: xattrs.into(), name: name.to_vec().into() }
        };
        let lines = vec![
            line(MetaKind::Itself, b""),
            line(MetaKind::Skipped(SkipReason::Reserved), b".GIT"),
            line(MetaKind::Skipped(SkipReason::TooLarge), b"big file %"),
            line(MetaKind::File { torn: true, ino: Some(77), sparse: true }, b"c\n\xff"),
            line(MetaKind::File { torn: false, ino: None, sparse: false }, b"d"),
            line(MetaKind::Special("fifo".into()), b"e"),
            line(MetaKind::Link, b"f"),
        ];
        let text = encode(lines.len(), lines.clone());
        assert_eq!(decode(text.as_bytes()).unwrap(), lines);
        assert_eq!(decode(b"fermata-meta 2\n").unwrap_err().0, 1);
        for bad in ["f 644 0.0 1 - ..", "f 644 0.0 1 - .Git", "x 0 0.0 0 reserved .."] {
            assert_eq!(decode(format!("fermata-meta 1\n{bad}\n").as_bytes()).unwrap_err().0, 2, "{bad}");
        }
    }

    #[test]
    fn invalid_times_and_attributes_that_grant_rights_are_refused() {
        let with = |time: &str, name: &[u8], value: &[u8]| {
            let text = format!("fermata-meta 1\nf 644 {time} 1 x:{}={} a\n", to_hex(name), to_hex(value));
            decode(text.as_bytes()).is_ok()
        };
        assert!(with("0.999999999", b"user.a", b"1"));
        assert!(!with("0.1000000000", b"user.a", b"1"));
        for name in [&b"security.capability"[..], b"trusted.a", b"system.posix_acl_access", b"user.", b"user.a\0b", b""]
        {
            assert!(!with("0.0", name, b"1"), "{name:?}");
        }
        assert!(!with("0.0", &[b"user.", &[b'a'; 251][..]].concat(), b"1"));
        assert!(
            with("0.0", b"user.a", &[0; xattrs::MAX_VALUE]) && !with("0.0", b"user.a", &[0; xattrs::MAX_VALUE + 1])
        );
    }
}
