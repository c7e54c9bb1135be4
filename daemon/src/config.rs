//! Settings: built-in defaults, overridden by the configuration file, the environment and flags, in this order.
//!
//! Paths are fixed at the start; a reload replaces [`Settings`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_os::cgroup::FreezerSetting;

use serde::Deserialize;
use thiserror::Error;

/// Why the configuration cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    #[error("read {}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The cause names line and key.
    #[error("parse {}", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("use {}: {why}", path.display())]
    Invalid {
        path: PathBuf,
        /// The value, and what is wrong with it.
        why: String,
    },
    #[error("find a {what} directory: neither ${first} nor $HOME is an absolute path")]
    NoHome {
        what: &'static str,
        /// The environment variable that takes precedence over `HOME`.
        first: &'static str,
    },
}

/// Paths given on the command line or in the environment.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    pub config: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub runtime_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub plugin_dir: Option<PathBuf>,
}

/// The paths that the daemon uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The configuration file; it need not exist.
    pub config: PathBuf,
    /// Whether the configuration file was given, and has to exist.
    pub config_is_wanted: bool,
    /// Database, checkpoints, logs.
    pub state: PathBuf,
    /// Sockets.
    pub runtime: PathBuf,
    pub socket: PathBuf,
    pub plugins: Vec<PathBuf>,
    pub plugin_settings: PathBuf,
    /// Profiles in addition to the embedded ones.
    pub profiles: PathBuf,
}

impl Paths {
    /// Returns the paths of a system daemon (`root`) or of a user's own, with overrides.
    ///
    /// # Errors
    /// A user's daemon has neither XDG variables nor a home.
    pub fn find(root: bool, overrides: &Overrides) -> Result<Self, SettingsError> {
        let (config_dir, state, runtime, plugins) = if root {
            ("/etc/fermata".into(), "/var/lib/fermata".into(), "/run/fermata".into(), "/usr/lib/fermata/plugins".into())
        } else {
            let config = xdg("config", "XDG_CONFIG_HOME", ".config")?.join("fermata");
            let state = xdg("state", "XDG_STATE_HOME", ".local/state")?.join("fermata");
            let runtime = match std::env::var_os("XDG_RUNTIME_DIR") {
                Some(dir) => PathBuf::from(dir).join("fermata"),
                None => state.join("run"),
            };
            let plugins = xdg("data", "XDG_DATA_HOME", ".local/share")?.join("fermata/plugins");
            (config, state, runtime, plugins)
        };
        let runtime = overrides.runtime_dir.clone().unwrap_or(runtime);
        let config = overrides.config.clone();
        // Plugin settings and profiles are in the directory of the configuration file.
        let config_dir: PathBuf = config.as_ref().and_then(|c| c.parent().map(Path::to_owned)).unwrap_or(config_dir);
        Ok(Self {
            config_is_wanted: config.is_some(),
            config: config.unwrap_or_else(|| config_dir.join("fermata.toml")),
            state: overrides.state_dir.clone().unwrap_or(state),
            socket: overrides.socket.clone().unwrap_or_else(|| runtime.join("fermata.sock")),
            runtime,
            plugins: vec![overrides.plugin_dir.clone().unwrap_or(plugins)],
            plugin_settings: config_dir.join("plugins.d"),
            profiles: config_dir.join("profiles.d"),
        })
    }
}

fn xdg(what: &'static str, variable: &'static str, below_home: &str) -> Result<PathBuf, SettingsError> {
    let absolute = |path: std::ffi::OsString| Some(PathBuf::from(path)).filter(|path| path.is_absolute());
    std::env::var_os(variable)
        .and_then(absolute)
        .or_else(|| std::env::var_os("HOME").and_then(absolute).map(|home| home.join(below_home)))
        .ok_or(SettingsError::NoHome { what, first: variable })
}

/// What the daemon does with the agents at shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnShutdown {
    /// They keep running; the next daemon adopts them.
    #[default]
    Leave,
    /// Every active project is paused and its agents are parked.
    Park,
}

/// The section `[pause]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PauseSettings {
    /// How long an agent without a channel has to stop by itself after SIGTSTP.
    pub grace_ms: u64,
    /// How long an agent with a channel has to acknowledge.
    pub channel_grace_ms: u64,
    /// How long agents stay frozen when the daemon does not renew the lease of a freeze.
    pub lease_ms: u64,
    /// A pause or checkpoint is refused if less space than this is free.
    pub disk_floor_bytes: u64,
    /// Whether a checkpoint of running agents freezes them even if that takes signals.
    pub blip_with_signals: bool,
}

