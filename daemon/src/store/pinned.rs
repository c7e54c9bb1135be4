//! Copies a project's rows into a database of their own: the database part of a checkpoint.
//!
//! ```text
//!   open ──► the copy, with its tables: nobody need stand still for that
//!   pin ───► one read transaction: what follows sees this instant, whatever is written meanwhile
//!   copy ──► the rows into the copy, the context to whoever writes it out
//!   refresh ► later, in a second transaction: the small tables anew, if the context is still the same
//!   finish ─► the file, which is yet to be synced
//! ```
//! The transaction only reads the live database, so nobody waits for it. A small copy is made in memory and written in one
//! piece; its tables stay for the next one.

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

/// What a checkpoint keeps of the database besides context, `(table, column that names the project)`:
/// few rows. Events, usage, operations, checkpoints and environments are not in it: a restore must
/// not rewind them.
pub(super) const SMALL: &[(&str, &str)] = &[
    ("projects", "name"),
    ("agents", "project"),
    ("agent_states", "project"),
    ("tasks", "project"),
    ("questions", "project"),
];

/// What it keeps of the context.
const CONTEXT: &[(&str, &str)] = &[("context_items", "project"), ("context_bodies", "id")];

/// The events that change neither context items nor their bodies. Whatever else is told of a project,
/// the context is taken to have changed.
const HARMLESS: &str = "'operation.stepped', 'pause.started', 'agent.progressed', 'agent.used', 'agent.adopted', \
     'agent.session_found', 'agent.suspended', 'agent.continued', 'task.changed', \
     'question.asked', 'question.answered'";

/// A project with so many context items, and so many tokens in them, has a small copy.
const FEW: (i64, i64) = (100, 200_000);

/// So many agents at most, and so many tasks: a thousand agents are megabytes, three times over while they are written.
const FEW_ROWS: i64 = 50;

/// The sizes of a copy's pages, bytes. Each table takes one at least, in every checkpoint.
const SMALL_PAGE: u32 = 1024;
const LARGE_PAGE: u32 = 16384;

/// A larger copy than this, in bytes, does not stay in memory.
const LARGEST_KEPT: usize = 256 << 10;

/// A copy in memory that was emptied has at most so many pages left over: they would be in the next one's file.
const MOST_LEFT_OVER: i64 = 16;

const BACKUP: &str = "back up the project's rows";

/// Agents' own blobs, as JSON text.
pub type States = Vec<(AgentName, String)>;

/// What a copy leaves to the next one, since making it takes longer than a small copy does: a connection to the database.
#[derive(Default)]
pub struct SpareCopy(Mutex<Option<SpareConnection>>);

struct SpareConnection {
    connection: Connection,
    /// Whether a copy in memory is attached to it, with its tables.
    has_copy: bool,
}

impl SpareCopy {
    fn take(&self) -> Option<SpareConnection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, kept: SpareConnection) {
        // What it has read of a large context is nobody's need any more.
        if kept.connection.execute_batch("PRAGMA shrink_memory").is_ok() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        }
    }
}

/// A connection to the database, and attached to it what rows are to go to, with its tables.
pub struct PreparedCopy {
    connection: Connection,
    spare: Arc<SpareCopy>,
    project: ProjectName,
    to: PathBuf,
    in_memory: bool,
}

/// The same with a read transaction on one instant of the database.
pub struct Pinned {
    prepared: PreparedCopy,
    /// Whether there are so few context items that nothing is gained by more threads than one.
    pub few: bool,
}

/// What is told of the context while it is copied, in this order.
pub enum CopiedRows<'a> {
    /// The agents' blobs.
    States(&'a States),
    /// An unarchived item, whole; by agent, and then oldest first.
    Item(ContextItem),
    /// That was all.
    All,
}

/// A copy that is complete.
pub struct DatabaseCopy {
    prepared: PreparedCopy,
    as_of: AsOf,
    /// How many context items there are, archived ones included.
    pub item_count: u64,
}

