//! Copies what a plugin prints and logs to the daemon's log, within limits.
//!
//! Long lines are cut, lines above the rate limit are counted instead of logged, and the last lines are kept for
//! `plugin ls`. Never blocks and never fails a call.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest line, in bytes.
const MAX_LINE: usize = 2048;
/// The number of last lines that are kept.
const RECENT: usize = 20;
/// The number of lines per period that are logged.
const BURST: u32 = 100;
const PERIOD: Duration = Duration::from_secs(1);

/// Cuts a line to 2 KiB, at a character boundary.
pub fn shortened(line: &str) -> String {
    if line.len() <= MAX_LINE {
        return line.to_owned();
    }
    let mut end = MAX_LINE;
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &line[..end])
}

/// The output of one plugin, across restarts of its host. Clones share it.
#[derive(Debug, Clone)]
pub struct PluginOutput {
    state: Arc<Mutex<OutputState>>,
}

#[derive(Debug)]
struct OutputState {
    plugin: String,
    recent: VecDeque<String>,
    /// When the current period began.
    period: Instant,
    lines: u32,
    suppressed: u64,
}

impl PluginOutput {
    pub fn new(plugin: &str) -> Self {
        Self {
            state: Arc::new(Mutex::new(OutputState {
                plugin: plugin.to_owned(),
                recent: VecDeque::new(),
                period: Instant::now(),
                lines: 0,
                suppressed: 0,
            })),
        }
    }

    /// Returns the last lines, oldest first.
    pub fn recent(&self) -> Vec<String> {
        self.lock().recent.iter().cloned().collect()
    }

    /// Records a line that the plugin has logged.
    pub fn logged(&self, level: &str, message: &str) {
        self.record(level, "log", message);
    }

    /// Reads lines until the stream ends.
    pub async fn follow(self, source: &'static str, mut stream: impl AsyncRead + Unpin) {
        let level = if source == "stderr" { "warn" } else { "info" };
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        // An error counts as the end.
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            for byte in &chunk[..count] {
                match byte {
                    b'\n' => {
                        self.record(level, source, &String::from_utf8_lossy(&line));
                        line.clear();
                    }
                    // A few bytes more than the limit, so that the line is marked as cut.
                    byte if line.len() < MAX_LINE + 8 => line.push(*byte),
                    _ => {}
                }
            }
        }
        if !line.is_empty() {
            self.record(level, source, &String::from_utf8_lossy(&line));
        }
    }

    fn record(&self, level: &str, source: &str, line: &str) {
        let line = shortened(line.trim_end());
        let mut state = self.lock();
        if state.period.elapsed() >= PERIOD {
            if state.suppressed > 0 {
                tracing::warn!(
                    plugin = state.plugin,
                    lines = state.suppressed,
                    "the plugin wrote too many lines; some were not logged"
                );
            }
            state.period = Instant::now();
            state.lines = 0;
            state.suppressed = 0;
        }
        state.recent.push_back(line.clone());
        if state.recent.len() > RECENT {
            state.recent.pop_front();
        }
        state.lines += 1;
        if state.lines > BURST {
            state.suppressed += 1;
            return;
        }
        let plugin = state.plugin.as_str();
        match level {
            "error" => tracing::error!(plugin, source, "{line}"),
            "warn" => tracing::warn!(plugin, source, "{line}"),
            "info" => tracing::info!(plugin, source, "{line}"),
            _ => tracing::debug!(plugin, source, "{line}"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, OutputState> {
        // A panic under the lock leaves at worst a wrong counter.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut_and_only_the_last_ones_are_kept() {
        let output = PluginOutput::new("p");
        let mut text = "é".repeat(100_000).into_bytes();
        text.extend(b"\n".repeat(RECENT - 1));
        text.extend(b"no end");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(output.clone().follow("stdout", &text[..]));
        let recent = output.recent();
        assert_eq!(recent.len(), RECENT);
        assert_eq!(recent[RECENT - 1], "no end");
        output.logged("info", &"é".repeat(100_000));
        let last = output.recent().pop().unwrap();
        assert!(last.len() <= MAX_LINE + 3 && last.ends_with("é…"), "{}", last.len());
    }
}
