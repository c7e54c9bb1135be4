//! Clears away what a crash left behind: drafts, and packs that no checkpoint needs.
//!
//! Everything here errs on the side of keeping: a pack goes only when every published checkpoint was read completely
//! and none of them reaches any of its objects.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use super::History;
use super::errors::{HistoryError, Result};
use super::listing::root_tree_of;
use super::objects::ObjectStore;
use super::oid::{ObjectKind, Oid};
use super::tree::{TreeEntry, decode_tree};

/// What a sweep cleared away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Drafts of snapshots that were never published.
    pub drafts: u64,
    /// Packs that no checkpoint needs.
    pub packs: u64,
    /// Bytes of those packs.
    pub bytes: u64,
}

impl History {
    /// Clears away what no checkpoint needs; called at start, and harmless at any time.
    ///
    /// # Errors
    /// Fails when the store cannot be listed or changed. A damaged checkpoint is no error: then every pack stays.
    pub fn sweep(&self) -> Result<SweepReport> {
        let _writer = self.lock_writer();
        let mut report = SweepReport::default();
        let live = self.live().clone();
        for name in list(&self.pending())?.into_iter().filter(|name| !live.contains(name)) {
            let path = self.pending().join(&name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(HistoryError::io("remove", &path))?;
            report.drafts += 1;
        }
        // A snapshot under way relies on published packs, of which one could be about to go.
        if live.is_empty() {
            self.sweep_packs(&mut report)?;
        }
        Ok(report)
    }

    fn sweep_packs(&self, report: &mut SweepReport) -> Result<()> {
        self.objects.refresh()?;
        let dir = self.objects.pack_dir();
        let mut commits = HashSet::new();
        for number in self.refs.list()? {
            commits.insert(self.refs.get(number)?);
        }
        commits.extend(self.refs.base()?);
        commits.extend(self.known().0.map(|picture| picture.commit));
        let packs = self.objects.contents();
        let suspects: Vec<_> = packs.iter().filter(|(_, ids)| !ids.iter().any(|id| commits.contains(id))).collect();
        if !suspects.is_empty() {
            match reachable(&self.objects, &commits) {
                Ok(needed) => {
                    for (name, _) in suspects.iter().filter(|(_, ids)| !ids.iter().any(|id| needed.contains(id))) {
                        // The index goes first: without it the pack does not count.
                        remove(&dir.join(format!("{name}.idx")))?;
                        report.bytes += remove(&dir.join(format!("{name}.pack")))?;
                        report.packs += 1;
                    }
                }
                Err(error) => tracing::warn!(%error, "a checkpoint is damaged; no pack is removed"),
            }
        }
        let names = list(&dir)?;
        let known: HashSet<&String> = names.iter().collect();
        for name in names.iter().filter(|name| name.ends_with(".pack")) {
            let index = format!("{}.idx", name.trim_end_matches(".pack"));
            if !known.contains(&index) {
                report.bytes += remove(&dir.join(name))?;
                report.packs += 1;
            }
        }
        self.objects.refresh()
    }
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(HistoryError::io("list", dir))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    names.collect::<std::io::Result<_>>().map_err(HistoryError::io("list", dir))
}

fn remove(path: &Path) -> Result<u64> {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HistoryError::io("remove", path)(error)),
        _ => Ok(size),
    }
}

/// Collects every object that the commits reach.
fn reachable(store: &ObjectStore, commits: &HashSet<Oid>) -> Result<HashSet<Oid>> {
    let mut seen = HashSet::new();
    let mut trees = Vec::new();
    for commit in commits {
        seen.insert(*commit);
        trees.push(root_tree_of(store, commit)?);
    }
    while let Some(tree) = trees.pop() {
        if !seen.insert(tree) {
            continue;
        }
        for TreeEntry { mode: _, name: _, oid } in leaves_and_trees(store, &tree, &mut trees)? {
            seen.insert(oid);
        }
    }
    Ok(seen)
}

fn leaves_and_trees(store: &ObjectStore, tree: &Oid, trees: &mut Vec<Oid>) -> Result<Vec<TreeEntry>> {
    let entries = decode_tree(tree, &store.read(tree, ObjectKind::Tree)?)?;
    let (below, leaves): (Vec<_>, Vec<_>) = entries.into_iter().partition(TreeEntry::is_tree);
    trees.extend(below.into_iter().map(|entry| entry.oid));
    Ok(leaves)
}
