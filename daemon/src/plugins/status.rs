//! What can be seen of a plugin from outside: the rows of `plugin ls`.

use fermata_plugin_api::PluginKind;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where a plugin stands.
///
/// ```text
///   disabled <-> starting -> running
///                 ^  |  \      |
///       (backoff) |  |   +-----+-- crash: starting again, or quarantined
///                 +--+
///   starting -> failed: refused, and nothing changes that but a new file or new settings
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    /// Its host answers.
    Running,
    /// Its host is being started, or waits for its turn after a crash.
    Starting,
    /// Somebody has switched it off.
    Disabled,
    /// It has crashed too often.
    Quarantined,
    /// It cannot be used as it is (see `last_error`).
    Failed,
}

/// One row of `plugin ls`.
#[derive(Debug, Clone, Serialize)]
pub struct PluginStatus {
    /// Name from its file name.
    pub name: String,
    /// The shared object.
    pub path: PathBuf,
    /// Its version, once it has said so.
    pub version: Option<String>,
    /// What it can do, once it has said so.
    pub kinds: Vec<PluginKind>,
    /// Where it stands.
    pub state: PluginState,
    /// How often its host was started again after a crash.
    pub restarts: u64,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
    /// Since when it is in this state, in milliseconds since 1970.
    pub since_ms: u64,
    /// Process id of its host.
    pub pid: Option<u32>,
    /// Calls made to it.
    pub calls: u64,
    /// Calls of those that failed.
    pub failed_calls: u64,
    /// Events that it was not told because its queue was full or it was out of order.
    pub dropped_events: u64,
    /// Its settings file, when there is one.
    pub settings_file: Option<PathBuf>,
    /// The last lines that it has logged or printed.
    pub recent_output: Vec<String>,
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
