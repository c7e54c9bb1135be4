//! Migrations of the schema: forward only, each in its own transaction, with a backup before the first.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::error::{Doing, StoreError};

/// Every migration, in order; the version of a schema is the number of its migrations.
const MIGRATIONS: &[(&str, &str)] = &[("0001_initial", include_str!("../../../migrations/0001_initial.sql"))];

/// The newest schema that this program supports.
pub(super) const NEWEST: u32 = MIGRATIONS.len() as u32;

/// Migrates the database to the newest schema.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let found: u32 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).doing("read the schema's version")?;
    if found > NEWEST {
        return Err(StoreError::TooNew { path: path.to_owned(), found, known: NEWEST });
    }
    if found > 0 && found < NEWEST {
        back_up(connection, path, found)?;
    }
    run(connection, path, MIGRATIONS, found)
}

/// Runs the migrations after version `found`.
fn run(connection: &mut Connection, path: &Path, migrations: &[(&str, &str)], found: u32) -> Result<(), StoreError> {
    for (index, (name, sql)) in migrations.iter().enumerate().skip(found as usize) {
        let version = index as u32 + 1;
        tracing::info!(migration = name, "migrating the database");
        let failed = |source| StoreError::Migrate { path: path.to_owned(), version, source };
        let transaction = connection.transaction().map_err(failed)?;
        transaction.execute_batch(sql).map_err(failed)?;
        transaction.pragma_update(None, "user_version", version).map_err(failed)?;
        transaction.commit().map_err(failed)?;
    }
    Ok(())
}

/// Returns a copy in memory of a checkpoint's backup, migrated from schema `found` to the newest one.
pub(super) fn migrated_copy(file: &Path, found: u32) -> Result<Connection, StoreError> {
    migrated_copy_by(file, MIGRATIONS, found)
}

/// A backup has only some of the tables, while migrations may change any: they run on a complete empty database, to which
/// the rows are added at their version.
fn migrated_copy_by(file: &Path, migrations: &[(&str, &str)], found: u32) -> Result<Connection, StoreError> {
    const COPY: &str = "migrate an older backup";
    let mut connection = Connection::open_in_memory().doing(COPY)?;
    // The tables are not in the order of their references.
    connection.pragma_update(None, "foreign_keys", false).doing(COPY)?;
    run(&mut connection, file, &migrations[..migrations.len().min(found as usize)], 0)?;
    connection.execute("ATTACH ?1 AS old", [file.to_string_lossy()]).doing(COPY)?;
    let tables: Vec<String> = connection
        .prepare("SELECT name FROM old.sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect())
        .doing(COPY)?;
    for table in tables {
        let sql = format!("INSERT INTO main.\"{table}\" SELECT * FROM old.\"{table}\"");
        connection.execute(&sql, []).doing(COPY)?;
    }
    connection.execute_batch("DETACH old").doing(COPY)?;
    run(&mut connection, file, migrations, found)?;
    Ok(connection)
}

fn back_up(connection: &Connection, path: &Path, version: u32) -> Result<(), StoreError> {
    let mut copy = path.as_os_str().to_owned();
    copy.push(format!(".schema-{version}.backup"));
    let copy = PathBuf::from(copy);
    let failed = |source| StoreError::BackUp { path: copy.clone(), source };
    // An existing copy is that of a migration that did not end; it is replaced.
    match std::fs::remove_file(&copy) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(StoreError::File { what: "replace the old backup", path: copy, source });
        }
        Ok(()) | Err(_) => {}
    }
    connection.execute("VACUUM INTO ?1", [copy.to_string_lossy()]).map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_of_an_older_schema_is_read_as_one_of_the_newest_and_stays_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("old.sqlite");
        let old = Connection::open(&file).expect("opened");
        // Like a backup: some of the tables, without indices.
        old.execute_batch(
            "CREATE TABLE tasks (project TEXT NOT NULL, id INTEGER NOT NULL, agent TEXT, title TEXT NOT NULL, \
             status TEXT NOT NULL, percent REAL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, \
             PRIMARY KEY (project, id)) STRICT, WITHOUT ROWID; \
             INSERT INTO tasks VALUES ('web', 1, NULL, 'write it', 'pending', NULL, 1, 2); PRAGMA user_version = 1",
        )
        .expect("made");
        drop(old);
        let before = std::fs::read(&file).expect("read");
        let later = [
            MIGRATIONS[0],
            (
                "0002_later",
                "ALTER TABLE tasks ADD COLUMN note TEXT NOT NULL DEFAULT 'none'; CREATE INDEX e ON events (at)",
            ),
        ];
        let copy = migrated_copy_by(&file, &later, 1).expect("migrated");
        let row = copy.query_row("SELECT title, note FROM tasks", [], |row| Ok((row.get(0)?, row.get(1)?)));
        assert_eq!(row, Ok(("write it".to_owned(), "none".to_owned())));
        let version: u32 = copy.pragma_query_value(None, "user_version", |row| row.get(0)).expect("read");
        assert_eq!(version, 2);
        assert_eq!(std::fs::read(&file).expect("read"), before);
    }
}
