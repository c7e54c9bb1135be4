//! The shim's protocol: JSON, one object per line, over a Unix socket of its own.
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
//! Daemon and shim can be of different builds (an upgrade leaves old shims running), hence the
//! version. The rule:
//!
//! - Another version is refused, in words that name both. Nothing is done to the agent then: it
//!   goes on under its shim, and the daemon says why it cannot be reached.
//! - Within a version fields, requests, events and codes are only added. Unknown fields are
//!   ignored, an unknown request is refused with its id, an unknown code is [`RefusalCode::Other`],
//!   an unknown event is passed over.
//! - The daemon says in its hello up to which [`LEVEL`] it knows the additions; the shim keeps
//!   events from a peer that is too old for them.

use fermata_protocol::pause::FreezerKind;
use serde::{Deserialize, Serialize};

use fermata_protocol::supervision::TerminalSize;
use fermata_protocol::terminal::Bytes;

use super::record::ExitRecord;
use fermata_os::process::ProcessId;

/// The version of this protocol.
pub const WIRE_VERSION: u32 = 1;

/// What has been added within the version, counted: 1 for [`ShimEvent::FreezeBroken`].
pub const LEVEL: u32 = 1;

/// The longest line, newline included, in either direction.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// A line to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToShim {
    /// Must come first.
    Hello {
        /// [`WIRE_VERSION`] of the sender.
        version: u32,
        /// [`LEVEL`] of the sender; the first builds did not say.
        #[serde(default)]
        level: u32,
    },
    /// A request, to be answered by a reply or a refusal with the same id.
    Call(Call),
}

/// A request with its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the sender, unique among its open requests.
    pub id: u64,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Request {
    /// How the agent is.
    Status {},
    /// SIGTSTP to the agent's process group; answered when its leader has stopped, or `grace_ms` is over.
    Quiesce {
        /// How long to wait for the leader.
        grace_ms: u64,
        /// The shim undoes it unless a freeze follows within so long.
        #[serde(default = "default_quiesce_lease_ms")]
        lease_ms: u64,
    },
    /// Freezes the whole tree for as long as the lease lasts.
    Freeze {
        /// Unless renewed or held, the tree is thawed after so long.
        lease_ms: u64,
    },
    /// Extends the lease of a frozen tree, from now.
    Renew {
        /// The new lease.
        lease_ms: u64,
    },
    /// Makes the freeze permanent: the pause was committed.
    Hold {},
    /// Undoes freeze and quiesce; fine when there is nothing to undo.
    Thaw {},
    /// Sends a signal to the main process; SIGCONT to its whole group, as a shell does that lets a
    /// stopped job go on.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// Thaws, sends SIGTERM to the group, and kills the tree when the grace is over. Answered when
    /// it has begun; the `exited` event follows.
    Stop {
        /// How long to wait; by default what the launch spec says.
        #[serde(default)]
        grace_ms: Option<u64>,
    },
    /// Kills the whole tree; a frozen one does not run once more. Answered when it has begun; the
    /// `exited` event follows.
    Kill {},
    /// Makes this connection a viewer of the agent's terminal: `screen` and `output` events follow.
    Watch {
        /// Begin with the lines that have left the screen.
        #[serde(default)]
        scrollback: bool,
    },
    /// Types into the agent's terminal.
    Type {
        /// What is typed.
        data: Bytes,
    },
    /// Gives the agent's terminal another size.
    Resize(TerminalSize),
}

fn default_quiesce_lease_ms() -> u64 {
    10_000
}

/// A line from the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    /// Answers a hello.
    Hello {
        /// [`WIRE_VERSION`] of the shim.
        version: u32,
        /// Which run this is.
        run_id: String,
        /// Who answers.
        shim: ProcessId,
        /// Whether the agent has a terminal. A shim that knows none says nothing.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        terminal: bool,
        /// Whether somebody else, a Ctrl-Z for instance, has stopped the main process; none from a
        /// shim that does not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        suspended: Option<bool>,
    },
    /// The result of a request.
    Reply {
        /// The request's id.
        id: u64,
        /// What the method answers.
        ok: serde_json::Value,
    },
    /// A request, or the whole connection, was refused.
    Refusal {
        /// The request's id; none for a line that was not a request.
        id: Option<u64>,
        /// A stable code.
        code: RefusalCode,
        /// A sentence for people.
        message: String,
    },
    /// Something happened.
    Event(ShimEvent),
}

/// Why the shim refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The versions of the two sides differ.
    VersionMismatch,
    /// The line was not understood.
    BadRequest,
    /// The line was too long.
    LineTooLong,
    /// Another quiesce or freeze is under way.
    Busy,
    /// The tree is frozen already.
    AlreadyFrozen,
    /// The tree is not frozen (any more).
    NotFrozen,
    /// The tree was frozen, and somebody else has let it run since.
    FreezeBroken,
    /// The freeze was not complete in time; everything was undone.
    FreezeTimeout,
    /// The freeze failed; everything was undone.
    FreezeFailed,
    /// A thaw, stop or kill came in between.
    Cancelled,
    /// The agent has ended or is being ended.
    Ending,
    /// The signal could not be sent.
    SignalFailed,
    /// The thaw did not work.
    ThawFailed,
    /// The agent has no terminal.
    NoTerminal,
    /// The agent is frozen, or about to be: what is typed now would reach it by surprise later.
    Held,
    /// So many watch already.
    TooManyViewers,
    /// The terminal could not be resized.
    ResizeFailed,
    /// A code of a newer shim.
    #[serde(other)]
    Other,
}

/// What the agent does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// It runs.
    Running,
    /// Its main process is stopped by a signal, ours or another's.
    Stopped,
    /// The whole tree is frozen.
    Frozen,
    /// It has ended or is being ended.
    Ending,
}

