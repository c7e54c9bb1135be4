//! Migrations: forward only, each in its own transaction, a backup before the first.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::{Doing, StoreError};

/// Every migration, in order; the schema's version is the number of them that ran.
const MIGRATIONS: &[(&str, &str)] = &[("0001_initial", include_str!("../../../migrations/0001_initial.sql"))];

/// The newest schema that this program knows.
pub(super) const NEWEST: u32 = MIGRATIONS.len() as u32;

/// Brings the database to the newest schema.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let found: u32 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).doing("read the schema's version")?;
    if found > NEWEST {
        return Err(StoreError::TooNew { path: path.to_owned(), found, known: NEWEST });
    }
    if found > 0 && found < NEWEST {
        back_up(connection, path, found)?;
    }
    for (index, (name, sql)) in MIGRATIONS.iter().enumerate().skip(found as usize) {
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

fn back_up(connection: &Connection, path: &Path, version: u32) -> Result<(), StoreError> {
    let mut copy = path.as_os_str().to_owned();
    copy.push(format!(".schema-{version}.backup"));
    let copy = PathBuf::from(copy);
    let failed = |source| StoreError::BackUp { path: copy.clone(), source };
    // A copy left by a migration that did not finish is of the same schema: take a fresh one.
    match std::fs::remove_file(&copy) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(StoreError::File { what: "replace the old backup", path: copy, source });
        }
        _ => {}
    }
    connection.execute("VACUUM INTO ?1", [copy.to_string_lossy()]).map_err(failed)?;
    Ok(())
}
