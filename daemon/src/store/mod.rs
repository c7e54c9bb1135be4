//! The database: one SQLite file, one writer thread, read-only connections for queries.
//!
//! The only user of rusqlite. It makes no decisions: `fermata_core` does.
//!
//! ```text
//!   write(job) ──► writer thread: BEGIN, job, job, … COMMIT (one sync for all queued jobs)
//!                      │ after the commit
//!                      ├──► the result of each job
//!                      └──► wake: the number of the last event
//!   read(query) ─► one of a few read-only connections, on a blocking thread
//! ```

pub mod backup;
pub mod checkpoints;
pub mod commit;
mod connection;
pub mod context;
mod error;
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
use tokio::sync::{Semaphore, watch};

use connection::connect;
use error::Doing;
pub use error::StoreError;
pub use writer::Durability;
use writer::StoreWriter;

/// The most concurrent queries.
const READERS: usize = 4;

/// The open database.
#[derive(Clone)]
pub struct Store {
    inner: Arc<StoreInner>,
}

struct StoreInner {
    path: PathBuf,
    /// Part of every event cursor: a cursor of another database is refused.
    id: String,
    writer: StoreWriter,
    readers: Mutex<Vec<Connection>>,
    permits: Semaphore,
    wake: watch::Receiver<i64>,
    spare: Arc<pinned::SpareCopy>,
}

impl Store {
    /// Opens the database, creates it if it does not exist, and migrates it. A new database gets the id `new_id`.
    ///
    /// # Errors
    /// The file cannot be opened, has a newer schema, or cannot be migrated.
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
        let writer = StoreWriter::start(connection, wake_sender);
        let inner = StoreInner {
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

    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Returns the connection that is reused for copies of a project's rows.
    pub fn spare(&self) -> Arc<pinned::SpareCopy> {
        Arc::clone(&self.inner.spare)
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Returns a receiver of the number of the last committed event.
    pub fn wake(&self) -> watch::Receiver<i64> {
        self.inner.wake.clone()
    }

    /// Runs a job in the writer's next transaction and waits until it is committed.
    ///
    /// # Errors
    /// The job's own error, which undoes its changes and not those of other jobs, or the error of the commit.
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
    /// The query's own error, or the connection cannot be opened.
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

    /// Commits the queued jobs and ends the writer thread.
    pub async fn close(&self) {
        self.inner.writer.close().await;
    }
}
