//! Reads which files the user's index tracks, without writing to it.
//!
//! All formats that git writes are read: versions 2 to 4, SHA-1 and SHA-256, split indexes, and indexes without
//! checksum (see gitformat-index in git's documentation). Only paths, kinds and the skip-worktree bit are used.
//! The file belongs to the user's `.git`, so its contents are not trusted. It is read into memory rather than
//! mapped, since an agent may truncate it at any time.

use std::path::Path;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use crate::rules::bounded_read::read_at_most;

/// The largest index that is read, in bytes: about two million files.
const MAX_INDEX: u64 = 256 << 20;

/// The longest name in bytes (`PATH_MAX` without the terminating zero).
const MAX_NAME: usize = 4095;

/// The largest ratio of all names to the size of the index: in version 4 an entry contains only the difference
/// to the previous name.
const MAX_EXPANSION: usize = 8;

/// The bit of an entry's flags that announces more flags.
const EXTENDED: u16 = 1 << 14;
/// The bit of the second flags for a file that a sparse checkout leaves out.
const SKIP_WORKTREE: u16 = 1 << 14;
/// The length of the fields before an entry's object id: nine numbers and the mode.
const STATE_BYTES: usize = 40;
const MODE_AT: usize = 24;
/// The bits of a mode that contain the kind.
const KIND: u32 = 0o170_000;

/// The error of an index that cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    #[error("'{0}' is missing, is not a file, or is too large")]
    Unreadable(&'static str),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("version {0} is not supported")]
    Version(u32),
    #[error("the extension '{0}' is not supported")]
    Extension(String),
}

use IndexError::Damaged;

type Result<T> = std::result::Result<T, IndexError>;

/// An entry of an index.
pub(crate) struct IndexEntry {
    /// The path from the top of the working tree.
    pub path: Vec<u8>,
    /// Whether a sparse checkout leaves the file out; it may exist nevertheless.
    pub skipped: bool,
    mode: u32,
}

impl IndexEntry {
    /// Says whether it is a submodule: a repository with its own index.
    pub fn is_module(&self) -> bool {
        self.mode & KIND == 0o160_000
    }
}

/// One file of an index, parsed.
struct ParsedIndex {
    entries: Vec<IndexEntry>,
    /// The reference to the shared index, if the index is split.
    shared: Option<SharedIndexLink>,
}

/// The reference of a split index to its shared index.
struct SharedIndexLink {
    /// The checksum of the shared index, which is part of its name.
    base: Vec<u8>,
    /// Two bitmaps: deleted entries of the shared index, and entries that are replaced by the first entries of
    /// the split index, which have no name. Empty if no entry is deleted or replaced.
    bitmaps: Vec<u8>,
}

/// Lists the files, symbolic links and submodules that an index tracks.
///
/// # Errors
/// Fails when the index is damaged or of an unsupported format.
pub(crate) fn tracked(git_dir: &Path, content: &[u8]) -> Result<Vec<IndexEntry>> {
    let (content, id_bytes) = checked(content)?;
    let ParsedIndex { mut entries, shared } = parse(content, id_bytes)?;
    if let Some(shared) = shared {
        entries = joined(git_dir, entries, &shared)?;
    }
    entries.retain(|entry| entry.is_module() || matches!(entry.mode & KIND, 0o100_000 | 0o120_000));
    Ok(entries)
}

/// Reads the file of an index; `None` if it is missing, not a file, or too large.
pub(crate) fn read(path: &Path) -> Option<Vec<u8>> {
    read_at_most(path, MAX_INDEX)
}

/// Verifies and removes the checksum; returns the rest and the length of the repository's object ids.
fn checked(content: &[u8]) -> Result<(&[u8], usize)> {
    let parts = |bytes| content.len().checked_sub(bytes).map(|at| content.split_at(at));
    if let Some((before, sum)) = parts(20).filter(|(before, sum)| Sha1::digest(before)[..] == **sum) {
        return Ok((before, sum.len()));
    }
    if let Some((before, sum)) = parts(32).filter(|(before, sum)| Sha256::digest(before)[..] == **sum) {
        return Ok((before, sum.len()));
    }
    // With `index.skipHash` the checksum is zero; its length follows from the entries.
    for bytes in [32, 20] {
        if let Some((before, _)) = parts(bytes).filter(|(_, sum)| sum.iter().all(|byte| *byte == 0))
            && parse(before, bytes).is_ok()
        {
            return Ok((before, bytes));
        }
    }
    Err(Damaged("its checksum does not match"))
}

/// Joins a split index and its shared index.
fn joined(git_dir: &Path, own: Vec<IndexEntry>, shared: &SharedIndexLink) -> Result<Vec<IndexEntry>> {
    const SHARED: &str = "sharedindex";
    let name: String = shared.base.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = read(&git_dir.join(format!("{SHARED}.{name}"))).ok_or(IndexError::Unreadable(SHARED))?;
    let (content, id_bytes) = checked(&file)?;
    let mut entries: Vec<Option<IndexEntry>> = parse(content, id_bytes)?.entries.into_iter().map(Some).collect();
    let mut bitmaps = IndexReader(&shared.bitmaps);
    let (deleted, replaced) = match bitmaps.0.is_empty() {
        true => (Vec::new(), Vec::new()),
        false => (bitmaps.bitmap(entries.len())?, bitmaps.bitmap(entries.len())?),
    };
    let mut own = own.into_iter();
    const BEYOND: IndexError = Damaged("its parts do not fit together");
    for at in replaced {
        let (Some(Some(old)), Some(new)) = (entries.get_mut(at), own.next()) else { return Err(BEYOND) };
        if !new.path.is_empty() {
            return Err(BEYOND);
        }
        (old.mode, old.skipped) = (new.mode, new.skipped);
    }
    for at in deleted {
        *entries.get_mut(at).ok_or(BEYOND)? = None;
    }
    let mut entries: Vec<IndexEntry> = entries.into_iter().flatten().collect();
    entries.extend(own);
    Ok(entries)
}

