//! Reads which files the user's index tracks, without ever writing to it.
//!
//! Every form that git writes is read: versions 2 to 4, SHA-1 and SHA-256, split in two files, without a checksum.
//! Only paths, kinds and the bit of a sparse checkout are taken. The formats are those of git's documentation
//! (gitformat-index); the bytes come from the user's `.git`, so nothing in them is relied on. A file is read into
//! memory, never mapped: an agent could cut it off meanwhile.

use std::path::Path;

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

use crate::rules::user_repository::read_at_most;

/// The largest index that is read, bytes: some two million files.
const MAX_INDEX: u64 = 256 << 20;

/// No name is longer (`PATH_MAX`, which counts the zero at its end).
const MAX_NAME: usize = 4095;

/// All names come to at most so many times what they take in the file: in version 4 each says only how it differs from the
/// one before.
const MAX_EXPANSION: usize = 8;

/// Bits of an entry's flags: more flags follow, and how many bytes of its name are counted at most.
const EXTENDED: u16 = 1 << 14;
/// The bit of the second flags whose file a sparse checkout leaves out.
const SKIP_WORKTREE: u16 = 1 << 14;
/// What comes before an entry's object id: nine numbers and the mode among them.
const STATE_BYTES: usize = 40;
const MODE_AT: usize = 24;
/// The part of a mode that says what an entry is.
const KIND: u32 = 0o170_000;

/// Why an index cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    #[error("'{0}' is missing, is no file, or is too large")]
    Unreadable(&'static str),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("version {0} is not known")]
    Version(u32),
    #[error("the extension '{0}' is not known")]
    Extension(String),
}

use IndexError::Damaged;

type Result<T> = std::result::Result<T, IndexError>;

/// An entry of an index.
pub(crate) struct Entry {
    /// From the top of the working tree.
    pub path: Vec<u8>,
    /// Whether a sparse checkout leaves it out; it may be there all the same.
    pub skipped: bool,
    mode: u32,
}

impl Entry {
    /// Says whether it is a submodule, a repository with an index of its own.
    pub fn is_module(&self) -> bool {
        self.mode & KIND == 0o160_000
    }
}

/// One file of an index, parsed.
struct Parsed {
    entries: Vec<Entry>,
    /// Where the other entries are, when the index is split.
    link: Option<Link>,
}

/// What a split index says of the file that it shares.
struct Link {
    /// The checksum of that file, which is also its name.
    base: Vec<u8>,
    /// Two bitmaps: of its entries that are gone, and of those that have become the first ones of the split index, which
    /// bear no name. None where all of them stand.
    bitmaps: Vec<u8>,
}

/// Lists the files, symbolic links and submodules that an index tracks.
///
/// # Errors
/// When the index is damaged, or of a form that is not known.
pub(crate) fn tracked(git_dir: &Path, content: &[u8]) -> Result<Vec<Entry>> {
    let (content, id_bytes) = checked(content)?;
    let Parsed { mut entries, link } = parse(content, id_bytes)?;
    if let Some(link) = link {
        entries = joined(git_dir, entries, &link)?;
    }
    entries.retain(|entry| entry.is_module() || matches!(entry.mode & KIND, 0o100_000 | 0o120_000));
    Ok(entries)
}

/// Reads an index; `None` when there is none.
pub(crate) fn read(path: &Path) -> Option<Vec<u8>> {
    read_at_most(path, MAX_INDEX)
}

/// Cuts the checksum off; returns what is before it and how long the repository's object ids are.
fn checked(content: &[u8]) -> Result<(&[u8], usize)> {
    let parts = |bytes| content.len().checked_sub(bytes).map(|at| content.split_at(at));
    if let Some((before, sum)) = parts(20).filter(|(before, sum)| Sha1::digest(before)[..] == **sum) {
        return Ok((before, sum.len()));
    }
    if let Some((before, sum)) = parts(32).filter(|(before, sum)| Sha256::digest(before)[..] == **sum) {
        return Ok((before, sum.len()));
    }
    // `index.skipHash` leaves the checksum out. Of which kind it would have been, only the entries tell.
    for bytes in [32, 20] {
        if let Some((before, _)) = parts(bytes).filter(|(_, sum)| sum.iter().all(|byte| *byte == 0))
            && parse(before, bytes).is_ok()
        {
            return Ok((before, bytes));
        }
    }
    Err(Damaged("its checksum is another one"))
}

