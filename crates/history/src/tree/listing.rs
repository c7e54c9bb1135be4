//! Flat listings of a checkpoint or of the current workspace.
//!
//! Comparison and restore both work on listings, so that they agree on what is equal.

use std::collections::BTreeMap;

use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::confined_dir::Time;
use crate::tree::manifest::{self, CheckpointManifest};
use crate::tree::metadata::{self, MetaKind, MetaLine};
use crate::tree::names::{RelPath, is_safe_name};
use crate::tree::skipped::SkipReason;
use crate::tree::trees::{MODE_LINK, TreeEntry, decode_tree};
use crate::tree::xattrs::Xattrs;

/// The content of the entry at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ItemContent {
    /// A file: its blob.
    File(Oid),
    /// A symbolic link: the blob with its target.
    Symlink(Oid),
    Directory,
    /// A special file: its kind.
    Special(String),
}

/// One path of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListingItem {
    pub content: ItemContent,
    pub mode: u32,
    /// Last change of the content.
    pub mtime: Time,
    /// Bytes of content.
    pub size: u64,
    /// Extended attributes of a file or directory.
    pub xattrs: Xattrs,
    /// The inode number of a file that had several names; equal for the names of one file.
    pub ino: Option<u64>,
    /// Whether the file has holes.
    pub sparse: bool,
}

impl ListingItem {
    /// Says whether kind and content are equal, whatever mode and times are.
    pub fn same_content(&self, other: &ListingItem) -> bool {
        self.content == other.content
    }

    /// Says whether the attributes are equal that can be set without writing the content.
    pub fn same_attributes(&self, other: &ListingItem) -> bool {
        (self.mode, self.mtime) == (other.mode, other.mtime) && self.xattrs == other.xattrs
    }
}

/// All paths, including the workspace itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    pub items: BTreeMap<RelPath, ListingItem>,
    /// Paths that are covered but not stored.
    pub skipped: BTreeMap<RelPath, SkipReason>,
    /// Files that changed while they were read.
    pub torn: Vec<RelPath>,
}

impl Listing {
    /// Says whether the path, or a directory above it, was skipped, so that the listing does not tell its
    /// content.
    pub fn is_unknown(&self, path: &RelPath) -> bool {
        if self.skipped.is_empty() {
            return false;
        }
        let mut at = Some(path.clone());
        while let Some(path) = at {
            if self.skipped.contains_key(&path) {
                return true;
            }
            at = path.parent();
        }
        false
    }

    /// Lists the entries of a checkpoint.
    pub fn of_checkpoint(store: &ObjectStore, commit: &Oid) -> Result<Listing> {
        let root = CheckpointRoot::read(store, commit)?;
        let mut listing = Listing::default();
        let mut open = vec![(RelPath::root(), root.top())];
        while let Some((path, directory)) = open.pop() {
            let below = directory.read(store, &path, &mut listing)?;
            open.extend(below.into_iter().map(|(name, directory)| (path.join(&name), directory)));
        }
        Ok(listing)
    }

    /// Lists the entries in which two checkpoints may differ: a directory that is equal in both, with
    /// everything below it, is in neither listing. If `wanted` is given, only directories above or below these
    /// paths are read.
    pub fn of_both(
        store: &ObjectStore,
        one: &CheckpointRoot,
        other: &CheckpointRoot,
        wanted: Option<&[RelPath]>,
    ) -> Result<(Listing, Listing)> {
        let is_wanted = |path: &RelPath| {
            wanted.is_none_or(|paths| paths.iter().any(|one| path.is_within(one) || one.is_within(path)))
        };
        let (mut left, mut right) = (Listing::default(), Listing::default());
        let mut open = vec![(RelPath::root(), Some(one.top()), Some(other.top()))];
        while let Some((path, one, other)) = open.pop() {
            if one == other {
                continue;
            }
            let mut below: BTreeMap<Vec<u8>, (Option<Directory>, Option<Directory>)> = BTreeMap::new();
            for (name, directory) in one.map_or(Ok(Vec::new()), |dir| dir.read(store, &path, &mut left))? {
                below.entry(name).or_default().0 = Some(directory);
            }
            for (name, directory) in other.map_or(Ok(Vec::new()), |dir| dir.read(store, &path, &mut right))? {
                below.entry(name).or_default().1 = Some(directory);
            }
            let below = below.into_iter().map(|(name, (one, other))| (path.join(&name), one, other));
            open.extend(below.filter(|(path, _, _)| is_wanted(path)));
        }
        Ok((left, right))
    }
}

/// The three parts of a checkpoint's root tree.
pub(crate) struct CheckpointRoot {
    /// The tree of the files.
    pub files: Oid,
    /// The tree of the metadata.
    pub meta: Oid,
    pub manifest: Oid,
}

impl CheckpointRoot {
    /// Returns the directory of the workspace itself.
    pub fn top(&self) -> Directory {
        Directory { files: Some(self.files), meta: self.meta }
    }

    /// Reads the commit and the root tree of a checkpoint.
    pub fn read(store: &ObjectStore, commit: &Oid) -> Result<CheckpointRoot> {
        let damaged = |problem: &str| HistoryError::DamagedObject { oid: *commit, problem: problem.to_owned() };
        let tree = root_tree_of(store, commit)?;
        let entries = decode_tree(&tree, &store.read(&tree, ObjectKind::Tree)?)?;
        let part = |name: &str| entries.iter().find(|entry| entry.name == name.as_bytes()).map(|entry| entry.oid);
        Ok(CheckpointRoot {
            files: part("files").ok_or_else(|| damaged("it has no files"))?,
            meta: part("meta").ok_or_else(|| damaged("it has no metadata"))?,
            manifest: part("manifest").ok_or_else(|| damaged("it has no manifest"))?,
        })
    }

