//! Copies a project's rows into a database file of their own: the database part of a checkpoint.
//!
//! ```text
//!   open ──► the file, with its tables: nobody need stand still for that
//!   pin ───► one read transaction: what follows sees this instant, whatever is written meanwhile
//!   copy ──► the rows into the file, the context to whoever writes it out
//!   refresh ► later, in a second transaction: the small tables anew, if the context is still the same
//!   finish ─► synced
//! ```
//! The transaction only reads the live database, so nobody waits for it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use fermata_protocol::context::ContextItem;
use fermata_protocol::{AgentName, ProjectName};
use rusqlite::{Connection, OpenFlags};

use super::rows::word;
use super::{Doing, StoreError, connect, context, migrations};

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

/// Up to so many context items a copy has small pages: each of its tables takes one at least, in every checkpoint.
const FEW_ITEMS: i64 = 100;

/// The sizes of a copy's pages, bytes: for few items, and for many.
const PAGES: [u32; 2] = [1024, 16384];

const BACKUP: &str = "back up the project's rows";

/// Agents' own blobs, as JSON text.
pub type States = Vec<(AgentName, String)>;

/// What a copy leaves to the next one, since making it takes longer than a small copy does.
#[derive(Default)]
pub struct Spare {
    /// A connection to the database, attached to nothing.
    connection: Mutex<Option<Connection>>,
    /// A copy's file before anything was copied, for each size of pages.
    empty: Mutex<[Option<Arc<[u8]>>; PAGES.len()]>,
}

impl Spare {
    fn take(&self) -> Option<Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, connection: Connection) {
        // What it has read of a large context is nobody's need any more.
        if connection.execute_batch("PRAGMA shrink_memory").is_ok() {
            *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
    }

    fn empty(&self, size: usize) -> Option<Arc<[u8]>> {
        self.empty.lock().unwrap_or_else(PoisonError::into_inner)[size].clone()
    }

    fn keep_empty(&self, size: usize, file: &Path) -> io::Result<()> {
        let bytes = fs::read(file)?;
        self.empty.lock().unwrap_or_else(PoisonError::into_inner)[size] = Some(bytes.into());
        Ok(())
    }
}

/// A connection to the database, and the file that rows are to go to, with its tables.
pub struct Prepared {
    connection: Connection,
    spare: Arc<Spare>,
    project: ProjectName,
    to: PathBuf,
}

/// The same with a read transaction on one instant of the database.
pub struct Pinned {
    prepared: Prepared,
    /// Whether there are so few context items that nothing is gained by more threads than one.
    pub few: bool,
}

/// What is told of the context while it is copied, in this order.
pub enum Told<'a> {
    /// The agents' blobs.
    States(&'a States),
    /// An unarchived item, whole; by agent, and then oldest first.
    Item(ContextItem),
    /// That was all.
    All,
}

