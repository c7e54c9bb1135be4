//! The progress bar of long work: fed by `$/progress`, drawn on stderr, and only on a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use fermata_protocol::rpc::Notification;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

use super::table::clean;

/// What a `$/progress` notification carries; unknown fields are left alone.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Step {
    /// The step under way.
    pub step: String,
    /// How much of it is done.
    #[serde(default)]
    pub done: Option<u64>,
    /// How much there is to do.
    #[serde(default)]
    pub total: Option<u64>,
    /// What is counted: `bytes`, `files`, `agents` …
    #[serde(default)]
    pub unit: Option<String>,
}

impl Step {
    /// Reads a notification, `None` when it is no progress.
    pub fn read(notification: &Notification) -> Option<Self> {
        if notification.method != "$/progress" {
            return None;
        }
        Self::deserialize(&notification.params).ok()
    }
}

/// A bar that shows itself once there is something to show, and leaves nothing behind.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins; nothing is ever drawn off a terminal or when `wanted` is false.
    pub fn begin(label: &str, wanted: bool) -> Self {
        if !wanted || !std::io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::new_spinner();
        bar.set_style(spinner());
        bar.set_prefix(clean(label));
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar: Some(bar) }
    }

    /// Shows what a notification says.
    pub fn watch(&self, notification: &Notification) {
        let Some(bar) = &self.bar else { return };
        let Some(step) = Step::read(notification) else {
            return;
        };
        bar.set_message(clean(&step.step));
        match step.total {
            Some(total) if total > 0 => {
                bar.set_style(counted(step.unit.as_deref()));
                bar.set_length(total);
                bar.set_position(step.done.unwrap_or(0).min(total));
            }
            _ => bar.set_style(spinner()),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The looks of a step whose size is not known.
const SPINNER: &str = "{spinner} {prefix}: {msg} [{elapsed}]";

fn spinner() -> ProgressStyle {
    style(SPINNER)
}

fn counted(unit: Option<&str>) -> ProgressStyle {
    style(&counted_template(unit))
}

fn counted_template(unit: Option<&str>) -> String {
    let counts = match unit {
        Some("bytes") => "{bytes}/{total_bytes}".into(),
        // Braces would begin a placeholder.
        Some(unit) => format!("{{pos}}/{{len}} {}", clean(unit).replace(['{', '}'], "")),
        None => "{pos}/{len}".to_owned(),
    };
    format!("{{spinner}} {{prefix}}: {{msg}} [{{bar:24}}] {counts}")
}

/// A template that does not parse costs the looks, not the command.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner()).progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn progress_is_read_and_other_notifications_are_not() {
        let progress = Notification::new(
            "$/progress",
            json!({"operation_id": "op-1", "step": "snapshot", "done": 3, "total": 9, "unit": "files"}),
        );
        let step = Step::read(&progress).expect("progress");
        assert_eq!((step.done, step.total), (Some(3), Some(9)));
        assert_eq!(Step::read(&Notification::new("event", json!({}))), None);
    }

    #[test]
    fn every_template_parses() {
        let units = [None, Some("bytes"), Some("files"), Some("{x}")];
        for template in units.map(counted_template).into_iter().chain([SPINNER.into()]) {
            assert!(ProgressStyle::with_template(&template).is_ok(), "{template}");
        }
    }
}
