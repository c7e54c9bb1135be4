//! What the daemon wants to have run: `launch.json` in the run's folder.
//!
//! It holds the agent's environment with its secrets, hence mode 0600 in a 0700 folder.

use std::path::{Path, PathBuf};

use fermata_protocol::supervision::OutputPolicy;
use serde::{Deserialize, Serialize};

use fermata_protocol::supervision::TerminalSize;

use super::raw::{self, Raw};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::controllers::TreeLimits;
use fermata_os::limits::Limit;

/// The version of [`LaunchSpec`]; a shim refuses any other.
pub const SPEC_VERSION: u32 = 1;

/// The environment variable that the shim sets to the run's id, so that whatever the agent left
/// behind can be recognised when the shim itself was lost.
pub const RUN_ID_VARIABLE: &str = "FERMATA_RUN_ID";

/// File names in the folder of a run.
pub mod files {
    /// The launch spec.
    pub const LAUNCH: &str = "launch.json";
    /// Who runs.
    pub const RUN: &str = "run.json";
    /// How it ended.
    pub const EXIT: &str = "exit.json";
    /// How it ended, while a command still runs after it or the log writer process writes; replaced by
    /// [`EXIT`].
    pub const ENDED: &str = "ended.json";
    /// Written by a daemon that gives a launch up which has not come as far as [`RUN`]. Either the
    /// shim sees it after writing that, and ends; or the daemon sees what the shim has written.
    pub const ABANDONED: &str = "abandoned";
    /// The folder of the log files.
    pub const LOGS: &str = "logs";
    /// What the shim itself had to say (normally empty).
    pub const SHIM_LOG: &str = "shim.log";
}

/// How large the logs may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// A file is rotated before it grows beyond this many bytes; 0 for never.
    pub max_bytes: u64,
    /// So many rotated files are kept beside the current one; 0 for all.
    pub max_files: u32,
    /// A file is rotated, when more is to be written to it, once its first line is so old,
    /// milliseconds; 0 for never.
    #[serde(default)]
    pub max_age_ms: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { max_bytes: 16 * 1024 * 1024, max_files: 8, max_age_ms: 0 }
    }
}

/// A command beside the agent, with its environment, directory and limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookSpec {
    /// The program and its arguments.
    pub argv: Vec<Raw>,
    /// How long it may take, frozen time not counted, milliseconds.
    pub timeout_ms: u64,
}

impl HookSpec {
    /// The command for people: as far as it is text, and not more than fits into a sentence.
    pub fn line(&self) -> String {
        const MOST: usize = 120;
        let words: Vec<_> = self.argv.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        let line = words.join(" ").replace('\n', " ");
        if line.chars().count() <= MOST { line } else { line.chars().take(MOST).chain(['…']).collect() }
    }
}

/// Everything the shim must know to start and hold one agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// [`SPEC_VERSION`].
    pub version: u32,
    /// The project's name.
    pub project: String,
    /// The agent's name.
    pub agent: String,
    /// Identifies this run among all runs of all agents.
    pub run_id: String,
    /// The program and its arguments; a program without a slash is looked up in the PATH of `env`.
    pub argv: Vec<Raw>,
    /// The whole environment.
    pub env: Vec<(Raw, Raw)>,
    /// The working directory.
    #[serde(with = "raw::path")]
    pub cwd: PathBuf,
    /// The file mode creation mask.
    pub umask: u32,
    /// Resource limits; those that are not named stay as the daemon has them.
    pub rlimits: Vec<Limit>,
    /// The folder of this run, absolute.
    #[serde(with = "raw::path")]
    pub run_dir: PathBuf,
    /// Where the shim listens, absolute, at most 107 bytes.
    #[serde(with = "raw::path")]
    pub socket: PathBuf,
    /// Where the agent's control group goes; by default below the daemon's own.
    #[serde(with = "raw::optional_path", default)]
    pub cgroup_parent: Option<PathBuf>,
    /// The name of the agent's control group.
    pub cgroup_name: String,
    /// Whether control groups may be used.
    #[serde(default)]
    pub mechanism: FreezerSetting,
    /// The terminal that the agent gets; without it, it writes to pipes and reads nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// What the whole tree may use; with any limit it is a control group or nothing.
    #[serde(default)]
    pub tree_limits: TreeLimits,
    /// How large the logs may grow.
    #[serde(default)]
    pub log: LogLimits,
    /// What becomes of output that comes faster than it can be kept.
    #[serde(default)]
    pub output: OutputPolicy,
    /// How long a stop waits before it kills, unless the request says otherwise.
    pub stop_grace_ms: u64,
    /// Runs in the agent's place before it; the start fails with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_start: Option<HookSpec>,
    /// Runs when nothing of the agent's tree is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_stop: Option<HookSpec>,
}

impl LaunchSpec {
    /// A file or folder of this run.
    pub fn file(&self, name: &str) -> PathBuf {
        self.run_dir.join(name)
    }
}

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a launch spec.
    #[error("understand {}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The file is of another version.
    #[error("use {}: its version is {found}, this shim knows {SPEC_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A path must be absolute, because the shim's working directory is `/`.
    #[error("use {}: {field} is not an absolute path", path.display())]
    Relative {
        /// The file.
        path: PathBuf,
        /// Which field.
        field: &'static str,
    },
}

impl LaunchSpec {
    /// Reads and checks the spec of a run.
    pub fn read(run_dir: &Path) -> Result<Self, SpecError> {
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u32,
        }
        let path = run_dir.join(files::LAUNCH);
        let bytes = std::fs::read(&path).map_err(|source| SpecError::Unreadable { path: path.clone(), source })?;
        let malformed = |source| SpecError::Malformed { path: path.clone(), source };
        // The version first: another version's fields may mean something else.
        let VersionOnly { version } = serde_json::from_slice(&bytes).map_err(malformed)?;
        if version != SPEC_VERSION {
            return Err(SpecError::Version { path, found: version });
        }
        let spec: Self = serde_json::from_slice(&bytes).map_err(malformed)?;
        for (field, value) in [("run_dir", &spec.run_dir), ("socket", &spec.socket), ("cwd", &spec.cwd)] {
            if !value.is_absolute() {
                return Err(SpecError::Relative { path, field });
            }
        }
        Ok(spec)
    }
}
