//! Reading events: which, from where on, and how they are sent.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::ids::{ProjectName, UnixMillis};

/// An event with its place in the order of all events.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RecordedEvent {
    /// Where a subscriber goes on after this event.
    pub cursor: String,
    pub at: UnixMillis,
    pub project: ProjectName,
    #[serde(flatten)]
    pub event: Event,
}

/// Which events a subscriber wants; what is left out does not filter.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EventFilter {
    /// Only those of this project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectName>,
    /// Only these kinds; `pause.*` means all that begin with `pause.`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
}

impl EventFilter {
    /// Says whether an event of that kind passes the filter's kinds.
    pub fn takes_kind(&self, kind: &str) -> bool {
        self.kinds.is_empty()
            || self.kinds.iter().any(|wanted| match wanted.strip_suffix('*') {
                Some(prefix) => kind.starts_with(prefix),
                None => wanted == kind,
            })
    }
}

/// Parameters of `events.subscribe`; events come as `event` notifications.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventsSubscribe {
    /// Go on after this event; from now on when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default)]
    pub filter: EventFilter,
}

/// Result of `events.subscribe`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventsSubscribeResult {
    /// The subscription, named in each of its notifications.
    pub subscription: u64,
    /// Where it begins.
    pub cursor: String,
}

/// Parameters of `events.unsubscribe`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventsUnsubscribe {
    pub subscription: u64,
}

/// Parameters of `events.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventsList {
    /// Go on after this event; from the oldest when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default)]
    pub filter: EventFilter,
    /// The most entries; 200 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// Result of `events.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EventsListResult {
    /// The events, oldest first.
    pub events: Vec<RecordedEvent>,
    /// Where the next call goes on.
    pub cursor: String,
}

/// Parameters of an `event` notification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EventNotification {
    pub subscription: u64,
    pub event: RecordedEvent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_know_prefixes() {
        let filter = EventFilter { project: None, kinds: vec!["pause.*".into(), "task.changed".into()] };
        assert!(filter.takes_kind("pause.started") && filter.takes_kind("task.changed"));
        assert!(!filter.takes_kind("task.changedx") && !filter.takes_kind("project.paused"));
    }
}
