//! Decides whether packs may be removed, for consolidation and sweep.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::History;
use crate::errors::{HistoryError, Result};
use crate::store::objects::ObjectStore;
use crate::store::oid::Oid;
use crate::store::reachability::Reachability;

/// The directory below `pending/` in which the new pack is written. After a crash it may belong to an
/// unfinished swap.
pub(crate) const CONSOLIDATION_DIR: &str = "consolidation";

/// The packs to be removed, and the objects that were needed when they were chosen.
pub(crate) struct ChosenPacks<'a> {
    /// The names of the packs.
    pub names: HashSet<String>,
    /// The commits that were walked.
    pub walked: HashSet<Oid>,
    /// The objects that these commits need.
    pub needed: &'a Reachability,
}

/// The objects that became needed after the packs were chosen.
#[derive(Default)]
pub(crate) struct LaterNeeds {
    walked: HashSet<Oid>,
    needed: Reachability,
}

impl ChosenPacks<'_> {
    /// Finds the objects that became needed meanwhile.
    pub fn later(&self, mut roots: Vec<Oid>, objects: &ObjectStore, cancel: &AtomicBool) -> Result<LaterNeeds> {
        roots.retain(|commit| !self.walked.contains(commit));
        let needed = Reachability::of(objects, &roots, &[self.needed], cancel)?;
        Ok(LaterNeeds { walked: roots.into_iter().collect(), needed })
    }
}

impl History {
    /// Says whether the new pack was already moved, so that old and new packs may coexist.
    pub(crate) fn swap_has_begun(&self) -> bool {
        match fs::read_dir(self.pending().join(CONSOLIDATION_DIR)) {
            Ok(entries) => {
                !entries.flatten().any(|candidate| candidate.file_name().to_string_lossy().ends_with(".pack"))
            }
            Err(_) => false,
        }
    }

    pub(crate) fn remove_consolidation_dir(&self) -> Result<()> {
        let dir = self.pending().join(CONSOLIDATION_DIR);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HistoryError::io("remove", &dir)(error)),
            _ => Ok(()),
        }
    }

    /// Lists the commits whose objects must stay: those of published checkpoints, and those of the workspace
    /// state on the disk and in memory.
    pub(crate) fn roots(&self) -> Result<Vec<Oid>> {
        let mut commits = Vec::new();
        for number in self.refs.list()? {
            // A checkpoint may be removed after it was listed.
            commits.extend(self.refs.find(number)?);
        }
        let last_state = self.last_state().0.map(|last| last.commit);
        // A damaged or cleared store may have lost these commits; the workspace state is then not trusted.
        commits.extend(self.refs.base()?.into_iter().chain(last_state).filter(|commit| self.objects.has(commit)));
        Ok(commits)
    }

    /// Says whether every object that is needed now was either walked or is in a pack that stays. The caller
    /// holds the writer lock, and no snapshot is in progress.
    pub(crate) fn allows(&self, chosen: &ChosenPacks<'_>, later: &LaterNeeds, cancel: &AtomicBool) -> Result<bool> {
        let mut roots = self.roots()?;
        roots.retain(|commit| !chosen.walked.contains(commit) && !later.walked.contains(commit));
        let newest = Reachability::of(&self.objects, &roots, &[chosen.needed, &later.needed], cancel)?;
        let would_go = |oid: &Oid| self.objects.has(oid) && !self.objects.contains_outside(oid, &chosen.names);
        Ok(!later.needed.nodes().iter().chain(newest.nodes()).any(|node| would_go(&node.oid)))
    }
}

/// Removes a file, which may not exist, and returns its size.
pub(crate) fn remove_if_exists(path: &Path) -> Result<u64> {
    let size = fs::metadata(path).map_or(0, |meta| meta.len());
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HistoryError::io("remove", path)(error)),
        _ => Ok(size),
    }
}
