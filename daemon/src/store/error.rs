//! The errors of the store.

use std::path::PathBuf;

use thiserror::Error;

/// Why the store could not read or write.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("open the database {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    /// The time of `Commit::only_before` has passed; nothing was written.
    #[error("commit before the lease of the freeze expired")]
    TooLate,
    /// A newer program has written the database.
    #[error(
        "open the database {}: it has schema {found}, and this program supports only up to {known}; \
         use the newer program again, or another state directory",
        path.display()
    )]
    TooNew {
        path: PathBuf,
        /// The schema of the database.
        found: u32,
        /// The newest schema that this program supports.
        known: u32,
    },
    /// A migration failed; the database is unchanged.
    #[error("migrate the database {} to schema {version}", path.display())]
    Migrate {
        path: PathBuf,
        version: u32,
        #[source]
        source: rusqlite::Error,
    },
    #[error("back up the database to {} before a migration", path.display())]
    BackUp {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error("{what}")]
    Sql {
        what: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    /// A stored value could not be read or written as JSON.
    #[error("{what}: a stored value has an unknown form")]
    Json {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    /// A file other than the database could not be written or read.
    #[error("{what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The transaction, which this job shares with others, could not be committed.
    #[error("commit to the database: {0}")]
    Commit(String),
    #[error("the database is closed")]
    Closed,
}

/// Adds to an error what was to be done, as a text that completes "failed to …".
pub(super) trait Doing<T> {
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
