//! The format of a checkpoint's directory and the names of its files.

/// The version of the format; a reader refuses a newer one.
pub const FORMAT: u32 = 1;

pub const DATABASE: &str = "database.sqlite";
pub const CONTEXT: &str = "context.json";
pub const MANIFEST: &str = "manifest.json";
