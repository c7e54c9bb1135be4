//! Agents that a workspace's `fermata.toml` declares: how what is stored of an agent is compared
//! with what a file says of it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::agent::{AgentSpec, AgentView};
use crate::ids::Target;

/// Where an agent was declared, and as what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Declared {
    /// The absolute path of the file.
    pub file: String,
    /// SHA-256 of what the file says of the agent, in hexadecimal. The client that declares it
    /// chooses the form; values of variables are not in it, since a digest of a short secret is no
    /// secret.
    pub sha256: String,
}

/// Parameters of `agent.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentShow {
    /// The agent.
    pub target: Target,
    /// Variables to compare with those that it is started with, which are never shown.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// Result of `agent.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgentDetail {
    /// What `agent.list` shows.
    pub agent: AgentView,
    /// How it is started, without its environment.
    pub spec: AgentSpec,
    /// Whether it ended by itself with exit code 0, rather than because a person stopped it.
    pub completed: bool,
    /// The names of those of the given variables that it is not started with, or with another value.
    pub env_differs: Vec<String>,
}
