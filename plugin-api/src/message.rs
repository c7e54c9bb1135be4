//! The JSON documents that cross the ABI, as serde types.
//!
//! For compatibility, both sides ignore unknown members, and new members are optional.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// Writes artifacts of a checkpoint: [`SaveRequest`] -> [`SaveReply`].
pub const CHECKPOINT_SAVE: &str = "checkpoint.save";
/// Restores artifacts: [`RestoreRequest`] -> [`RestoreReply`].
pub const CHECKPOINT_RESTORE: &str = "checkpoint.restore";
/// Delivers one event: [`NotifyRequest`] -> an empty reply.
pub const NOTIFY: &str = "notify";

/// A capability of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PluginKind {
    /// Adds artifacts to checkpoints.
    Checkpoint,
    /// Delivers notifications.
    Notify,
    /// A capability that this version does not know.
    #[serde(other)]
    Unknown,
}

/// What a plugin reports about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The name of the plugin.
    pub name: String,
    /// The version of the plugin.
    pub version: String,
    /// The capabilities.
    #[serde(default)]
    pub kind: Vec<PluginKind>,
    /// The JSON schema of the settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Value>,
}

impl Description {
    /// Describes a plugin without a schema for its settings.
    pub fn new(name: &str, version: &str, kind: impl IntoIterator<Item = PluginKind>) -> Self {
        Self { name: name.to_owned(), version: version.to_owned(), kind: kind.into_iter().collect(), settings: None }
    }
}

/// The error of a call to a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallError {
    /// Stable snake_case code.
    pub code: String,
    /// One sentence for users.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl CallError {
    /// The code of a method that the plugin does not offer; the host does not treat it as an error.
    pub const UNSUPPORTED: &'static str = "unsupported";
    /// The code of a call that was cancelled by the host.
    pub const CANCELLED: &'static str = "cancelled";

    /// Creates an error without a hint.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None }
    }

    /// The plugin, or its configuration, does not offer this method.
    pub fn unsupported(what: &str) -> Self {
        Self::new(Self::UNSUPPORTED, format!("{what} is not supported"))
    }

    /// The call was cancelled by the host.
    pub fn cancelled() -> Self {
        Self::new(Self::CANCELLED, "the call was cancelled")
    }

    /// Adds a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CallError {}

/// A running agent of the project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentProcess {
    /// The name of the agent, unique in the project.
    pub name: String,
    /// The pid of its main process, if it runs.
    #[serde(default)]
    pub pid: Option<i32>,
    /// The absolute path of its cgroup directory, if it has one.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

/// Parameters of `checkpoint.save`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// The name of the project.
    pub project: String,
    /// The number of the checkpoint.
    pub checkpoint: String,
    /// The id of the operation.
    pub operation: String,
    /// The absolute path of the workspace.
    pub workspace: PathBuf,
    /// The absolute path of an empty directory for the artifacts.
    pub directory: PathBuf,
    /// The agents of the project.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
    /// Whether the agents are frozen during the call.
    #[serde(default)]
    pub frozen: bool,
    /// The time in milliseconds after which the host gives up on the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// A file that a plugin has written to the directory of a [`SaveRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The path of a regular file, relative to the directory.
    pub path: PathBuf,
    /// The media type, such as `application/octet-stream`.
    #[serde(default)]
    pub media_type: Option<String>,
    /// A short description for users.
    #[serde(default)]
    pub description: Option<String>,
}

/// Result of `checkpoint.save`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReply {
    /// All files that belong to the checkpoint.
    #[serde(default)]
    pub artifacts: Vec<Artifact>,
}

/// Parameters of `checkpoint.restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The name of the project.
    pub project: String,
    /// The number of the restored checkpoint.
    pub checkpoint: String,
    /// The id of the operation.
    pub operation: String,
    /// The absolute path of the workspace.
    pub workspace: PathBuf,
    /// The absolute path of the directory with the artifacts, which must not be modified.
    pub directory: PathBuf,
    /// The agents at the time of the checkpoint.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
    /// The time in milliseconds after which the host gives up on the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// Result of `checkpoint.restore`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReply {
    /// The agents that the plugin has restarted, with their new pids.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
}

/// Parameters of `notify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NotifyRequest {
    /// The event, as in the wire protocol.
    pub event: Value,
    /// The time in milliseconds after which the host gives up on the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// Returns the name of an event, such as `project.paused`: its member `type`, else `kind`.
pub fn event_name(event: &Value) -> Option<&str> {
    ["type", "kind"].iter().find_map(|member| event.get(member).and_then(Value::as_str))
}

/// Says whether the name of an event matches one of the patterns, such as `project.paused`, `project.*` or `*`.
///
/// A `*` matches any number of characters, including dots.
pub fn event_matches<S: AsRef<str>>(patterns: &[S], name: &str) -> bool {
    patterns.iter().any(|pattern| glob(pattern.as_ref().as_bytes(), name.as_bytes()))
}

/// Backtracks to the last `*` only, hence takes O(pattern * name) in the worst case.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut last_star: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            last_star = Some((p, n));
            p += 1;
        } else if pattern.get(p) == name.get(n) {
            p += 1;
            n += 1;
        } else if let Some((star, start)) = last_star {
            p = star + 1;
            n = start + 1;
            last_star = Some((star, n));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pattern_matches_whole_names_only() {
        assert!(event_matches(&["project.paused"], "project.paused"));
        assert!(!event_matches(&["project.paused"], "project.paused_by"));
        assert!(!event_matches(&["paused"], "project.paused"));
        assert!(event_matches(&["agent.*", "project.*"], "project.paused"));
        assert!(event_matches(&["*.paused"], "project.paused"));
        assert!(event_matches(&["*"], "anything"));
        assert!(event_matches(&["a*b*c"], "aXbYbZc"));
        assert!(!event_matches(&["a*b*c"], "aXbYbZ"));
        assert!(!event_matches::<&str>(&[], "anything"));
    }

    #[test]
    fn the_name_of_an_event_is_its_type() {
        assert_eq!(event_name(&json!({"type": "a.b", "kind": "c"})), Some("a.b"));
        assert_eq!(event_name(&json!({"kind": "c"})), Some("c"));
        assert_eq!(event_name(&json!([1])), None);
    }

    #[test]
    fn unknown_kinds_and_members_are_tolerated() {
        let description: Description = serde_json::from_value(json!({
            "name": "x", "version": "1", "kind": ["notify", "teleport"], "later": true
        }))
        .unwrap();
        assert_eq!(description.kind, [PluginKind::Notify, PluginKind::Unknown]);
    }
}
