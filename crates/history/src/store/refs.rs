//! The refs of the checkpoints: `refs/fermata/checkpoints/<number>`, one file each.
//!
//! A checkpoint exists from the instant its ref does. The ref is written to a temporary file, flushed and
//! hard-linked to its name, which fails if the number is taken: a compare-and-swap that needs no lock file.
//!
//! `packed-refs` is read, too. The store never writes refs there, but a user who runs `git gc` in the store
//! must not lose all checkpoints.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::errors::{HistoryError, Result};
use crate::store::oid::Oid;
use crate::tree::confined_dir::sync_dir;

#[derive(Debug)]
pub struct Refs {
    dir: PathBuf,
    packed: PathBuf,
    base: PathBuf,
}

/// The temporary file of a ref.
const STAGED_REF: &str = "ref";

const PREFIX: &str = "refs/fermata/checkpoints/";

/// Parses a number in the form that this module writes: without sign or leading zero.
fn as_number(name: &str) -> Option<u64> {
    let number = name.parse::<u64>().ok()?;
    (name == number.to_string()).then_some(number)
}

/// Returns the checkpoint number in a line of `packed-refs`.
fn packed_number(line: &str) -> Option<u64> {
    as_number(line.split_once(' ')?.1.strip_prefix(PREFIX)?)
}

impl Refs {
    /// Returns the refs of a bare repository.
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

    /// Returns the commit of the saved workspace state. Its objects are kept like those of a checkpoint.
    pub fn base(&self) -> Result<Option<Oid>> {
        match fs::read_to_string(&self.base) {
            Ok(text) => match text.trim_end().parse() {
                Ok(oid) => Ok(Some(oid)),
                // The file is never flushed and may be incomplete after a power failure; the state is then
                // rebuilt.
                Err(_) => Ok(None),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HistoryError::io("read", &self.base)(error)),
        }
    }

    /// Sets the commit of the saved workspace state. The temporary file is written to `dir`, a directory on
    /// the same file system.
    pub fn set_base(&self, commit: Oid, dir: &Path) -> Result<()> {
        let staged = dir.join("base");
        fs::write(&staged, format!("{commit}\n")).map_err(HistoryError::io("write", &staged))?;
        fs::rename(&staged, &self.base).map_err(HistoryError::io("write", &self.base))
    }

    /// Lists the numbers of all checkpoints, ascending.
    pub fn list(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        match fs::read_dir(&self.dir) {
            Ok(entries) => {
                for entry in entries {
                    let name = entry.map_err(HistoryError::io("list", &self.dir))?.file_name();
                    numbers.extend(name.to_str().and_then(as_number));
                }
            }
            // Git removes a directory whose refs it has packed. If both are missing the store is damaged, and
            // an empty result would let a sweep remove every pack.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.packed.exists() => {}
            Err(error) => return Err(HistoryError::io("list", &self.dir)(error)),
        }
        numbers.extend(self.packed_text()?.lines().filter_map(packed_number));
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// Returns the commit of a checkpoint; `None` if there is no such checkpoint.
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

    /// Returns the commit of a checkpoint; fails if there is none.
    pub fn get(&self, number: u64) -> Result<Oid> {
        self.find(number)?.ok_or(HistoryError::NoSuchCheckpoint { number })
    }

    /// Writes the contents of a ref to a temporary file in `dir`, a directory on the same file system. The
    /// caller flushes it.
    pub fn stage(&self, commit: Oid, dir: &Path) -> Result<fs::File> {
        let staged = dir.join(STAGED_REF);
        let write = || -> io::Result<fs::File> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&staged)?;
            // One write call: formatting an id directly would write byte by byte.
            file.write_all(format!("{commit}\n").as_bytes())?;
            Ok(file)
        };
        write().map_err(HistoryError::io("write", &staged))
    }

    /// Links the staged ref to a free number. The caller flushes the staged file and then the directory of the
    /// refs, or calls [`Refs::take_back`].
    pub fn create(&self, number: u64, dir: &Path) -> Result<()> {
        let (staged, path) = (dir.join(STAGED_REF), self.path(number));
        fs::create_dir_all(&self.dir).map_err(HistoryError::io("create", &self.dir))?;
        fs::hard_link(&staged, &path).map_err(|error| match error.kind() == io::ErrorKind::AlreadyExists {
            true => HistoryError::NumberTaken { number },
            false => HistoryError::io("create", &path)(error),
        })
    }

    /// Removes a ref that was not made durable: the caller was told that publishing failed.
    pub fn take_back(&self, number: u64) {
        if let Err(error) = fs::remove_file(self.path(number)) {
            tracing::warn!(%error, number, "failed to remove the ref of a failed publication");
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn packed_text(&self) -> Result<String> {
        match fs::read_to_string(&self.packed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            result => result.map_err(HistoryError::io("read", &self.packed)),
        }
    }

    /// Removes the ref of a checkpoint.
    pub fn remove(&self, number: u64) -> Result<()> {
        let path = self.path(number);
        // The packed ref is removed first, since a loose one hides it.
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
        let stage = self.packed.with_extension("new");
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&stage)?;
            file.write_all(kept.as_bytes())?;
            file.sync_all()?;
            fs::rename(&stage, &self.packed)?;
            self.packed.parent().map_or(Ok(()), sync_dir)
        };
        write().map_err(HistoryError::io("rewrite", &self.packed))?;
        Ok(true)
    }
}
