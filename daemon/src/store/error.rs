//! Why the store could not read or write.

use std::path::PathBuf;

use thiserror::Error;

/// Why the store could not do what it was told.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The database's file could not be opened.
    #[error("open the database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// The moment before which it had to be done has passed; nothing was written.
    #[error("write it in time")]
    TooLate,
    /// A newer program has written the database.
    #[error(
        "open the database {}: it has schema {found}, and this program knows only up to {known}; \
         use the newer program again, or another state directory",
        path.display()
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// The schema found.
        found: u32,
        /// The newest schema that this program knows.
        known: u32,
    },
    /// A migration failed; the database is as it was.
    #[error("migrate the database {} to schema {version}", path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
        /// The schema that could not be reached.
        version: u32,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// The copy that is taken before a migration could not be written.
    #[error("back up the database to {} before a migration", path.display())]
    BackUp {
        /// The copy.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: rusqlite::Error,
    },
    /// A statement failed.
    #[error("{what}")]
    Sql {
        /// What was to be done.
        what: &'static str,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// A stored value could not be read or written as JSON.
    #[error("{what}: a stored value has an unknown form")]
    Json {
        /// What was to be done.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A file beside the database could not be written or read.
    #[error("{what} {}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The transaction of this and other jobs could not be committed.
    #[error("commit to the database: {0}")]
    Commit(String),
    /// The store is closed.
    #[error("the database is closed")]
    Closed,
}

/// Names what was to be done when a statement fails.
pub(super) trait Doing<T> {
    /// Adds what was to be done.
    fn doing(self, what: &'static str) -> Result<T, StoreError>;
}

impl<T> Doing<T> for Result<T, rusqlite::Error> {
    fn doing(self, what: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Sql { what, source })
    }
}

impl<T> Doing<T> for Result<T, serde_json::Error> {
    fn doing(self, what: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Json { what, source })
    }
}
