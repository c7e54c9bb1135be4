//! Plugins: drop-in shared objects, each in its own host process.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::UnixMillis;

/// Where a plugin stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    /// Its host is being started.
    Starting,
    /// It takes calls.
    Running,
    /// Switched off.
    Disabled,
    /// Its host ended; it will be started again.
    Backoff,
    /// It crashed too often and stays off until it is enabled or reloaded.
    Quarantined,
    /// It could not be loaded.
    Failed,
}

/// A plugin as `plugin.list` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginView {
    pub name: String,
    /// The path of the shared object.
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What it does: `checkpoint`, `notify`.
    pub kinds: Vec<String>,
    pub state: PluginState,
    /// How often its host was started again.
    pub restarts: u64,
    /// How many calls it has answered.
    pub calls: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Since when it is in that state.
    pub since: UnixMillis,
    /// The process id of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}

/// Parameters of `plugin.list`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginList {}

/// Parameters of `plugin.reload`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginReload {}

/// Result of `plugin.list` and `plugin.reload`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginListResult {
    /// The plugins, by name.
    pub plugins: Vec<PluginView>,
}

/// Parameters of `plugin.enable`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginEnable {
    /// The plugin.
    pub name: String,
    /// Whether it takes calls.
    pub enabled: bool,
}

/// Parameters of `plugin.check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginCheck {
    /// The absolute path of a shared object, loaded in a host of its own that ends afterwards.
    pub path: String,
}

/// Result of `plugin.check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PluginCheckResult {
    /// The name that the plugin gives itself.
    pub name: String,
    pub version: String,
    /// What it does.
    pub kinds: Vec<String>,
}
