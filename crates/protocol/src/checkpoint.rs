//! Checkpoints: restorable points of a project.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::ids::{CheckpointNumber, OperationId, ProjectName, UnixMillis};
use crate::rpc::shorten;
use crate::task::Phase;

/// The longest name of a checkpoint, in characters.
pub const MAX_CHECKPOINT_NAME: usize = 100;

/// The longest description of a checkpoint, in characters.
pub const MAX_CHECKPOINT_DESCRIPTION: usize = 500;

/// What made a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// A person asked for it.
    Manual,
    /// It was due by time or progress.
    Auto,
    /// The phase of the work changed.
    PhaseTransition,
    /// A pause made it.
    Pause,
    /// An agent's time was over.
    Timeout,
    /// The daemon shut down.
    Shutdown,
    /// Taken before a restore, to be able to undo it.
    Safety,
}

impl Trigger {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Auto => "auto",
            Self::PhaseTransition => "phase_transition",
            Self::Pause => "pause",
            Self::Timeout => "timeout",
            Self::Shutdown => "shutdown",
            Self::Safety => "safety",
        }
    }
}

/// The state of the project at the moment of the checkpoint, in numbers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointMetadata {
    /// The phase of the work.
    pub phase: Phase,
    /// How many tasks there were.
    pub tasks_total: u64,
    /// How many of them were completed.
    pub tasks_done: u64,
    /// The agents that ran.
    pub active_agents: Vec<String>,
    /// The title of the task completed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_task_done: Option<String>,
    /// How many context items there were, archived ones included.
    pub context_items: u64,
    /// Tokens of the unarchived ones.
    pub context_tokens: u64,
    /// What the agents had cost, millionths of a US dollar.
    pub cost_micro_usd: u64,
    /// HEAD, branch and state of the user's repository, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<Value>,
    /// Files that the snapshot covers.
    pub files: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// How many paths were left out although no rule excludes them.
    pub skipped: u64,
    pub warnings: Vec<String>,
    /// How long each part took, milliseconds.
    pub parts_ms: BTreeMap<String, f64>,
}

/// A checkpoint as `checkpoint.list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointView {
    pub project: ProjectName,
    /// Its number.
    pub id: CheckpointNumber,
    /// Its name, at most 100 characters.
    pub name: String,
    /// Its description, at most 500 characters.
    pub description: String,
    /// What made it.
    pub trigger: Trigger,
    /// The format version of its files.
    pub format: u32,
    pub created_at: UnixMillis,
    /// The operation that made it.
    pub operation_id: OperationId,
    /// The reason of the pause that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_reason: Option<String>,
    /// The commit of the workspace snapshot in Fermata's own store.
    pub git_commit: String,
    /// The database backup's path.
    pub database_backup: String,
    /// The context snapshot's path.
    pub context_snapshot: String,
    /// SHA-256 of the manifest, in hexadecimal.
    pub manifest_sha256: String,
    /// Bytes that it added to the disk: its own files, and the contents that no earlier checkpoint has.
    pub size_bytes: u64,
    /// Whether retention must leave it alone.
    pub pinned: bool,
    pub metadata: CheckpointMetadata,
}

/// Parameters of `checkpoint.create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointCreate {
    /// The project; the caller's own when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default)]
    pub description: String,
}

/// Result of `checkpoint.create`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointCreateResult {
    pub operation_id: OperationId,
    /// The number of the checkpoint.
    pub checkpoint_id: CheckpointNumber,
    pub checkpoint: CheckpointView,
    /// How long the agents stood still, milliseconds.
    pub frozen_ms: f64,
    /// How long each step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    pub warnings: Vec<String>,
}

/// Parameters of `checkpoint.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointList {
    pub project: ProjectName,
    /// Only those before this number; for the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<CheckpointNumber>,
    /// The most entries, newest first; 200 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Result of `checkpoint.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointListResult {
    /// The checkpoints, newest first.
    pub checkpoints: Vec<CheckpointView>,
    /// Bytes that all checkpoints of the project take on disk, those of other pages included.
    #[serde(default)]
    pub disk_bytes: u64,
}

/// Parameters of `checkpoint.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointShow {
    pub project: ProjectName,
    pub checkpoint: CheckpointNumber,
}

/// A path that a snapshot left out although no rule excludes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkippedPath {
    /// The path inside the workspace; bytes that are no UTF-8 are replaced.
    pub path: String,
    /// Why: `too_large`, `unreadable`, `special` (a socket, FIFO or device), `unsteady` (it became something
    /// else whenever it was to be read) or `reserved` (its name is git's own, in another case).
    pub reason: String,
    /// What the system said, or the size, or the kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The kind of a part of a checkpoint; on the wire and in manifests its text, for instance `plugin:exec`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartKind {
    /// The snapshot of the workspace: a commit in Fermata's own store, the only part that is no file.
    Workspace,
    /// The database backup.
    Database,
    /// The context snapshot.
    Context,
    /// A transcript of a tool's session.
    Transcript,
    /// An artifact of the plugin of this name.
    Plugin(String),
}

impl fmt::Display for PartKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workspace => f.pad("workspace"),
            Self::Database => f.pad("database"),
            Self::Context => f.pad("context"),
            Self::Transcript => f.pad("transcript"),
            Self::Plugin(name) => f.pad(&format!("plugin:{name}")),
        }
    }
}

impl FromStr for PartKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "workspace" => Ok(Self::Workspace),
            "database" => Ok(Self::Database),
            "context" => Ok(Self::Context),
            "transcript" => Ok(Self::Transcript),
            _ => match text.strip_prefix("plugin:") {
                Some(name) => Ok(Self::Plugin(name.to_owned())),
                None => Err(format!("'{}' is no kind of checkpoint part", shorten(text))),
            },
        }
    }
}

