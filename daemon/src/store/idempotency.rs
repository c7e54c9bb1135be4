//! Idempotency keys: a call that is repeated with the same key is carried out once.

use fermata_protocol::{OperationId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::Value;

use super::connection::Cached as _;
use super::error::{Doing, StoreError};
use super::rows::{json, text, word};

/// How long a key is stored, in milliseconds.
const REMEMBERED_MS: i64 = 24 * 3_600_000;

/// The key of a call.
#[derive(Debug, Clone)]
pub struct Keyed {
    /// The caller, to whom the key belongs.
    pub principal: String,
    pub key: String,
    /// SHA-256 of method and parameters, in hexadecimal.
    pub request: String,
}

/// An earlier call with the same key.
#[derive(Debug, Clone)]
pub enum KeyedAnswer {
    /// The same call had this reply.
    Reply(Value),
    /// The same call began this operation.
    Operation(OperationId),
    /// Another call used the key.
    OtherRequest,
}

/// Finds the earlier call with a key.
///
/// # Errors
/// The row cannot be read.
pub fn find(connection: &Connection, keyed: &Keyed) -> Result<Option<KeyedAnswer>, StoreError> {
    let what = "look up an idempotency key";
    let sql = "SELECT request, operation, reply FROM idempotency_keys WHERE principal = ?1 AND key = ?2";
    let row: Option<(String, Option<String>, Option<String>)> = connection
        .query_row(sql, [&keyed.principal, &keyed.key], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()
        .doing(what)?;
    let Some((request, operation, reply)) = row else { return Ok(None) };
    Ok(Some(match (request == keyed.request, operation, reply) {
        (false, _, _) => KeyedAnswer::OtherRequest,
        (true, Some(operation), _) => KeyedAnswer::Operation(word(&operation)?),
        (true, None, reply) => KeyedAnswer::Reply(json(reply.as_deref().unwrap_or("null"))?),
    }))
}

/// Stores a key in the transaction of the call's changes, and removes expired ones.
///
/// # Errors
/// The row cannot be written, for instance because a concurrent call has used the key.
pub fn remember(
    connection: &Connection,
    keyed: &Keyed,
    operation: Option<&OperationId>,
    reply: Option<&Value>,
    now: UnixMillis,
) -> Result<(), StoreError> {
    let what = "store an idempotency key";
    connection
        .execute_cached("DELETE FROM idempotency_keys WHERE at < ?1", [now.0 - REMEMBERED_MS])
        .doing("remove expired idempotency keys")?;
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
