//! Compares two checkpoints, or a checkpoint with the current workspace.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::rules::coverage::Rules;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::listing::{CheckpointRoot, ItemContent, Listing, ListingItem};
use crate::tree::names::RelPath;
use crate::workspace::check_workspace;

/// One side of a comparison.
#[derive(Clone, Debug)]
pub enum Point {
    /// A checkpoint.
    Checkpoint(u64),
    /// The current workspace under these rules.
    Workspace(PathBuf, Rules),
}

/// How a path differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffChange {
    /// Only the later side has it.
    Added,
    /// Only the later side has the path.
    Removed,
    /// Its content differs.
    Modified,
    /// The kind of entry differs.
    TypeChanged,
    /// Only its permission bits differ.
    ModeChanged,
    /// Only its extended attributes differ.
    AttributesChanged,
}

/// The kind of entry at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A file.
    File,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// A FIFO, socket or device.
    Special,
}

/// One path that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffEntry {
    pub path: RelPath,
    pub change: DiffChange,
    /// The kind of the entry on the later side; of a removed entry, on the earlier side.
    pub kind: EntryKind,
    /// Bytes on the earlier side.
    pub old_size: Option<u64>,
    /// Bytes on the later side.
    pub new_size: Option<u64>,
    /// Permission bits on the earlier side.
    pub old_mode: Option<u32>,
    /// Permission bits on the later side.
    pub new_mode: Option<u32>,
}

/// All paths that differ, in byte order. A directory is listed if its mode changed, or if only one side has it
/// and it is empty there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    pub entries: Vec<DiffEntry>,
}

/// The text difference of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextDiff {
    /// A unified patch; empty when the contents are equal. Bytes that are not UTF-8 are replaced.
    Patch(String),
    /// One of the sides contains a NUL byte.
    Binary,
    /// One of the sides is larger than the caller's limit.
    TooLarge,
}

