//! The files that the user's index and those of its submodules track, which a checkpoint covers even if they
//! are ignored.

use std::path::Path;

use crate::rules::user_repository::{Indexed, Location};
use crate::scan::workspace_state::{Dir, FileFingerprint, Node, Source, WorkspaceState};
use crate::tree::confined_dir::Stat;
use crate::tree::names::RelPath;

/// The largest number of submodules whose index is read.
const MOST_MODULES: usize = 4096;

/// The tracked files below the workspace, sorted.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    paths: Vec<RelPath>,
    /// The indexes that were read, the workspace's own first, with their fingerprints before reading.
    pub indexes: Vec<Source>,
}

/// Says whether the indexes are those that a workspace state was built from.
pub(crate) fn indexes_hold(before: &WorkspaceState, location: Option<&Location>) -> bool {
    let own = before.indexes.first().map(|(path, _)| path);
    own == location.map(Location::index).as_ref() && before.indexes.iter().all(|(path, seen)| state_of(path) == *seen)
}

/// Returns the fingerprint of an index. If it is a symbolic link, git writes to its target.
fn state_of(path: &Path) -> Option<FileFingerprint> {
    nix::sys::stat::stat(path).ok().map(|stat| FileFingerprint::from(&Stat::from(stat)))
}

impl Tracked {
    /// Reads the user's index and those of its submodules for a scan that began at `started_ns`. An index that
    /// cannot be read tracks nothing and adds a note.
    pub fn of(location: Option<&Location>, workspace: &Path, started_ns: i128, notes: &mut Vec<String>) -> Tracked {
        const COMPLAINT: &str = "the index cannot be read, files both tracked and ignored are not covered";
        notes.retain(|note| !note.starts_with(COMPLAINT));
        let (mut paths, mut indexes) = (Vec::new(), Vec::new());
        let mut open: Vec<(RelPath, Location)> =
            location.map(|own| (RelPath::root(), own.clone())).into_iter().collect();
        while let Some((at, location)) = open.pop() {
            // The fingerprint is taken first, so that the next scan notices a concurrent write. A recent one
            // proves nothing.
            let (index, seen) = (location.index(), state_of(&location.index()));
            indexes.push((
                index,
                seen.map(|seen| if seen.is_settled(started_ns) { seen } else { FileFingerprint::UNSURE }),
            ));
            let Indexed { files, modules } = match location.tracked() {
                Ok(indexed) => indexed,
                Err(error) if at.is_root() => {
                    notes.push(format!("{COMPLAINT}: {error}"));
                    continue;
                }
                Err(error) => {
                    notes.push(format!("{COMPLAINT}: {error} (submodule {at})"));
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
                    None => indexes.push((top.join(".git"), state_of(&top.join(".git")))),
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

    /// Says whether a file below a directory is tracked.
    pub fn has_below(&self, dir: &RelPath) -> bool {
        let first = dir.join(b"");
        let at = self.paths.partition_point(|path| *path < first);
        self.paths.get(at).is_some_and(|path| path.is_within(dir))
    }

    /// Lists the tracked paths that the rules ignore: paths that are not in the tree, or only because they are
    /// tracked.
    pub fn left_out_of(&self, root: &Dir) -> impl Iterator<Item = &RelPath> {
        self.paths.iter().filter(move |path| match root.find(path) {
            Some(Node::File(file)) => file.remarks.forced,
            Some(Node::Special { .. } | Node::Dir(_)) => false,
            // Once the file can be stored, it may be covered only because it is tracked.
            Some(Node::Skipped { .. } | Node::Draft) | None => true,
        })
    }
}
