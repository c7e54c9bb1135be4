//! Keeps the files of a project in order beside its operations: removes leftovers, consolidates packs, measures.

pub mod leftovers;
pub mod storage;
pub mod upkeep;
