//! Context items: what agents know, scored and tiered; nothing is ever deleted.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{AgentName, ProjectName, Target, UnixMillis};

/// The largest text of one item, in bytes.
pub const MAX_ITEM_BYTES: usize = 256 << 10;

/// What kind of knowledge an item is; its weight in the score depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ItemType {
    /// Something to do.
    Task,
    /// Source code.
    Code,
    /// An error that happened.
    Error,
    /// The outcome of a test.
    TestResult,
    /// A section of a requirements document.
    PrdSection,
    /// Anything else.
    Other,
}

impl ItemType {
    /// Every type.
    pub const ALL: [Self; 6] = [Self::Task, Self::Code, Self::Error, Self::TestResult, Self::PrdSection, Self::Other];

    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Task => "TASK",
            Self::Code => "CODE",
            Self::Error => "ERROR",
            Self::TestResult => "TEST_RESULT",
            Self::PrdSection => "PRD_SECTION",
            Self::Other => "OTHER",
        }
    }
}

/// How close an item is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Always handed back.
    Hot,
    /// Handed back.
    Warm,
    /// Archived by the next flash save.
    Cold,
}

impl Tier {
    /// Returns the text of the wire and of the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// An item to put.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NewItem {
    #[serde(rename = "type")]
    pub kind: ItemType,
    /// Its text, at most 256 KiB.
    pub text: String,
    /// Whether it always stays hot.
    #[serde(default)]
    pub pinned: bool,
}

/// Parameters of `context.put`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextPut {
    /// The agent; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    pub items: Vec<NewItem>,
}

/// Result of `context.put`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ContextPutResult {
    /// The new items' ids, in the order given.
    pub ids: Vec<i64>,
    /// Their tokens together.
    pub tokens: u64,
    /// Tokens of the agent's unarchived items afterwards.
    pub total_tokens: u64,
    /// How many items a flash save that became due archived.
    pub items_archived: u64,
}

/// An item as `context.list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ContextItem {
    pub id: i64,
    /// The agent that knows it.
    pub agent: AgentName,
    #[serde(rename = "type")]
    pub kind: ItemType,
    pub tokens: u64,
    /// Its score when it was scored last, 0 to 1.
    pub score: f64,
    /// Its tier when it was scored last.
    pub tier: Tier,
    /// Whether it always stays hot.
    pub pinned: bool,
    /// Whether it is archived: still searchable, no longer handed back.
    pub archived: bool,
    /// How often it was read.
    pub access_count: u64,
    pub created_at: UnixMillis,
    /// The text, or its beginning in lists.
    pub text: String,
}

/// Parameters of `context.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextList {
    /// A project or one of its agents; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Only this tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
    /// Only archived, or only unarchived ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<bool>,
    /// Only ids below this one; for the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
    /// The most entries, newest first; 100 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Result of `context.list` and `context.search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ContextListResult {
    pub items: Vec<ContextItem>,
}

/// Parameters of `context.show`; reading an item counts as an access.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextShow {
    /// The project; the caller's own when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    pub id: i64,
}

/// Parameters of `context.pin`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextPin {
    /// The project; the caller's own when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    pub id: i64,
    /// Whether it always stays hot.
    pub pinned: bool,
}

/// Parameters of `context.search`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextSearch {
    /// A project or one of its agents; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// Words that the text must hold, archived items included.
    pub query: String,
    /// The most entries, best first; 20 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Parameters of `context.recall`: brings archived items back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextRecall {
    /// The project; the caller's own when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    pub ids: Vec<i64>,
}

/// Parameters of `context.flash_save`: re-score, re-tier, archive the cold items.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContextFlashSave {
    /// A project or one of its agents; the caller itself when an agent calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
}

/// What a flash save did.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct FlashSaveResult {
    /// Tokens of the unarchived items before.
    pub tokens_before: u64,
    /// The same after.
    pub tokens_after: u64,
    /// How many items were archived.
    pub items_archived: u64,
    pub tokens_archived: u64,
    /// How many hot items stay.
    pub hot_items_retained: u64,
    /// How many warm items stay.
    pub warm_items_retained: u64,
}

/// What the agents of a project know, in numbers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct ContextSummary {
    /// Items, archived ones included.
    pub items: u64,
    /// Archived items.
    pub archived: u64,
    /// Tokens of the unarchived ones.
    pub tokens: u64,
    /// Unarchived hot items.
    pub hot: u64,
    /// Unarchived warm items.
    pub warm: u64,
    /// Unarchived cold items.
    pub cold: u64,
}
