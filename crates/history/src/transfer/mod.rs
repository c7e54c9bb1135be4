//! Exports a checkpoint to one file and imports such a file after its validation.

pub(crate) mod bundle;
pub(crate) mod import_validation;
