//! Consolidates many packs into one, so that finding an object stays fast and versions are stored as deltas.
//!
//! ```text
//! choose  fresh packs, and consolidated ones that are small beside those that join them    no lock
//! write   the new pack in pending/, flushed and read back                                  no lock, slow
//! swap    move it to the others, then remove those that it replaces                        writer lock, short
//! ```
//!
//! A pack is rewritten only if the others add a good part of its size, so that each object is copied a few
//! times in its life, whatever the number of checkpoints. Objects that no checkpoint needs are dropped.
//!
//! A snapshot in progress relies on objects in published packs. It registers itself under the writer lock; the
//! swap runs under that lock, and only while no snapshot is registered. Checkpoints that were published while
//! the pack was written are walked before any pack is removed. If one of them needs an object that would be
//! lost, the swap is abandoned and the next attempt includes it.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::store::oid::Oid;
use crate::store::pack_reader::PackReader;
use crate::store::pack_removal::{CONSOLIDATION_DIR, ChosenPacks, LaterNeeds, remove_if_exists};
use crate::store::reachability::Reachability;
use crate::store::repack::{Repack, RepackEffort};
use crate::tree::confined_dir::sync_dir;
use fermata_failpoint as failpoint;

/// A consolidated pack is rewritten if the packs that join it have at least a quarter of its size.
const GROWTH: u64 = 4;
/// A pack is also rewritten if more than a quarter of it is unneeded.
const WASTE: u64 = 4;
/// The number of fresh packs from which a consolidation is worth its cost.
const MANY: usize = 32;

/// How long a finished pack waits for a moment without snapshots, and how often it checks.
const PATIENCE: Duration = Duration::from_secs(10);
const TURN: Duration = Duration::from_millis(2);
/// Free space that must remain, in bytes.
const SPARE: u64 = 64 << 20;

/// The number of removed checkpoints from which a search for unneeded objects is worth its cost.
const REMOVED: u64 = 8;

/// Which packs are consolidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// Every pack with unneeded objects, and no others: used when the disk is full.
    FreeSpace,
    /// Packs with many unneeded objects, and those that join them.
    Waste,
    /// As `Waste`, and all fresh packs once there are many.
    ManyFresh,
    /// As `Waste`, and all fresh packs even if they are few.
    Fresh,
    /// All packs: the smallest result, at the cost of reading and writing everything.
    Everything,
}

/// The result of a consolidation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consolidated {
    /// The number of packs that were replaced.
    pub packs: u64,
    /// The bytes of those packs.
    pub bytes_before: u64,
    /// The bytes of the new pack.
    pub bytes_after: u64,
    /// The number of objects in it.
    pub objects: u64,
    /// The number of objects stored as deltas.
    pub deltas: u64,
    /// Unneeded bytes in the other packs.
    pub wasted: u64,
}

/// The result of an attempt to consolidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Packs were replaced.
    Done(Consolidated),
    /// There was nothing to do. Contains the number of unneeded bytes, if they were counted.
    Nothing(Option<u64>),
    /// Another consolidation or a snapshot prevented it.
    Busy,
}

/// The number and size of the packs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackStats {
    pub packs: u64,
    /// Those that a snapshot wrote.
    pub fresh: u64,
    /// The bytes of all packs and their indexes.
    pub bytes: u64,
}

struct Candidate {
    reader: PackReader,
    bytes: u64,
    fresh: bool,
}

impl History {
    /// # Errors
    /// Fails when a pack cannot be opened.
    pub fn pack_stats(&self) -> Result<PackStats> {
        let candidates = self.candidates()?;
        let index = |candidate: &Candidate| candidate.reader.index.size();
        Ok(PackStats {
            packs: candidates.len() as u64,
            fresh: candidates.iter().filter(|candidate| candidate.fresh).count() as u64,
            bytes: candidates.iter().map(|candidate| candidate.bytes + index(candidate)).sum(),
        })
    }

