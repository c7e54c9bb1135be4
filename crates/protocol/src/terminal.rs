//! Terminals of agents: looking at one, typing into it.
//!
//! ```text
//! -> agent.attach {target}          <- {attachment: 1, writing: true, …}
//!                                   <- $/attach.screen {attachment: 1, size}     what was shown before is void
//!                                   <- $/attach.output {attachment: 1, data}     bytes for a terminal, as they come
//! -> agent.input {attachment: 1, data}
//! -> agent.resize {attachment: 1, size}
//!                                   <- $/attach.notice {attachment: 1, …}
//!                                   <- $/attach.end {attachment: 1, exit}
//! ```
//!
//! A viewer that reads too slowly is given no backlog: it gets a new `$/attach.screen`, and after it
//! the bytes that draw the screen as it is then.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::agent::ExitStatus;
use crate::ids::{RunId, Target, UnixMillis};
use crate::supervision::TerminalSize;

/// The most bytes that one call types.
pub const MAX_INPUT_BYTES: usize = 32 << 10;

/// The largest number of lines, and of characters per line.
pub const MAX_TERMINAL_SIDE: u16 = 1000;

/// Bytes that need not be text; base64 on the wire.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

/// Input may be a password: logs show its length, not its bytes.
impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(|error| serde::de::Error::custom(format!("no base64: {error}")))
    }
}

impl JsonSchema for Bytes {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Bytes".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "contentEncoding": "base64", "description": "Bytes that need not be text." })
    }
}

/// Parameters of `agent.attach`. The connection gets the agent's screen and what follows as
/// `$/attach.…` notifications, until `agent.detach`, the end of the run or of the connection.
///
/// One attachment writes, the others watch. The first one writes; when the writer leaves, the
/// next one that types or attaches becomes the writer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentAttach {
    /// The agent.
    pub target: Target,
    /// Only watch, and never write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Write even if another attachment does, which only watches from then on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub steal: bool,
    /// Begin with lines that have left the screen, as many as are kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scrollback: bool,
    /// The size of the caller's terminal, which the agent's takes on if the caller writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<TerminalSize>,
}

/// Result of `agent.attach`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgentAttachResult {
    /// Names the attachment on this connection.
    pub attachment: u64,
    /// The run whose terminal it is.
    pub run: RunId,
    /// Whether this attachment writes.
    pub writing: bool,
    /// Who writes instead: a user or an agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<String>,
    /// The size of the agent's terminal.
    pub size: TerminalSize,
    /// Whether the agent can run.
    pub standing: InputState,
}

/// Whether what is typed can reach the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum InputState {
    /// It runs.
    Running,
    /// A signal stopped it, for instance by Ctrl-Z: `agent.kill` with `CONT` lets it go on.
    Suspended {
        /// When that became known.
        since: UnixMillis,
    },
    /// Its project is paused, or a pause or resume is in progress: it takes no input.
    Held,
}

/// Parameters of `agent.input`: types into the terminal of an attachment that writes. Calls are
/// carried out side by side; who types waits for the answer before it types on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentInput {
    pub attachment: u64,
    /// What is typed, at most 32 KiB.
    pub data: Bytes,
}

/// Result of `agent.input` and `agent.send`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TypedResult {
    /// How many of the bytes were taken. Less than were given when the agent reads none of them.
    pub bytes: u64,
    /// No attachment wrote, and this one does from now on: the caller reports its size.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub claimed: bool,
}

/// Parameters of `agent.resize`: the terminal of the one who writes has another size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentResize {
    pub attachment: u64,
    pub size: TerminalSize,
}

/// Parameters of `agent.detach`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentDetach {
    pub attachment: u64,
}

/// Parameters of `agent.send`: types into an agent's terminal without attaching to it. An event
/// keeps who sent how many bytes, not which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentSend {
    /// The agent.
    pub target: Target,
    /// What is typed, in one piece, at most 32 KiB.
    pub data: Bytes,
    /// Type even if an attachment writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub anyway: bool,
}

/// Parameters of a `$/attach.screen` notification: what was shown before is void, and the bytes that
/// follow draw everything anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachScreen {
    pub attachment: u64,
    /// The size that the bytes are for.
    pub size: TerminalSize,
}

/// Parameters of a `$/attach.output` notification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachOutput {
    pub attachment: u64,
    /// What the terminal shows.
    pub data: Bytes,
}

/// Parameters of a `$/attach.notice` notification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachNotice {
    pub attachment: u64,
    /// What has changed.
    #[serde(flatten)]
    pub notice: Notice,
}

/// What a viewer should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", tag = "notice", content = "data")]
pub enum Notice {
    /// Another attachment writes now.
    Replaced {
        /// Who.
        by: String,
    },
    /// Whether input reaches the agent has changed.
    #[serde(rename = "standing")]
    InputState(InputState),
}

/// Parameters of a `$/attach.end` notification: the run has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachEnd {
    pub attachment: u64,
    /// How it ended; none when the shim did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_travel_as_base64() {
        let bytes = Bytes(vec![0, 27, 255]);
        let text = serde_json::to_string(&bytes).expect("serialises");
        assert_eq!(text, r#""ABv/""#);
        assert_eq!(serde_json::from_str::<Bytes>(&text).expect("reads"), bytes);
        assert!(serde_json::from_str::<Bytes>(r#""%%""#).is_err());
    }

    #[test]
    fn a_notice_has_one_shape() {
        let notice = AttachNotice { attachment: 3, notice: Notice::InputState(InputState::Held) };
        let text = serde_json::to_string(&notice).expect("serialises");
        assert_eq!(text, r#"{"attachment":3,"notice":"standing","data":{"is":"held"}}"#);
        assert_eq!(serde_json::from_str::<AttachNotice>(&text).expect("reads"), notice);
    }
}
