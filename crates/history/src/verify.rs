//! Verifies checkpoints: every object exists, decompresses and has the hash that names it, and the packs and
//! indexes that hold the objects match their checksums.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::History;
use crate::errors::{BadObject, HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::store::pack_index::PackIndex;
use crate::store::pack_reader::PackReader;
use crate::tree::listing::{CheckpointRoot, Directory, Listing, root_tree_of};
use crate::tree::names::RelPath;
use crate::tree::trees::decode_tree;

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The number of objects that were checked.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The missing and damaged objects.
    pub bad: Vec<BadObject>,
}

/// Objects that the verification of several checkpoints has already checked, so that shared ones are read once.
#[derive(Default)]
pub(crate) struct CheckedObjects {
    /// Trees below which every object is sound.
    trees: HashSet<Oid>,
    /// Objects that are sound by themselves.
    objects: HashSet<Oid>,
    /// Pairs of trees of files and metadata that match, including everything below them.
    described: HashSet<Directory>,
    /// The packs that were checked, with the problem of each damaged one.
    packs: HashMap<String, Option<String>>,
    unreadable: Vec<Oid>,
}

impl History {
    /// Reads every object of a checkpoint and compares the packs that hold them with their checksums. Damaged
    /// objects are marked: the next snapshot stores them again if the workspace still has their content.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint or when cancelled. Damage is reported, not an error.
    pub fn verify(&self, number: u64, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<VerifyReport> {
        let mut checked = CheckedObjects::default();
        let report = self.verify_one(number, &mut checked, progress, cancel);
        self.mark_damaged(&checked.unreadable);
        report
    }

    /// Verifies several checkpoints and reads shared objects once. A report counts only objects that no earlier
    /// report has counted. Each checkpoint has its own result, as of [`History::verify`]; `begins` receives the
    /// number of finished checkpoints before each one.
    pub fn verify_all(
        &self,
        numbers: &[u64],
        begins: &dyn Fn(usize),
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> BTreeMap<u64, Result<VerifyReport>> {
        let mut checked = CheckedObjects::default();
        let mut one = |(done, number): (usize, &u64)| {
            begins(done);
            (*number, self.verify_one(*number, &mut checked, progress, cancel))
        };
        let reports = numbers.iter().enumerate().map(&mut one).collect();
        self.mark_damaged(&checked.unreadable);
        reports
    }

    fn verify_one(
        &self,
        number: u64,
        checked: &mut CheckedObjects,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<VerifyReport> {
        let commit = self.refs.get(number)?;
        let mut report = VerifyReport::default();
        let mut visited = HashSet::new();
        let mut trees = Vec::new();
        let mut packs = HashSet::new();
        let mut unreadable = Vec::new();
        let mut open = vec![(commit, ObjectKind::Commit, String::new())];
        while let Some((oid, kind, path)) = open.pop() {
            if checked.trees.contains(&oid) || !visited.insert(oid) {
                continue;
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            packs.extend(self.objects.pack_of(&oid));
            match self.check_and_open(&oid, kind, &path, checked, &mut open) {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    report.bytes += bytes;
                    report.objects += 1;
                    if report.objects.is_multiple_of(256) {
                        progress(StoreProgress { phase: StorePhase::Verify, done: report.objects, total: 0 });
                    }
                }
                Err(error) => {
                    report.objects += 1;
                    unreadable.push(oid);
                    report.bad.push(BadObject { oid, path, problem: error.to_string() });
                }
            }
            trees.extend((kind == ObjectKind::Tree).then_some(oid));
        }
        // The objects of a checkpoint that was removed meanwhile are absent for a good reason.
        if self.refs.find(number)? == Some(commit) {
            checked.unreadable.append(&mut unreadable);
        }
        // A damaged object has already been reported; its pack needs no second report.
        let packs = if report.bad.is_empty() { packs } else { HashSet::new() };
        for pack in packs {
            let problem = checked.packs.entry(pack).or_insert_with_key(|pack| self.check_pack(pack, cancel).err());
            if let Some(problem) = problem {
                report.bad.push(BadObject { oid: commit, path: String::new(), problem: problem.clone() });
            }
        }
        // Sound objects can still contradict each other.
        if report.bad.is_empty() {
            match check_described(&self.objects, &commit, checked, cancel) {
                Ok(()) => checked.trees.extend(trees),
                Err(HistoryError::Cancelled) => return Err(HistoryError::Cancelled),
                Err(error) => {
                    report.bad.push(BadObject { oid: commit, path: String::new(), problem: error.to_string() })
                }
            }
        }
        Ok(report)
    }

    /// Checks an object unless that was done before, and pushes the objects that it refers to. Returns its size
    /// if it was checked now.
    fn check_and_open(
        &self,
        oid: &Oid,
        kind: ObjectKind,
        path: &str,
        checked: &mut CheckedObjects,
        open: &mut Vec<(Oid, ObjectKind, String)>,
    ) -> Result<Option<u64>> {
        let bytes = match checked.objects.contains(oid) {
            true => None,
            false => Some(check_object(&self.objects, oid, kind)?),
        };
        match kind {
            ObjectKind::Commit => open.push((root_tree_of(&self.objects, oid)?, ObjectKind::Tree, String::new())),
            ObjectKind::Tree => {
                for entry in decode_tree(oid, &self.objects.read(oid, ObjectKind::Tree)?)? {
                    let kind = if entry.is_tree() { ObjectKind::Tree } else { ObjectKind::Blob };
                    let slash = if path.is_empty() { "" } else { "/" };
                    let below = format!("{path}{slash}{}", fermata_protocol::paths::escape(&entry.name));
                    open.push((entry.oid, kind, below));
                }
            }
            ObjectKind::Blob => {}
        }
        checked.objects.insert(*oid);
        Ok(bytes)
    }

    fn is_gone(&self, pack: &str) -> bool {
        self.objects.refresh().is_ok() && !self.objects.has_pack(pack)
    }

    /// Compares a pack and its index, both as they are on the disk now, with their checksums.
    fn check_pack(&self, name: &str, cancel: &AtomicBool) -> Result<(), String> {
        let dir = self.objects.pack_dir();
        let index = PackIndex::load(&dir, name).map(Arc::new);
        let checked = index
            .and_then(|index| PackReader::open(&dir, index))
            .and_then(|pack| pack.check(|| cancel.load(Ordering::Relaxed)));
        match checked {
            Ok(()) => Ok(()),
            // The pack was consolidated meanwhile; its objects were found, here or in the pack that replaces
            // it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.is_gone(name) => Ok(()),
            Err(error) => Err(format!("{name}: {error}")),
        }
    }
}

/// Checks that the manifest and metadata of a commit can be read and that each file has its metadata line.
///
/// # Errors
/// Fails when an object is damaged, or when cancelled.
pub(crate) fn check_described(
    store: &ObjectStore,
    commit: &Oid,
    checked: &mut CheckedObjects,
    cancel: &AtomicBool,
) -> Result<()> {
    let root = CheckpointRoot::read(store, commit)?;
    root.manifest(store)?;
    let mut read = HashSet::new();
    let mut open = vec![(RelPath::root(), root.top())];
    while let Some((path, directory)) = open.pop() {
        // Equal directories are read once, whatever their number of paths.
        if checked.described.contains(&directory) || !read.insert(directory) {
            continue;
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(HistoryError::Cancelled);
        }
        let below = directory.read(store, &path, &mut Listing::default())?;
        open.extend(below.into_iter().map(|(name, directory)| (path.join(&name), directory)));
    }
    checked.described.extend(read);
    Ok(())
}

/// Streams an object, checks kind, size and hash, and returns its size.
pub(crate) fn check_object(store: &ObjectStore, oid: &Oid, kind: ObjectKind) -> Result<u64> {
    let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
    let mut object = store.open_object(oid)?;
    if object.kind != kind {
        return Err(damaged(format!("expected a {}, found a {}", kind.word(), object.kind.word())));
    }
    let size = object.size;
    let mut hasher = ObjectHasher::new(kind, size);
    let mut buffer = [0; 32 * 1024];
    loop {
        let n = object.read(&mut buffer).map_err(|error| damaged(error.to_string()))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    if hasher.finish() != *oid {
        return Err(damaged("its content does not match its id".to_owned()));
    }
    Ok(size)
}