impl Default for PauseSettings {
    fn default() -> Self {
        Self {
            grace_ms: 200,
            channel_grace_ms: 2_000,
            lease_ms: 10_000,
            disk_floor_bytes: 64 << 20,
            blip_with_signals: false,
        }
    }
}

/// The section `[agents]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentSettings {
    /// Which mechanism freezes agents.
    pub freezer: FreezerSetting,
    /// The parent of the agents' control groups; the daemon's own group when left out.
    pub cgroup_parent: Option<PathBuf>,
    /// How long a stop waits between SIGTERM and SIGKILL.
    pub stop_grace_ms: u64,
    /// The size at which a log file is rotated; 0 for never.
    pub log_max_bytes: u64,
    /// How many rotated log files are kept; 0 for all.
    pub log_max_files: u32,
    /// How long a live shim may go without an answer before it and its agent are ended; the agent then counts as
    /// interrupted.
    pub shim_patience_ms: u64,
    /// The age of its first line at which a log file is rotated by the next write; 0 for never.
    pub log_max_age_ms: u64,
    /// How many runs of an agent keep their logs, the current one included; 0 for all.
    pub keep_runs: u32,
    /// An agent that was frozen longer than this is started again instead of thawed if its session can be continued,
    /// since its network connections have timed out.
    pub stale_after_ms: u64,
}

impl Default for AgentSettings {
    fn default() -> Self {
        Self {
            freezer: FreezerSetting::Auto,
            cgroup_parent: None,
            stop_grace_ms: 10_000,
            log_max_bytes: 16 << 20,
            log_max_files: 8,
            shim_patience_ms: 20_000,
            log_max_age_ms: 7 * 24 * 3_600_000,
            keep_runs: 10,
            stale_after_ms: 15 * 60_000,
        }
    }
}

/// How a project is paused under memory pressure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPressure {
    /// Its processes are ended, which frees their memory.
    #[default]
    Park,
    /// Its processes stay frozen: useful only with swap.
    Freeze,
}

/// The section `[pressure]`: automatic pauses. Without a bound nothing is watched.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PressureSettings {
    /// The percentage of `some avg10` of the kernel's memory pressure at which the project that uses the most memory is
    /// paused.
    pub memory_some_avg10: Option<f64>,
    /// How it is paused.
    pub memory_mode: OnPressure,
    /// The free space of a file system below which the projects that write there are paused.
    pub disk_free_bytes: Option<u64>,
    /// How long a pause for memory has to take effect before the next project is paused.
    pub settle_ms: u64,
    /// The shortest time between two automatic pauses of a project.
    pub apart_ms: u64,
    /// The most automatic pauses in an hour; further ones are only recorded.
    pub max_per_hour: u32,
}

impl Default for PressureSettings {
    fn default() -> Self {
        Self {
            memory_some_avg10: None,
            memory_mode: OnPressure::Park,
            disk_free_bytes: None,
            settle_ms: 15_000,
            apart_ms: 10 * 60_000,
            max_per_hour: 12,
        }
    }
}

/// The section `[restore]`: how long a restore that fails is tried again before it is given up.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreSettings {
    pub patience_ms: u64,
    /// The same while a disk is full.
    pub full_disk_patience_ms: u64,
}

impl Default for RestoreSettings {
    fn default() -> Self {
        Self { patience_ms: 30_000, full_disk_patience_ms: 15 * 60_000 }
    }
}

/// The section `[checkpoints]`: how workspaces are scanned.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSettings {
    /// Whether directories are watched, so that a scan visits only what has changed. A reload does not change it.
    pub watch: bool,
    /// The age of the last full scan at which a checkpoint makes another one, in milliseconds, since some writes cause no
    /// event; 0 for never.
    pub whole_look_ms: u64,
}

impl CheckpointSettings {
    /// Returns the age of the last full scan at which another one is due.
    pub fn whole_after(&self) -> Option<Duration> {
        (self.whole_look_ms > 0).then(|| Duration::from_millis(self.whole_look_ms))
    }
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self { watch: true, whole_look_ms: 60 * 60_000 }
    }
}

/// The section `[context]`: weights of the item types, 0 to 1.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContextSettings {
    /// Weights that differ from the built-in ones, by type, for instance `CODE = 0.9`.
    pub weights: std::collections::BTreeMap<String, f64>,
}

