//! Checkpoints that leave as one file or arrive as one, and the validation of what arrives.

pub(crate) mod bundle;
pub(crate) mod import_validation;
