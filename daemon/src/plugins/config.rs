//! Finds the plugins of this machine, reads their settings files, and stores the choices of `plugin enable|disable`.

use super::crash::CrashPolicy;
use super::trust::{self, TrustError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The settings of the daemon for its plugins.
#[derive(Debug, Clone)]
pub struct PluginConfig {
    /// Directories with `*.so` files. Of two plugins with the same name the one in the earlier directory is used.
    pub directories: Vec<PathBuf>,
    /// Directory with one optional `<name>.toml` per plugin.
    pub settings_dir: PathBuf,
    /// The program `fermata-plugin-host`.
    pub host_binary: PathBuf,
    /// Directory of the file with the choices of `plugin enable|disable`.
    pub state_dir: PathBuf,
    /// How long one call may take, unless the plugin's own file sets it.
    pub deadline: Duration,
    /// How long loading, describing and creating a plugin may take together.
    pub start_deadline: Duration,
    /// How long a cancelled call may still take before its host is killed.
    pub cancel_grace: Duration,
    /// Events that may wait for one plugin; further ones are dropped and counted.
    pub queue: usize,
    /// Resident memory that a host may use, in bytes (0: no limit).
    pub memory_limit: u64,
    pub crashes: CrashPolicy,
}

impl PluginConfig {
    /// Default settings with the given paths.
    pub fn new(directories: Vec<PathBuf>, settings_dir: PathBuf, host_binary: PathBuf, state_dir: PathBuf) -> Self {
        Self {
            directories,
            settings_dir,
            host_binary,
            state_dir,
            deadline: Duration::from_secs(30),
            start_deadline: Duration::from_secs(10),
            cancel_grace: Duration::from_millis(500),
            queue: 256,
            memory_limit: 1 << 30,
            crashes: CrashPolicy::default(),
        }
    }
}

/// Why a file of the plugins could not be used.
#[derive(Debug, thiserror::Error)]
pub enum PluginConfigError {
    #[error("the plugin's file is not trusted")]
    Trust(#[from] TrustError),
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not a valid settings file")]
    Toml {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The table `settings` has a value that JSON does not have.
    #[error("the settings in {path} cannot be converted to JSON")]
    Settings {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// The file with the choices of `plugin enable|disable` is damaged.
    #[error("{path} is damaged")]
    Choices {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// A plugin's own file, `<name>.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginFile {
    /// `plugin enable|disable` overrides it.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Patterns of the events that the plugin receives, such as `project.*`.
    #[serde(default = "all")]
    pub events: Vec<String>,
    /// How long one call may take, in milliseconds.
    pub deadline_ms: Option<u64>,
    /// The settings that are passed to the plugin.
    #[serde(default)]
    pub settings: toml::Table,
}

fn yes() -> bool {
    true
}

fn all() -> Vec<String> {
    vec!["*".to_owned()]
}

impl Default for PluginFile {
    fn default() -> Self {
        Self { enabled: yes(), events: all(), deadline_ms: None, settings: toml::Table::new() }
    }
}

impl PluginFile {
    /// Converts the settings for the plugin; `path` is for the error.
    pub fn settings_json(&self, path: &Path) -> Result<serde_json::Value, PluginConfigError> {
        serde_json::to_value(&self.settings)
            .map_err(|source| PluginConfigError::Settings { path: path.to_owned(), source })
    }
}

/// Reads a plugin's settings file, after checking that no other user can change it.
pub fn read_plugin_file(path: &Path) -> Result<PluginFile, PluginConfigError> {
    let real = trust::trusted_file(path)?;
    let text = fs::read_to_string(&real).map_err(|source| PluginConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| PluginConfigError::Toml { path: path.to_owned(), source: Box::new(source) })
}

/// Metadata that differ when a file was changed or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
}

impl FileIdentity {
    fn of(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|metadata| Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.len(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// A plugin as it was found on disk.
#[derive(Debug, Clone)]
pub struct ConfiguredPlugin {
    /// Name from the file name: `libfermata_exec.so` is `exec`.
    pub name: String,
    /// The shared object.
    pub path: PathBuf,
    pub settings_file: Option<PathBuf>,
    /// Of the shared object and of the settings file.
    pub identity: (Option<FileIdentity>, Option<FileIdentity>),
}

/// Finds the plugins of all directories, in the order of their names.
///
/// A directory that does not exist has no plugins; one that cannot be read is an error.
pub fn discover(config: &PluginConfig) -> Result<Vec<ConfiguredPlugin>, PluginConfigError> {
    let mut found = BTreeMap::new();
    for directory in &config.directories {
        let unreadable = |source| PluginConfigError::Read { path: directory.clone(), source };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error)),
        };
        for entry in entries {
            let path = entry.map_err(unreadable)?.path();
            let Some(name) = plugin_name(&path) else {
                continue;
            };
            if let Some(ConfiguredPlugin { path: first, .. }) = found.get(&name) {
                let first: &PathBuf = first;
                tracing::warn!(
                    plugin = name, used = %first.display(), ignored = %path.display(),
                    "two plugins have the same name"
                );
                continue;
            }
            let settings = config.settings_dir.join(format!("{name}.toml"));
            let settings_identity = FileIdentity::of(&settings).ok();
            let plugin = ConfiguredPlugin {
                name: name.clone(),
                identity: (FileIdentity::of(&path).ok(), settings_identity),
                path,
                // A file without read permission is reported when it is read.
                settings_file: settings.symlink_metadata().is_ok().then_some(settings),
            };
            found.insert(name, plugin);
        }
    }
    Ok(found.into_values().collect())
}

/// Returns the name of the plugin in a file, or `None` for a file that is no plugin.
pub fn plugin_name(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".so")?;
    let name = stem.strip_prefix("lib").unwrap_or(stem);
    let name = name.strip_prefix("fermata_").unwrap_or(name);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (!name.is_empty() && name.chars().all(plain)).then(|| name.to_owned())
}

/// The choices of `plugin enable|disable`, stored on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Choices {
    #[serde(default)]
    enabled: BTreeMap<String, bool>,
}

impl Choices {
    fn path(config: &PluginConfig) -> PathBuf {
        config.state_dir.join("plugins.json")
    }

    /// Reads the choices; there are none without the file.
    pub fn load(config: &PluginConfig) -> Result<Self, PluginConfigError> {
        let path = Self::path(config);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| PluginConfigError::Choices { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(PluginConfigError::Read { path, source }),
        }
    }

    /// Returns whether a plugin was enabled or disabled by the user.
    pub fn get(&self, name: &str) -> Option<bool> {
        self.enabled.get(name).copied()
    }

    /// Stores a choice: on disk first, then in memory.
    pub fn set(&mut self, config: &PluginConfig, name: &str, enabled: bool) -> Result<(), PluginConfigError> {
        let mut next = self.enabled.clone();
        next.insert(name.to_owned(), enabled);
        let next = Self { enabled: next };
        let path = Self::path(config);
        next.write(config, &path).map_err(|source| PluginConfigError::Write { path, source })?;
        *self = next;
        Ok(())
    }

    fn write(&self, config: &PluginConfig, path: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&config.state_dir)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        fs::File::open(&config.state_dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_file_names() {
        for (file, name) in [
            ("/p/libfermata_exec.so", Some("exec")),
            ("/p/exec.so", Some("exec")),
            ("/p/libcriu-image.so", Some("criu-image")),
            ("/p/exec.so.1", None),
            ("/p/lib.so", None),
            ("/p/we ird.so", None),
            ("/p/readme.txt", None),
        ] {
            assert_eq!(plugin_name(Path::new(file)).as_deref(), name, "{file}");
        }
    }

    #[test]
    fn choices_are_stored_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().to_owned();
        let config = PluginConfig::new(vec![], here.clone(), here.clone(), here);
        let mut choices = Choices::load(&config).unwrap();
        assert_eq!(choices.get("exec"), None);
        choices.set(&config, "exec", false).unwrap();
        assert_eq!(Choices::load(&config).unwrap().get("exec"), Some(false));
        fs::write(dir.path().join("plugins.json"), "{").unwrap();
        assert!(matches!(Choices::load(&config), Err(PluginConfigError::Choices { .. })));
    }

    #[test]
    fn a_settings_file_with_an_unknown_member_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        fs::write(&path, "deadline_ms = 5\n[settings]\nx = [1]\n").unwrap();
        let file = read_plugin_file(&path).unwrap();
        assert!(file.enabled && file.deadline_ms == Some(5) && file.events == ["*"]);
        assert_eq!(file.settings_json(&path).unwrap(), serde_json::json!({"x": [1]}));
        fs::write(&path, "deadline = 5\n").unwrap();
        assert!(matches!(read_plugin_file(&path), Err(PluginConfigError::Toml { .. })));
    }
}
