//! The database: one SQLite file, one writer thread, read-only connections for queries.
//!
//! The only user of rusqlite. It stores what it is told and decides nothing; which facts are
//! true is `fermata_core`'s business.
//!
//! ```text
//!   write(job) ──► writer thread: BEGIN, job, job, … COMMIT (one sync for all that waited)
//!                      │ after the commit
//!                      ├──► each job's own answer
//!                      └──► wake: "events up to n are there"
//!   read(query) ─► one of a few read-only connections, on a blocking thread
//! ```

pub mod backup;
pub mod checkpoints;
pub mod commit;
pub mod context;
pub mod events;
pub mod idempotency;
mod migrations;
pub mod operations;
pub mod pinned;
pub mod rows;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

pub use rusqlite::Connection;
use rusqlite::OpenFlags;
use thiserror::Error;
use tokio::sync::{Semaphore, watch};

pub use writer::Durability;
use writer::Writer;

/// How many queries run at the same time.
const READERS: usize = 4;

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
pub(crate) trait Doing<T> {
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

/// Carries out statements that are prepared once and kept.
pub(crate) trait Cached {
    /// Carries one out; returns how many rows it has changed.
    fn execute_cached(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize, rusqlite::Error>;

    /// Carries one out and reads its first row.
    fn query_row_cached<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnOnce(&rusqlite::Row<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<T, rusqlite::Error>;
}

impl Cached for Connection {
    fn query_row_cached<T>(
        &self,
        sql: &str,
        params: impl rusqlite::Params,
        read: impl FnOnce(&rusqlite::Row<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<T, rusqlite::Error> {
        self.prepare_cached(sql)?.query_row(params, read)
    }

    fn execute_cached(&self, sql: &str, params: impl rusqlite::Params) -> Result<usize, rusqlite::Error> {
        self.prepare_cached(sql)?.execute(params)
    }
}

/// The open database.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    /// Distinguishes this database's cursors from those of another one.
    id: String,
    writer: Writer,
    readers: Mutex<Vec<Connection>>,
    permits: Semaphore,
    wake: watch::Receiver<i64>,
    spare: Arc<pinned::Spare>,
}

impl Store {
    /// Opens the database, creates it when there is none, and migrates it.
    ///
    /// # Errors
    /// When the file cannot be opened, was written by a newer program, or cannot be migrated.
    pub fn open(path: &Path, new_id: &str) -> Result<Self, StoreError> {
        let mut connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        migrations::migrate(&mut connection, path)?;
        let what = "read the database's id";
        connection.execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('id', ?1)", [new_id]).doing(what)?;
        let id = connection.query_row("SELECT value FROM meta WHERE key = 'id'", [], |row| row.get(0)).doing(what)?;
        let last: i64 = connection
            .query_row("SELECT coalesce(max(seq), 0) FROM events", [], |row| row.get(0))
            .doing("find the last event")?;
        let (wake_sender, wake) = watch::channel(last);
        let writer = Writer::start(connection, wake_sender);
        let inner = Inner {
            path: path.to_owned(),
            spare: Arc::default(),
            id,
            writer,
            readers: Mutex::new(Vec::new()),
            permits: Semaphore::new(READERS),
            wake,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the id of this database.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Returns the connection that is kept for copies of a project's rows.
    pub fn spare(&self) -> Arc<pinned::Spare> {
        Arc::clone(&self.inner.spare)
    }

    /// Returns the database's file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Returns what is woken whenever events were committed; its value is the last one's number.
    pub fn wake(&self) -> watch::Receiver<i64> {
        self.inner.wake.clone()
    }

    /// Runs a job in the writer's next transaction and waits until it is committed.
    ///
    /// # Errors
    /// The job's own error (its changes are then undone, those of other jobs are not), or that of
    /// the commit.
    pub async fn write<T: Send + 'static>(
        &self,
        durability: Durability,
        job: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.inner.writer.write(durability, job).await
    }

    /// Runs a query on a read-only connection.
    ///
    /// # Errors
    /// The query's own error, or that of opening a connection.
    pub async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let _permit = self.inner.permits.acquire().await.map_err(|_| StoreError::Closed)?;
        let inner = Arc::clone(&self.inner);
        let run = move || {
            let kept = inner.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match kept {
                Some(connection) => connection,
                None => connect(&inner.path, OpenFlags::SQLITE_OPEN_READ_ONLY)?,
            };
            let result = query(&connection);
            inner.readers.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            result
        };
        tokio::task::spawn_blocking(run).await.map_err(|_| StoreError::Closed)?
    }

    /// Commits what waits and ends the writer thread.
    pub async fn close(&self) {
        self.inner.writer.close().await;
    }
}

/// Opens a connection with the settings that every connection has.
fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, StoreError> {
    let open = |source| StoreError::Open { path: path.to_owned(), source };
    let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(open)?;
    connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(open)?;
    connection.pragma_update(None, "foreign_keys", true).map_err(open)?;
    connection.set_prepared_statement_cache_capacity(64);
    if flags.contains(OpenFlags::SQLITE_OPEN_READ_WRITE) {
        // A thousand agents' reports go through this one all the time; the default of 2 MB thrashes.
        // Readers keep to it: there are several, and the kernel has the file's pages anyway.
        connection.pragma_update(None, "cache_size", -4096).map_err(open)?;
        connection.pragma_update(None, "journal_mode", "wal").map_err(open)?;
        connection.pragma_update(None, "synchronous", "full").map_err(open)?;
    }
    Ok(connection)
}
