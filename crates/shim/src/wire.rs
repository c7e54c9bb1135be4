//! The shim's protocol: JSON, one object per line, over a Unix socket per run.
//!
//! ```text
//! -> {"hello":{"version":1,"level":1}}
//! <- {"hello":{"version":1,"run_id":"…","shim":{"pid":7,"start":9}}}
//! -> {"call":{"id":1,"method":"freeze","params":{"lease_ms":5000}}}
//! <- {"reply":{"id":1,"ok":{"mechanism":"cgroup","processes":3,"took_us":410}}}
//! <- {"refusal":{"id":2,"code":"not_frozen","message":"…"}}
//! <- {"event":{"exited":{"code":0,"signal":null,…}}}
//! ```
//!
//! Daemon and shim may be of different builds, since an upgrade leaves old shims running. The rules:
//!
//! - Another version is refused with a message that names both versions. The agent is not touched: it continues under
//!   its shim, and the daemon reports why it cannot be reached.
//! - Within a version, fields, requests, events and codes are only added. Unknown fields are ignored, an unknown
//!   request is refused with its id, an unknown code is read as [`RefusalCode::Other`], and an unknown event is
//!   skipped.
//! - The daemon's hello states the [`LEVEL`] of additions that it understands. The shim does not send newer events to
//!   it.

use fermata_protocol::pause::FreezerKind;
use serde::{Deserialize, Serialize};

use fermata_protocol::supervision::TerminalSize;
use fermata_protocol::terminal::Bytes;

use super::record::ExitRecord;
use fermata_os::process::ProcessId;

pub const WIRE_VERSION: u32 = 1;

/// The number of additions within the version: 1 for [`ShimEvent::FreezeBroken`].
pub const LEVEL: u32 = 1;

/// The longest line in either direction, in bytes, including the newline.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// A line to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToShim {
    /// The first line of a connection.
    Hello {
        /// [`WIRE_VERSION`] of the sender.
        version: u32,
        /// [`LEVEL`] of the sender; the first builds did not send one.
        #[serde(default)]
        level: u32,
    },
    /// A request, answered by a reply or a refusal with the same id.
    Call(ShimCall),
}

/// A request with its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimCall {
    /// Chosen by the sender, unique among its open requests.
    pub id: u64,
    #[serde(flatten)]
    pub request: ShimRequest,
}

/// A request to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum ShimRequest {
    /// Asks for a [`Status`].
    Status {},
    /// Sends SIGTSTP to the agent's process group. Answered when its leader has stopped, or `grace_ms` is over.
    Quiesce {
        /// How long to wait for the leader.
        grace_ms: u64,
        /// The shim undoes the quiesce unless a freeze follows within this time.
        #[serde(default = "default_quiesce_lease_ms")]
        lease_ms: u64,
    },
    /// Freezes the whole tree for the duration of the lease.
    Freeze {
        /// The tree is thawed after this time, unless the lease is renewed or the freeze committed.
        lease_ms: u64,
    },
    /// Extends the lease of a frozen tree, from now.
    Renew { lease_ms: u64 },
    /// Makes the freeze permanent, since the pause has been committed.
    #[serde(rename = "hold")]
    Commit {},
    /// Undoes freeze and quiesce. Succeeds if there is nothing to undo.
    Thaw {},
    /// Sends a signal to the main process; SIGCONT is sent to its whole group, as by a shell that continues a stopped
    /// job.
    Signal { signal: i32 },
    /// Thaws the tree, sends SIGTERM to the group, and kills the tree when the grace is over. Answered when this has
    /// begun; the `exited` event follows.
    Stop {
        /// How long to wait; the launch spec has the default.
        #[serde(default)]
        grace_ms: Option<u64>,
    },
    /// Kills the whole tree. A frozen tree executes no further instruction. Answered when this has begun; the `exited`
    /// event follows.
    Kill {},
    /// Makes this connection a viewer of the agent's terminal: `screen` and `output` events follow.
    Watch {
        /// Starts with the lines that have left the screen.
        #[serde(default)]
        scrollback: bool,
    },
    /// Types into the agent's terminal.
    Type { data: Bytes },
    /// Resizes the agent's terminal.
    Resize(TerminalSize),
}

fn default_quiesce_lease_ms() -> u64 {
    10_000
}

