//! Checks that a checkpoint is whole: each object is there, inflates, and has the hash that names it.

use std::collections::HashSet;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::errors::{HistoryError, Result};
use super::listing::{CheckpointRoot, Listing, root_tree_of};
use super::objects::ObjectStore;
use super::oid::{ObjectHasher, ObjectKind, Oid};
use super::tree::decode_tree;
use super::{History, OnProgress, Phase, Progress};

/// An object that is missing or damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadObject {
    /// The object.
    pub oid: Oid,
    /// Where it belongs in the checkpoint, escaped.
    pub path: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The outcome of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// How many objects were checked.
    pub objects: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// Those that are missing or damaged.
    pub bad: Vec<BadObject>,
}

impl History {
    /// Reads every object of a checkpoint.
    ///
    /// # Errors
    /// Fails when there is no such checkpoint or when cancelled; damage is reported, not an error.
    pub fn verify(&self, number: u64, progress: OnProgress<'_>, cancel: &AtomicBool) -> Result<VerifyReport> {
        let commit = self.refs.get(number)?;
        let mut report = VerifyReport::default();
        let mut seen = HashSet::new();
        let mut open = vec![(commit, ObjectKind::Commit, String::new())];
        while let Some((oid, kind, path)) = open.pop() {
            if !seen.insert(oid) {
                continue;
            }
            if cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            report.objects += 1;
            if report.objects.is_multiple_of(256) {
                progress(Progress { phase: Phase::Verify, done: report.objects, total: 0 });
            }
            match self.check_and_open(&oid, kind, &path, &mut open) {
                Ok(bytes) => report.bytes += bytes,
                Err(error) => report.bad.push(BadObject { oid, path, problem: error.to_string() }),
            }
        }
        // Whole objects can still fail to describe each other.
        if report.bad.is_empty() {
            let described = CheckpointRoot::read(&self.objects, &commit)
                .and_then(|root| root.manifest(&self.objects))
                .and_then(|_| Listing::of_checkpoint(&self.objects, &commit));
            if let Err(error) = described {
                report.bad.push(BadObject { oid: commit, path: String::new(), problem: error.to_string() });
            }
        }
        Ok(report)
    }

    fn check_and_open(
        &self,
        oid: &Oid,
        kind: ObjectKind,
        path: &str,
        open: &mut Vec<(Oid, ObjectKind, String)>,
    ) -> Result<u64> {
        let bytes = check_object(&self.objects, oid, kind)?;
        match kind {
            ObjectKind::Commit => open.push((root_tree_of(&self.objects, oid)?, ObjectKind::Tree, String::new())),
            ObjectKind::Tree => {
                for entry in decode_tree(oid, &self.objects.read(oid, ObjectKind::Tree)?)? {
                    let kind = if entry.is_tree() { ObjectKind::Tree } else { ObjectKind::Blob };
                    let slash = if path.is_empty() { "" } else { "/" };
                    let below = format!("{path}{slash}{}", super::names::escape(&entry.name));
                    open.push((entry.oid, kind, below));
                }
            }
            ObjectKind::Blob => {}
        }
        Ok(bytes)
    }
}

/// Streams an object, compares kind, size and hash, and returns its size.
pub(super) fn check_object(store: &ObjectStore, oid: &Oid, kind: ObjectKind) -> Result<u64> {
    let damaged = |problem: String| HistoryError::DamagedObject { oid: *oid, problem };
    let mut object = store.open_object(oid)?;
    if object.kind != kind {
        return Err(damaged(format!("a {} was expected, it is a {}", kind.word(), object.kind.word())));
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
        return Err(damaged("its content has another hash".to_owned()));
    }
    Ok(size)
}
