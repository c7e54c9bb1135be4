//! Clears away what a crash left behind: drafts, and packs that no checkpoint needs.
//!
//! Everything here errs on the side of keeping: a pack goes only when every published checkpoint was read completely
//! and none of them reaches any of its objects, or when other packs hold all of those too.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::History;
use super::consolidate::DRAFT;
use super::errors::{HistoryError, Result};
use super::oid::Oid;
use super::pack_index::PackIndex;
use super::reach::Reach;
use crate::failpoint;

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
        for name in list(&self.pending())?.into_iter().filter(|name| !live.contains(name) && name != DRAFT) {
            let path = self.pending().join(&name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(HistoryError::io("remove", &path))?;
            report.drafts += 1;
            failpoint::hit("history.sweep.draft");
        }
        // A snapshot under way relies on published packs, of which one could be about to go.
        if live.is_empty() {
            // Who holds this lock is at work in the draft; after a crash nobody does.
            let left_behind = self.consolidating.try_lock().ok().filter(|_| self.pending().join(DRAFT).exists());
            self.sweep_packs(&mut report, left_behind.is_some() && self.swap_has_begun())?;
            if left_behind.is_some() {
                self.remove_draft()?;
                report.drafts += 1;
            }
        }
        Ok(report)
    }

    /// Removes packs that nobody needs; if `doubles`, also those of which other packs hold everything that is needed.
    /// The caller holds the writer's lock and knows that no snapshot is under way.
    pub(super) fn sweep_packs(&self, report: &mut SweepReport, doubles: bool) -> Result<()> {
        self.objects.refresh()?;
        let dir = self.objects.pack_dir();
        let roots = self.roots()?;
        let commits: HashSet<&Oid> = roots.iter().collect();
        let mut packs = self.objects.indexes();
        if !doubles {
            packs.retain(|pack| !pack.ids().any(|id| commits.contains(&id)));
        }
        if !packs.is_empty() {
            self.sweep_suspects(packs, doubles, &roots, report)?;
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

    fn sweep_suspects(
        &self,
        mut suspects: Vec<Arc<PackIndex>>,
        doubles: bool,
        roots: &[Oid],
        report: &mut SweepReport,
    ) -> Result<()> {
        let reach = match Reach::of(&self.objects, roots, None, &AtomicBool::new(false)) {
            Ok(reach) => reach,
            Err(error) => {
                tracing::warn!(%error, "a checkpoint is damaged; no pack is removed");
                return Ok(());
            }
        };
        let dir = self.objects.pack_dir();
        // The small ones first: they are those that a larger one has replaced.
        suspects.sort_by_key(|pack| pack.count());
        let mut gone = HashSet::new();
        for pack in suspects {
            gone.insert(pack.name.clone());
            let needed = |id: &Oid| reach.needs(id) && !(doubles && self.objects.contains_outside(id, &gone));
            if pack.ids().any(|id| needed(&id)) {
                gone.remove(&pack.name);
                continue;
            }
            // The index goes first: without it the pack does not count.
            remove(&dir.join(format!("{}.idx", pack.name)))?;
            failpoint::hit("history.sweep.index");
            report.bytes += remove(&dir.join(format!("{}.pack", pack.name)))?;
            report.packs += 1;
        }
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(HistoryError::io("list", dir))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    names.collect::<std::io::Result<_>>().map_err(HistoryError::io("list", dir))
}

/// Removes a file that may be gone already, and returns its size.
pub(super) fn remove(path: &Path) -> Result<u64> {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HistoryError::io("remove", path)(error)),
        _ => Ok(size),
    }
}