impl Serialize for PartKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PartKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for PartKind {
    fn schema_name() -> Cow<'static, str> {
        "PartKind".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "`workspace`, `database`, `context`, `transcript` or `plugin:<name>`.",
            "pattern": "^(workspace|database|context|transcript|plugin:.*)$",
        })
    }
}

/// One part of a checkpoint, as its manifest names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManifestPart {
    pub kind: PartKind,
    /// The path inside the checkpoint's directory; the commit for the workspace.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 in hexadecimal; the git object id for the workspace.
    pub sha256: String,
}

/// The file `manifest.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    /// The format version.
    pub format: u32,
    pub project: ProjectName,
    pub checkpoint: CheckpointNumber,
    pub created_at: UnixMillis,
    pub parts: Vec<ManifestPart>,
}

/// Result of `checkpoint.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDetail {
    pub checkpoint: CheckpointView,
    pub manifest: Manifest,
    /// What the snapshot left out although no rule excludes it; the first ones by path.
    pub skipped: Vec<SkippedPath>,
    /// How many there are in all.
    #[serde(default)]
    pub skipped_total: u64,
    /// Files that changed whenever they were read: what is saved of them may be of several moments.
    /// The first ones by path.
    #[serde(default)]
    pub torn: Vec<String>,
    /// How many there are in all.
    #[serde(default)]
    pub torn_total: u64,
}

/// Parameters of `checkpoint.diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointDiff {
    pub project: ProjectName,
    /// The older point.
    pub from: CheckpointNumber,
    /// The newer point; the workspace as it is now when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<CheckpointNumber>,
    /// Whether the reply holds the text of the changes.
    #[serde(default)]
    pub patch: bool,
}

/// What happened to a path between two points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It is gone.
    Removed,
    /// Its bytes changed.
    Modified,
    /// It became another kind of file.
    TypeChanged,
    /// Only its mode changed.
    ModeChanged,
    /// Only its extended attributes changed.
    AttributesChanged,
}

/// A path that differs between two points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangedPath {
    /// The path inside the workspace, with control characters, `%` and bytes that are not UTF-8 as `%XX`.
    pub path: String,
    pub change: ChangeKind,
    /// The size before, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_bytes: Option<u64>,
    /// The size after, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<u64>,
}

/// Result of `checkpoint.diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointDiffResult {
    /// The paths that differ, by path; of very many the first.
    pub changes: Vec<ChangedPath>,
    /// How many differ in all.
    #[serde(default)]
    pub changes_total: u64,
    /// The unified diff of the text files among them, when it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
}

/// Parameters of `checkpoint.restore`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRestore {
    pub project: ProjectName,
    pub checkpoint: CheckpointNumber,
    /// Only shows what would change.
    #[serde(default)]
    pub dry_run: bool,
    /// Restores only these files and directories, and neither tasks nor context: paths inside the workspace, with
    /// control characters, `%` and bytes that are not UTF-8 as `%XX`. Everything when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
}

/// A path that a restore leaves as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeftPath {
    /// The path inside the workspace.
    pub path: String,
    pub reason: String,
}

/// The most paths that one restore takes.
pub const MAX_RESTORE_PATHS: usize = 1_000;

/// Result of `checkpoint.restore`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointRestoreResult {
    /// The operation; none for a dry run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// The checkpoint that was restored.
    pub checkpoint_id: CheckpointNumber,
    /// The checkpoint of what was there before; restoring it undoes the restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_checkpoint_id: Option<CheckpointNumber>,
    /// What changed, or for a dry run would change, in the workspace; of very many paths the first.
    pub changes: Vec<ChangedPath>,
    /// How many paths that are.
    #[serde(default)]
    pub changes_total: u64,
    /// How many paths were written.
    pub written: u64,
    /// How many paths were removed.
    pub removed: u64,
    /// The paths that were asked for, when not everything was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// What stays as it is although the checkpoint has something else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_alone: Vec<LeftPath>,
    /// The command that undoes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// How long each step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    pub warnings: Vec<String>,
}

/// Parameters of `checkpoint.verify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointVerify {
    pub project: ProjectName,
    /// One checkpoint; all of them when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointNumber>,
}

/// What a verification found of one checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VerifiedCheckpoint {
    pub checkpoint_id: CheckpointNumber,
    /// Whether every part is there and unchanged.
    pub good: bool,
    pub problems: Vec<String>,
}

/// Result of `checkpoint.verify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CheckpointVerifyResult {
    /// One entry per checkpoint.
    pub checkpoints: Vec<VerifiedCheckpoint>,
}

/// Parameters of `checkpoint.pin`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPin {
    pub project: ProjectName,
    pub checkpoint: CheckpointNumber,
    /// Whether retention must leave it alone.
    pub pinned: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_parts_are_texts_and_unknown_ones_are_refused() {
        for (kind, text) in [
            (PartKind::Workspace, "workspace"),
            (PartKind::Database, "database"),
            (PartKind::Context, "context"),
            (PartKind::Transcript, "transcript"),
            (PartKind::Plugin("exec".into()), "plugin:exec"),
        ] {
            assert_eq!(serde_json::to_value(&kind).expect("serialises"), text);
            assert_eq!(text.parse(), Ok(kind));
        }
        let error = "picture".parse::<PartKind>().expect_err("unknown");
        assert!(error.contains("picture"), "{error}");
    }
}
