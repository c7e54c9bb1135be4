//! The status of a plugin: a row of `plugin ls`.

use fermata_plugin_api::PluginKind;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// The state of a plugin's host.
///
/// ```text
///   disabled <-> starting -> running
///                 ^  |  \      |
///       (backoff) |  |   +-----+-- crash: starting again, or quarantined
///                 +--+
///   starting -> failed: refused; only a new file or new settings change that
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// The host answers calls.
    Running,
    /// The host is being started, or waits for its restart after a crash.
    Starting,
    /// The user has disabled the plugin.
    Disabled,
    /// The host has crashed too often.
    Quarantined,
    /// The plugin cannot be used (see `last_error`).
    Failed,
}

/// One row of `plugin ls`.
#[derive(Debug, Clone, Serialize)]
pub struct PluginStatus {
    /// Name from its file name.
    pub name: String,
    /// The shared object.
    pub path: PathBuf,
    /// `None` until the first start.
    pub version: Option<String>,
    /// The functions that it offers; empty until the first start.
    pub kinds: Vec<PluginKind>,
    pub state: HostState,
    /// How often its host was started again after a crash.
    pub restarts: u64,
    pub last_error: Option<String>,
    /// When it entered its state, in milliseconds since 1970.
    pub since_ms: u64,
    /// Process id of its host.
    pub pid: Option<u32>,
    /// Calls made to it.
    pub calls: u64,
    /// The number of those calls that failed.
    pub failed_calls: u64,
    /// Events that it missed because its queue was full or its host was not running.
    pub dropped_events: u64,
    pub settings_file: Option<PathBuf>,
    /// The last lines that it has logged or printed.
    pub recent_output: Vec<String>,
}

/// Returns the time in milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