    /// Returns the extent for which [`History::consolidate`] has become worth its cost: there are many fresh
    /// packs, checkpoints were removed, or damaged objects have good copies. Cheap.
    pub fn worthwhile_extent(&self) -> Option<Extent> {
        if self.objects.indexes().len() >= MANY && self.candidates().is_ok_and(|all| has_many_fresh(&all)) {
            Some(Extent::ManyFresh)
        } else if self.removed.load(Ordering::Relaxed) >= REMOVED || !self.objects.packs_to_repair(|_| true).is_empty()
        {
            Some(Extent::Waste)
        } else {
            None
        }
    }

    /// Consolidates packs and drops unneeded objects.
    ///
    /// # Errors
    /// Fails when an object is damaged, when the disk is too full, or when cancelled. The packs are then
    /// unchanged.
    pub fn consolidate(&self, extent: Extent, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Attempt> {
        let _one_at_a_time = match self.consolidating.try_lock() {
            Ok(lock) => lock,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(Attempt::Busy),
        };
        if !self.clear_consolidation_dir()? {
            return Ok(Attempt::Busy);
        }
        self.objects.refresh()?;
        let candidates = self.candidates()?;
        if extent == Extent::ManyFresh && !has_many_fresh(&candidates) {
            return Ok(Attempt::Nothing(None));
        }
        let removed = self.removed.load(Ordering::Relaxed);
        let attempt = self.consolidate_these(candidates, extent, progress, cancel)?;
        if attempt != Attempt::Busy {
            // Checkpoints removed before this attempt are dealt with.
            self.removed.fetch_sub(removed, Ordering::Relaxed);
        }
        Ok(attempt)
    }

    fn consolidate_these(
        &self,
        candidates: Vec<Candidate>,
        extent: Extent,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Attempt> {
        let roots = self.roots()?;
        let needed = match Reachability::of(&self.objects, &roots, &[], cancel) {
            Ok(needed) => needed,
            // A checkpoint was removed and swept during the walk; the next attempt does not include it.
            Err(error) if !matches!(error, HistoryError::Cancelled) && self.any_removed(&roots)? => {
                return Ok(Attempt::Busy);
            }
            Err(error) => return Err(error),
        };
        let packs_to_repair = self.objects.packs_to_repair(|oid| needed.contains(oid));
        let (packs, wasted) = choose(candidates, &needed, &packs_to_repair, extent)?;
        if packs.is_empty() {
            return Ok(Attempt::Nothing(Some(wasted)));
        }
        let names: HashSet<String> = packs.iter().map(|candidate| candidate.reader.index.name.clone()).collect();
        let bytes_before = packs.iter().map(|candidate| candidate.bytes + candidate.reader.index.size()).sum();
        let chosen = ChosenPacks { names, walked: roots.iter().copied().collect(), needed: &needed };
        let readers = packs.into_iter().map(|candidate| candidate.reader).collect();
        let plan = Repack::plan(&needed, readers, RepackEffort::Thorough, |pack, oid| {
            self.objects.contains_outside(oid, &chosen.names) || self.objects.is_replaced(pack, oid)
        })?;
        let report = Consolidated { packs: chosen.names.len() as u64, bytes_before, wasted, ..Consolidated::default() };
        let dir = self.pending().join(CONSOLIDATION_DIR);
        if plan.objects() == 0 {
            fs::create_dir(&dir).map_err(HistoryError::io("create", &dir))?;
            let swapped = self.swap(None, &chosen, cancel)?;
            self.remove_consolidation_dir()?;
            return Ok(if swapped { Attempt::Done(report) } else { Attempt::Busy });
        }
        self.check_space(bytes_before)?;
        let done = self.write_and_swap(plan, &chosen, report, progress, cancel);
        self.objects.free_cache();
        if done.is_ok() || !self.swap_has_begun() {
            self.remove_consolidation_dir()?;
        }
        done
    }

    fn write_and_swap(
        &self,
        plan: Repack<'_>,
        chosen: &ChosenPacks<'_>,
        mut report: Consolidated,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Attempt> {
        let dir = self.pending().join(CONSOLIDATION_DIR);
        fs::create_dir(&dir).map_err(HistoryError::io("create", &dir))?;
        let (finished, counts) = plan.write(&dir, progress, cancel)?;
        sync_dir(&self.pending()).map_err(HistoryError::io("flush", &dir))?;
        failpoint::check("history.consolidation.written").map_err(HistoryError::io("write", &dir))?;
        let index = dir.join(format!("{}.idx", finished.name));
        report.objects = finished.objects;
        report.deltas = counts.deltas;
        report.bytes_after = finished.bytes + fs::metadata(index).map_or(0, |meta| meta.len());
        let swapped = self.swap(Some(&finished.name), chosen, cancel)?;
        Ok(if swapped { Attempt::Done(report) } else { Attempt::Busy })
    }

    /// Removes the files of an earlier consolidation; returns `false` if a snapshot prevents it.
    fn clear_consolidation_dir(&self) -> Result<bool> {
        if !self.pending().join(CONSOLIDATION_DIR).exists() {
            return Ok(true);
        }
        if self.swap_has_begun() && !self.sweep_packs(&mut crate::SweepReport::default(), true)? {
            return Ok(false);
        }
        self.remove_consolidation_dir().map(|()| true)
    }

    /// Fails if the disk has too little space. The new pack is never larger than those that it replaces.
    fn check_space(&self, bytes: u64) -> Result<()> {
        let disk = nix::sys::statvfs::statvfs(&self.repository)
            .map_err(HistoryError::io("read the free space of", &self.repository))?;
        let free = disk.blocks_available() as u64 * disk.fragment_size() as u64;
        if free < bytes + SPARE {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(HistoryError::io("find space to consolidate packs in", &self.repository)(full));
        }
        Ok(())
    }

    /// Says whether one of these commits no longer has to stay.
    fn any_removed(&self, roots: &[Oid]) -> Result<bool> {
        let now: HashSet<Oid> = self.roots()?.into_iter().collect();
        Ok(roots.iter().any(|commit| !now.contains(commit)))
    }

    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for index in self.objects.indexes() {
            let name = index.name.clone();
            let candidate = self.objects.reader(&index).and_then(|reader| {
                let bytes = reader.length()?;
                Ok(Candidate { bytes, fresh: reader.is_fresh(), reader })
            });
            match candidate {
                Ok(candidate) => candidates.push(candidate),
                // A sweep has removed it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(HistoryError::io("open pack", Path::new(&name))(error)),
            }
        }
        Ok(candidates)
    }

    /// Replaces the old packs by the new one; returns `false` if snapshots prevent it. Waits for a moment
    /// without snapshots, up to a limit.
    fn swap(&self, new: Option<&str>, chosen: &ChosenPacks<'_>, cancel: &AtomicBool) -> Result<bool> {
        let start = Instant::now();
        // Checkpoints published meanwhile are walked before the lock is taken.
        let later = match chosen.later(self.roots()?, &self.objects, cancel) {
            Ok(later) => later,
            Err(HistoryError::Cancelled) => return Err(HistoryError::Cancelled),
            // A checkpoint was removed and swept, or is damaged; the check under the lock tells which.
            Err(_) => LaterNeeds::default(),
        };
        let _writer = loop {
            let writer = self.lock_writer();
            if self.live().is_empty() {
                break writer;
            }
            drop(writer);
            if cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            if start.elapsed() > PATIENCE {
                tracing::debug!("snapshots are in progress; the consolidation is postponed");
                return Ok(false);
            }
            std::thread::sleep(TURN);
        };
        let swapped = self.swap_now(new, chosen, &later, cancel);
        // Also after a failure, since some packs may be gone.
        self.objects.refresh()?;
        if matches!(swapped, Ok(true)) {
            failpoint::hit("history.consolidation.swapped");
        }
        swapped
    }

    /// As [`History::swap`]; the caller holds the writer lock.
    fn swap_now(
        &self,
        new: Option<&str>,
        chosen: &ChosenPacks<'_>,
        later: &LaterNeeds,
        cancel: &AtomicBool,
    ) -> Result<bool> {
        self.objects.refresh()?;
        if !self.allows(chosen, later, cancel)? {
            tracing::debug!("a new checkpoint needs objects of the old packs; the consolidation is postponed");
            return Ok(false);
        }
        let (from, to) = (self.pending().join(CONSOLIDATION_DIR), self.objects.pack_dir());
        if let Some(new) = new {
            self.install(&from, new, || failpoint::check("history.consolidation.moved"))?;
        }
        failpoint::check("history.consolidation.before_removal").map_err(HistoryError::io("remove packs of", &to))?;
        for name in chosen.names.iter().filter(|name| Some(name.as_str()) != new) {
            // A pack without an index is invisible. The pack itself is removed later, since freeing a large
            // file may take long.
            remove_if_exists(&to.join(format!("{name}.idx")))?;
            failpoint::check("history.consolidation.removed").map_err(HistoryError::io("remove packs of", &to))?;
            let pack = to.join(format!("{name}.pack"));
            match fs::rename(&pack, from.join(format!("{name}.gone"))) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(HistoryError::io("move", &pack)(error));
                }
                _ => {}
            }
            failpoint::check("history.consolidation.removed").map_err(HistoryError::io("remove packs of", &to))?;
        }
        sync_dir(&to).map_err(HistoryError::io("flush", &to))?;
        Ok(true)
    }
}

