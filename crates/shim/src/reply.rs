//! The answer to a request of the daemon: a result or a refusal.

use fermata_protocol::error_chain;
use serde_json::Value;

use super::connection::ConnectionId;
use super::wire::RefusalCode;

/// A request that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingCall {
    pub connection: ConnectionId,
    /// The id of the request on this connection.
    pub id: u64,
}

/// The result of a request, or a refusal.
pub type ShimReply = Result<Value, Refused>;

/// A refusal and its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub code: RefusalCode,
    /// A sentence for people.
    pub message: String,
}

impl Refused {
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Serialises a result.
pub fn encode(result: &impl serde::Serialize) -> ShimReply {
    serde_json::to_value(result).map_err(|error| Refused::new(RefusalCode::Other, error.to_string()))
}

/// The result of a request that returns nothing.
pub fn done() -> ShimReply {
    Ok(Value::Object(serde_json::Map::new()))
}

/// Formats an error and its causes as one line: "failed to …: …".
pub fn failed_to(error: &(dyn std::error::Error + 'static)) -> String {
    format!("failed to {}", error_chain(error))
}