/// What tells whether the context of a project has changed: every change of it is told by an event
/// in the same transaction, but for the count of accesses, which only grows.
struct AsOf {
    seq: i64,
    accesses: i64,
}

/// Makes the tables of a copy; nothing is copied yet.
///
/// # Errors
/// When the database cannot be read, or the file cannot be made.
pub fn open(
    spare: &Arc<SpareCopy>,
    database: &Path,
    project: &ProjectName,
    to: &Path,
) -> Result<PreparedCopy, StoreError> {
    let SpareConnection { connection, has_copy } = match spare.take() {
        Some(kept) => kept,
        None => {
            // One of its own, with the right to create: the attached file inherits its flags.
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
            SpareConnection { connection: connect(database, flags)?, has_copy: false }
        }
    };
    let (few_items, few_rows) = are_few(&connection, project)?;
    let in_memory = few_items && few_rows;
    if !(in_memory && has_copy && has_room(&connection)?) {
        if has_copy {
            connection.execute_batch("DETACH backup").doing(BACKUP)?;
        }
        let place = if in_memory { ":memory:".into() } else { to.to_string_lossy() };
        attach(&connection, &place, if few_items { SMALL_PAGE } else { LARGE_PAGE })?;
    }
    Ok(PreparedCopy { connection, spare: Arc::clone(spare), project: project.clone(), to: to.to_owned(), in_memory })
}

/// Attaches a new copy, with its tables.
fn attach(connection: &Connection, place: &str, page_size: u32) -> Result<(), StoreError> {
    connection.execute("ATTACH ?1 AS backup", [place]).doing(BACKUP)?;
    // The file is worth nothing until the checkpoint's row names it, so it is synced once, at the end. What was in it for
    // another project is in no page of the next one's.
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

/// Empties a copy that was made before; `false` when too much of it would be left over.
fn has_room(connection: &Connection) -> Result<bool, StoreError> {
    connection.execute_batch("BEGIN").doing(BACKUP)?;
    for (table, _) in SMALL.iter().chain(CONTEXT) {
        connection.execute_cached(&format!("DELETE FROM backup.{table}"), []).doing(BACKUP)?;
    }
    // How many items another project has come to.
    connection.execute_cached("DELETE FROM backup.sqlite_sequence", []).doing(BACKUP)?;
    connection.execute_batch("COMMIT").doing(BACKUP)?;
    let left: i64 = connection.query_row_cached("PRAGMA backup.freelist_count", [], |row| row.get(0)).doing(BACKUP)?;
    Ok(left <= MOST_LEFT_OVER)
}

/// Says whether a project has few context items, and whether it has few other rows.
fn are_few(connection: &Connection, project: &ProjectName) -> Result<(bool, bool), StoreError> {
    let sql = "SELECT count(*) <= ?2 AND total(tokens) <= ?3, \
               (SELECT count(*) FROM main.agents WHERE project = ?1) <= ?4 \
               AND (SELECT count(*) FROM main.tasks WHERE project = ?1) <= ?4 \
               FROM (SELECT tokens FROM main.context_items WHERE project = ?1 LIMIT ?2 + 1)";
    let params = rusqlite::params![project.as_str(), FEW.0, FEW.1, FEW_ROWS];
    connection.query_row_cached(sql, params, |row| Ok((row.get(0)?, row.get(1)?))).doing(BACKUP)
}

/// A plain BEGIN takes nothing yet: the first read does.
fn pin(connection: &Connection) -> Result<(), StoreError> {
    connection.execute_cached("BEGIN", []).doing(BACKUP)?;
    connection.query_row_cached("SELECT count(*) FROM main.meta", [], |_| Ok(())).doing(BACKUP)
}

impl PreparedCopy {
    /// Begins the copy: from here on it sees what the database holds now.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn pin(self) -> Result<Pinned, StoreError> {
        pin(&self.connection)?;
        let (few, _) = are_few(&self.connection, &self.project)?;
        Ok(Pinned { prepared: self, few })
    }
}

