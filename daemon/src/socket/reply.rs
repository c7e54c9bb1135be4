//! Encodes the results of handlers.

use serde::Serialize;
use serde_json::Value;

use crate::errors::Failure;

/// Turns a result into what the wire carries.
pub(super) fn wire(value: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::fault("encode the reply", &error))
}
