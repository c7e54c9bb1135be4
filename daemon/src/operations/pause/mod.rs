//! The steps of a pause before its checkpoint. Their undo is cheap: the agents run on as before.

pub mod flash_save;
pub mod freeze;
pub mod quiesce;
pub mod validate;