/// The settings that a reload replaces.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The level of the log (`error`, `warn`, `info`, `debug`), or a filter such as `info,fermata_daemon::store=debug`.
    pub log: String,
    /// The group whose members are operators of a system daemon.
    pub operator_group: String,
    /// Whether other users have the role of a reader; otherwise they are refused.
    pub others_may_look: bool,
    pub on_shutdown: OnShutdown,
    pub pause: PauseSettings,
    pub agents: AgentSettings,
    pub context: ContextSettings,
    pub pressure: PressureSettings,
    /// Applies to projects without a policy of their own.
    pub retention: fermata_core::retention::RetentionPolicy,
    pub restore: RestoreSettings,
    pub checkpoints: CheckpointSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log: "info".into(),
            operator_group: "fermata".into(),
            others_may_look: true,
            on_shutdown: OnShutdown::default(),
            pause: PauseSettings::default(),
            agents: AgentSettings::default(),
            context: ContextSettings::default(),
            pressure: PressureSettings::default(),
            retention: fermata_core::retention::RetentionPolicy::default(),
            restore: RestoreSettings::default(),
            checkpoints: CheckpointSettings::default(),
        }
    }
}

impl Settings {
    /// Reads the configuration file. The default file may be missing.
    ///
    /// # Errors
    /// The file cannot be read, is not valid, or has an unknown key.
    pub fn read(paths: &Paths) -> Result<Self, SettingsError> {
        let path = &paths.config;
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !paths.config_is_wanted => {
                return Ok(Self::default());
            }
            Err(source) => return Err(SettingsError::Unreadable { path: path.clone(), source }),
        };
        let settings: Self = toml::from_str(&text)
            .map_err(|source| SettingsError::Malformed { path: path.clone(), source: Box::new(source) })?;
        settings.check().map_err(|why| SettingsError::Invalid { path: path.clone(), why })?;
        Ok(settings)
    }

    /// Checks what the types of the values do not; returns what is wrong.
    fn check(&self) -> Result<(), String> {
        let PressureSettings { memory_some_avg10, disk_free_bytes, .. } = self.pressure;
        if let Some(percent) = memory_some_avg10.filter(|percent| !(*percent > 0.0 && *percent <= 100.0)) {
            return Err(format!("pressure.memory_some_avg10 is {percent}, outside 0 to 100 (0 excluded)"));
        }
        let floor = self.pause.disk_floor_bytes;
        match disk_free_bytes {
            Some(bytes) if bytes <= floor => Err(format!(
                "pressure.disk_free_bytes is {bytes}, not more than pause.disk_floor_bytes ({floor}): \
                 the pause itself would be refused for lack of space for its checkpoint"
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the names of the keys and sections in which two settings differ.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut names = Vec::new();
        let mut note = |name: &str, differs: bool| {
            if differs {
                names.push(name.to_owned());
            }
        };
        note("log", self.log != other.log);
        note("operator_group", self.operator_group != other.operator_group);
        note("others_may_look", self.others_may_look != other.others_may_look);
        note("on_shutdown", self.on_shutdown != other.on_shutdown);
        note("pause", self.pause != other.pause);
        note("agents", self.agents != other.agents);
        note("context", self.context != other.context);
        note("pressure", self.pressure != other.pressure);
        note("retention", self.retention != other.retention);
        note("restore", self.restore != other.restore);
        note("checkpoints", self.checkpoints != other.checkpoints);
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_the_file_names_line_and_key() {
        let error = toml::from_str::<Settings>("log = \"info\"\n[pause]\ngrase_ms = 3\n").expect_err("unknown key");
        let text = error.to_string();
        assert!(text.contains("line 3") && text.contains("grase_ms"), "{text}");
    }

    #[test]
    fn pressure_bounds_that_could_never_work_are_refused() {
        let check = |text: &str| toml::from_str::<Settings>(text).expect("of the right types").check();
        for bad in ["memory_some_avg10 = 0.0", "memory_some_avg10 = 101.0", "memory_some_avg10 = nan"] {
            assert!(
                check(&format!("[pressure]\n{bad}\n")).is_err_and(|why| why.contains("memory_some_avg10")),
                "{bad}"
            );
        }
        let low = check("[pressure]\ndisk_free_bytes = 1024\n").expect_err("below the floor");
        assert!(low.contains("pause.disk_floor_bytes"), "{low}");
        assert_eq!(check("[pressure]\nmemory_some_avg10 = 40.0\ndisk_free_bytes = 1073741824\n"), Ok(()));
    }

    #[test]
    fn sections_that_are_left_out_have_their_defaults() {
        let settings: Settings = toml::from_str("[pause]\nlease_ms = 5000\n").expect("valid");
        assert_eq!(settings.pause.lease_ms, 5000);
        assert_eq!(settings.pause.grace_ms, PauseSettings::default().grace_ms);
        assert_eq!(settings.differences(&Settings::default()), ["pause"]);
    }
}
