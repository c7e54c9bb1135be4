//! Makes one pack of many, so that finding an object stays fast and versions cost what differs between them.
//!
//! ```text
//! choose  fresh packs, and consolidated ones that are small beside what joins them      no lock
//! write   the new pack, in pending/, flushed and read back                              no lock, slow
//! swap    move it among the others, then remove those that it replaces                  writer lock, an instant
//! ```
//!
//! A pack is written again only when what is merged into it is a good part of its size, so that an object is copied a
//! few times in its life, however many checkpoints come. What no checkpoint needs is left out.
//!
//! The lease: a snapshot under way relies on what it found in published packs. It announces itself under the writer
//! lock; the swap happens under that lock and only while no snapshot is announced. What was published while the pack was
//! written is walked before anything goes; if it needs something that would, nothing happens and the next try sees it.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::TryLockError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::store::objects::ObjectStore;
use crate::store::oid::Oid;
use crate::store::pack_reader::PackReader;
use crate::store::reachability::Reachability;
use crate::store::repack::{Manner, Repack};
use crate::store::sweep::remove;
use crate::tree::confined_dir::sync_dir;
use fermata_failpoint as failpoint;

/// A consolidated pack is written again when what joins it has at least a quarter of its size.
const GROWTH: u64 = 4;
/// A pack of which this part (one in so many bytes) is not needed is written again, too.
const WASTE: u64 = 4;
/// So many fresh packs are worth a consolidation.
const MANY: usize = 32;

/// How long a finished pack waits for an instant without a snapshot under way, and how often it looks for one.
const PATIENCE: Duration = Duration::from_secs(10);
const TURN: Duration = Duration::from_millis(2);
/// Free space that is left to others, in bytes.
const SPARE: u64 = 64 << 20;

/// So many removed checkpoints are worth a look for what nobody needs any more.
const REMOVED: u64 = 8;

/// The directory of the pack that is being written, below `pending/`. Whatever is in it after a crash may be half of a
/// swap.
pub(crate) const DRAFT: &str = "consolidation";

/// How much is consolidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// Packs with anything that nobody needs any more, and no others: somebody waits for the room.
    Room,
    /// Packs with much that nobody needs any more, and whatever they join.
    Waste,
    /// The same and all fresh packs, once there are many of these.
    Due,
    /// The same and all fresh packs, even if they are few.
    Fresh,
    /// All packs into one: the smallest result, for the price of reading and writing everything.
    Everything,
}

/// What came of a consolidation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consolidated {
    /// Packs that were there and are gone.
    pub packs: u64,
    /// Their bytes.
    pub bytes_before: u64,
    /// The bytes of the pack that replaces them.
    pub bytes_after: u64,
    /// Objects in it.
    pub objects: u64,
    /// How many of them are stored as a difference to another version.
    pub deltas: u64,
    /// Bytes in the other packs that nobody needs.
    pub wasted: u64,
}

/// What came of a try to consolidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Packs were replaced.
    Done(Consolidated),
    /// There is nothing to do; so many bytes in the packs are needed by nobody, if that was looked for.
    Nothing(Option<u64>),
    /// Somebody else consolidates, or a snapshot does not allow it now: what there is to do is not known.
    Busy,
}

/// How the packs of a store lie on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackStats {
    /// All packs.
    pub packs: u64,
    /// Those that are as a snapshot wrote them.
    pub fresh: u64,
    /// Bytes of all packs and their indexes.
    pub bytes: u64,
}

struct Candidate {
    reader: PackReader,
    bytes: u64,
    fresh: bool,
}

impl History {
    /// Counts the packs.
    ///
    /// # Errors
    /// Fails when they cannot be looked at.
    pub fn pack_stats(&self) -> Result<PackStats> {
        let candidates = self.candidates()?;
        let index = |one: &Candidate| one.reader.index.size();
        Ok(PackStats {
            packs: candidates.len() as u64,
            fresh: candidates.iter().filter(|one| one.fresh).count() as u64,
            bytes: candidates.iter().map(|one| one.bytes + index(one)).sum(),
        })
    }

    /// Says what of [`History::consolidate`] has become worth it: many packs have come, checkpoints were removed, or
    /// what was damaged has good copies.
    /// Costs next to nothing.
    pub fn due(&self) -> Option<Extent> {
        if self.objects.indexes().len() >= MANY && self.candidates().is_ok_and(|all| is_due(&all)) {
            Some(Extent::Due)
        } else if self.removed.load(Ordering::Relaxed) >= REMOVED || !self.objects.mendable(|_| true).is_empty() {
            Some(Extent::Waste)
        } else {
            None
        }
    }