/// Answers `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The main process.
    pub agent: ProcessId,
    /// What it does.
    pub state: AgentState,
    /// How frozen it would be.
    pub mechanism: FreezerKind,
    /// Milliseconds until the shim thaws by itself; none when nothing is pending.
    pub lease_remaining_ms: Option<u64>,
    /// Whether the freeze is permanent.
    pub held: bool,
    /// How many processes the tree has.
    pub processes: u64,
    /// Payload bytes of output that a full disk has cost so far.
    #[serde(default)]
    pub log_bytes_lost: u64,
}

/// How a quiesce ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuiesceOutcome {
    /// The leader stopped.
    Stopped,
    /// The leader still ran when the grace was over.
    Ignored,
    /// The leader had been stopped by somebody else before.
    AlreadyStopped,
    /// The leader ended.
    Exited,
}

/// Answers `quiesce`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesced {
    /// How it ended.
    pub outcome: QuiesceOutcome,
    /// How long it took.
    pub waited_ms: u64,
}

/// Answers `watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    /// The size of the terminal.
    pub size: TerminalSize,
}

/// Answers `type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Typed {
    /// How many bytes were taken; the rest finds no place, since the agent does not read.
    pub bytes: u64,
}

/// Answers `freeze`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// How it was done.
    pub mechanism: FreezerKind,
    /// How many processes stand still.
    pub processes: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// What the shim tells unasked, to every connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimEvent {
    /// The agent has ended, nothing of its tree is left, and `exit.json` is on disk.
    Exited(Box<ExitRecord>),
    /// Somebody else stopped the main process.
    Stopped {
        /// By which signal.
        signal: i32,
    },
    /// Somebody else continued it.
    Continued {},
    /// Nobody renewed the lease: the shim has undone freeze and quiesce.
    LeaseExpired {},
    /// Somebody else let a frozen tree run. Since [`LEVEL`] 1.
    FreezeBroken(FreezeBroken),
    /// To viewers: what was shown is void, and the output that follows draws everything anew.
    Screen(TerminalSize),
    /// To viewers: what the terminal shows.
    Output {
        /// The bytes.
        data: Bytes,
    },
}

impl ShimEvent {
    /// The [`LEVEL`] that a peer needs to understand it.
    pub fn level(&self) -> u32 {
        match self {
            Self::Exited(_) | Self::Stopped { .. } | Self::Continued {} | Self::LeaseExpired {} => 0,
            // Only to those who have asked to see a terminal.
            Self::Screen(_) | Self::Output { .. } => 0,
            Self::FreezeBroken(_) => 1,
        }
    }
}

/// How a frozen tree came to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeBroken {
    /// How often since this was told last.
    pub times: u64,
    /// How many processes have run since this was told last; 0 when a whole group was thawed.
    pub processes: u64,
    /// Whether the freeze was permanent; otherwise whoever relies on it has to begin anew.
    pub held: bool,
    /// Whether all stand still again.
    pub frozen_again: bool,
}

/// What a line of the shim turned out to be.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// One that is known.
    Known(FromShim),
    /// An event of a newer shim, as it was.
    Newer(String),
}

/// Understands a line of the shim.
///
/// # Errors
/// When it is no line of this protocol.
pub fn hear(line: &[u8]) -> Result<Heard, serde_json::Error> {
    match serde_json::from_slice(line) {
        Ok(known) => Ok(Heard::Known(known)),
        Err(error) => match serde_json::from_slice::<serde_json::Value>(line) {
            Ok(value) if value.get("event").is_some() => Ok(Heard::Newer(value.to_string())),
            _ => Err(error),
        },
    }
}

/// Finds the id of a call that is not understood, so that it can be refused by it.
pub fn id_of_call(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<serde_json::Value>(line).ok()?.pointer("/call/id")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip_call(line: &str, request: Request) {
        let call = ToShim::Call(Call { id: 1, request });
        assert_eq!(serde_json::to_string(&call).unwrap(), line);
        assert_eq!(serde_json::from_str::<ToShim>(line).unwrap(), call);
    }

    #[test]
    fn every_request_has_its_golden_line() {
        round_trip_call(r#"{"call":{"id":1,"method":"status","params":{}}}"#, Request::Status {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"quiesce","params":{"grace_ms":200,"lease_ms":9}}}"#,
            Request::Quiesce { grace_ms: 200, lease_ms: 9 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"freeze","params":{"lease_ms":5000}}}"#,
            Request::Freeze { lease_ms: 5000 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"renew","params":{"lease_ms":5}}}"#,
            Request::Renew { lease_ms: 5 },
        );
        round_trip_call(r#"{"call":{"id":1,"method":"hold","params":{}}}"#, Request::Hold {});
        round_trip_call(r#"{"call":{"id":1,"method":"thaw","params":{}}}"#, Request::Thaw {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"signal","params":{"signal":10}}}"#,
            Request::Signal { signal: 10 },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"stop","params":{"grace_ms":null}}}"#,
            Request::Stop { grace_ms: None },
        );
        round_trip_call(r#"{"call":{"id":1,"method":"kill","params":{}}}"#, Request::Kill {});
        round_trip_call(
            r#"{"call":{"id":1,"method":"watch","params":{"scrollback":true}}}"#,
            Request::Watch { scrollback: true },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"type","params":{"data":"bHM="}}}"#,
            Request::Type { data: Bytes(b"ls".to_vec()) },
        );
        round_trip_call(
            r#"{"call":{"id":1,"method":"resize","params":{"rows":24,"cols":80}}}"#,
            Request::Resize(TerminalSize { rows: 24, cols: 80 }),
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
