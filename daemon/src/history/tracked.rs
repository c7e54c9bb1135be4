//! What the user's index tracks: files that a checkpoint covers although the rules ignore them.

use super::names::RelPath;
use super::picture::{Dir, Node};
use super::user_repository::Location;

/// The tracked files below the workspace, sorted.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    paths: Vec<RelPath>,
}

impl Tracked {
    /// Reads the user's index; one that cannot be read tracks nothing, and a note says so.
    pub fn of(location: Option<&Location>, notes: &mut Vec<String>) -> Tracked {
        const COMPLAINT: &str = "the index cannot be read, files both tracked and ignored are not covered";
        notes.retain(|note| !note.starts_with(COMPLAINT));
        match location.map_or_else(|| Ok(Vec::new()), Location::tracked) {
            Ok(paths) => Tracked::new(paths),
            Err(error) => {
                notes.push(format!("{COMPLAINT}: {error}"));
                Tracked::default()
            }
        }
    }

    /// Takes the paths of an index, in any order.
    fn new(mut paths: Vec<RelPath>) -> Tracked {
        paths.sort_unstable();
        paths.dedup();
        Tracked { paths }
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
