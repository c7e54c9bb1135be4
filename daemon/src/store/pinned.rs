//! Copies a project's rows into a database of their own: the database part of a checkpoint.
//!
//! ```text
//!   open ────► the copy with its tables; before the freeze
//!   pin ─────► begins a read transaction: the copy shows the database at this instant
//!   copy ────► the rows go to the copy, the context also to the writer of the context file
//!   refresh ─► later, in a second transaction: copies the small tables again if the context has not changed
//!   finish ──► the file, not synced
//! ```
//! The transaction only reads the live database, so it delays no writer. A small copy is made in memory and written in
//! one piece; its tables are reused for the next one.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fermata_protocol::context::ContextItem;
use fermata_protocol::{AgentName, ProjectName};
use rusqlite::{Connection, OpenFlags};

use super::connection::{Cached as _, connect};
use super::error::{Doing, StoreError};
use super::rows::word;
use super::{context, migrations};

/// The small tables of a copy, `(table, column of the project's name)`. Events, usage, operations, checkpoints and
/// environments are not part of a checkpoint, since a restore must not rewind them.
pub(super) const SMALL: &[(&str, &str)] = &[
    ("projects", "name"),
    ("agents", "project"),
    ("agent_states", "project"),
    ("tasks", "project"),
    ("questions", "project"),
];

/// The tables of the context, `(table, key)`.
const CONTEXT: &[(&str, &str)] = &[("context_items", "project"), ("context_bodies", "id")];

/// The events that change neither context items nor their texts. After any other event of the project the context counts
/// as changed.
const HARMLESS: &str = "'operation.stepped', 'pause.started', 'agent.progressed', 'agent.used', 'agent.adopted', \
     'agent.session_found', 'agent.suspended', 'agent.continued', 'task.changed', \
     'question.asked', 'question.answered'";

/// The most context items, and the most tokens in them, of a small copy.
const FEW: (i64, i64) = (100, 200_000);

/// The most agents, and the most tasks, of a small copy: a thousand agents are megabytes, which are in memory three times
/// while they are written.
const FEW_ROWS: i64 = 50;

/// The page sizes of copies, in bytes. Each table needs at least one page, in every checkpoint.
const SMALL_PAGE: u32 = 1024;
const LARGE_PAGE: u32 = 16384;

/// The largest copy that stays in memory for the next one, in bytes.
const LARGEST_KEPT: usize = 256 << 10;

/// The most free pages of a copy in memory that is reused: they become part of the next file.
const MOST_LEFT_OVER: i64 = 16;

const BACKUP: &str = "back up the project's rows";

/// The states that agents have saved, as JSON text.
pub type States = Vec<(AgentName, String)>;

/// The connection that the next copy reuses: opening one takes longer than a small copy.
#[derive(Default)]
pub struct SpareCopy(Mutex<Option<SpareConnection>>);

struct SpareConnection {
    connection: Connection,
    /// Whether a copy in memory with its tables is attached.
    has_copy: bool,
}

impl SpareCopy {
    fn take(&self) -> Option<SpareConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, kept: SpareConnection) {
        // Frees the cached pages of a large context.
        if kept.connection.execute_batch("PRAGMA shrink_memory").is_ok() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        }
    }
}

/// A connection to the database, with the empty copy attached.
pub struct PreparedCopy {
    connection: Connection,
    spare: Arc<SpareCopy>,
    project: ProjectName,
    to: PathBuf,
    in_memory: bool,
}

/// A prepared copy with a read transaction on one instant of the database.
pub struct Pinned {
    prepared: PreparedCopy,
    /// Whether the context is too small for a second thread to make it faster.
    pub few: bool,
}

/// The context, as it is read while it is copied, in this order.
pub enum CopiedRows<'a> {
    States(&'a States),
    /// An unarchived item with its complete text; sorted by agent and age, oldest first.
    Item(ContextItem),
    /// The end.
    All,
}

/// A complete copy.
pub struct DatabaseCopy {
    prepared: PreparedCopy,
    as_of: AsOf,
    /// The number of context items, archived ones included.
    pub item_count: u64,
}