/// A line from the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    /// The answer to a hello.
    Hello {
        /// [`WIRE_VERSION`] of the shim.
        version: u32,
        run_id: String,
        shim: ProcessId,
        /// Whether the agent has a terminal. A shim that does not support terminals omits the field.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        terminal: bool,
        /// Whether the main process has been stopped by another process, for instance by Ctrl-Z; `None` from a shim
        /// that does not report it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        suspended: Option<bool>,
    },
    /// The result of a request.
    Reply {
        /// The request's id.
        id: u64,
        /// The result of the method.
        ok: serde_json::Value,
    },
    /// A request, or the whole connection, was refused.
    Refusal {
        /// The request's id; `None` for a line that was not a request.
        id: Option<u64>,
        code: RefusalCode,
        /// A sentence for people.
        message: String,
    },
    Event(ShimEvent),
}

/// Why the shim refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The peer uses another version of the protocol.
    VersionMismatch,
    /// The line is not part of the protocol.
    BadRequest,
    LineTooLong,
    /// Another quiesce or freeze is under way.
    Busy,
    AlreadyFrozen,
    /// The tree is not frozen, or no longer.
    NotFrozen,
    /// The tree was frozen, and another process has let it run since.
    FreezeBroken,
    /// The freeze was not complete in time; everything was undone.
    FreezeTimeout,
    /// The freeze failed; everything was undone.
    FreezeFailed,
    /// A thaw, stop or kill superseded the request.
    Cancelled,
    /// The agent has ended or is being ended.
    Ending,
    /// The signal could not be sent.
    SignalFailed,
    ThawFailed,
    /// The agent has no terminal.
    NoTerminal,
    /// The agent is frozen, or about to be: input typed now would reach it unexpectedly later.
    #[serde(rename = "held")]
    AgentFrozen,
    /// The terminal has the maximum number of viewers.
    TooManyViewers,
    /// The terminal could not be resized.
    ResizeFailed,
    /// A code of a newer shim.
    #[serde(other)]
    Other,
}

/// The state of the agent's process tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TreeState {
    /// The main process runs.
    Running,
    /// The main process is stopped by a signal, of the shim or of another process.
    Stopped,
    /// The whole tree is frozen.
    Frozen,
    /// The agent has ended or is being ended.
    Ending,
}

/// The result of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The main process.
    pub agent: ProcessId,
    pub state: TreeState,
    /// How the tree is, or would be, frozen.
    pub mechanism: FreezerKind,
    /// Milliseconds until the shim thaws the tree; `None` if no lease is running.
    pub lease_remaining_ms: Option<u64>,
    /// Whether the freeze has been committed.
    #[serde(rename = "held")]
    pub committed: bool,
    /// The number of processes of the tree.
    pub processes: u64,
    /// Payload bytes of output lost so far, for instance because the disk is full.
    #[serde(default)]
    pub log_bytes_lost: u64,
}

/// How a quiesce has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuiesceOutcome {
    /// The leader has stopped.
    Stopped,
    /// The leader still ran when the grace was over.
    Ignored,
    /// The leader had been stopped by another process before.
    AlreadyStopped,
    /// The leader has ended.
    Exited,
}

/// The result of `quiesce`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesced {
    pub outcome: QuiesceOutcome,
    pub waited_ms: u64,
}

/// The result of `watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    pub size: TerminalSize,
}

/// The result of `type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Typed {
    /// How many bytes were accepted. The rest was dropped, since the agent does not read its input.
    pub bytes: u64,
}

/// The result of `freeze`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeReply {
    pub mechanism: FreezerKind,
    /// The number of frozen processes.
    pub processes: u64,
    /// The duration in microseconds.
    pub took_us: u64,
}

/// An event that the shim sends to every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimEvent {
    /// The agent has ended, no process of its tree is left, and `exit.json` is on disk.
    Exited(Box<ExitRecord>),
    /// A process other than the shim has stopped the main process.
    Stopped { signal: i32 },
    /// A process other than the shim has continued the main process.
    Continued {},
    /// The lease was not renewed: the shim has undone freeze and quiesce.
    LeaseExpired {},
    /// A process other than the shim has let a frozen tree run. Since [`LEVEL`] 1.
    FreezeBroken(FreezeBroken),
    /// To viewers: the screen has this size and is void; the output that follows draws it completely.
    Screen(TerminalSize),
    /// To viewers: bytes that the terminal shows.
    Output { data: Bytes },
}

