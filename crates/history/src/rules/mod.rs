//! Determines which paths a checkpoint covers: ignore files, the index of the user's repository, and the
//! decision for each name.

pub(crate) mod bounded_read;
pub(crate) mod checkpoint_rules;
pub(crate) mod coverage;
pub(crate) mod decision;
pub(crate) mod ignore_file;
pub(crate) mod rule_cache;
pub(crate) mod tracked;
pub(crate) mod user_index;
pub(crate) mod user_repository;
pub(crate) mod wildcard;
