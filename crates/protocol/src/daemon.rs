//! The daemon itself: greeting, status, reload.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{Target, UnixMillis};

/// What a peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// May read.
    Reader,
    /// May report for one agent, and see that agent's own things.
    Agent,
    /// May run, pause, resume, restore.
    Operator,
    /// May do everything.
    Admin,
}

impl Role {
    /// Returns the text of the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Agent => "agent",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// Parameters of `hello`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The oldest protocol version that the client speaks.
    pub min: u32,
    /// The newest one.
    pub max: u32,
    /// The client's name and version.
    pub client: String,
    /// An agent's per-launch token (`FERMATA_TOKEN`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Limits of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// The longest line, bytes.
    pub line_bytes: u64,
    /// The most concurrent requests on one connection.
    pub in_flight: u64,
}

/// Result of `hello`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HelloResult {
    /// The protocol version of this connection.
    pub protocol: u32,
    /// The daemon's version.
    pub version: String,
    /// The peer's role.
    pub role: Role,
    /// The agent that the peer is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Target>,
    /// Limits of the connection.
    pub limits: Limits,
    /// Changes with every start of the daemon.
    pub boot_epoch: String,
}

/// Parameters of `rpc.discover`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Discover {}

/// Parameters of `daemon.status`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DaemonStatus {}

/// Result of `daemon.status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonStatusResult {
    /// The daemon's version.
    pub version: String,
    pub pid: u32,
    pub started_at: UnixMillis,
    /// Its state directory.
    pub state_dir: String,
    pub socket: String,
    /// How agents are frozen: `cgroup`, or `signals` and why.
    pub freezer: String,
    /// How many projects there are.
    pub projects: u64,
    /// How many agents run.
    pub agents_running: u64,
    /// What recovery did at the start.
    pub recovery: Vec<String>,
}

/// Parameters of `daemon.reload`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DaemonReload {}

/// Result of `daemon.reload`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonReloadResult {
    /// The settings that changed.
    pub changed: Vec<String>,
    /// The settings that changed in the file but need a restart.
    pub needs_restart: Vec<String>,
}
