//! Trees of a checkpoint, the metadata that git trees cannot hold, and the confined directory from which files
//! are read.

pub(crate) mod confined_dir;
pub(crate) mod fingerprint;
pub(crate) mod listing;
pub(crate) mod manifest;
pub(crate) mod metadata;
pub(crate) mod names;
pub(crate) mod skipped;
pub(crate) mod trees;
pub(crate) mod xattrs;
