//! Operations: long actions with an id, steps and a result.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::ErrorObject;
use crate::ids::{OperationId, ProjectName, UnixMillis};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Pauses a project.
    Pause,
    /// Resumes a project.
    Resume,
    /// Makes a checkpoint.
    Checkpoint,
    /// Restores a checkpoint.
    Restore,
}

impl OperationKind {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
        }
    }
}

/// Where an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// A step is in progress.
    Running,
    /// A step failed, and what was done is being undone.
    Undoing,
    /// Ended as asked.
    Succeeded,
    /// Ended in failure.
    Failed,
    /// Ended because someone cancelled it.
    Cancelled,
}

impl OperationState {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// An operation as `operation.show` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OperationView {
    pub id: OperationId,
    pub project: ProjectName,
    pub kind: OperationKind,
    pub state: OperationState,
    /// The step in progress, or the one that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// How long each concluded step took, milliseconds.
    pub steps_ms: BTreeMap<String, f64>,
    pub started_at: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<UnixMillis>,
    /// The result, when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// The error, when it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorObject>,
}

/// Parameters of `operation.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationList {
    /// Only those of this project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    /// The most entries, newest first; 50 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Result of `operation.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OperationListResult {
    /// The operations, newest first.
    pub operations: Vec<OperationView>,
}

/// Parameters of `operation.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationShow {
    pub operation_id: OperationId,
}

/// Parameters of `operation.cancel`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationCancel {
    pub operation_id: OperationId,
}
