//! What the user's index tracks, and those of its submodules: files that a checkpoint covers although the rules ignore
//! them.

use std::path::Path;

use crate::rules::user_repository::{Indexed, Location};
use crate::scan::workspace_state::{Dir, FileFingerprint, Node, Source, WorkspaceState};
use crate::tree::confined_dir::Stat;
use crate::tree::names::RelPath;

/// More submodules are not asked for what they track.
const MOST_MODULES: usize = 4096;

/// The tracked files below the workspace, sorted.
#[derive(Debug, Default)]
pub(crate) struct Tracked {
    paths: Vec<RelPath>,
    /// The indexes that say so, the workspace's own first, as they were before they were read.
    pub indexes: Vec<Source>,
}

/// Says whether the indexes that a picture goes by are what they were.
pub(crate) fn indexes_hold(before: &WorkspaceState, location: Option<&Location>) -> bool {
    let own = before.indexes.first().map(|(path, _)| path);
    own == location.map(Location::index).as_ref() && before.indexes.iter().all(|(path, seen)| state_of(path) == *seen)
}

/// Returns the state of an index. Where it is a link, git writes what that leads to.
fn state_of(path: &Path) -> Option<FileFingerprint> {
    nix::sys::stat::stat(path).ok().map(|stat| FileFingerprint::from(&Stat::from(stat)))
}

impl Tracked {
    /// Reads the user's index, and those of the submodules in it, for a look that began at `started_ns`; one that cannot be
    /// read tracks nothing, and a note says so.
    pub fn of(location: Option<&Location>, workspace: &Path, started_ns: i128, notes: &mut Vec<String>) -> Tracked {
        const COMPLAINT: &str = "the index cannot be read, files both tracked and ignored are not covered";
        notes.retain(|note| !note.starts_with(COMPLAINT));
        let (mut paths, mut indexes) = (Vec::new(), Vec::new());
        let mut open: Vec<(RelPath, Location)> =
            location.map(|own| (RelPath::root(), own.clone())).into_iter().collect();
        while let Some((at, location)) = open.pop() {
            // The state first: whoever writes meanwhile is noticed by the next look. A young one vouches for nothing.
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
                    // It may be checked out later.
                    None => indexes.push((top.join(".git"), state_of(&top.join(".git")))),
                }
            }
        }
        Tracked { indexes, ..Tracked::new(paths) }
    }

    /// Takes the paths of an index, in any order.
    fn new(mut paths: Vec<RelPath>) -> Tracked {
        paths.sort_unstable();
        paths.dedup();
        Tracked { paths, indexes: Vec::new() }
    }

    /// Says whether a file is tracked.
    pub fn has(&self, path: &RelPath) -> bool {
        self.paths.binary_search(path).is_ok()
    }

    /// Says whether anything below a directory is tracked.
    pub fn has_below(&self, dir: &RelPath) -> bool {
        let first = dir.join(b"");
        let at = self.paths.partition_point(|path| *path < first);
        self.paths.get(at).is_some_and(|path| path.is_within(dir))
    }

    /// Lists what the rules would leave out of this tree: what is not in it, and what is in it only for being tracked.
    pub fn left_out_of(&self, root: &Dir) -> impl Iterator<Item = &RelPath> {
        self.paths.iter().filter(move |path| match root.find(path) {
            Some(Node::File(file)) => file.remarks.forced,
            Some(Node::Special { .. } | Node::Dir(_)) => false,
            // Once it can be stored, that it is tracked may be all that speaks for it.
            Some(Node::Skipped { .. } | Node::Draft) | None => true,
        })
    }
}
