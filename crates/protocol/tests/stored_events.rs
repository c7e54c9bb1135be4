//! Events that were stored once are read for ever: one line of each kind, as a database holds it.
//!
//! A new kind gets a line; a line that is here is never changed.

use std::collections::BTreeSet;

use fermata_protocol::event::Event;
use serde_json::Value;

const STORED: &str = include_str!("golden/events.jsonl");

#[test]
fn every_stored_event_is_read_and_written_as_it_was() {
    for line in STORED.lines() {
        let event: Event = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let stored: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(stored["kind"], event.kind(), "{line}");
        let written = serde_json::to_value(&event).expect("serialises");
        assert_eq!(written, stored, "{line}");
    }
}

#[test]
fn there_is_a_line_for_every_kind() {
    let kept: BTreeSet<String> =
        STORED.lines().map(|line| serde_json::from_str::<Event>(line).expect("an event").kind().to_owned()).collect();
    let schema = fermata_protocol::openrpc::document();
    let recorded = &schema["components"]["schemas"]["RecordedEvent"]["oneOf"];
    let kinds: BTreeSet<String> = recorded
        .as_array()
        .expect("one schema per kind")
        .iter()
        .filter_map(|one| one["properties"]["kind"]["const"].as_str().map(str::to_owned))
        .collect();
    assert!(kinds.len() > 30, "{kinds:?}");
    assert_eq!(kept, kinds);
}
