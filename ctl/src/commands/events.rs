//! `events`: lists recorded events and follows new ones.

use std::io;

use fermata_protocol::subscription::RecordedEvent;
use fermata_protocol::subscription::{EventFilter, EventNotification, EventsList, EventsSubscribe};
use serde::Deserialize as _;
use serde_json::Value;

use crate::cli::EventsArgs;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Format, Paint, Printer};
use crate::session::DaemonSession;
use crate::terminal_text::{clean, truncate};
use crate::units::local;

pub fn events(session: &mut DaemonSession, args: EventsArgs) -> CommandResult {
    let filter = EventFilter { project: args.project, kinds: args.kind };
    if args.follow { follow(session, args.since_cursor, &filter) } else { list(session, args.since_cursor, &filter) }
}

fn list(session: &mut DaemonSession, mut cursor: Option<String>, filter: &EventFilter) -> CommandResult {
    loop {
        let page = session.call(&EventsList { cursor: cursor.clone(), filter: filter.clone(), limit: None })?;
        for event in &page.events {
            show(&mut session.out, event)?;
        }
        // A page may be empty because the filter took nothing of it; the cursor then still moved.
        if page.events.is_empty() && cursor.as_ref() == Some(&page.cursor) {
            return Ok(0);
        }
        cursor = Some(page.cursor);
    }
}

fn follow(session: &mut DaemonSession, mut cursor: Option<String>, filter: &EventFilter) -> CommandResult {
    loop {
        let subscribed =
            session.call_across_restarts(&EventsSubscribe { cursor: cursor.clone(), filter: filter.clone() })?;
        // From here on a daemon that comes back is asked for what follows this cursor.
        cursor.get_or_insert(subscribed.cursor);
        while let Some(notification) = session.next_notification()? {
            if notification.method != "event" {
                continue;
            }
            let event = EventNotification::deserialize(&notification.params).map_err(|e| {
                CommandError::local(format!("cannot parse an event: {e}"))
                    .hint("run fermatactl version to compare the versions of client and daemon")
            })?;
            if event.subscription != subscribed.subscription {
                continue;
            }
            show(&mut session.out, &event.event)?;
            session.out.flush()?;
            cursor = Some(event.event.cursor);
        }
    }
}

fn show(out: &mut Printer, event: &RecordedEvent) -> io::Result<()> {
    match out.format() {
        Format::Json => out.json(event),
        Format::Ids => out.line(clean(&event.cursor)),
        Format::Human => {
            let at = Paint::Dim.apply(&local(event.at), out.color());
            let kind = event.event.kind();
            let data = serde_json::to_value(&event.event)?;
            let summary = summary(data.get("data").unwrap_or(&Value::Null));
            let line = format!("{at}  {:<12}  {kind:<22}  {summary}", event.project.as_str());
            out.line(line.trim_end())
        }
    }
}

/// Writes an event's simple fields as `name=value`; what is nested is there with `--json`.
fn summary(data: &Value) -> String {
    let Value::Object(fields) = data else {
        return String::new();
    };
    let mut parts = Vec::new();
    for (name, value) in fields {
        let text = match value {
            Value::Null | Value::Object(_) => continue,
            Value::Array(items) if items.iter().any(|i| i.is_object() || i.is_array()) => continue,
            Value::String(text) if text.is_empty() => continue,
            Value::String(text) if !text.contains([' ', '\n']) => text.clone(),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => value.to_string(),
        };
        parts.push(format!("{name}={}", truncate(&clean(&text), 60)));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_summary_has_the_simple_fields() {
        let data = json!({"agent": "coder", "text": "a b", "nested": {"x": 1}, "none": null, "ids": [1, 2]});
        let mut parts: Vec<_> = summary(&data).split(' ').map(str::to_owned).collect();
        parts.sort();
        assert_eq!(parts.join(" "), "agent=coder b\" ids=[1,2] text=\"a");
    }
}
