//! The launch spec, `launch.json` in the run's directory: everything the shim must know to start and supervise one
//! agent.
//!
//! It contains the agent's environment with its secrets, so that its mode is 0600 in a directory of mode 0700.

use std::io;
use std::path::{Path, PathBuf};

use fermata_protocol::supervision::{OutputPolicy, TerminalSize};
use serde::{Deserialize, Serialize};

use super::raw::{self, RawString};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::controllers::TreeLimits;
use fermata_os::limits::Limit;
use fermata_os::spawn::Program;

/// The version of [`LaunchSpec`]; a shim refuses any other.
pub const SPEC_VERSION: u32 = 1;

/// The environment variable that the shim sets to the run's id. It identifies processes of the agent after their shim
/// was killed.
pub const RUN_ID_VARIABLE: &str = "FERMATA_RUN_ID";

/// File names in the directory of a run.
pub mod files {
    /// The [`LaunchSpec`](super::LaunchSpec).
    pub const LAUNCH: &str = "launch.json";
    /// The [`RunRecord`](crate::record::RunRecord).
    pub const RUN: &str = "run.json";
    /// The [`ExitRecord`](crate::record::ExitRecord).
    pub const EXIT: &str = "exit.json";
    /// The exit record as far as it is known while the post-stop command runs or the log writer process writes;
    /// replaced by [`EXIT`].
    pub const ENDED: &str = "ended.json";
    /// Written by a daemon that gives up a launch before [`RUN`] exists. Either the shim finds it after writing [`RUN`]
    /// and exits, or the daemon finds [`RUN`].
    pub const ABANDONED: &str = "abandoned";
    /// The directory of the log files.
    pub const LOGS: &str = "logs";
    /// Messages of the shim itself; normally empty.
    pub const SHIM_LOG: &str = "shim.log";
}

/// How large the logs may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// A file is rotated before it grows beyond this many bytes; 0 for never.
    pub max_bytes: u64,
    /// How many rotated files are kept beside the current one; 0 for all.
    pub max_files: u32,
    /// A file is rotated, when more is to be written to it, once its first line is this old, in milliseconds; 0 for
    /// never.
    #[serde(default)]
    pub max_age_ms: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { max_bytes: 16 * 1024 * 1024, max_files: 8, max_age_ms: 0 }
    }
}

/// A command that runs before or after the agent, with the agent's environment, directory and limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookSpec {
    /// The program and its arguments.
    pub argv: Vec<RawString>,
    /// How long it may run, in milliseconds, not counting the time for which it is frozen.
    pub timeout_ms: u64,
}

impl HookSpec {
    /// Returns the command for messages: invalid UTF-8 is replaced, and long commands are shortened.
    pub fn line(&self) -> String {
        const MOST: usize = 120;
        let words: Vec<_> = self.argv.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        let line = words.join(" ").replace('\n', " ");
        if line.chars().count() <= MOST { line } else { line.chars().take(MOST).chain(['…']).collect() }
    }
}

/// Everything the shim must know to start and supervise one agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// [`SPEC_VERSION`].
    pub version: u32,
    pub project: String,
    pub agent: String,
    /// Unique among all runs of all agents.
    pub run_id: String,
    /// The program and its arguments; a program without a slash is searched for in the PATH of `env`.
    pub argv: Vec<RawString>,
    /// The complete environment.
    pub env: Vec<(RawString, RawString)>,
    /// The working directory, absolute.
    #[serde(with = "raw::path")]
    pub cwd: PathBuf,
    /// The file mode creation mask.
    pub umask: u32,
    /// Resource limits; a limit that is not listed is inherited from the daemon.
    pub rlimits: Vec<Limit>,
    /// The directory of this run, absolute.
    #[serde(with = "raw::path")]
    pub run_dir: PathBuf,
    /// The path of the shim's socket, absolute, at most 107 bytes.
    #[serde(with = "raw::path")]
    pub socket: PathBuf,
    /// The parent of the agent's control group; by default the daemon's own group.
    #[serde(with = "raw::optional_path", default)]
    pub cgroup_parent: Option<PathBuf>,
    /// The name of the agent's control group.
    pub cgroup_name: String,
    /// Whether control groups may be used.
    #[serde(default)]
    pub mechanism: FreezerSetting,
    /// The size of the agent's terminal. Without a terminal the agent writes to pipes and has no input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// Limits of the whole tree. With any of them the agent needs a control group, and does not start without one.
    #[serde(default)]
    pub tree_limits: TreeLimits,
    #[serde(default)]
    pub log: LogLimits,
    /// What happens to output that comes faster than it can be written.
    #[serde(default)]
    pub output: OutputPolicy,
    /// How long a stop waits before it kills, unless the request specifies it.
    pub stop_grace_ms: u64,
    /// Runs before the agent's program in the same process; if it fails, the start fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_start: Option<HookSpec>,
    /// Runs after the agent, once no process of its tree is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_stop: Option<HookSpec>,
}

impl LaunchSpec {
    /// Prepares a program with the agent's environment, directory and limits. `variables` are added to the environment.
    ///
    /// # Errors
    /// If a string contains a NUL or `argv` is empty.
    pub fn program(&self, argv: &[RawString], variables: &[(RawString, RawString)]) -> io::Result<Program> {
        let mut env = self.env.clone();
        env.retain(|(name, _)| name.as_bytes() != RUN_ID_VARIABLE.as_bytes());
        env.push((RawString::from(RUN_ID_VARIABLE), RawString::from(self.run_id.as_str())));
        env.extend_from_slice(variables);
        Program::new(argv, &env, self.cwd.as_os_str(), self.umask, &self.rlimits)
    }

    /// Returns the path of a file or directory of this run.
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
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is not a launch spec.
    #[error("parse {}", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// The file has another version.
    #[error("use {}: its version is {found}, and this shim supports version {SPEC_VERSION}", path.display())]
    Version {
        path: PathBuf,
        /// The version in the file.
        found: u32,
    },
    /// A path must be absolute, because the shim's working directory is `/`.
    #[error("use {}: {field} is not an absolute path", path.display())]
    Relative {
        path: PathBuf,
        /// The name of the field.
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
        // The version is checked first: fields of another version may have another meaning.
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