impl ShimEvent {
    /// Returns the [`LEVEL`] that a peer needs to understand the event.
    pub fn level(&self) -> u32 {
        match self {
            Self::Exited(_) | Self::Stopped { .. } | Self::Continued {} | Self::LeaseExpired {} => 0,
            // These are sent only to connections that have asked to watch a terminal.
            Self::Screen(_) | Self::Output { .. } => 0,
            Self::FreezeBroken(_) => 1,
        }
    }
}

/// How a frozen tree has come to run. The counts start at the previous event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeBroken {
    /// How often the freeze was broken.
    pub times: u64,
    /// How many processes have run; 0 if a whole group was thawed.
    pub processes: u64,
    /// Whether the freeze had been committed. A freeze that had not been is void, and must be requested again.
    #[serde(rename = "held")]
    pub committed: bool,
    /// Whether the tree is frozen again.
    pub frozen_again: bool,
}

/// A line from a shim that may be newer than this build.
#[derive(Debug, PartialEq)]
pub enum LineFromShim {
    /// A line that this build understands.
    Understood(FromShim),
    /// An event of a newer shim, as JSON.
    NewerEvent(String),
}

/// Parses a line from the shim.
///
/// # Errors
/// If the line is not part of this protocol.
pub fn parse_line(line: &[u8]) -> Result<LineFromShim, serde_json::Error> {
    match serde_json::from_slice(line) {
        Ok(line) => Ok(LineFromShim::Understood(line)),
        Err(error) => match serde_json::from_slice::<serde_json::Value>(line) {
            Ok(value) if value.get("event").is_some() => Ok(LineFromShim::NewerEvent(value.to_string())),
            _ => Err(error),
        },
    }
}

/// Returns the id of a call that is otherwise not understood, so that its refusal can refer to it.
pub fn id_of_call(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?.pointer("/call/id")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip_call(line: &str, request: ShimRequest) {
        let call = ToShim::Call(ShimCall { id: 1, request });
        assert_eq!(serde_json::to_string(&call).unwrap(), line);
        assert_eq!(serde_json::from_str::<ToShim>(line).unwrap(), call);
    }

    #[test]
    fn every_request_has_its_golden_line() {
        round_trip_call(r#"{"call":{"id":1,"method":"status","params":{}}}"#, ShimRequest::Status {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"quiesce","params":{"grace_ms":200,"lease_ms":9}}}"#,
            ShimRequest::Quiesce { grace_ms: 200, lease_ms: 9 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"freeze","params":{"lease_ms":5000}}}"#,
            ShimRequest::Freeze { lease_ms: 5000 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"renew","params":{"lease_ms":5}}}"#,
            ShimRequest::Renew { lease_ms: 5 },
        );
        round_trip_call(r#"{"call":{"id":1,"method":"hold","params":{}}}"#, ShimRequest::Commit {});
        round_trip_call(r#"{"call":{"id":1,"method":"thaw","params":{}}}"#, ShimRequest::Thaw {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"signal","params":{"signal":10}}}"#,
            ShimRequest::Signal { signal: 10 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"stop","params":{"grace_ms":null}}}"#,
            ShimRequest::Stop { grace_ms: None },
        );
        round_trip_call(r#"{"call":{"id":1,"method":"kill","params":{}}}"#, ShimRequest::Kill {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"watch","params":{"scrollback":true}}}"#,
            ShimRequest::Watch { scrollback: true },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"type","params":{"data":"bHM="}}}"#,
            ShimRequest::Type { data: Bytes(b"ls".to_vec()) },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"resize","params":{"rows":24,"cols":80}}}"#,
            ShimRequest::Resize(TerminalSize { rows: 24, cols: 80 }),
        );
    }

    #[test]
    fn events_and_unknown_refusals_are_understood() {
        let line = r#"{"event":{"stopped":{"signal":20}}}"#;
        let event = FromShim::Event(ShimEvent::Stopped { signal: 20 });
        assert_eq!(serde_json::to_string(&event).unwrap(), line);
        let line = r#"{"refusal":{"id":4,"code":"from_the_future","message":"x"}}"#;
        match serde_json::from_str::<FromShim>(line).unwrap() {
            FromShim::Refusal { code: RefusalCode::Other, id: Some(4), .. } => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_hello_of_another_version_is_still_a_hello() {
        let line = r#"{"hello":{"version":99,"new_field":true}}"#;
        assert_eq!(serde_json::from_str::<ToShim>(line).unwrap(), ToShim::Hello { version: 99, level: 0 });
    }
}