/// A copy that is complete, and not yet synced.
pub struct Copied {
    connection: Connection,
    spare: Arc<Spare>,
    project: ProjectName,
    to: PathBuf,
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

/// Makes the file of a copy; nothing is copied yet.
///
/// # Errors
/// When the database cannot be read, or the file cannot be made.
pub fn open(spare: &Arc<Spare>, database: &Path, project: &ProjectName, to: &Path) -> Result<Prepared, StoreError> {
    let connection = match spare.take() {
        Some(connection) => connection,
        // One of its own, with the right to create: the attached file inherits its flags.
        None => connect(database, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?,
    };
    let size = usize::from(!are_few(&connection, project)?);
    let file = |what| move |source| StoreError::File { what, path: to.to_owned(), source };
    let empty = spare.empty(size);
    if let Some(empty) = &empty {
        fs::write(to, empty).map_err(file("write"))?;
    }
    connection.execute("ATTACH ?1 AS backup", [to.to_string_lossy()]).doing(BACKUP)?;
    // The file is worth nothing until the checkpoint's row names it, so it is synced once, at the end.
    let settings = format!(
        "PRAGMA backup.page_size = {}; PRAGMA backup.journal_mode = off; PRAGMA backup.synchronous = off; \
         PRAGMA backup.cache_size = -8192; PRAGMA main.cache_size = -16384",
        PAGES[size]
    );
    connection.execute_batch(&settings).doing(BACKUP)?;
    if empty.is_none() {
        connection.execute_batch("BEGIN").doing(BACKUP)?;
        for (table, _) in SMALL.iter().chain(CONTEXT) {
            copy_schema(&connection, table)?;
        }
        let version = format!("PRAGMA backup.user_version = {}; COMMIT", migrations::NEWEST);
        connection.execute_batch(&version).doing(BACKUP)?;
        spare.keep_empty(size, to).map_err(file("read"))?;
    }
    Ok(Prepared { connection, spare: Arc::clone(spare), project: project.clone(), to: to.to_owned() })
}

fn are_few(connection: &Connection, project: &ProjectName) -> Result<bool, StoreError> {
    let sql = "SELECT count(*) <= ?2 FROM (SELECT 1 FROM main.context_items WHERE project = ?1 LIMIT ?2 + 1)";
    connection.query_row(sql, rusqlite::params![project.as_str(), FEW_ITEMS], |row| row.get(0)).doing(BACKUP)
}

/// A plain BEGIN takes nothing yet: the first read does.
fn pin(connection: &Connection) -> Result<(), StoreError> {
    connection.execute_batch("BEGIN").doing(BACKUP)?;
    connection.query_row("SELECT count(*) FROM main.meta", [], |_| Ok(())).doing(BACKUP)
}

impl Prepared {
    /// Begins the copy: from here on it sees what the database holds now.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn pin(self) -> Result<Pinned, StoreError> {
        pin(&self.connection)?;
        let few = are_few(&self.connection, &self.project)?;
        Ok(Pinned { prepared: self, few })
    }
}

impl Pinned {
    /// Copies everything, and tells what the context is before it does.
    ///
    /// # Errors
    /// When a row cannot be read, or the file cannot be written.
    pub fn copy(self, mut tell: impl FnMut(Told)) -> Result<Copied, StoreError> {
        let Prepared { connection, spare, project, to } = self.prepared;
        let states = read_states(&connection, &project)?;
        tell(Told::States(&states));
        // Read first: whoever writes them out works beside the copy then.
        context::each_unarchived(&connection, &project, |item| tell(Told::Item(item)))?;
        tell(Told::All);
        copy_small(&connection, &project)?;
        for sql in [
            "INSERT INTO backup.context_items SELECT * FROM main.context_items WHERE project = ?1",
            "INSERT INTO backup.context_bodies SELECT b.* FROM backup.context_items i \
             CROSS JOIN main.context_bodies b USING (id) WHERE i.project = ?1",
        ] {
            connection.execute(sql, [project.as_str()]).doing(BACKUP)?;
        }
        let as_of = as_of(&connection, &project)?;
        let item_count = connection
            .query_row("SELECT count(*) FROM backup.context_items", [], |row| row.get::<_, i64>(0))
            .doing(BACKUP)?
            .unsigned_abs();
        connection.execute_batch("COMMIT").doing(BACKUP)?;
        Ok(Copied { connection, spare, project, to, as_of, item_count })
    }
}

impl Copied {
    /// Brings the copy up to this instant; `false` when the context has changed since, so that it has
    /// to be made anew.
    ///
    /// # Errors
    /// When a row cannot be read, or the file cannot be written.
    pub fn refresh(&mut self) -> Result<bool, StoreError> {
        let connection = &self.connection;
        pin(connection)?;
        let told = format!(
            "SELECT EXISTS (SELECT 1 FROM main.events WHERE seq > ?1 AND project = ?2 AND kind NOT IN ({HARMLESS}))"
        );
        let told: bool = connection
            .query_row(&told, rusqlite::params![self.as_of.seq, self.project.as_str()], |row| row.get(0))
            .doing(BACKUP)?;
        let now = as_of(connection, &self.project)?;
        if told || now.accesses != self.as_of.accesses {
            connection.execute_batch("COMMIT").doing(BACKUP)?;
            return Ok(false);
        }
        for (table, _) in SMALL {
            connection.execute(&format!("DELETE FROM backup.{table}"), []).doing(BACKUP)?;
        }
        copy_small(connection, &self.project)?;
        connection.execute_batch("COMMIT").doing(BACKUP)?;
        self.as_of = now;
        Ok(true)
    }

