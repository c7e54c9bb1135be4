//! Finds the changes of a workspace: the watcher, the workspace state, the walk, and reading of contents.

pub(crate) mod content;
mod dir_walk;
pub(crate) mod pool;
pub(crate) mod scan_result;
pub(crate) mod seal;
pub(crate) mod state_file;
pub(crate) mod unchanged;
pub(crate) mod walk;
pub(crate) mod warm_up;
pub(crate) mod watcher;
pub(crate) mod workspace_listing;
pub(crate) mod workspace_scan;
pub(crate) mod workspace_state;
