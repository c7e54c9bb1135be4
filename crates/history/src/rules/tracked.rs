//! The files that the user's index and those of its submodules track, which a checkpoint covers even if they
//! are ignored.

use std::path::Path;

use crate::rules::user_repository::{Indexed, Location};
use crate::tree::confined_dir::FileStat;
use crate::tree::fingerprint::{FileFingerprint, RuleSource};
use crate::tree::names::RelPath;

/// The largest number of submodules whose index is read.
const MOST_MODULES: usize = 4096;

/// The tracked files below the workspace, sorted.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    paths: Vec<RelPath>,
    /// The indexes that were read, the workspace's own first, with their fingerprints before reading.
    pub indexes: Vec<RuleSource>,
}

/// Says whether the indexes of an earlier scan are unchanged, and the first one still belongs to the workspace.
pub(crate) fn indexes_unchanged(indexes: &[RuleSource], location: Option<&Location>) -> bool {
    let own = indexes.first().map(|(path, _)| path);
    own == location.map(Location::index).as_ref()
        && indexes.iter().all(|(path, fingerprint)| fingerprint_of(path) == *fingerprint)
}

/// Returns the fingerprint of an index. If it is a symbolic link, git writes to its target.
fn fingerprint_of(path: &Path) -> Option<FileFingerprint> {
    nix::sys::stat::stat(path).ok().map(|stat| FileFingerprint::from(&FileStat::from(stat)))
}

impl Tracked {
    /// Reads the user's index and those of its submodules for a scan that began at `started_ns`. An index that
    /// cannot be read tracks nothing and adds a note.
    pub fn of(location: Option<&Location>, workspace: &Path, started_ns: i128, notes: &mut Vec<String>) -> Tracked {
        const WARNING: &str = "the index cannot be read, files both tracked and ignored are not covered";
        notes.retain(|note| !note.starts_with(WARNING));
        let (mut paths, mut indexes) = (Vec::new(), Vec::new());
        let mut open: Vec<(RelPath, Location)> =
            location.map(|own| (RelPath::root(), own.clone())).into_iter().collect();
        while let Some((at, location)) = open.pop() {
            // The fingerprint is taken first, so that the next scan notices a concurrent write. A recent one
            // proves nothing.
            let index = location.index();
            let fingerprint = fingerprint_of(&index).map(|fingerprint| match fingerprint.is_settled(started_ns) {
                true => fingerprint,
                false => FileFingerprint::UNSURE,
            });
            indexes.push((index, fingerprint));
            let Indexed { files, modules } = match location.tracked() {
                Ok(indexed) => indexed,
                Err(error) if at.is_root() => {
                    notes.push(format!("{WARNING}: {error}"));
                    continue;
                }
                Err(error) => {
                    notes.push(format!("{WARNING}: {error} (submodule {at})"));
                    continue;
                }
            };
            paths.extend(files.iter().map(|path| at.join(path.bytes())));
            for module in modules.iter().map(|path| at.join(path.bytes())) {
                let top = workspace.join(module.as_path());
                match Location::at(&top, &top) {
                    _ if indexes.len() + open.len() >= MOST_MODULES => break,
                    Some(found) => open.push((module, found)),
                    // The submodule may be checked out later.
                    None => indexes.push((top.join(".git"), fingerprint_of(&top.join(".git")))),
                }
            }
        }
        Tracked { indexes, ..Tracked::new(paths) }
    }

    /// Sorts the paths of an index.
    fn new(mut paths: Vec<RelPath>) -> Tracked {
        paths.sort_unstable();
        paths.dedup();
        Tracked { paths, indexes: Vec::new() }
    }

    pub fn has(&self, path: &RelPath) -> bool {
        self.paths.binary_search(path).is_ok()
    }

    pub fn paths(&self) -> &[RelPath] {
        &self.paths
    }

    /// Says whether a file below a directory is tracked.
    pub fn has_below(&self, dir: &RelPath) -> bool {
        let first = dir.join(b"");
        let at = self.paths.partition_point(|path| *path < first);
        self.paths.get(at).is_some_and(|path| path.is_within(dir))
    }
}
