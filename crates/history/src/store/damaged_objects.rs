//! Remembers copies of objects that were found damaged, so that good copies are written again and preferred by
//! readers.
//!
//! An entry names one copy: the object and its pack. The entries are kept in a file of the store, so that the
//! findings of a verification survive a restart. If the file is lost, another verification finds the damage
//! again.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::store::oid::Oid;
use crate::tree::confined_dir::sync_dir;

const FILE: &str = "distrusted";

/// The damaged copies: for each object, the names of the packs.
#[derive(Default)]
pub(crate) struct DamagedObjects {
    path: PathBuf,
    copies: HashMap<Oid, Vec<String>>,
}

impl DamagedObjects {
    /// Reads the entries from a directory. Lines that cannot be parsed are ignored.
    pub fn load(dir: &Path) -> DamagedObjects {
        let path = dir.join(FILE);
        let mut copies: HashMap<Oid, Vec<String>> = HashMap::new();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                let path = path.display();
                tracing::warn!(%error, %path, "failed to read the damaged objects; verify all checkpoints");
                String::new()
            }
        };
        for line in text.lines() {
            if let Some((oid, pack)) = line.split_once(' ')
                && let Ok(oid) = oid.parse()
            {
                copies.entry(oid).or_default().push(pack.to_owned());
            }
        }
        DamagedObjects { path, copies }
    }

    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Says whether the copy of an object in a pack is damaged.
    pub fn is_bad(&self, oid: &Oid, pack: &str) -> bool {
        self.copies.get(oid).is_some_and(|packs| packs.iter().any(|name| name == pack))
    }

    pub fn all(&self) -> impl Iterator<Item = (&Oid, &str)> {
        self.copies.iter().flat_map(|(oid, packs)| packs.iter().map(move |pack| (oid, pack.as_str())))
    }

    pub fn add(&mut self, oid: Oid, pack: String) {
        let packs = self.copies.entry(oid).or_default();
        if !packs.contains(&pack) {
            packs.push(pack);
        }
    }

    /// Removes the entries of packs that no longer exist.
    pub fn retain(&mut self, exists: impl Fn(&str) -> bool) {
        self.copies.retain(|_, packs| {
            packs.retain(|pack| exists(pack));
            !packs.is_empty()
        });
    }

    /// Writes all entries durably and atomically.
    ///
    /// # Errors
    /// Fails when the disk does; the previous file then stays.
    pub fn save(&self) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = fs::File::create(&temporary)?;
        let lines: String = self.all().map(|(oid, pack)| format!("{oid} {pack}\n")).collect();
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        self.path.parent().map_or(Ok(()), sync_dir)
    }
}
