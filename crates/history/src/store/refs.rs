//! The names of the checkpoints: `refs/fermata/checkpoints/<number>`, one file each.
//!
//! A ref is the instant at which a checkpoint exists. It is written aside, flushed and then linked into place, which
//! fails when the number is taken: a compare-and-swap without a lock that a crash could leave behind.
//!
//! `packed-refs` is read too: nothing here writes refs there, but somebody who runs `git gc` in the store must not make
//! all checkpoints disappear.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::errors::{HistoryError, Result};
use crate::store::oid::Oid;
use crate::tree::confined_dir::sync_dir;

/// The refs of one store.
#[derive(Debug)]
pub struct Refs {
    dir: PathBuf,
    packed: PathBuf,
    base: PathBuf,
}

/// The file in which a ref is written before it has a name.
const DRAFT: &str = "ref";

const PREFIX: &str = "refs/fermata/checkpoints/";

/// Reads a number that is written as nobody but this file writes it: no sign, no leading zero.
fn as_number(name: &str) -> Option<u64> {
    let number = name.parse::<u64>().ok()?;
    (name == number.to_string()).then_some(number)
}

/// Returns the number in a line of `packed-refs`.
fn packed_number(line: &str) -> Option<u64> {
    as_number(line.split_once(' ')?.1.strip_prefix(PREFIX)?)
}

impl Refs {
    /// Names the place of the refs below the bare repository.
    pub fn below(repository: &Path) -> Refs {
        Refs {
            dir: repository.join("refs/fermata/checkpoints"),
            packed: repository.join("packed-refs"),
            base: repository.join("refs/fermata/base"),
        }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Returns the commit that the kept picture of the workspace belongs to; what it reaches stays, like a checkpoint's.
    pub fn base(&self) -> Result<Option<Oid>> {
        match fs::read_to_string(&self.base) {
            Ok(text) => match text.trim_end().parse() {
                Ok(oid) => Ok(Some(oid)),
                // Torn by a power failure: it was never flushed, and only costs time.
                Err(_) => Ok(None),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HistoryError::io("read", &self.base)(error)),
        }
    }

    /// Names the commit of the kept picture; `aside` is a directory on the same file system for the draft.
    pub fn set_base(&self, commit: Oid, aside: &Path) -> Result<()> {
        let draft = aside.join("base");
        fs::write(&draft, format!("{commit}\n")).map_err(HistoryError::io("write", &draft))?;
        fs::rename(&draft, &self.base).map_err(HistoryError::io("write", &self.base))
    }

    /// Lists the numbers of all published checkpoints, ascending.
    pub fn list(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        match fs::read_dir(&self.dir) {
            Ok(entries) => {
                for entry in entries {
                    let name = entry.map_err(HistoryError::io("list", &self.dir))?.file_name();
                    numbers.extend(name.to_str().and_then(as_number));
                }
            }
            // Git removes a directory whose refs it has packed. With neither, something is wrong, and an empty answer
            // would let a sweep remove every pack.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.packed.exists() => {}
            Err(error) => return Err(HistoryError::io("list", &self.dir)(error)),
        }
        numbers.extend(self.packed_text()?.lines().filter_map(packed_number));
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// Returns the commit of a checkpoint, `None` when there is no such checkpoint.
    pub fn find(&self, number: u64) -> Result<Option<Oid>> {
        let path = self.path(number);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let packed = self.packed_text()?;
                match packed.lines().find(|line| packed_number(line) == Some(number)) {
                    Some(line) => line.split(' ').next().unwrap_or_default().to_owned(),
                    None => return Ok(None),
                }
            }
            Err(error) => return Err(HistoryError::io("read", &path)(error)),
        };
        let oid = text.trim_end().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        oid.map(Some).map_err(HistoryError::io("read", &path))
    }

    /// Returns the commit of a checkpoint that must exist.
    pub fn get(&self, number: u64) -> Result<Oid> {
        self.find(number)?.ok_or(HistoryError::NoSuchCheckpoint { number })
    }

    /// Writes what a ref is to say, in a directory on the same file system; the caller syncs it.
    pub fn draft(&self, commit: Oid, aside: &Path) -> Result<fs::File> {
        let draft = aside.join(DRAFT);
        let write = || -> io::Result<fs::File> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&draft)?;
            // In one piece: an id writes itself byte by byte.
            file.write_all(format!("{commit}\n").as_bytes())?;
            Ok(file)
        };
        write().map_err(HistoryError::io("write", &draft))
    }

    /// Gives a free number to the commit of a draft. The caller syncs the draft and, after this, their directory, or
    /// takes the number back.
    pub fn create(&self, number: u64, aside: &Path) -> Result<()> {
        let (draft, path) = (aside.join(DRAFT), self.path(number));
        fs::create_dir_all(&self.dir).map_err(HistoryError::io("create", &self.dir))?;
        fs::hard_link(&draft, &path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => HistoryError::NumberTaken { number },
            _ => HistoryError::io("create", &path)(error),
        })
    }

    /// Takes back a number that was given and not made durable: whoever is told that it failed must not find it
    /// afterwards.
    pub fn take_back(&self, number: u64) {
        if let Err(error) = fs::remove_file(self.path(number)) {
            tracing::warn!(%error, number, "a ref that could not be flushed stays");
        }
    }

    /// Returns the directory of the loose refs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn packed_text(&self) -> Result<String> {
        match fs::read_to_string(&self.packed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            result => result.map_err(HistoryError::io("read", &self.packed)),
        }
    }

    /// Takes the number away from its checkpoint.
    pub fn remove(&self, number: u64) -> Result<()> {
        let path = self.path(number);
        // The packed one first: a loose ref hides it, and must not uncover it.
        let packed = self.remove_packed(number)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && packed => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(HistoryError::NoSuchCheckpoint { number }),
            Err(error) => Err(HistoryError::io("remove", &path)(error)),
            Ok(()) => sync_dir(&self.dir).map_err(HistoryError::io("flush", &self.dir)),
        }
    }

    fn remove_packed(&self, number: u64) -> Result<bool> {
        let text = self.packed_text()?;
        let keep = |line: &&str| packed_number(line) != Some(number);
        let kept: String = text.lines().filter(keep).flat_map(|line| [line, "\n"]).collect();
        if kept.lines().count() == text.lines().count() {
            return Ok(false);
        }
        let draft = self.packed.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&draft)?;
            file.write_all(kept.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &self.packed)?;
            self.packed.parent().map_or(Ok(()), sync_dir)
        };
        write().map_err(HistoryError::io("rewrite", &self.packed))?;
        Ok(true)
    }
}