fn has_many_fresh(candidates: &[Candidate]) -> bool {
    candidates.iter().filter(|candidate| candidate.fresh).count() >= MANY
}

/// Chooses the packs to consolidate and returns the number of unneeded bytes in the others.
fn choose(
    candidates: Vec<Candidate>,
    needed: &Reachability,
    packs_to_repair: &HashSet<String>,
    extent: Extent,
) -> Result<(Vec<Candidate>, u64)> {
    let mut chosen = Vec::new();
    let mut others = Vec::new();
    let all = candidates.len();
    for candidate in candidates {
        let joins = match extent {
            Extent::FreeSpace | Extent::Waste => false,
            Extent::ManyFresh | Extent::Fresh | Extent::Everything => candidate.fresh,
        };
        let tolerable = if extent == Extent::FreeSpace { 0 } else { candidate.bytes / WASTE };
        let wasted = waste(&candidate, needed)?;
        if joins || wasted > tolerable || packs_to_repair.contains(&candidate.reader.index.name) {
            chosen.push(candidate);
        } else {
            others.push((candidate, wasted));
        }
    }
    match extent {
        Extent::Everything if all == 1 => {}
        Extent::Everything => chosen.extend(others.drain(..).map(|(candidate, _)| candidate)),
        Extent::FreeSpace => {}
        Extent::Waste | Extent::ManyFresh | Extent::Fresh if chosen.is_empty() => {}
        Extent::Waste | Extent::ManyFresh | Extent::Fresh => {
            let mut bytes: u64 = chosen.iter().map(|candidate| candidate.bytes).sum();
            others.sort_by_key(|(candidate, _)| candidate.bytes);
            let mut joining = 0;
            for (candidate, _) in &others {
                if candidate.bytes > bytes.saturating_mul(GROWTH) {
                    break;
                }
                bytes += candidate.bytes;
                joining += 1;
            }
            chosen.extend(others.drain(..joining).map(|(candidate, _)| candidate));
        }
    }
    // Consolidated packs come first: if several packs have an object, the first entry is taken.
    chosen.sort_by_key(|candidate| candidate.fresh);
    Ok((chosen, others.iter().map(|(_, wasted)| wasted).sum()))
}

/// Returns the number of unneeded bytes in a pack.
fn waste(candidate: &Candidate, needed: &Reachability) -> Result<u64> {
    let name = Path::new(&candidate.reader.index.name);
    let layout = candidate.reader.index.layout().map_err(HistoryError::io("read the index of", name))?;
    let ends = layout.iter().skip(1).map(|(at, _)| *at).chain([candidate.bytes]);
    let unneeded = layout
        .iter()
        .zip(ends)
        .filter(|((_, n), _)| !candidate.reader.index.oid(*n as usize).is_some_and(|oid| needed.contains(&oid)));
    Ok(unneeded.map(|((at, _), end)| end.saturating_sub(*at)).sum())
}
