//! The steps of a pause before its checkpoint: they are cheap to undo, and the agents go on as before.

pub mod flash_save;
pub mod freeze;
pub mod quiesce;
pub mod validate;
