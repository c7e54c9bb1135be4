//! The writer thread, which runs all queued jobs in one transaction.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot, watch};

use super::connection::Cached as _;
use super::error::{Doing, StoreError};

/// Capacity of the queue; a sender waits while it is full.
const QUEUE: usize = 1024;

/// The most jobs of one transaction.
const BATCH: usize = 256;

/// What the commit of a job must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// A crash of the daemon. Sufficient for the announcement of a step: after a power failure the processes that it
    /// concerns are gone, and every undo works without it.
    Process,
    /// A power failure: synced before the reply.
    Power,
}

/// Runs a job and returns how to reply to its caller after the commit. Without a connection the job is not run: the
/// reply says that the transaction was rolled back.
type Job = Box<dyn FnOnce(Option<&Connection>) -> JobReply + Send>;
type JobReply = Box<dyn FnOnce(Result<(), String>) + Send>;

struct Queued {
    durability: Durability,
    job: Job,
}

pub(super) struct StoreWriter {
    queue: Mutex<Option<mpsc::Sender<Queued>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl StoreWriter {
    pub(super) fn start(connection: Connection, wake: watch::Sender<i64>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let spawned =
            std::thread::Builder::new().name("store-writer".into()).spawn(move || run(&connection, receiver, &wake));
        // Without the thread the queue has no receiver, and every write fails with `Closed`.
        Self { queue: Mutex::new(Some(sender)), thread: Mutex::new(spawned.ok()) }
    }

    pub(super) async fn write<T: Send + 'static>(
        &self,
        durability: Durability,
        job: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let queue = queue.ok_or(StoreError::Closed)?;
        let (reply, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Some(connection) => in_savepoint(connection, job),
                None => Err(StoreError::Commit("the transaction was rolled back by the database".into())),
            };
            Box::new(move |committed| {
                let outcome = match (result, committed) {
                    (Err(error), _) => Err(error),
                    (Ok(_), Err(error)) => Err(StoreError::Commit(error)),
                    (Ok(value), Ok(())) => Ok(value),
                };
                // The caller may have gone; what was committed stays committed.
                drop(reply.send(outcome));
            })
        });
        queue.send(Queued { durability, job }).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    pub(super) async fn close(&self) {
        drop(self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread ends after it has committed the queued jobs.
            drop(tokio::task::spawn_blocking(move || thread.join()).await);
        }
    }
}

/// Runs one job; its error, or a panic, undoes its own changes only.
fn in_savepoint<T>(
    connection: &Connection,
    job: impl FnOnce(&Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    connection.execute_cached("SAVEPOINT job", []).doing("begin a write")?;
    let result = catch_unwind(AssertUnwindSafe(|| job(connection)))
        .unwrap_or_else(|_| Err(StoreError::Commit("the job panicked and was undone".into())));
    if connection.is_autocommit() {
        // SQLite rolls the transaction back by itself when a disk is full or fails.
        return result.and(Err(StoreError::Commit("the transaction was rolled back by the database".into())));
    }
    if result.is_err() {
        connection.execute_batch("ROLLBACK TO job").doing("undo a write")?;
    }
    connection.execute_cached("RELEASE job", []).doing("end a write")?;
    result
}

fn run(connection: &Connection, mut queue: mpsc::Receiver<Queued>, wake: &watch::Sender<i64>) {
    let mut synced = Durability::Power;
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let needed = batch.iter().map(|queued| queued.durability).max().unwrap_or(Durability::Power);
        let (replies, committed) = match begin(connection, needed, &mut synced) {
            Ok(()) => run_batch(connection, batch),
            Err(error) => {
                tracing::error!(error = %error, "failed to begin a transaction");
                (batch.into_iter().map(|queued| (queued.job)(None)).collect(), Err(error.to_string()))
            }
        };
        // Before the replies: a subscription of a caller that has its reply begins after the events of its call.
        if let Ok(Some(last)) = committed {
            wake.send_if_modified(|current| std::mem::replace(current, last) != last);
        }
        let committed = committed.map(drop);
        for reply in replies {
            reply(committed.clone());
        }
    }
}

/// Runs the jobs of a batch and commits; returns the number of the last event. After SQLite has rolled the transaction
/// back by itself the other jobs are not run, since every statement would be a transaction of its own.
fn run_batch(connection: &Connection, batch: Vec<Queued>) -> (Vec<JobReply>, Result<Option<i64>, String>) {
    let mut replies: Vec<JobReply> = Vec::with_capacity(batch.len());
    for queued in batch {
        let in_transaction = !connection.is_autocommit();
        replies.push((queued.job)(in_transaction.then_some(connection)));
    }
    let committed = if connection.is_autocommit() {
        Err("the transaction was rolled back by the database, most likely because the disk is full".to_owned())
    } else {
        let sql = "SELECT coalesce(max(seq), 0) FROM events";
        // Read before the commit, while the pages are cached. If it fails, the next commit wakes the subscriptions.
        let last = connection.query_row_cached(sql, [], |row| row.get(0)).ok();
        commit(connection).map(|()| last)
    };
    (replies, committed)
}

fn begin(connection: &Connection, needed: Durability, synced: &mut Durability) -> Result<(), rusqlite::Error> {
    if needed != *synced {
        // In WAL mode NORMAL writes the log without syncing it; the next FULL commit syncs all of it.
        let mode = if needed == Durability::Power { "full" } else { "normal" };
        connection.pragma_update(None, "synchronous", mode)?;
        *synced = needed;
    }
    connection.execute_cached("BEGIN IMMEDIATE", []).map(drop)
}

fn commit(connection: &Connection) -> Result<(), String> {
    connection.execute_cached("COMMIT", []).map(drop).map_err(|error| {
        // SQLite has rolled back by itself if the disk is full.
        if !connection.is_autocommit()
            && let Err(rollback) = connection.execute_batch("ROLLBACK")
        {
            tracing::error!(error = %rollback, "failed to roll back after a failed commit");
        }
        error.to_string()
    })
}
