//! The bare repository: objects, packs, deltas, refs, and what makes them smaller or removes them.

pub(crate) mod consolidate;
pub(crate) mod damaged_objects;
pub(crate) mod deflate;
pub(crate) mod delta;
pub(crate) mod objects;
pub(crate) mod oid;
pub(crate) mod pack;
pub(crate) mod pack_entry;
pub(crate) mod pack_index;
pub(crate) mod pack_reader;
pub(crate) mod publish;
pub(crate) mod reachability;
pub(crate) mod refs;
pub(crate) mod repack;
pub(crate) mod sweep;
