//! The JSON documents that travel through the ABI, as serde types.
//!
//! Documents grow: unknown members are ignored on both sides and new ones are optional.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// Method that writes artifacts of a checkpoint: [`SaveRequest`] -> [`SaveReply`].
pub const CHECKPOINT_SAVE: &str = "checkpoint.save";
/// Method that brings artifacts back: [`RestoreRequest`] -> [`RestoreReply`].
pub const CHECKPOINT_RESTORE: &str = "checkpoint.restore";
/// Method that delivers one event: [`NotifyRequest`] -> nothing.
pub const NOTIFY: &str = "notify";

/// What a plugin can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Adds artifacts to checkpoints.
    Checkpoint,
    /// Delivers notifications.
    Notify,
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// Who a plugin says it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Its own name.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// What it can do.
    #[serde(default)]
    pub kind: Vec<Kind>,
    /// JSON schema of its settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Value>,
}

impl Description {
    /// Describes a plugin without a schema for its settings.
    pub fn new(name: &str, version: &str, kind: impl IntoIterator<Item = Kind>) -> Self {
        Self { name: name.to_owned(), version: version.to_owned(), kind: kind.into_iter().collect(), settings: None }
    }
}

/// Why a plugin could not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable snake_case code.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Failure {
    /// The code that means "not offered": the host does not treat it as an error.
    pub const UNSUPPORTED: &'static str = "unsupported";
    /// The code that means "given up because the host asked for it".
    pub const CANCELLED: &'static str = "cancelled";

    /// Makes a failure without a hint.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None }
    }

    /// Says that this is not offered, by this plugin or with its present settings.
    pub fn unsupported(what: &str) -> Self {
        Self::new(Self::UNSUPPORTED, format!("{what} is not offered"))
    }

    /// Says that the call was given up because the host asked for it.
    pub fn cancelled() -> Self {
        Self::new(Self::CANCELLED, "the call was cancelled")
    }

    /// Adds what to do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// One agent of the project, as it runs at this instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentProcess {
    /// Name inside its project.
    pub name: String,
    /// Its first process, when it has one.
    #[serde(default)]
    pub pid: Option<i32>,
    /// Its cgroup (absolute path in the file system), when it has one.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

/// Parameters of `checkpoint.save`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// Name of the project.
    pub project: String,
    /// Id of the checkpoint that is being made.
    pub checkpoint: String,
    /// Id of the operation it belongs to.
    pub operation: String,
    /// Absolute path of the workspace.
    pub workspace: PathBuf,
    /// Absolute path of an empty directory to put artifacts into.
    pub directory: PathBuf,
    /// The agents of the project.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
    /// Whether the agents are frozen for as long as the call lasts.
    #[serde(default)]
    pub frozen: bool,
    /// Milliseconds until the host gives up on this call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// One file that a plugin has left in the directory it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Path relative to the directory; a regular file.
    pub path: PathBuf,
    /// Media type, such as `application/octet-stream`.
    #[serde(default)]
    pub media_type: Option<String>,
    /// A few words for people.
    #[serde(default)]
    pub description: Option<String>,
}

/// Result of `checkpoint.save`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReply {
    /// Every file that belongs to the checkpoint.
    #[serde(default)]
    pub artifacts: Vec<Artifact>,
}

/// Parameters of `checkpoint.restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Name of the project.
    pub project: String,
    /// Id of the checkpoint that is brought back.
    pub checkpoint: String,
    /// Id of the operation it belongs to.
    pub operation: String,
    /// Absolute path of the workspace.
    pub workspace: PathBuf,
    /// Absolute path of the directory with the artifacts; not to be changed.
    pub directory: PathBuf,
    /// The agents as they were when the checkpoint was made.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
    /// Milliseconds until the host gives up on this call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// Result of `checkpoint.restore`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReply {
    /// Agents that run again, with their new pids.
    #[serde(default)]
    pub agents: Vec<AgentProcess>,
}

/// Parameters of `notify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NotifyRequest {
    /// The event, as on the wire.
    pub event: Value,
    /// Milliseconds until the host gives up on this call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

/// Finds the name of an event (`project.paused`): its member `type`, or else `kind`.
pub fn event_name(event: &Value) -> Option<&str> {
    ["type", "kind"].iter().find_map(|member| event.get(member).and_then(Value::as_str))
}

/// Says whether an event's name fits one of the patterns: `project.paused`, `project.*` or `*`.
///
/// A `*` stands for any number of any characters, dots included.
pub fn event_matches<S: AsRef<str>>(patterns: &[S], name: &str) -> bool {
    patterns.iter().any(|pattern| glob(pattern.as_ref().as_bytes(), name.as_bytes()))
}

/// Matches with one mark to go back to, hence in O(pattern * name) at worst.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut mark: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            mark = Some((p, n));
            p += 1;
        } else if pattern.get(p) == name.get(n) {
            p += 1;
            n += 1;
        } else if let Some((star, start)) = mark {
            p = star + 1;
            n = start + 1;
            mark = Some((star, n));
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
    fn an_event_is_named_by_its_type() {
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
        assert_eq!(description.kind, [Kind::Notify, Kind::Unknown]);
    }
}