fn parse(content: &[u8], id_bytes: usize) -> Result<ParsedIndex> {
    let mut rest = IndexReader(content);
    if rest.take(4)? != b"DIRC" {
        return Err(Damaged("its header is wrong"));
    }
    let (version, count) = (rest.number()?, rest.number()?);
    if !(2..=4).contains(&version) {
        return Err(IndexError::Version(version));
    }
    // Each entry has at least its fixed fields, which bounds the number of entries.
    let mut entries = Vec::with_capacity((count as usize).min(content.len() / STATE_BYTES));
    let (mut before, mut names) = (Vec::new(), 0);
    for _ in 0..count {
        let entry = parse_entry(&mut rest, version, id_bytes, &before)?;
        names += entry.path.len();
        if entry.path.len() > MAX_NAME || names > content.len().saturating_mul(MAX_EXPANSION) {
            return Err(Damaged("its names are too long"));
        }
        if version == 4 {
            before.clone_from(&entry.path);
        }
        entries.push(entry);
    }
    let mut shared = None;
    while !rest.0.is_empty() {
        let (name, size) = (rest.take(4)?, rest.number()?);
        let extension = IndexReader(rest.take(size as usize)?);
        match name {
            b"link" => shared = parse_shared_link(extension, id_bytes)?,
            // Entries for directories outside a sparse checkout: they are no files and are not listed.
            b"sdir" => {}
            // Extensions whose name begins with a capital letter are optional.
            _ if name[0].is_ascii_uppercase() => {}
            _ => return Err(IndexError::Extension(String::from_utf8_lossy(name).into_owned())),
        }
    }
    Ok(ParsedIndex { entries, shared })
}

fn parse_entry(rest: &mut IndexReader<'_>, version: u32, id_bytes: usize, before: &[u8]) -> Result<IndexEntry> {
    let start = rest.0.len();
    let state = rest.take(STATE_BYTES)?;
    let mode = u32::from_be_bytes(state[MODE_AT..MODE_AT + 4].try_into().map_err(|_| CUT_OFF)?);
    rest.take(id_bytes)?;
    let flags = rest.short()?;
    let skipped = version > 2 && flags & EXTENDED != 0 && rest.short()? & SKIP_WORKTREE != 0;
    if version < 4 {
        let path = rest.until_nul()?.to_vec();
        // Entries are padded to multiples of eight bytes; at least one zero ends the name.
        let long = start - rest.0.len();
        let padding = rest.take(long.next_multiple_of(8) - long)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Damaged("an entry does not end where it should"));
        }
        return Ok(IndexEntry { path, skipped, mode });
    }
    // The number of bytes to remove from the end of the previous name.
    let kept = before.len().checked_sub(rest.varint()?).ok_or(Damaged("a name removes more than there is"))?;
    let path = [&before[..kept], rest.until_nul()?].concat();
    Ok(IndexEntry { path, skipped, mode })
}

fn parse_shared_link(mut rest: IndexReader<'_>, id_bytes: usize) -> Result<Option<SharedIndexLink>> {
    let base = rest.take(id_bytes)?.to_vec();
    // An extension without a shared index has no meaning.
    if base.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    Ok(Some(SharedIndexLink { base, bitmaps: rest.0.to_vec() }))
}

const CUT_OFF: IndexError = Damaged("it is truncated");

/// The bytes that are not parsed yet.
struct IndexReader<'a>(&'a [u8]);

impl<'a> IndexReader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(CUT_OFF)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| CUT_OFF)
    }

    fn number(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn short(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn until_nul(&mut self) -> Result<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(CUT_OFF)?;
        let name = self.take(end)?;
        self.take(1)?;
        Ok(name)
    }

    /// Reads a number of seven bits per byte, the highest first, encoded like the offsets of a pack.
    fn varint(&mut self) -> Result<usize> {
        let mut value = 0_usize;
        loop {
            let [byte] = self.array()?;
            value |= usize::from(byte & 0x7f);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
            value = value.checked_add(1).and_then(|value| value.checked_mul(128)).ok_or(CUT_OFF)?;
        }
    }

    /// Lists the bits that are set in an EWAH bitmap of at most `most` bits: each control word tells how many
    /// equal words are omitted and how many literal words follow.
    fn bitmap(&mut self, most: usize) -> Result<Vec<usize>> {
        let (bits, words) = (self.number()? as usize, self.number()? as usize);
        if bits > most {
            return Err(Damaged("a bitmap is longer than the index"));
        }
        let mut words = IndexReader(self.take(words.checked_mul(8).ok_or(CUT_OFF)?)?);
        // The position of the last control word, which only writers need.
        self.number()?;
        let (mut set, mut at) = (Vec::new(), 0_usize);
        while !words.0.is_empty() {
            let word = u64::from_be_bytes(words.array()?);
            let (runs_of, run, literal) = (word & 1 == 1, (word >> 1 & 0xffff_ffff) as usize, word >> 33);
            let end = at.saturating_add(run.saturating_mul(64));
            if runs_of {
                set.extend(at..end.min(bits));
            }
            at = end;
            for _ in 0..literal {
                let word = u64::from_be_bytes(words.array()?);
                set.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| at.saturating_add(bit)));
                at = at.saturating_add(64);
            }
        }
        match set.last() {
            Some(last) if *last >= bits => Err(Damaged("a bitmap is longer than its header says")),
            _ => Ok(set),
        }
    }
}