/// Shows whether the context of a project has changed: every change has an event in its transaction, except for the
/// counts of accesses, whose sum only grows.
struct AsOf {
    seq: i64,
    accesses: i64,
}

/// Creates an empty copy.
///
/// # Errors
/// The database cannot be read, or the file cannot be created.
pub fn open(
    spare: &Arc<SpareCopy>,
    database: &Path,
    project: &ProjectName,
    to: &Path,
) -> Result<PreparedCopy, StoreError> {
    let SpareConnection { connection, has_copy } = match spare.take() {
        Some(kept) => kept,
        None => {
            // With the flag to create files, which applies to attached files too.
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
            SpareConnection { connection: connect(database, flags)?, has_copy: false }
        }
    };
    let (few_items, few_rows) = are_few(&connection, project)?;
    let in_memory = few_items && few_rows;
    if !(in_memory && has_copy && empty_for_reuse(&connection)?) {
        if has_copy {
            connection.execute_batch("DETACH backup").doing(BACKUP)?;
        }
        let path = if in_memory { ":memory:".into() } else { to.to_string_lossy() };
        attach(&connection, &path, if few_items { SMALL_PAGE } else { LARGE_PAGE })?;
    }
    Ok(PreparedCopy { connection, spare: Arc::clone(spare), project: project.clone(), to: to.to_owned(), in_memory })
}

/// Attaches a new copy and creates its tables.
fn attach(connection: &Connection, path: &str, page_size: u32) -> Result<(), StoreError> {
    connection.execute("ATTACH ?1 AS backup", [path]).doing(BACKUP)?;
    // Not synced: the file is synced once, before the checkpoint's row is committed. Deleted rows are overwritten, so that
    // no page of a reused copy has data of another project.
    let settings = format!(
        "PRAGMA backup.page_size = {page_size}; PRAGMA backup.journal_mode = off; PRAGMA backup.synchronous = off; \
         PRAGMA backup.secure_delete = on; PRAGMA backup.cache_size = -8192; PRAGMA main.cache_size = -16384; BEGIN"
    );
    connection.execute_batch(&settings).doing(BACKUP)?;
    for (table, _) in SMALL.iter().chain(CONTEXT) {
        copy_schema(connection, table)?;
    }
    let version = format!("PRAGMA backup.user_version = {}; COMMIT", migrations::NEWEST);
    connection.execute_batch(&version).doing(BACKUP)
}

/// Empties a copy that is to be reused; `false` if it has too many free pages.
fn empty_for_reuse(connection: &Connection) -> Result<bool, StoreError> {
    connection.execute_batch("BEGIN").doing(BACKUP)?;
    for (table, _) in SMALL.iter().chain(CONTEXT) {
        connection.execute_cached(&format!("DELETE FROM backup.{table}"), []).doing(BACKUP)?;
    }
    // The last item id of the other project.
    connection.execute_cached("DELETE FROM backup.sqlite_sequence", []).doing(BACKUP)?;
    connection.execute_batch("COMMIT").doing(BACKUP)?;
    let left: i64 = connection.query_row_cached("PRAGMA backup.freelist_count", [], |row| row.get(0)).doing(BACKUP)?;
    Ok(left <= MOST_LEFT_OVER)
}

/// Returns whether a project has few context items, and whether it has few other rows.
fn are_few(connection: &Connection, project: &ProjectName) -> Result<(bool, bool), StoreError> {
    let sql = "SELECT count(*) <= ?2 AND total(tokens) <= ?3, \
               (SELECT count(*) FROM main.agents WHERE project = ?1) <= ?4 \
               AND (SELECT count(*) FROM main.tasks WHERE project = ?1) <= ?4 \
               FROM (SELECT tokens FROM main.context_items WHERE project = ?1 LIMIT ?2 + 1)";
    let params = rusqlite::params![project.as_str(), FEW.0, FEW.1, FEW_ROWS];
    connection.query_row_cached(sql, params, |row| Ok((row.get(0)?, row.get(1)?))).doing(BACKUP)
}

/// Begins a read transaction. Its instant is that of the first read, not that of the BEGIN.
fn pin(connection: &Connection) -> Result<(), StoreError> {
    connection.execute_cached("BEGIN", []).doing(BACKUP)?;
    connection.query_row_cached("SELECT count(*) FROM main.meta", [], |_| Ok(())).doing(BACKUP)
}