    pub fn manifest(&self, store: &ObjectStore) -> Result<CheckpointManifest> {
        let bytes = store.read(&self.manifest, ObjectKind::Blob)?;
        let damaged = |problem| HistoryError::DamagedObject { oid: self.manifest, problem };
        let manifest: CheckpointManifest =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if manifest.format > manifest::FORMAT {
            return Err(damaged(format!("format {} is newer than this program", manifest.format)));
        }
        Ok(manifest)
    }
}

pub(crate) fn root_tree_of(store: &ObjectStore, commit: &Oid) -> Result<Oid> {
    let bytes = store.read(commit, ObjectKind::Commit)?;
    let tree = bytes.strip_prefix(b"tree ").and_then(|rest| std::str::from_utf8(rest.get(..40)?).ok()?.parse().ok());
    tree.ok_or_else(|| HistoryError::DamagedObject { oid: *commit, problem: "it names no tree".to_owned() })
}

/// A directory of a checkpoint; equal for equal contents, modes and times of everything in and below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Directory {
    /// The tree of its files; `None` if nothing below it is stored.
    files: Option<Oid>,
    meta: Oid,
}

impl Directory {
    /// Adds the entries of the directory to a listing and returns its subdirectories by name.
    pub fn read(self, store: &ObjectStore, path: &RelPath, listing: &mut Listing) -> Result<Vec<(Vec<u8>, Directory)>> {
        let damaged = |oid: Oid, problem: &str| HistoryError::DamagedObject { oid, problem: problem.to_owned() };
        let files = self.stored(store)?;
        let mut below = Vec::new();
        // Each stored file needs a metadata line, since a git tree entry is not enough to restore it.
        let mut described = 0;
        for entry in decode_tree(&self.meta, &store.read(&self.meta, ObjectKind::Tree)?)? {
            if let Some(name) = entry.name.strip_prefix(b"d.") {
                if !is_safe_name(name) {
                    return Err(HistoryError::UnsafePath { path: path.join(name).to_string() });
                }
                let files = files.get(name).filter(|entry| entry.is_tree()).map(|entry| entry.oid);
                described += usize::from(files.is_some());
                below.push((name.to_vec(), Directory { files, meta: entry.oid }));
                continue;
            }
            let lines = metadata::decode(&store.read(&entry.oid, ObjectKind::Blob)?);
            for line in lines.map_err(|error| damaged(entry.oid, &error.to_string()))? {
                let at = if line.kind == MetaKind::Itself { path.clone() } else { path.join(&line.name) };
                let (mut ino, mut sparse) = (None, false);
                let content = match &line.kind {
                    MetaKind::Itself => ItemContent::Directory,
                    MetaKind::Special(kind) => ItemContent::Special(kind.to_string()),
                    MetaKind::Skipped(reason) => {
                        listing.skipped.insert(at, *reason);
                        continue;
                    }
                    MetaKind::File { .. } | MetaKind::Link => {
                        let stored = files.get(&*line.name).filter(|entry| !entry.is_tree());
                        let stored =
                            stored.ok_or_else(|| damaged(self.meta, "it describes a file that is not stored"))?;
                        described += 1;
                        if let MetaKind::File { torn, ino: shared, sparse: holes } = &line.kind {
                            (ino, sparse) = (*shared, *holes);
                            listing.torn.extend(torn.then(|| at.clone()));
                        }
                        if stored.mode == MODE_LINK {
                            ItemContent::Symlink(stored.oid)
                        } else {
                            ItemContent::File(stored.oid)
                        }
                    }
                };
                let MetaLine { mode, mtime, size, xattrs, .. } = line;
                listing.items.insert(
                    at,
                    ListingItem { content, mode, mtime, size, xattrs: xattrs.into_owned().into(), ino, sparse },
                );
            }
        }
        if described != files.len() {
            return Err(damaged(self.meta, "it does not describe every file"));
        }
        Ok(below)
    }

    fn stored(self, store: &ObjectStore) -> Result<BTreeMap<Vec<u8>, TreeEntry>> {
        let Some(oid) = self.files else {
            return Ok(BTreeMap::new());
        };
        let entries = decode_tree(&oid, &store.read(&oid, ObjectKind::Tree)?)?;
        Ok(entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect())
    }

    /// Says whether the checkpoint covers a path below the directory, and whether it stored it; `None` if the
    /// path did not exist or was not covered.
    pub fn coverage_of(self, store: &ObjectStore, path: &RelPath) -> Result<Option<PathCoverage>> {
        let (mut at, mut here) = (self, RelPath::root());
        let mut names = path.bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty()).peekable();
        while let Some(name) = names.next() {
            let mut listing = Listing::default();
            let below = at.read(store, &here, &mut listing)?;
            here = here.join(name);
            match below.into_iter().find(|(one, _)| one == name) {
                Some((_, directory)) => at = directory,
                None if listing.skipped.contains_key(&here) => return Ok(Some(PathCoverage::Skipped)),
                None if names.peek().is_none() && listing.items.contains_key(&here) => {
                    return Ok(Some(PathCoverage::Stored));
                }
                None => return Ok(None),
            }
        }
        Ok(Some(PathCoverage::Stored))
    }
}

/// Whether a checkpoint stored a path that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PathCoverage {
    Stored,
    /// The path, or a directory above it, was skipped.
    Skipped,
}
