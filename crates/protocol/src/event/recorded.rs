//! An event as the journal has it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Event;
use crate::ids::{ProjectName, UnixMillis};

/// An event with its place in the order of all events.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RecordedEvent {
    /// Where a subscriber goes on after this event.
    pub cursor: String,
    /// When it was recorded.
    pub at: UnixMillis,
    /// The project.
    pub project: ProjectName,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}