impl Pinned {
    /// Copies everything, and tells what the context is before it does.
    ///
    /// # Errors
    /// When a row cannot be read, or the file cannot be written.
    pub fn copy(self, mut tell: impl FnMut(CopiedRows)) -> Result<DatabaseCopy, StoreError> {
        let prepared = self.prepared;
        let PreparedCopy { connection, project, .. } = &prepared;
        let states = read_states(connection, project)?;
        tell(CopiedRows::States(&states));
        // Read first: whoever writes them out works beside the copy then.
        context::each_unarchived(connection, project, |item| tell(CopiedRows::Item(item)))?;
        tell(CopiedRows::All);
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
    /// Brings the copy up to this instant; `false` when the context has changed since, so that it has
    /// to be made anew.
    ///
    /// # Errors
    /// When a row cannot be read, or the file cannot be written.
    pub fn refresh(&mut self) -> Result<bool, StoreError> {
        let PreparedCopy { connection, project, .. } = &self.prepared;
        pin(connection)?;
        let told = format!(
            "SELECT EXISTS (SELECT 1 FROM main.events WHERE seq > ?1 AND project = ?2 AND kind NOT IN ({HARMLESS}))"
        );
        let told: bool = connection
            .query_row_cached(&told, rusqlite::params![self.as_of.seq, project.as_str()], |row| row.get(0))
            .doing(BACKUP)?;
        let now = as_of(connection, project)?;
        if told || now.accesses != self.as_of.accesses {
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

    /// Hands what was written to the disk, and waits until it is there: so much less is left to be done at the end.
    ///
    /// # Errors
    /// When it cannot be synced.
    pub fn sync(&self) -> Result<(), StoreError> {
        let PreparedCopy { to, in_memory, .. } = &self.prepared;
        if *in_memory {
            return Ok(());
        }
        let synced = File::open(to).and_then(|file| file.sync_all());
        synced.map_err(|source| StoreError::File { what: "sync", path: to.clone(), source })
    }

    /// Completes the file, which is yet to be synced; returns it, and what is in it where that is at hand.
    ///
    /// # Errors
    /// When it cannot be written.
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
    // One pass over narrow rows is faster than an index that names most of them.
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
    // The stored text begins with `CREATE TABLE <name>`; only the schema's name is put in front.
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
        /// Two projects, `web` and `other`, that know two things each.
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

        fn tell(&self, name: &str, kind: &str) {
            let sql = "INSERT INTO events (at, project, kind, event) VALUES (1, ?1, ?2, '{}')";
            self.live.execute(sql, [name, kind]).expect("told");
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
            let mut found = Vec::new();
            context::each_unarchived(&self.live, &project(name), |item| found.push(item.text)).expect("read");
            found
        }
    }

    fn copy(pinned: Pinned) -> (DatabaseCopy, Vec<String>) {
        let mut told = Vec::new();
        let copied = pinned.copy(|one| match one {
            CopiedRows::States(states) => told.extend(states.iter().map(|(agent, state)| format!("{agent} {state}"))),
            CopiedRows::Item(item) => told.push(item.text),
            CopiedRows::All => told.push("all".to_owned()),
        });
        (copied.expect("copied"), told)
    }

    #[test]
    fn what_is_written_after_the_beginning_is_not_in_the_copy_and_nobody_waits_for_it() {
        let bed = Bed::new();
        let pinned = bed.begin();
        bed.put("web", &["three"]);
        bed.live.execute("UPDATE agent_states SET state = '{\"step\":2}'", []).expect("written beside it");
        let (copied, told) = copy(pinned);
        assert_eq!(told, ["a {\"step\":1}", "one", "two", "all"]);
        assert_eq!(copied.item_count, 2);
        copied.finish().expect("synced");
        assert_eq!(check(&bed.file(), &project("web")).expect("opened"), None);
        assert!(check(&bed.file(), &project("other")).expect("opened").is_some(), "it is of one project alone");
    }

    #[test]
    fn what_a_copy_leaves_to_the_next_one_changes_nothing() {
        let bed = Bed::new();
        let in_file = |sql: &str| -> i64 {
            let backup = Connection::open(bed.file()).expect("opened");
            backup.query_row(sql, [], |row| row.get(0)).expect("asked")
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
            // One that is given up takes its connection with it, and leaves a file where it is a large one.
            drop(bed.begin());
            let left = std::fs::remove_file(bed.file());
            assert_eq!(left.is_ok(), (2..4).contains(&round));
            let (copied, told) = copy(bed.begin());
            assert_eq!(told.len() as u64, copied.item_count + 2);
            let content = copied.finish().expect("complete").1;
            let bytes = std::fs::read(bed.file()).expect("it is there");
            assert!(content.is_none_or(|content| content == bytes));
            lengths.push(bytes.len());
            assert_eq!(bed.spare.take().map(|spare| bed.spare.keep(spare)), Some(()), "the connection is kept");
            assert_eq!(check(&bed.file(), &project("web")).expect("opened"), None);
            assert_eq!(in_file("SELECT count(*) FROM context_bodies") as usize, told.len() - 2);
            pages.push(in_file("PRAGMA page_size") as u32);
            std::fs::remove_file(bed.file()).expect("it is there");
        }
        assert_eq!(pages, [SMALL_PAGE, SMALL_PAGE, LARGE_PAGE, LARGE_PAGE, SMALL_PAGE, SMALL_PAGE]);
        assert_eq!((lengths[0], lengths[4]), (lengths[1], lengths[5]), "nothing piles up: {lengths:?}");
    }

    #[test]
    fn nothing_of_one_projects_copy_is_in_the_next_ones() {
        let bed = Bed::new();
        let copy_of = |name: &str| {
            let live = bed.dir.path().join("live.sqlite");
            let prepared = open(&bed.spare, &live, &project(name), &bed.file()).expect("opened");
            copy(prepared.pin().expect("pinned")).0.finish().expect("complete").1.expect("a small one")
        };
        let has = |copy: &[u8], text: &str| copy.windows(text.len()).any(|part| part == text.as_bytes());
        let small = copy_of("web").len();
        // More than a page, so that some are left over.
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
    fn a_copy_is_brought_up_to_date_where_the_context_is_the_same() {
        let bed = Bed::new();
        let (mut copied, _) = copy(bed.begin());
        bed.tell("web", "operation.stepped");
        bed.tell("other", "context.added");
        bed.put("other", &["three"]);
        bed.live.execute("UPDATE projects SET phase = 'complete'", []).expect("changed");
        bed.live.execute("INSERT INTO tasks VALUES ('web', 1, NULL, 't', 'pending', NULL, 1, 1)", []).expect("put");
        assert!(copied.refresh().expect("refreshed"));
        assert!(copied.refresh().expect("again"));
        copied.finish().expect("synced");
        let backed = crate::store::backup::open(&bed.file(), &project("web")).expect("opened");
        assert_eq!((backed.phase.as_str(), backed.tasks.len()), ("complete", 1));
    }

    #[test]
    fn a_copy_whose_context_has_changed_is_not_taken() {
        for kind in ["context.added", "context.pinned", "context.recalled", "agent.state_saved", "a.kind_to_come"] {
            let bed = Bed::new();
            let (mut copied, _) = copy(bed.begin());
            bed.tell("web", kind);
            assert!(!copied.refresh().expect("looked"), "{kind}");
        }
        // Of an access no event tells.
        let bed = Bed::new();
        let (mut copied, _) = copy(bed.begin());
        context::count_access(&bed.live, &project("web"), 1).expect("counted");
        assert!(!copied.refresh().expect("looked"));
    }

    #[test]
    fn rows_that_are_put_back_are_those_of_the_copy_and_other_projects_keep_theirs() {
        let bed = Bed::new();
        let (copied, _) = copy(bed.begin());
        copied.finish().expect("synced");
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
        let found = |text: &str| context::search(&bed.live, &project("web"), None, text, 9).expect("searched").len();
        assert_eq!((found("two"), found("three")), (1, 0), "the index goes along");
    }
}
