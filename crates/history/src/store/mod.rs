//! The bare repository: objects, packs, deltas and refs, and the jobs that shrink or remove them.

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
pub(crate) mod pack_removal;
pub(crate) mod pending;
pub(crate) mod publish;
pub(crate) mod reachability;
pub(crate) mod refs;
pub(crate) mod repack;
pub(crate) mod sweep;