    /// Writes small packs as one and drops what nobody needs.
    ///
    /// # Errors
    /// Fails when an object is damaged, when the disk is too full, or when cancelled; then everything is as it was.
    pub fn consolidate(&self, extent: Extent, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<Attempt> {
        let _one_at_a_time = match self.consolidating.try_lock() {
            Ok(lock) => lock,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(Attempt::Busy),
        };
        if !self.clear_draft()? {
            return Ok(Attempt::Busy);
        }
        self.objects.refresh()?;
        let candidates = self.candidates()?;
        if extent == Extent::Due && !is_due(&candidates) {
            return Ok(Attempt::Nothing(None));
        }
        let removed = self.removed.load(Ordering::Relaxed);
        let attempt = self.consolidate_these(candidates, extent, progress, cancel)?;
        if attempt != Attempt::Busy {
            // What was removed until then has been looked for.
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
        let reach = match Reachability::of(&self.objects, &roots, &[], cancel) {
            Ok(reach) => reach,
            // Removed and swept while it was walked; the next try does not see it.
            Err(error) if !matches!(error, HistoryError::Cancelled) && self.have_gone(&roots)? => {
                return Ok(Attempt::Busy);
            }
            Err(error) => return Err(error),
        };
        let mendable = self.objects.mendable(|oid| reach.needs(oid));
        let (packs, wasted) = choose(candidates, &reach, &mendable, extent)?;
        if packs.is_empty() {
            return Ok(Attempt::Nothing(Some(wasted)));
        }
        let names: HashSet<String> = packs.iter().map(|one| one.reader.index.name.clone()).collect();
        let bytes_before = packs.iter().map(|one| one.bytes + one.reader.index.size()).sum();
        let old = Old { names, walked: roots.iter().copied().collect(), reach: &reach };
        let readers = packs.into_iter().map(|one| one.reader).collect();
        let plan = Repack::plan(&reach, readers, Manner::Patience, |pack, oid| {
            self.objects.contains_outside(oid, &old.names) || self.objects.is_replaced(pack, oid)
        })?;
        let report = Consolidated { packs: old.names.len() as u64, bytes_before, wasted, ..Consolidated::default() };
        let draft = self.pending().join(DRAFT);
        if plan.objects() == 0 {
            fs::create_dir(&draft).map_err(HistoryError::io("create", &draft))?;
            let swapped = self.swap(None, &old, cancel)?;
            self.remove_draft()?;
            return Ok(if swapped { Attempt::Done(report) } else { Attempt::Busy });
        }
        self.check_space(bytes_before)?;
        let done = self.write_and_swap(plan, &old, report, progress, cancel);
        self.objects.rest();
        if done.is_ok() || !self.swap_has_begun() {
            self.remove_draft()?;
        }
        done
    }

    fn write_and_swap(
        &self,
        plan: Repack<'_>,
        old: &Old<'_>,
        mut report: Consolidated,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Attempt> {
        let draft = self.pending().join(DRAFT);
        fs::create_dir(&draft).map_err(HistoryError::io("create", &draft))?;
        let (finished, counts) = plan.write(&draft, progress, cancel)?;
        sync_dir(&self.pending()).map_err(HistoryError::io("flush", &draft))?;
        failpoint::check("history.consolidation.written").map_err(HistoryError::io("write", &draft))?;
        let index = draft.join(format!("{}.idx", finished.name));
        report.objects = finished.objects;
        report.deltas = counts.deltas;
        report.bytes_after = finished.bytes + fs::metadata(index).map_or(0, |meta| meta.len());
        let swapped = self.swap(Some(&finished.name), old, cancel)?;
        Ok(if swapped { Attempt::Done(report) } else { Attempt::Busy })
    }

    /// Clears away what an earlier consolidation has left; `false` when that has to wait for a snapshot.
    fn clear_draft(&self) -> Result<bool> {
        if !self.pending().join(DRAFT).exists() {
            return Ok(true);
        }
        if self.swap_has_begun() && !self.sweep_packs(&mut crate::SweepReport::default(), true)? {
            return Ok(false);
        }
        self.remove_draft().map(|()| true)
    }

    /// Says whether the draft of a consolidation has given its pack away, so that old and new may stand side by side.
    pub(crate) fn swap_has_begun(&self) -> bool {
        match fs::read_dir(self.pending().join(DRAFT)) {
            Ok(entries) => !entries.flatten().any(|one| one.file_name().to_string_lossy().ends_with(".pack")),
            Err(_) => false,
        }
    }

    pub(crate) fn remove_draft(&self) -> Result<()> {
        let draft = self.pending().join(DRAFT);
        match fs::remove_dir_all(&draft) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(HistoryError::io("remove", &draft)(error))
            }
            _ => Ok(()),
        }
    }

    /// Refuses to fill the disk: the new pack is never larger than those that it replaces.
    fn check_space(&self, bytes: u64) -> Result<()> {
        let disk = nix::sys::statvfs::statvfs(&self.repository)
            .map_err(HistoryError::io("look at the disk of", &self.repository))?;
        let free = disk.blocks_available() as u64 * disk.fragment_size() as u64;
        if free < bytes + SPARE {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(HistoryError::io("find space to consolidate packs in", &self.repository)(full));
        }
        Ok(())
    }

    /// Lists what must stay: published checkpoints, and the commits of what is known of the workspace, on the disk and
    /// in memory, on which the next snapshot builds.
    pub(crate) fn roots(&self) -> Result<Vec<Oid>> {
        let mut commits = Vec::new();
        for number in self.refs.list()? {
            // A checkpoint may be removed between being listed and being asked for.
            commits.extend(self.refs.find(number)?);
        }
        let known = self.known().0.map(|picture| picture.commit);
        // A store that was damaged or cleared may have lost them; then they are not trusted either.
        commits.extend(self.refs.base()?.into_iter().chain(known).filter(|commit| self.objects.has(commit)));
        Ok(commits)
    }

    /// Says whether any of these need not stay any more.
    fn have_gone(&self, roots: &[Oid]) -> Result<bool> {
        let now: HashSet<Oid> = self.roots()?.into_iter().collect();
        Ok(roots.iter().any(|commit| !now.contains(commit)))
    }

    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut found = Vec::new();
        for index in self.objects.indexes() {
            let name = index.name.clone();
            let one = self.objects.reader(&index).and_then(|reader| {
                let bytes = reader.length()?;
                Ok(Candidate { bytes, fresh: reader.is_fresh(), reader })
            });
            match one {
                Ok(one) => found.push(one),
                // A sweep has removed it since.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(HistoryError::io("open pack", Path::new(&name))(error)),
            }
        }
        Ok(found)
    }

