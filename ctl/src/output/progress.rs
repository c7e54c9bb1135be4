//! The progress line of a long call: fed by `$/progress` notifications, drawn on stderr if that is a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use fermata_protocol::rpc::Notification;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

use crate::terminal_text::clean;

/// The parameters of a `$/progress` notification; unknown members are ignored.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ProgressUpdate {
    /// The name of the step in progress.
    pub step: String,
    /// How many units of the step are done.
    #[serde(default)]
    pub done: Option<u64>,
    /// How many units the step has.
    #[serde(default)]
    pub total: Option<u64>,
    /// The unit: `bytes`, `files`, `agents` …
    #[serde(default)]
    pub unit: Option<String>,
}

impl ProgressUpdate {
    /// Returns `None` for a notification of another kind.
    pub fn read(notification: &Notification) -> Option<Self> {
        if notification.method != "$/progress" {
            return None;
        }
        Self::deserialize(&notification.params).ok()
    }
}

/// A spinner or bar that is erased when dropped.
#[derive(Debug)]
pub struct ProgressLine {
    bar: Option<ProgressBar>,
}

impl ProgressLine {
    /// Draws nothing when `wanted` is false or stderr is not a terminal.
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

    pub fn show(&self, notification: &Notification) {
        let Some(bar) = &self.bar else { return };
        let Some(update) = ProgressUpdate::read(notification) else {
            return;
        };
        bar.set_message(clean(&update.step));
        match update.total {
            Some(total) if total > 0 => {
                bar.set_style(bar_style(update.unit.as_deref()));
                bar.set_length(total);
                bar.set_position(update.done.unwrap_or(0).min(total));
            }
            _ => bar.set_style(spinner()),
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The template of a step whose size is not known.
const SPINNER: &str = "{spinner} {prefix}: {msg} [{elapsed}]";

fn spinner() -> ProgressStyle {
    style(SPINNER)
}

fn bar_style(unit: Option<&str>) -> ProgressStyle {
    style(&bar_template(unit))
}

fn bar_template(unit: Option<&str>) -> String {
    let counts = match unit {
        Some("bytes") => "{bytes}/{total_bytes}".into(),
        // Braces would begin a placeholder.
        Some(unit) => format!("{{pos}}/{{len}} {}", clean(unit).replace(['{', '}'], "")),
        None => "{pos}/{len}".to_owned(),
    };
    format!("{{spinner}} {{prefix}}: {{msg}} [{{bar:24}}] {counts}")
}

/// Falls back to the default style for a template that does not parse.
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
        let update = ProgressUpdate::read(&progress).expect("progress");
        assert_eq!((update.done, update.total), (Some(3), Some(9)));
        assert_eq!(ProgressUpdate::read(&Notification::new("event", json!({}))), None);
    }

    #[test]
    fn every_template_parses() {
        let units = [None, Some("bytes"), Some("files"), Some("{x}")];
        for template in units.map(bar_template).into_iter().chain([SPINNER.into()]) {
            assert!(ProgressStyle::with_template(&template).is_ok(), "{template}");
        }
    }
}
