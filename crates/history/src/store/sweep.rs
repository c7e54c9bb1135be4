//! Removes what a crash has left: directories of snapshots, and packs that no checkpoint needs.
//!
//! In doubt a pack stays: it is removed only if every published checkpoint was read completely and needs none
//! of its objects, or if other packs have all of them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::store::oid::Oid;
use crate::store::pack_index::PackIndex;
use crate::store::pack_removal::{CONSOLIDATION_DIR, ChosenPacks, LaterNeeds, remove_if_exists};
use crate::store::reachability::Reachability;
use fermata_failpoint as failpoint;

/// The result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Directories of snapshots that were never published.
    pub directories: u64,
    /// Packs that no checkpoint needs.
    pub packs: u64,
    /// Bytes of those packs.
    pub bytes: u64,
}

impl History {
    /// Removes what no checkpoint needs; called at the start, and safe at any time. A starting snapshot waits
    /// at most for the removal of names.
    ///
    /// # Errors
    /// Fails when the store cannot be listed or changed. If a checkpoint is damaged, every pack stays; that is
    /// no error.
    pub fn sweep(&self) -> Result<SweepReport> {
        let mut report = SweepReport::default();
        self.sweep_pending(&mut report)?;
        // A running consolidation holds this lock; after a crash nothing does.
        let left_behind =
            self.consolidating.try_lock().ok().filter(|_| self.pending().join(CONSOLIDATION_DIR).exists());
        let swept = self.sweep_packs(&mut report, left_behind.is_some() && self.swap_has_begun())?;
        if swept && left_behind.is_some() {
            self.remove_consolidation_dir()?;
            report.directories += 1;
        }
        Ok(report)
    }

    fn sweep_pending(&self, report: &mut SweepReport) -> Result<()> {
        let _writer = self.lock_writer();
        let live = self.live().clone();
        for name in list(&self.pending())?.into_iter().filter(|name| !live.contains(name) && name != CONSOLIDATION_DIR)
        {
            let path = self.pending().join(&name);
            match if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) } {
                Ok(()) => {
                    report.directories += 1;
                    failpoint::hit("history.sweep.directory");
                }
                // A concurrent sweep has removed it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(HistoryError::io("remove", &path)(error)),
            }
        }
        Ok(())
    }

    /// Removes packs that no checkpoint needs; with `redundant`, also those whose needed objects are all in other
    /// packs. Returns `false` if a snapshot in progress or just published prevents it. With `redundant`, the
    /// caller must hold the consolidation lock.
    pub(crate) fn sweep_packs(&self, report: &mut SweepReport, redundant: bool) -> Result<bool> {
        if !self.live().is_empty() {
            return Ok(false);
        }
        self.objects.refresh()?;
        let roots = self.roots()?;
        let candidates = self.candidates_for_removal(&roots, redundant);
        let needed = if candidates.is_empty() {
            Reachability::default()
        } else {
            match Reachability::of(&self.objects, &roots, &[], &AtomicBool::new(false)) {
                Ok(needed) => needed,
                Err(error) => {
                    tracing::warn!(%error, "failed to read a checkpoint; no pack is removed");
                    return Ok(true);
                }
            }
        };
        let names = self.unneeded(candidates, &needed, redundant);
        failpoint::check("history.sweep.walked").map_err(HistoryError::io("sweep", &self.repository))?;
        let chosen = ChosenPacks { names, walked: roots.into_iter().collect(), needed: &needed };
        let mut gone = Vec::new();
        let swept = self.remove_packs(&chosen, &mut gone, report);
        // Freeing a large file may take long, so it happens without the lock.
        for path in gone {
            remove_if_exists(&path)?;
        }
        swept
    }

    /// Lists the packs that may be unneeded. A pack with the commit of a checkpoint is needed.
    fn candidates_for_removal(&self, roots: &[Oid], redundant: bool) -> Vec<Arc<PackIndex>> {
        let commits: HashSet<&Oid> = roots.iter().collect();
        let mut packs = self.objects.indexes();
        if !redundant {
            packs.retain(|pack| !pack.ids().any(|id| commits.contains(&id)));
        }
        packs
    }

    /// Returns the names of the packs that can be removed.
    fn unneeded(&self, mut packs: Vec<Arc<PackIndex>>, needed: &Reachability, redundant: bool) -> HashSet<String> {
        // Small packs first: a consolidation has probably replaced them.
        packs.sort_by_key(|pack| pack.count());
        let mut gone = HashSet::new();
        for pack in packs {
            gone.insert(pack.name.clone());
            let needed = |id: &Oid| needed.contains(id) && !(redundant && self.objects.contains_outside(id, &gone));
            if pack.ids().any(|id| needed(&id)) {
                gone.remove(&pack.name);
            }
        }
        gone
    }

    /// Renames unneeded packs to `pending/` unless a checkpoint has come to need them. The caller removes the
    /// files, which are added to `gone`.
    fn remove_packs(
        &self,
        chosen: &ChosenPacks<'_>,
        gone: &mut Vec<PathBuf>,
        report: &mut SweepReport,
    ) -> Result<bool> {
        let _writer = self.lock_writer();
        // A snapshot in progress may rely on one of these packs.
        if !self.live().is_empty() {
            return Ok(false);
        }
        let removed = self.remove_packs_now(chosen, gone, report);
        // Also after a failure, since some packs may be gone.
        self.objects.refresh()?;
        removed
    }

    /// As [`History::remove_packs`]; the caller holds the writer lock and no snapshot is in progress.
    fn remove_packs_now(
        &self,
        chosen: &ChosenPacks<'_>,
        gone: &mut Vec<PathBuf>,
        report: &mut SweepReport,
    ) -> Result<bool> {
        let dir = self.objects.pack_dir();
        self.objects.refresh()?;
        match self.allows(chosen, &LaterNeeds::default(), &AtomicBool::new(false)) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                tracing::warn!(%error, "failed to read a checkpoint; no pack is removed");
                return Ok(true);
            }
        }
        for name in chosen.names.iter().filter(|name| self.objects.has_pack(name)) {
            // The index goes first, since a pack without an index is invisible.
            remove_if_exists(&dir.join(format!("{name}.idx")))?;
            failpoint::hit("history.sweep.index");
            self.move_to_pending(name, gone, report)?;
        }
        let names = list(&dir)?;
        let all: HashSet<&String> = names.iter().collect();
        for name in names.iter().filter_map(|name| name.strip_suffix(".pack")) {
            if !all.contains(&format!("{name}.idx")) {
                self.move_to_pending(name, gone, report)?;
            }
        }
        Ok(true)
    }

    fn move_to_pending(&self, name: &str, gone: &mut Vec<PathBuf>, report: &mut SweepReport) -> Result<()> {
        let pack = self.objects.pack_dir().join(format!("{name}.pack"));
        let target = self.pending().join(format!("{name}.gone"));
        let size = fs::metadata(&pack).map_or(0, |meta| meta.len());
        match fs::rename(&pack, &target) {
            Ok(()) => gone.push(target),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(HistoryError::io("move", &pack)(error)),
        }
        report.bytes += size;
        report.packs += 1;
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(HistoryError::io("list", dir))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    names.collect::<std::io::Result<_>>().map_err(HistoryError::io("list", dir))
}