    /// Puts the new pack in the place of the old ones; `false` when that is not allowed now. Waits for its turn between
    /// snapshots, within bounds.
    fn swap(&self, new: Option<&str>, old: &Old<'_>, cancel: &AtomicBool) -> Result<bool> {
        let start = Instant::now();
        // What was published meanwhile is walked before anybody has to wait for it.
        let ahead = match old.ahead(self.roots()?, &self.objects, cancel) {
            Ok(ahead) => ahead,
            Err(HistoryError::Cancelled) => return Err(HistoryError::Cancelled),
            // One of them was removed and swept, or is damaged: under the lock it shows which.
            Err(_) => Ahead::default(),
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
                tracing::debug!("snapshots are under way; packs are consolidated another time");
                return Ok(false);
            }
            std::thread::sleep(TURN);
        };
        let swapped = self.swap_now(new, old, &ahead, cancel);
        // Also where it failed half-way: whoever comes next must not rely on what is gone.
        self.objects.refresh()?;
        if matches!(swapped, Ok(true)) {
            failpoint::hit("history.consolidation.swapped");
        }
        swapped
    }

    /// The same, for whoever holds the writer's lock.
    fn swap_now(&self, new: Option<&str>, old: &Old<'_>, ahead: &Ahead, cancel: &AtomicBool) -> Result<bool> {
        self.objects.refresh()?;
        if !self.allows(old, ahead, cancel)? {
            tracing::debug!("a new checkpoint needs what was to go; packs are consolidated another time");
            return Ok(false);
        }
        let (from, to) = (self.pending().join(DRAFT), self.objects.pack_dir());
        if let Some(new) = new {
            self.install(&from, new, || failpoint::check("history.consolidation.moved"))?;
        }
        failpoint::check("history.consolidation.before_removal").map_err(HistoryError::io("remove packs of", &to))?;
        for name in old.names.iter().filter(|name| Some(name.as_str()) != new) {
            // Without its index a pack does not count. The pack itself goes with the draft: to free a large file takes
            // longer than anybody should wait for this lock.
            remove(&to.join(format!("{name}.idx")))?;
            failpoint::check("history.consolidation.removed").map_err(HistoryError::io("remove packs of", &to))?;
            let pack = to.join(format!("{name}.pack"));
            match fs::rename(&pack, from.join(format!("{name}.gone"))) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(HistoryError::io("put aside", &pack)(error));
                }
                _ => {}
            }
            failpoint::check("history.consolidation.removed").map_err(HistoryError::io("remove packs of", &to))?;
        }
        sync_dir(&to).map_err(HistoryError::io("flush", &to))?;
        Ok(true)
    }

    /// Says whether everything that is needed by now either was walked or lies in a pack that stays. The caller holds the
    /// writer's lock and knows that no snapshot is under way.
    pub(crate) fn allows(&self, old: &Old<'_>, ahead: &Ahead, cancel: &AtomicBool) -> Result<bool> {
        let mut roots = self.roots()?;
        roots.retain(|commit| !old.walked.contains(commit) && !ahead.walked.contains(commit));
        let since = Reachability::of(&self.objects, &roots, &[old.reach, &ahead.reach], cancel)?;
        let goes = |oid: &Oid| self.objects.has(oid) && !self.objects.contains_outside(oid, &old.names);
        Ok(!ahead.reach.nodes().iter().chain(since.nodes()).any(|node| goes(&node.oid)))
    }
}

