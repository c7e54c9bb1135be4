//! JSON-RPC 2.0 envelopes: one object per line, batches refused.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Code, ErrorObject, Refusal};

/// The protocol version this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// The id of a request: a string, a number or null, given back as it came.
pub type RequestId = Value;

/// A request (with `id`) or a notification (without).
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The id, `None` for a notification.
    pub id: Option<RequestId>,
    /// The method's name.
    pub method: String,
    /// The parameters by name; absent parameters are an empty object.
    pub params: Map<String, Value>,
}

/// A line that is no request: what to answer, under which id.
#[derive(Debug, Clone, PartialEq)]
pub struct BadRequest {
    /// The id to answer under; null when it could not be read.
    pub id: RequestId,
    /// What was wrong.
    pub refusal: Refusal,
}

impl Request {
    /// Reads one line, without its newline.
    ///
    /// # Errors
    /// Answers what is wrong with the line, under the line's own id where it has a usable one.
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        let bad = |id: Value, code: Code, message: String| BadRequest { id, refusal: Refusal::new(code, message) };
        let text = std::str::from_utf8(line).map_err(|e| {
            bad(Value::Null, Code::ParseError, format!("the line is not valid UTF-8 (at byte {})", e.valid_up_to()))
        })?;
        let value: Value = serde_json::from_str(text)
            .map_err(|e| bad(Value::Null, Code::ParseError, format!("the line is not valid JSON: {e}")))?;
        let mut object = match value {
            Value::Object(object) => object,
            Value::Array(_) => {
                return Err(bad(
                    Value::Null,
                    Code::InvalidRequest,
                    "batches are not supported: send one request object per line".into(),
                ));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                return Err(bad(Value::Null, Code::InvalidRequest, "a request is a JSON object".into()));
            }
        };
        let id = object.remove("id");
        let answer_id = match &id {
            Some(Value::String(_) | Value::Number(_)) => id.clone().unwrap_or(Value::Null),
            None | Some(Value::Null) => Value::Null,
            Some(_) => {
                return Err(bad(Value::Null, Code::InvalidRequest, "'id' is a string or a number".into()));
            }
        };
        let invalid = |message: &str| bad(answer_id.clone(), Code::InvalidRequest, message.into());
        match object.remove("jsonrpc") {
            Some(Value::String(v)) if v == "2.0" => {}
            _ => return Err(invalid("'jsonrpc' must be \"2.0\"")),
        }
        let Some(Value::String(method)) = object.remove("method") else {
            return Err(invalid("'method' must be a string"));
        };
        let params = match object.remove("params") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(params)) => params,
            Some(_) => {
                return Err(bad(
                    answer_id,
                    Code::InvalidParams,
                    "'params' must be an object: parameters are given by name".into(),
                ));
            }
        };
        if let Some(name) = object.keys().next() {
            return Err(invalid(&format!("unknown member '{}' of the request", shorten(name))));
        }
        Ok(Self { id, method, params })
    }
}

/// Cuts a text from outside to a length that fits into an error sentence.
pub fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// A reply to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Always "2.0".
    pub jsonrpc: Version,
    /// The id of the request.
    pub id: RequestId,
    /// The result, present when the call succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// The error, present when it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorObject>,
}

impl Response {
    /// Makes the reply to a call that succeeded.
    pub fn success(id: RequestId, result: Value) -> Self {
        Self { jsonrpc: Version, id, result: Some(result), error: None }
    }

    /// Makes the reply to a call that failed.
    pub fn failure(id: RequestId, error: impl Into<ErrorObject>) -> Self {
        Self { jsonrpc: Version, id, result: None, error: Some(error.into()) }
    }
}

/// A message of the daemon that answers no request: an event, progress, a pause request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Notification {
    /// Always "2.0".
    pub jsonrpc: Version,
    /// What it is: `event`, `$/progress`, `pause_requested`.
    pub method: String,
    /// Its content.
    pub params: Value,
}

impl Notification {
    /// Makes a notification.
    pub fn new(method: &str, params: Value) -> Self {
        Self { jsonrpc: Version, method: method.into(), params }
    }
}

/// The constant `"2.0"` of JSON-RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version;

impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str("2.0")
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match String::deserialize(d)?.as_str() {
            "2.0" => Ok(Self),
            other => Err(serde::de::Error::custom(format!("jsonrpc version '{}'", shorten(other)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_requests_parse() {
        let request = Request::parse(br#"{"jsonrpc":"2.0","id":7,"method":"hello","params":{"min":1}}"#);
        let request = request.expect("parses");
        assert_eq!(request.id, Some(Value::from(7)));
        assert_eq!(request.method, "hello");
        assert_eq!(request.params.get("min"), Some(&Value::from(1)));
        assert!(Request::parse(br#"{"jsonrpc":"2.0","method":"x"}"#).is_ok_and(|r| r.id.is_none()));
    }

    #[test]
    fn bad_lines_say_what_is_wrong_under_their_own_id() {
        let cases: [(&[u8], Code, Value); 9] = [
            (b"\xff\xfe", Code::ParseError, Value::Null),
            (b"{", Code::ParseError, Value::Null),
            (b"", Code::ParseError, Value::Null),
            (b"[]", Code::InvalidRequest, Value::Null),
            (b"3", Code::InvalidRequest, Value::Null),
            (br#"{"id":3,"method":"x"}"#, Code::InvalidRequest, Value::from(3)),
            (br#"{"jsonrpc":"2.0","id":"a","method":4}"#, Code::InvalidRequest, Value::from("a")),
            (br#"{"jsonrpc":"2.0","id":1,"method":"x","params":[1]}"#, Code::InvalidParams, Value::from(1)),
            (br#"{"jsonrpc":"2.0","id":1,"method":"x","parms":{}}"#, Code::InvalidRequest, Value::from(1)),
        ];
        for (line, code, id) in cases {
            let bad = Request::parse(line).expect_err(&String::from_utf8_lossy(line));
            assert_eq!((bad.refusal.code, bad.id), (code, id), "{}", String::from_utf8_lossy(line));
        }
    }
}