/// Puts the two parts of a split index together.
fn joined(git_dir: &Path, own: Vec<Entry>, link: &Link) -> Result<Vec<Entry>> {
    const SHARED: &str = "sharedindex";
    let name: String = link.base.iter().map(|byte| format!("{byte:02x}")).collect();
    let shared = read(&git_dir.join(format!("{SHARED}.{name}"))).ok_or(IndexError::Unreadable(SHARED))?;
    let (content, id_bytes) = checked(&shared)?;
    let mut entries: Vec<Option<Entry>> = parse(content, id_bytes)?.entries.into_iter().map(Some).collect();
    let mut bitmaps = Bytes(&link.bitmaps);
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
    let mut entries: Vec<Entry> = entries.into_iter().flatten().collect();
    entries.extend(own);
    Ok(entries)
}

fn parse(content: &[u8], id_bytes: usize) -> Result<Parsed> {
    let mut rest = Bytes(content);
    if rest.take(4)? != b"DIRC" {
        return Err(Damaged("it does not begin as one"));
    }
    let (version, count) = (rest.number()?, rest.number()?);
    if !(2..=4).contains(&version) {
        return Err(IndexError::Version(version));
    }
    // What is not there is not waited for: every entry has at least its state.
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
    let mut link = None;
    while !rest.0.is_empty() {
        let (name, size) = (rest.take(4)?, rest.number()?);
        let extension = Bytes(rest.take(size as usize)?);
        match name {
            b"link" => link = parse_link(extension, id_bytes)?,
            // Entries that stand for whole directories outside a sparse checkout: no files, so none is taken.
            b"sdir" => {}
            // Git says: what begins with a capital may be left alone.
            _ if name[0].is_ascii_uppercase() => {}
            _ => return Err(IndexError::Extension(String::from_utf8_lossy(name).into_owned())),
        }
    }
    Ok(Parsed { entries, link })
}

fn parse_entry(rest: &mut Bytes<'_>, version: u32, id_bytes: usize, before: &[u8]) -> Result<Entry> {
    let start = rest.0.len();
    let state = rest.take(STATE_BYTES)?;
    let mode = u32::from_be_bytes(state[MODE_AT..MODE_AT + 4].try_into().map_err(|_| CUT_OFF)?);
    rest.take(id_bytes)?;
    let flags = rest.short()?;
    let skipped = version > 2 && flags & EXTENDED != 0 && rest.short()? & SKIP_WORKTREE != 0;
    if version < 4 {
        let path = rest.until_nul()?.to_vec();
        // Entries begin at multiples of eight, and at least one zero ends the name.
        let long = start - rest.0.len();
        let padding = rest.take(long.next_multiple_of(8) - long)?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Damaged("an entry does not end where it should"));
        }
        return Ok(Entry { path, skipped, mode });
    }
    // So many bytes go from the end of the name before this one.
    let kept = before.len().checked_sub(rest.varint()?).ok_or(Damaged("a name is shorter than nothing"))?;
    let path = [&before[..kept], rest.until_nul()?].concat();
    Ok(Entry { path, skipped, mode })
}

fn parse_link(mut rest: Bytes<'_>, id_bytes: usize) -> Result<Option<Link>> {
    let base = rest.take(id_bytes)?.to_vec();
    // Without a base it is an index like any other.
    if base.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    Ok(Some(Link { base, bitmaps: rest.0.to_vec() }))
}

const CUT_OFF: IndexError = Damaged("it is cut off");

/// What is left to be read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
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

    /// Reads a number of seven bits a byte, the highest first, as the offsets of a pack have it.
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

    /// Lists the bits that are set in an EWAH bitmap of at most so many: words of which each says how many equal ones are
    /// left out after it, and how many follow as they are.
    fn bitmap(&mut self, most: usize) -> Result<Vec<usize>> {
        let (bits, words) = (self.number()? as usize, self.number()? as usize);
        if bits > most {
            return Err(Damaged("a bitmap is longer than what it is about"));
        }
        let mut words = Bytes(self.take(words.checked_mul(8).ok_or(CUT_OFF)?)?);
        // Where the last of those words stands, which only a writer needs.
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
            Some(last) if *last >= bits => Err(Damaged("a bitmap is longer than it says")),
            _ => Ok(set),
        }
    }
}