impl History {
    /// Compares two points.
    ///
    /// # Errors
    /// Fails when a checkpoint does not exist or is damaged, or when a workspace cannot be read.
    pub fn diff(&self, from: &Point, to: &Point, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Diff> {
        let (old, new) = match (from, to) {
            (Point::Checkpoint(from), Point::Checkpoint(to)) => {
                let root = |number: &u64| CheckpointRoot::read(&self.objects, &self.refs.get(*number)?);
                Listing::of_both(&self.objects, &root(from)?, &root(to)?, None)?
            }
            _ => (self.listing_at(from, progress, cancel)?, self.listing_at(to, progress, cancel)?),
        };
        Ok(compare(&old, &new))
    }

    fn listing_at(&self, point: &Point, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Listing> {
        match point {
            Point::Checkpoint(number) => self.listing_of(*number),
            Point::Workspace(path, rules) => {
                let root = Root::open(&check_workspace(path)?)?;
                self.workspace_listing(&root, rules, progress, cancel)
            }
        }
    }

    /// Returns the unified patch of one path between two points; an absent side counts as empty.
    ///
    /// # Errors
    /// Fails when a checkpoint does not exist or is damaged, or when the file cannot be read.
    pub fn diff_text(&self, from: &Point, to: &Point, path: &RelPath, max_bytes: u64) -> Result<TextDiff> {
        let (Some(old), Some(new)) = (self.text_at(from, path, max_bytes)?, self.text_at(to, path, max_bytes)?) else {
            return Ok(TextDiff::TooLarge);
        };
        if old.contains(&0) || new.contains(&0) {
            return Ok(TextDiff::Binary);
        }
        let mut patch = git2::Patch::from_buffers(&old, Some(path.as_path()), &new, Some(path.as_path()), None)
            .map_err(HistoryError::git("compare two texts"))?;
        let text = patch.to_buf().map_err(HistoryError::git("write a patch"))?;
        Ok(TextDiff::Patch(String::from_utf8_lossy(&text).into_owned()))
    }

    fn text_at(&self, point: &Point, path: &RelPath, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        match point {
            Point::Checkpoint(number) => match self.blob_at(*number, path)? {
                Some(oid) if self.objects.open_object(&oid)?.size > max_bytes => Ok(None),
                Some(oid) => self.objects.read(&oid, ObjectKind::Blob).map(Some),
                None => Ok(Some(Vec::new())),
            },
            Point::Workspace(workspace, _) => {
                let root = Root::open(&check_workspace(workspace)?)?;
                let shown = root.show(path);
                let stat = root.stat_if_there(path).map_err(HistoryError::io("read the metadata of", &shown))?;
                match stat.map(|stat| (stat.kind(), stat.size)) {
                    Some((FileKind::Regular, size)) if size > max_bytes => Ok(None),
                    Some((FileKind::Regular, _)) => {
                        let file = root.open_file(path).map_err(HistoryError::io("open", &shown))?;
                        let mut text = Vec::new();
                        file.take(max_bytes).read_to_end(&mut text).map_err(HistoryError::io("read", &shown))?;
                        Ok(Some(text))
                    }
                    Some((FileKind::Symlink, _)) => {
                        let target = root.read_link(path).map_err(HistoryError::io("read", &shown))?;
                        Ok(Some(target.as_bytes().to_vec()))
                    }
                    _ => Ok(Some(Vec::new())),
                }
            }
        }
    }

    /// Finds the blob of a path by walking down one tree per component.
    fn blob_at(&self, number: u64, path: &RelPath) -> Result<Option<Oid>> {
        let commit = self.refs.get(number)?;
        let mut at = CheckpointRoot::read(&self.objects, &commit)?.files;
        let mut names = path.bytes().split(|b| *b == b'/').peekable();
        while let Some(name) = names.next() {
            let entries = crate::tree::trees::decode_tree(&at, &self.objects.read(&at, ObjectKind::Tree)?)?;
            match entries.into_iter().find(|entry| entry.name == name) {
                Some(entry) if names.peek().is_none() && !entry.is_tree() => {
                    return Ok(Some(entry.oid));
                }
                Some(entry) if names.peek().is_some() && entry.is_tree() => at = entry.oid,
                _ => return Ok(None),
            }
        }
        Ok(None)
    }
}

fn kind_of(item: &ListingItem) -> EntryKind {
    match item.content {
        ItemContent::File(_) => EntryKind::File,
        ItemContent::Symlink(_) => EntryKind::Symlink,
        ItemContent::Directory => EntryKind::Directory,
        ItemContent::Special(_) => EntryKind::Special,
    }
}

pub(crate) fn compare(old: &Listing, new: &Listing) -> Diff {
    let (full_old, full_new) = (with_children(old), with_children(new));
    let paths: BTreeSet<&RelPath> = old.items.keys().chain(new.items.keys()).collect();
    let mut diff = Diff::default();
    for path in paths {
        let (before, after) = (old.items.get(path), new.items.get(path));
        let change = match (before, after) {
            (Some(before), Some(after)) if kind_of(before) != kind_of(after) => DiffChange::TypeChanged,
            (Some(before), Some(after)) if !before.same_content(after) => DiffChange::Modified,
            (Some(before), Some(after)) if before.mode != after.mode => DiffChange::ModeChanged,
            (Some(before), Some(after)) if before.xattrs != after.xattrs => DiffChange::AttributesChanged,
            (Some(_), Some(_)) | (None, None) => continue,
            (Some(before), None) if before.content == ItemContent::Directory && full_old.contains(path) => {
                continue;
            }
            (None, Some(after)) if after.content == ItemContent::Directory && full_new.contains(path) => {
                continue;
            }
            (Some(_), None) => DiffChange::Removed,
            (None, Some(_)) => DiffChange::Added,
        };
        let Some(kind) = after.or(before).map(kind_of) else {
            continue;
        };
        diff.entries.push(DiffEntry {
            path: path.clone(),
            change,
            kind,
            old_size: before.map(|item| item.size),
            new_size: after.map(|item| item.size),
            old_mode: before.map(|item| item.mode),
            new_mode: after.map(|item| item.mode),
        });
    }
    diff
}

fn with_children(listing: &Listing) -> BTreeSet<RelPath> {
    listing.items.keys().filter_map(RelPath::parent).collect()
}