impl PreparedCopy {
    /// Pins the instant of the database that is to be copied.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn pin(self) -> Result<Pinned, StoreError> {
        pin(&self.connection)?;
        let (few, _) = are_few(&self.connection, &self.project)?;
        Ok(Pinned { prepared: self, few })
    }
}

impl Pinned {
    /// Copies all rows. Before that, passes the context to `each`.
    ///
    /// # Errors
    /// A row cannot be read, or the file cannot be written.
    pub fn copy(self, mut each: impl FnMut(CopiedRows)) -> Result<DatabaseCopy, StoreError> {
        let prepared = self.prepared;
        let PreparedCopy { connection, project, .. } = &prepared;
        let states = read_states(connection, project)?;
        each(CopiedRows::States(&states));
        // Before the copy, so that the writer of the context file works beside it.
        context::each_unarchived(connection, project, |item| each(CopiedRows::Item(item)))?;
        each(CopiedRows::All);
        copy_small(connection, project)?;
        for sql in [
            "INSERT INTO backup.context_items SELECT * FROM main.context_items WHERE project = ?1",
            "INSERT INTO backup.context_bodies SELECT b.* FROM backup.context_items i \
             CROSS JOIN main.context_bodies b USING (id) WHERE i.project = ?1",
        ] {
            connection.execute_cached(sql, [project.as_str()]).doing(BACKUP)?;
        }
        let as_of = as_of(connection, project)?;
        let item_count = connection
            .query_row_cached("SELECT count(*) FROM backup.context_items", [], |row| row.get::<_, i64>(0))
            .doing(BACKUP)?
            .unsigned_abs();
        connection.execute_cached("COMMIT", []).doing(BACKUP)?;
        Ok(DatabaseCopy { prepared, as_of, item_count })
    }
}

impl DatabaseCopy {
    /// Updates the copy to the present state; `false` if the context has changed since, and a new copy is needed.
    ///
    /// # Errors
    /// A row cannot be read, or the file cannot be written.
    pub fn refresh(&mut self) -> Result<bool, StoreError> {
        let PreparedCopy { connection, project, .. } = &self.prepared;
        pin(connection)?;
        let sql = format!(
            "SELECT EXISTS (SELECT 1 FROM main.events WHERE seq > ?1 AND project = ?2 AND kind NOT IN ({HARMLESS}))"
        );
        let has_event: bool = connection
            .query_row_cached(&sql, rusqlite::params![self.as_of.seq, project.as_str()], |row| row.get(0))
            .doing(BACKUP)?;
        let now = as_of(connection, project)?;
        if has_event || now.accesses != self.as_of.accesses {
            connection.execute_batch("COMMIT").doing(BACKUP)?;
            return Ok(false);
        }
        for (table, _) in SMALL {
            connection.execute(&format!("DELETE FROM backup.{table}"), []).doing(BACKUP)?;
        }
        copy_small(connection, project)?;
        connection.execute_batch("COMMIT").doing(BACKUP)?;
        self.as_of = now;
        Ok(true)
    }

    /// Syncs what was written so far, so that the sync at the end takes less time.
    ///
    /// # Errors
    /// The file cannot be synced.
    pub fn sync(&self) -> Result<(), StoreError> {
        let PreparedCopy { to, in_memory, .. } = &self.prepared;
        if *in_memory {
            return Ok(());
        }
        let synced = File::open(to).and_then(|file| file.sync_all());
        synced.map_err(|source| StoreError::File { what: "sync", path: to.clone(), source })
    }

