//! What a run leaves on disk for a daemon that was not there: `run.json` and `exit.json`.

use std::io;
use std::path::{Path, PathBuf};

use fermata_protocol::pause::FreezerKind;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::raw;
use super::spec::{LaunchSpec, files};
use fermata_os::controllers::OutOfMemory;
use fermata_os::process::ProcessId;

/// Who runs: written (atomically, synced) before the launch is reported as a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run.
    pub run_id: String,
    /// The shim.
    pub shim: ProcessId,
    /// The agent's main process.
    pub agent: ProcessId,
    /// The boot in which these processes mean anything.
    pub boot_id: String,
    /// When the agent started, Unix milliseconds.
    pub started_at_ms: i64,
    /// How the tree is frozen.
    pub mechanism: FreezerKind,
    /// Why it is not done by a control group, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The agent's control group.
    #[serde(with = "raw::optional_path", default)]
    pub cgroup: Option<PathBuf>,
    /// The shim's socket.
    #[serde(with = "raw::path")]
    pub socket: PathBuf,
    /// The inode of the pipe that is the agent's standard output, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_pipe: Option<u64>,
    /// The same of its standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_pipe: Option<u64>,
}

/// How it ended: written (atomically, synced) before anybody is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The run.
    pub run_id: String,
    /// The exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it left a core dump.
    pub core_dumped: bool,
    /// When the main process ended, Unix milliseconds.
    pub ended_at_ms: i64,
    /// How many other processes of its tree had to be killed.
    pub leftovers_killed: u64,
    /// Payload bytes of output that a full disk cost.
    #[serde(default)]
    pub log_bytes_lost: u64,
    /// Why the agent's program was never executed: what ran before it failed, for instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<String>,
    /// What went wrong with the command after its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_stop_failure: Option<String>,
    /// What the kernel has done to the tree for want of memory.
    #[serde(default)]
    pub out_of_memory: OutOfMemory,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file is there but cannot be read.
    #[error("read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is no such record.
    #[error("understand {}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

impl RecordError {
    /// Whether a later try may succeed: the file could not be read now. One that was read and is no
    /// record stays so.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreadable { .. })
    }
}

/// Reads who runs; `None` when the run never came so far.
pub fn read_run(run_dir: &Path) -> Result<Option<RunRecord>, RecordError> {
    read(&run_dir.join(files::RUN))
}

/// Gives up a launch that has not come as far as its record: a shim that is still on its way ends.
/// The record has to be looked for once more afterwards.
///
/// # Errors
/// When the folder is there and cannot be written.
pub fn abandon(run_dir: &Path) -> io::Result<()> {
    match std::fs::write(run_dir.join(files::ABANDONED), b"") {
        // Without a folder there is no launch.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Reads how a run ended; `None` when it has not, or when its shim was lost.
pub fn read_exit(run_dir: &Path) -> Result<Option<ExitRecord>, RecordError> {
    read(&run_dir.join(files::EXIT))
}

/// Reads how a run ended whose shim was lost while a command ran after it, or while it waited for the
/// log writer process; `None` when it was lost earlier, or never.
pub fn read_cut_short(run_dir: &Path) -> Result<Option<ExitRecord>, RecordError> {
    let record: Option<ExitRecord> = read(&run_dir.join(files::ENDED))?;
    // A spec that cannot be understood is most likely of an older shim, which wrote this only then.
    let had_command = LaunchSpec::read(run_dir).map_or(true, |spec| spec.post_stop.is_some());
    Ok(record.map(|record| {
        if !had_command {
            return record;
        }
        let failure = "the post-stop command was cut short: the shim was killed".to_owned();
        ExitRecord { post_stop_failure: Some(failure), ..record }
    }))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| RecordError::Malformed { path: path.to_path_buf(), source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RecordError::Unreadable { path: path.to_path_buf(), source }),
    }
}
