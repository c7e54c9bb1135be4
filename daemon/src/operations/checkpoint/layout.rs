//! The format of a checkpoint's directory and the names of its files.

/// The version of a checkpoint's files.
pub const FORMAT: u32 = 1;

/// The database backup's file name.
pub const DATABASE: &str = "database.sqlite";
/// The context snapshot's file name.
pub const CONTEXT: &str = "context.json";
/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