    /// Completes the file without syncing it; returns it, and its content if that is in memory.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<(File, Option<Vec<u8>>), StoreError> {
        let PreparedCopy { mut connection, spare, to, in_memory, .. } = self.prepared;
        let failed = |what: &'static str| {
            let path = to.clone();
            move |source| StoreError::File { what, path, source }
        };
        let finished = if in_memory {
            let content = connection.serialize("backup").doing(BACKUP)?.to_vec();
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&to);
            let written = file.and_then(|mut file| file.write_all(&content).map(|()| file));
            (written.map_err(failed("write"))?, Some(content))
        } else {
            connection.execute_batch("DETACH backup").doing(BACKUP)?;
            (File::open(&to).map_err(failed("open"))?, None)
        };
        let has_copy = finished.1.as_ref().is_some_and(|content| content.len() <= LARGEST_KEPT);
        if in_memory && !has_copy {
            connection.execute_batch("DETACH backup").doing(BACKUP)?;
        }
        spare.keep(SpareConnection { connection, has_copy });
        Ok(finished)
    }
}

fn as_of(connection: &Connection, project: &ProjectName) -> Result<AsOf, StoreError> {
    let seq = connection.query_row_cached("SELECT coalesce(max(seq), 0) FROM main.events", [], |row| row.get(0));
    // `+` prevents the use of an index: a scan of the narrow rows is faster, since most of them match.
    let accesses = "SELECT coalesce(sum(access_count), 0) FROM main.context_items WHERE +project = ?1";
    let accesses = connection.query_row_cached(accesses, [project.as_str()], |row| row.get(0));
    Ok(AsOf { seq: seq.doing(BACKUP)?, accesses: accesses.doing(BACKUP)? })
}

fn copy_small(connection: &Connection, project: &ProjectName) -> Result<(), StoreError> {
    for (table, column) in SMALL {
        let sql = format!("INSERT INTO backup.{table} SELECT * FROM main.{table} WHERE {column} = ?1");
        connection.execute_cached(&sql, [project.as_str()]).doing(BACKUP)?;
    }
    Ok(())
}

fn copy_schema(connection: &Connection, table: &str) -> Result<(), StoreError> {
    let sql: String = connection
        .query_row("SELECT sql FROM main.sqlite_schema WHERE type = 'table' AND name = ?1", [table], |row| row.get(0))
        .doing(BACKUP)?;
    // The stored text begins with `CREATE TABLE <name>`; the name gets the prefix of the attached database.
    let sql = sql.replacen(&format!("CREATE TABLE {table}"), &format!("CREATE TABLE backup.{table}"), 1);
    connection.execute_batch(&sql).doing(BACKUP)
}

