//! Encodes the results of handlers.

use serde::Serialize;
use serde_json::Value;

use crate::errors::Failure;

/// Encodes a result as the value of a reply.
pub(super) fn wire(value: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::fault("encode the reply", &error))
}
