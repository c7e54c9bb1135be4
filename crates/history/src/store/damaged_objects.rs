//! Remembers copies of objects that were found damaged, so that a good one is written again and read instead.
//!
//! An object is the same wherever it lies; what is damaged is one copy, in one pack. Kept in a file of the store, since
//! what a verification has found must not be forgotten by a restart. A lost file only costs another verification.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::store::oid::Oid;
use crate::tree::confined_dir::sync_dir;

const FILE: &str = "distrusted";

/// Copies that are damaged: for each object, the names of the packs.
#[derive(Default)]
pub(crate) struct DamagedObjects {
    place: PathBuf,
    copies: HashMap<Oid, Vec<String>>,
}

impl DamagedObjects {
    /// Reads what is kept in a directory. A line that makes no sense is passed over.
    pub fn load(dir: &Path) -> DamagedObjects {
        let place = dir.join(FILE);
        let mut copies: HashMap<Oid, Vec<String>> = HashMap::new();
        let text = match fs::read_to_string(&place) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                tracing::warn!(%error, place = %place.display(), "which objects are damaged is not known any more");
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
        DamagedObjects { place, copies }
    }

    /// Says whether nothing is distrusted.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Says whether the copy of an object in a pack is a damaged one.
    pub fn is_bad(&self, oid: &Oid, pack: &str) -> bool {
        self.copies.get(oid).is_some_and(|packs| packs.iter().any(|name| name == pack))
    }

    /// Lists the damaged copies.
    pub fn all(&self) -> impl Iterator<Item = (&Oid, &str)> {
        self.copies.iter().flat_map(|(oid, packs)| packs.iter().map(move |pack| (oid, pack.as_str())))
    }

    /// Notes a damaged copy.
    pub fn add(&mut self, oid: Oid, pack: String) {
        let packs = self.copies.entry(oid).or_default();
        if !packs.contains(&pack) {
            packs.push(pack);
        }
    }

    /// Forgets the copies in packs that are gone.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.copies.retain(|_, packs| {
            packs.retain(|pack| is_there(pack));
            !packs.is_empty()
        });
    }

    /// Writes it down, durably and in one go.
    ///
    /// # Errors
    /// Fails when the disk does; what was written before stays.
    pub fn save(&self) -> io::Result<()> {
        let draft = self.place.with_extension("new");
        let mut file = fs::File::create(&draft)?;
        let lines: String = self.all().map(|(oid, pack)| format!("{oid} {pack}\n")).collect();
        file.write_all(lines.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, &self.place)?;
        self.place.parent().map_or(Ok(()), sync_dir)
    }
}
