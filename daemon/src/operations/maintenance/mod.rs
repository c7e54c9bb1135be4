//! Keeps the files of a project in order beside its operations: removes leftovers, consolidates packs, measures.

pub mod consolidation;
pub(in crate::operations) mod consolidation_queue;
pub mod leftovers;
pub mod removal;
pub mod storage;
