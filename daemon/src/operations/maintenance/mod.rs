//! Maintenance of a project's files outside its operations: removes leftovers, consolidates packs, measures disk usage.

pub mod consolidation;
pub(in crate::operations) mod consolidation_queue;
pub mod leftovers;
pub mod removal;
pub mod storage;
