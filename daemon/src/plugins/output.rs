//! What a plugin prints and logs, on its way to the daemon's log: bounded in every direction.
//!
//! Lines are cut, a flood is thinned out and counted, and the last few lines are kept to be shown
//! beside an error. Never blocks and never fails a call.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest line that is kept, in bytes.
const MAX_LINE: usize = 2048;
/// Lines that are kept.
const RECENT: usize = 20;
/// Lines per period that reach the log.
const BURST: u32 = 100;
const PERIOD: Duration = Duration::from_secs(1);

/// Cuts a line to the most that is kept of one (2 KiB), at a character.
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

/// The output of one plugin, over all of its host processes.
#[derive(Debug, Clone)]
pub struct Output {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    plugin: String,
    recent: VecDeque<String>,
    period: Instant,
    lines: u32,
    suppressed: u64,
}

impl Output {
    /// Starts empty.
    pub fn new(plugin: &str) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                plugin: plugin.to_owned(),
                recent: VecDeque::new(),
                period: Instant::now(),
                lines: 0,
                suppressed: 0,
            })),
        }
    }

    /// The last lines, oldest first.
    pub fn recent(&self) -> Vec<String> {
        self.lock().recent.iter().cloned().collect()
    }

    /// Takes a line that the plugin has logged.
    pub fn logged(&self, level: &str, message: &str) {
        self.take(level, "log", message);
    }

    /// Reads lines until the stream ends.
    pub async fn follow(self, source: &'static str, mut stream: impl AsyncRead + Unpin) {
        let level = if source == "stderr" { "warn" } else { "info" };
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        // An error here means what the end means: nothing more will come.
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            for byte in &chunk[..count] {
                match byte {
                    b'\n' => {
                        self.take(level, source, &String::from_utf8_lossy(&line));
                        line.clear();
                    }
                    // A little more than is shown, so that the cut is marked.
                    byte if line.len() < MAX_LINE + 8 => line.push(*byte),
                    _ => {}
                }
            }
        }
        if !line.is_empty() {
            self.take(level, source, &String::from_utf8_lossy(&line));
        }
    }

    fn take(&self, level: &str, source: &str, line: &str) {
        let line = shortened(line.trim_end());
        let mut inner = self.lock();
        if inner.period.elapsed() >= PERIOD {
            if inner.suppressed > 0 {
                tracing::warn!(
                    plugin = inner.plugin,
                    lines = inner.suppressed,
                    "the plugin wrote too much: lines were left out"
                );
            }
            inner.period = Instant::now();
            inner.lines = 0;
            inner.suppressed = 0;
        }
        inner.recent.push_back(line.clone());
        if inner.recent.len() > RECENT {
            inner.recent.pop_front();
        }
        inner.lines += 1;
        if inner.lines > BURST {
            inner.suppressed += 1;
            return;
        }
        let plugin = inner.plugin.as_str();
        match level {
            "error" => tracing::error!(plugin, source, "{line}"),
            "warn" => tracing::warn!(plugin, source, "{line}"),
            "info" => tracing::info!(plugin, source, "{line}"),
            _ => tracing::debug!(plugin, source, "{line}"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Lines and counters cannot be left half-changed in a way that matters.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_cut_and_only_the_last_ones_are_kept() {
        let output = Output::new("p");
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