fn read_states(connection: &Connection, project: &ProjectName) -> Result<States, StoreError> {
    let sql = "SELECT agent, state FROM main.agent_states WHERE project = ?1 ORDER BY agent";
    let mut statement = connection.prepare_cached(sql).doing(BACKUP)?;
    let rows = statement
        .query_map([project.as_str()], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
        .doing(BACKUP)?;
    rows.map(|row| {
        let (agent, state) = row.doing(BACKUP)?;
        Ok((word(&agent)?, state))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::backup::{check, put_rows, read_rows};
    use crate::store::context::NewRow;
    use fermata_protocol::UnixMillis;
    use fermata_protocol::context::{ItemType, Tier};

    struct Bed {
        dir: tempfile::TempDir,
        live: Connection,
        spare: Arc<SpareCopy>,
    }

    fn project(name: &str) -> ProjectName {
        ProjectName::new(name).expect("valid")
    }

    fn agent() -> AgentName {
        AgentName::new("a").expect("valid")
    }

    impl Bed {
        /// Two projects, `web` and `other`, with two context items each.
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let path = dir.path().join("live.sqlite");
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
            let mut live = connect(&path, flags).expect("opened");
            migrations::migrate(&mut live, &path).expect("migrated");
            let bed = Self { dir, live, spare: Arc::default() };
            for name in ["web", "other"] {
                let sql = "INSERT INTO projects VALUES (?1, '', NULL, NULL, NULL, '/w', 'active', 'review', '{}', '{}', \
                           NULL, '{}', 0, 0, 0)";
                bed.live.execute(sql, [name]).expect("inserted");
                bed.live.execute("INSERT INTO agent_states VALUES (?1, 'a', '{\"step\":1}', 5)", [name]).expect("put");
                bed.put(name, &["one", "two"]);
            }
            bed
        }

        fn put(&self, name: &str, texts: &[&str]) {
            let row = |text: &&str| NewRow {
                kind: ItemType::Code,
                text: (*text).to_owned(),
                tokens: 1,
                score: 0.5,
                tier: Tier::Warm,
                pinned: false,
            };
            let rows: Vec<NewRow> = texts.iter().map(row).collect();
            context::insert(&self.live, &project(name), &agent(), &rows, UnixMillis(1)).expect("inserted");
        }

        fn append_event(&self, name: &str, kind: &str) {
            let sql = "INSERT INTO events (at, project, kind, event) VALUES (1, ?1, ?2, '{}')";
            self.live.execute(sql, [name, kind]).expect("appended");
        }

        fn file(&self) -> PathBuf {
            self.dir.path().join("backup.sqlite")
        }

        fn begin(&self) -> Pinned {
            let live = self.dir.path().join("live.sqlite");
            let prepared = open(&self.spare, &live, &project("web"), &self.file()).expect("opened");
            prepared.pin().expect("pinned")
        }

        fn texts(&self, name: &str) -> Vec<String> {
            let mut texts = Vec::new();
            context::each_unarchived(&self.live, &project(name), |item| texts.push(item.text)).expect("read");
            texts
        }
    }

    fn copy(pinned: Pinned) -> (DatabaseCopy, Vec<String>) {
        let mut rows = Vec::new();
        let copied = pinned.copy(|row| match row {
            CopiedRows::States(states) => rows.extend(states.iter().map(|(agent, state)| format!("{agent} {state}"))),
            CopiedRows::Item(item) => rows.push(item.text),
            CopiedRows::All => rows.push("all".to_owned()),
        });
        (copied.expect("copied"), rows)
    }

    #[test]
    fn a_write_after_the_pin_does_not_wait_and_is_not_in_the_copy() {
        let bed = Bed::new();
        let pinned = bed.begin();
        bed.put("web", &["three"]);
        bed.live.execute("UPDATE agent_states SET state = '{\"step\":2}'", []).expect("written beside it");
        let (copied, rows) = copy(pinned);
        assert_eq!(rows, ["a {\"step\":1}", "one", "two", "all"]);
        assert_eq!(copied.item_count, 2);
        copied.finish().expect("written");
        assert_eq!(check(&bed.file(), &project("web")).expect("opened"), None);
        assert!(check(&bed.file(), &project("other")).expect("opened").is_some(), "the copy has one project only");
    }

    #[test]
    fn a_copy_is_the_same_whether_a_connection_is_reused_or_not() {
        let bed = Bed::new();
        let in_file = |sql: &str| -> i64 {
            let backup = Connection::open(bed.file()).expect("opened");
            backup.query_row(sql, [], |row| row.get(0)).expect("read")
        };
        let (mut pages, mut lengths) = (Vec::new(), Vec::new());
        for round in 0..6 {
            if round == 2 {
                let many: Vec<String> = (0..FEW.0).map(|n| format!("item {n}")).collect();
                bed.put("web", &many.iter().map(String::as_str).collect::<Vec<_>>());
            }
            if round == 4 {
                bed.live.execute("DELETE FROM context_items WHERE project = 'web' AND id > 4", []).expect("removed");
            }
            // A copy that is dropped closes its connection, and leaves a file if it is large.
            drop(bed.begin());
            let left = std::fs::remove_file(bed.file());
            assert_eq!(left.is_ok(), (2..4).contains(&round));
            let (copied, rows) = copy(bed.begin());
            assert_eq!(rows.len() as u64, copied.item_count + 2);
            let content = copied.finish().expect("complete").1;
            let bytes = std::fs::read(bed.file()).expect("read");
            assert!(content.is_none_or(|content| content == bytes));
            lengths.push(bytes.len());
            assert_eq!(bed.spare.take().map(|spare| bed.spare.keep(spare)), Some(()), "the connection is kept");
            assert_eq!(check(&bed.file(), &project("web")).expect("opened"), None);
            assert_eq!(in_file("SELECT count(*) FROM context_bodies") as usize, rows.len() - 2);
            pages.push(in_file("PRAGMA page_size") as u32);
            std::fs::remove_file(bed.file()).expect("removed");
        }
        assert_eq!(pages, [SMALL_PAGE, SMALL_PAGE, LARGE_PAGE, LARGE_PAGE, SMALL_PAGE, SMALL_PAGE]);
        assert_eq!((lengths[0], lengths[4]), (lengths[1], lengths[5]), "the file does not grow: {lengths:?}");
    }

    #[test]
    fn a_reused_copy_has_no_data_of_another_project() {
        let bed = Bed::new();
        let copy_of = |name: &str| {
            let live = bed.dir.path().join("live.sqlite");
            let prepared = open(&bed.spare, &live, &project(name), &bed.file()).expect("opened");
            copy(prepared.pin().expect("pinned")).0.finish().expect("complete").1.expect("a small one")
        };
        let has = |copy: &[u8], text: &str| copy.windows(text.len()).any(|part| part == text.as_bytes());
        let small = copy_of("web").len();
        // More than one page, so that free pages are left.
        let secret = format!("the password is {}", "swordfish ".repeat(1000));
        bed.put("other", &[&secret]);
        assert!(has(&copy_of("other"), "swordfish"));
        for _ in 0..2 {
            let next = copy_of("web");
            assert!(!has(&next, "swordfish") && has(&next, "two"));
            assert!(next.len() <= small + MOST_LEFT_OVER as usize * SMALL_PAGE as usize);
        }
        bed.put("other", &[&secret.repeat(9)]);
        copy_of("other");
        assert!(copy_of("web").len() <= small + MOST_LEFT_OVER as usize * SMALL_PAGE as usize);
    }

    #[test]
    fn a_copy_is_refreshed_if_the_context_has_not_changed() {
        let bed = Bed::new();
        let (mut copied, _) = copy(bed.begin());
        bed.append_event("web", "operation.stepped");
        bed.append_event("other", "context.added");
        bed.put("other", &["three"]);
        bed.live.execute("UPDATE projects SET phase = 'complete'", []).expect("changed");
        bed.live.execute("INSERT INTO tasks VALUES ('web', 1, NULL, 't', 'pending', NULL, 1, 1)", []).expect("put");
        assert!(copied.refresh().expect("refreshed"));
        assert!(copied.refresh().expect("again"));
        copied.finish().expect("written");
        let backed_up = crate::store::backup::open(&bed.file(), &project("web")).expect("opened");
        assert_eq!((backed_up.phase.as_str(), backed_up.tasks.len()), ("complete", 1));
    }

    #[test]
    fn a_copy_whose_context_has_changed_is_not_refreshed() {
        for kind in ["context.added", "context.pinned", "context.recalled", "agent.state_saved", "a.kind_to_come"] {
            let bed = Bed::new();
            let (mut copied, _) = copy(bed.begin());
            bed.append_event("web", kind);
            assert!(!copied.refresh().expect("compared"), "{kind}");
        }
        // An access has no event.
        let bed = Bed::new();
        let (mut copied, _) = copy(bed.begin());
        context::count_access(&bed.live, &project("web"), 1).expect("counted");
        assert!(!copied.refresh().expect("compared"));
    }

    #[test]
    fn rows_that_are_put_back_are_those_of_the_copy_and_other_projects_keep_theirs() {
        let bed = Bed::new();
        let (copied, _) = copy(bed.begin());
        copied.finish().expect("written");
        bed.put("web", &["three"]);
        bed.put("other", &["three"]);
        bed.live.execute("UPDATE agent_states SET state = '{\"step\":2}'", []).expect("changed");
        let rows = read_rows(&bed.file(), &project("web")).expect("read");
        put_rows(&bed.live, &project("web"), &rows).expect("put back");
        assert_eq!(bed.texts("web"), ["one", "two"]);
        assert_eq!(bed.texts("other"), ["one", "two", "three"]);
        let sql = "SELECT group_concat(state) FROM (SELECT state FROM agent_states ORDER BY project DESC)";
        let states: String = bed.live.query_row(sql, [], |row| row.get(0)).expect("read");
        assert_eq!(states, "{\"step\":1},{\"step\":2}");
        let hits = |text: &str| context::search(&bed.live, &project("web"), None, text, 9).expect("searched").len();
        assert_eq!((hits("two"), hits("three")), (1, 0), "the index is restored too");
    }
}
