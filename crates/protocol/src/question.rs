//! Questions: requests for human input, durable until they are answered.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{AgentName, ProjectName, Target, UnixMillis};

/// A question as `question.list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct QuestionView {
    pub project: ProjectName,
    /// Its number inside the project.
    pub id: u64,
    /// The agent that asks.
    pub agent: AgentName,
    pub text: String,
    /// Answers to choose from; any text when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
    pub asked_at: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_at: Option<UnixMillis>,
}

/// Parameters of `question.ask`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuestionAsk {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    pub text: String,
    /// Answers to choose from; any text when empty.
    #[serde(default)]
    pub choices: Vec<String>,
}

/// Parameters of `question.wait`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuestionWait {
    /// The project; the caller's own when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    pub id: u64,
    /// How long to wait at most, milliseconds; for ever when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// Parameters of `question.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuestionList {
    /// Only those of this project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    /// Also those that were answered.
    #[serde(default)]
    pub all: bool,
}

/// Result of `question.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct QuestionListResult {
    /// The questions, by project and number.
    pub questions: Vec<QuestionView>,
}

/// Parameters of `question.answer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuestionAnswer {
    pub project: ProjectName,
    pub id: u64,
    pub answer: String,
}