    /// Hands what was written to the disk, and waits until it is there.
    ///
    /// # Errors
    /// When it cannot be synced.
    pub fn sync(&self) -> Result<(), StoreError> {
        let synced = std::fs::File::open(&self.to).and_then(|file| file.sync_all());
        synced.map_err(|source| StoreError::File { what: "sync", path: self.to.clone(), source })
    }

    /// Closes the file, synced.
    ///
    /// # Errors
    /// When it cannot be synced.
    pub fn finish(self) -> Result<(), StoreError> {
        self.connection.execute_batch("DETACH backup").doing(BACKUP)?;
        self.sync()?;
        self.spare.keep(self.connection);
        Ok(())
    }
}

fn as_of(connection: &Connection, project: &ProjectName) -> Result<AsOf, StoreError> {
    let seq = connection.query_row("SELECT coalesce(max(seq), 0) FROM main.events", [], |row| row.get(0));
    // One pass over narrow rows is faster than an index that names most of them.
    let accesses = "SELECT coalesce(sum(access_count), 0) FROM main.context_items WHERE +project = ?1";
    let accesses = connection.query_row(accesses, [project.as_str()], |row| row.get(0));
    Ok(AsOf { seq: seq.doing(BACKUP)?, accesses: accesses.doing(BACKUP)? })
}

fn copy_small(connection: &Connection, project: &ProjectName) -> Result<(), StoreError> {
    for (table, column) in SMALL {
        let sql = format!("INSERT INTO backup.{table} SELECT * FROM main.{table} WHERE {column} = ?1");
        connection.execute(&sql, [project.as_str()]).doing(BACKUP)?;
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
    let mut statement = connection.prepare(sql).doing(BACKUP)?;
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
        spare: Arc<Spare>,
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

    fn copy(pinned: Pinned) -> (Copied, Vec<String>) {
        let mut told = Vec::new();
        let copied = pinned.copy(|one| match one {
            Told::States(states) => told.extend(states.iter().map(|(agent, state)| format!("{agent} {state}"))),
            Told::Item(item) => told.push(item.text),
            Told::All => told.push("all".to_owned()),
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
        let in_file = |file: &Path, sql: &str| -> i64 {
            let backup = Connection::open(file).expect("opened");
            backup.query_row(sql, [], |row| row.get(0)).expect("asked")
        };
        let mut sizes = Vec::new();
        for round in 0..4 {
            if round == 2 {
                let many: Vec<String> = (0..FEW_ITEMS).map(|n| format!("item {n}")).collect();
                bed.put("web", &many.iter().map(String::as_str).collect::<Vec<_>>());
            }
            // One that is given up takes its connection with it.
            drop(bed.begin());
            fs::remove_file(bed.file()).expect("a file was begun");
            let (copied, told) = copy(bed.begin());
            assert_eq!(told.len() as u64, copied.item_count + 2);
            copied.finish().expect("synced");
            assert_eq!(bed.spare.take().map(|spare| bed.spare.keep(spare)), Some(()), "the connection is kept");
            assert_eq!(check(&bed.file(), &project("web")).expect("opened"), None);
            let bodies = in_file(&bed.file(), "SELECT count(*) FROM context_bodies");
            assert_eq!(bodies as usize, told.len() - 2);
            sizes.push(in_file(&bed.file(), "PRAGMA page_size"));
            fs::remove_file(bed.file()).expect("it is there");
        }
        assert_eq!(sizes, [PAGES[0], PAGES[0], PAGES[1], PAGES[1]].map(i64::from));
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