/// The packs that are to go, and what was known to be needed when they were chosen.
pub(crate) struct Old<'a> {
    /// Their names.
    pub names: HashSet<String>,
    /// The commits that were known.
    pub walked: HashSet<Oid>,
    /// What these need.
    pub reach: &'a Reachability,
}

/// What became known to be needed after packs were chosen.
#[derive(Default)]
pub(crate) struct Ahead {
    walked: HashSet<Oid>,
    reach: Reachability,
}

impl Old<'_> {
    fn ahead(&self, mut roots: Vec<Oid>, objects: &ObjectStore, cancel: &AtomicBool) -> Result<Ahead> {
        roots.retain(|commit| !self.walked.contains(commit));
        let reach = Reachability::of(objects, &roots, &[self.reach], cancel)?;
        Ok(Ahead { walked: roots.into_iter().collect(), reach })
    }
}

fn is_due(candidates: &[Candidate]) -> bool {
    candidates.iter().filter(|one| one.fresh).count() >= MANY
}

/// Chooses the packs that become one, and says how many bytes nobody needs in the others.
fn choose(
    candidates: Vec<Candidate>,
    reach: &Reachability,
    mendable: &HashSet<String>,
    extent: Extent,
) -> Result<(Vec<Candidate>, u64)> {
    let mut chosen = Vec::new();
    let mut others = Vec::new();
    let all = candidates.len();
    for one in candidates {
        let joins = match extent {
            Extent::Room | Extent::Waste => false,
            Extent::Due | Extent::Fresh | Extent::Everything => one.fresh,
        };
        let tolerable = if extent == Extent::Room { 0 } else { one.bytes / WASTE };
        let wasted = waste(&one, reach)?;
        if joins || wasted > tolerable || mendable.contains(&one.reader.index.name) {
            chosen.push(one);
        } else {
            others.push((one, wasted));
        }
    }
    match extent {
        Extent::Everything if all == 1 => {}
        Extent::Everything => chosen.extend(others.drain(..).map(|(one, _)| one)),
        Extent::Room => {}
        Extent::Waste | Extent::Due | Extent::Fresh if chosen.is_empty() => {}
        Extent::Waste | Extent::Due | Extent::Fresh => {
            let mut bytes: u64 = chosen.iter().map(|one| one.bytes).sum();
            others.sort_by_key(|(one, _)| one.bytes);
            let mut joining = 0;
            for (one, _) in &others {
                if one.bytes > bytes.saturating_mul(GROWTH) {
                    break;
                }
                bytes += one.bytes;
                joining += 1;
            }
            chosen.extend(others.drain(..joining).map(|(one, _)| one));
        }
    }
    // What is good already comes first: of an object that several packs hold, its entry is taken.
    chosen.sort_by_key(|one| one.fresh);
    Ok((chosen, others.iter().map(|(_, wasted)| wasted).sum()))
}

/// Returns how many bytes of a pack nobody needs.
fn waste(one: &Candidate, reach: &Reachability) -> Result<u64> {
    let name = Path::new(&one.reader.index.name);
    let layout = one.reader.index.layout().map_err(HistoryError::io("read the index of", name))?;
    let ends = layout.iter().skip(1).map(|(at, _)| *at).chain([one.bytes]);
    let unneeded = layout
        .iter()
        .zip(ends)
        .filter(|((_, n), _)| !one.reader.index.oid(*n as usize).is_some_and(|oid| reach.needs(&oid)));
    Ok(unneeded.map(|((at, _), end)| end.saturating_sub(*at)).sum())
}
