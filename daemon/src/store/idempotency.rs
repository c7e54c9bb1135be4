//! Idempotency keys: the same call with the same key is carried out once.

use fermata_protocol::{OperationId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::Value;

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json, text, word};

/// How long a key is remembered, milliseconds.
const REMEMBERED_MS: i64 = 24 * 3_600_000;

/// A call that carries a key.
#[derive(Debug, Clone)]
pub struct Keyed {
    /// Who calls.
    pub principal: String,
    /// The key.
    pub key: String,
    /// SHA-256 of method and parameters, in hexadecimal.
    pub request: String,
}

/// What is known of a key.
#[derive(Debug, Clone)]
pub enum KeyedAnswer {
    /// The same call had this reply.
    Reply(Value),
    /// The same call began this operation.
    Operation(OperationId),
    /// Another call used the key.
    OtherRequest,
}

/// Looks a key up.
///
/// # Errors
/// When the row cannot be read.
pub fn find(connection: &Connection, keyed: &Keyed) -> Result<Option<KeyedAnswer>, StoreError> {
    let what = "look up an idempotency key";
    let sql = "SELECT request, operation, reply FROM idempotency_keys WHERE principal = ?1 AND key = ?2";
    let found: Option<(String, Option<String>, Option<String>)> = connection
        .query_row(sql, [&keyed.principal, &keyed.key], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()
        .doing(what)?;
    let Some((request, operation, reply)) = found else { return Ok(None) };
    Ok(Some(match (request == keyed.request, operation, reply) {
        (false, _, _) => KeyedAnswer::OtherRequest,
        (true, Some(operation), _) => KeyedAnswer::Operation(word(&operation)?),
        (true, None, reply) => KeyedAnswer::Reply(json(reply.as_deref().unwrap_or("null"))?),
    }))
}

/// Remembers a key, in the transaction of what the call changed.
///
/// # Errors
/// When the row cannot be written, for instance because the key was used in the meantime.
pub fn remember(
    connection: &Connection,
    keyed: &Keyed,
    operation: Option<&OperationId>,
    reply: Option<&Value>,
    now: UnixMillis,
) -> Result<(), StoreError> {
    let what = "remember an idempotency key";
    connection
        .execute_cached("DELETE FROM idempotency_keys WHERE at < ?1", [now.0 - REMEMBERED_MS])
        .doing("forget old idempotency keys")?;
    let reply = reply.map(text).transpose()?;
    connection
        .execute_cached(
            "INSERT INTO idempotency_keys (principal, key, request, operation, reply, at) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![keyed.principal, keyed.key, keyed.request, operation.map(OperationId::as_str), reply, now.0],
        )
        .doing(what)?;
    Ok(())
}
