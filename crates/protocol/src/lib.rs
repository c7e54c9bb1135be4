//! Wire types of the Fermata control protocol: requests, replies, events, errors, ids,
//! the NDJSON line codec and a blocking client.
//!
//! Nothing here does I/O except [`client`], and nothing here decides: rules live in
//! `fermata-core`, work in `fermata-daemon`.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

pub mod agent;
pub mod budget;
pub mod checkpoint;
pub mod client;
pub mod codec;
pub mod context;
pub mod daemon;
pub mod error;
pub mod event;
pub mod ids;
pub mod load;
pub mod method;
pub mod openrpc;
pub mod operation;
pub mod paths;
pub mod pause;
pub mod plugin;
pub mod project;
pub mod question;
pub mod retention;
pub mod rpc;
pub mod subscription;
pub mod supervision;
pub mod task;
pub mod terminal;
pub mod transfer;

pub use error::{Code, ErrorObject, Refusal, error_chain};
pub use ids::{AgentName, CheckpointNumber, OperationId, ProjectName, RunId, Target, UnixMillis};
pub use rpc::PROTOCOL_VERSION;

/// The longest line, in bytes without its newline, that either side accepts.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// The most concurrent requests of one connection.
pub const MAX_IN_FLIGHT: usize = 64;
