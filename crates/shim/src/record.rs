//! The records that a run leaves on disk for later daemons: `run.json` and `exit.json`.

use std::io;
use std::path::{Path, PathBuf};

use fermata_protocol::pause::FreezerKind;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::raw;
use super::spec::{LaunchSpec, files};
use fermata_os::controllers::OutOfMemory;
use fermata_os::process::ProcessId;

/// The processes of a run. Written (atomically, synced) before the launch is reported as a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    pub run_id: String,
    pub shim: ProcessId,
    /// The agent's main process.
    pub agent: ProcessId,
    /// The boot to which these process ids belong.
    pub boot_id: String,
    /// When the agent was started, in Unix milliseconds.
    pub started_at_ms: i64,
    /// How the tree is frozen.
    pub mechanism: FreezerKind,
    /// Why the tree is frozen by signals and not by a control group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The agent's control group.
    #[serde(with = "raw::optional_path", default)]
    pub cgroup: Option<PathBuf>,
    /// The path of the shim's socket.
    #[serde(with = "raw::path")]
    pub socket: PathBuf,
    /// The inode of the pipe that is the agent's standard output, unless that is a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_pipe: Option<u64>,
    /// The inode of the pipe that is the agent's standard error, unless that is a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_pipe: Option<u64>,
}

/// How a run has ended. Written (atomically, synced) before the end is reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub run_id: String,
    /// The exit code; `None` if a signal ended the main process.
    pub code: Option<i32>,
    /// The signal that ended the main process.
    pub signal: Option<i32>,
    pub core_dumped: bool,
    /// When the main process ended, in Unix milliseconds.
    pub ended_at_ms: i64,
    /// How many other processes of the tree had to be killed.
    pub leftovers_killed: u64,
    /// Payload bytes of output that were lost, for instance because the disk was full.
    #[serde(default)]
    pub log_bytes_lost: u64,
    /// Why the agent's program was never executed, for instance because the pre-start command failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<String>,
    /// What went wrong with the post-stop command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_stop_failure: Option<String>,
    /// Kills by the kernel for lack of memory.
    #[serde(default)]
    pub out_of_memory: OutOfMemory,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file exists but cannot be read.
    #[error("read {}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file is not a record.
    #[error("parse {}", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl RecordError {
    /// Returns whether a retry may succeed. A file that could be read but is not a record stays malformed.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreadable { .. })
    }
}

/// Reads the run record; `None` if the launch never got that far.
pub fn read_run(run_dir: &Path) -> Result<Option<RunRecord>, RecordError> {
    read(&run_dir.join(files::RUN))
}

/// Gives up a launch that has not written its run record: a shim that is still starting will exit. The caller must look
/// for the record once more afterwards.
///
/// # Errors
/// If the directory exists but cannot be written.
pub fn abandon(run_dir: &Path) -> io::Result<()> {
    match std::fs::write(run_dir.join(files::ABANDONED), b"") {
        // Without a directory there is no launch.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Reads the exit record; `None` if the run has not ended, or its shim was killed.
pub fn read_exit(run_dir: &Path) -> Result<Option<ExitRecord>, RecordError> {
    read(&run_dir.join(files::EXIT))
}

/// Reads how a run has ended whose shim was killed while the post-stop command ran, or while it waited for the log
/// writer process; `None` if the shim was killed earlier, or not at all.
pub fn read_cut_short(run_dir: &Path) -> Result<Option<ExitRecord>, RecordError> {
    let record: Option<ExitRecord> = read(&run_dir.join(files::ENDED))?;
    // A spec that cannot be parsed is most likely that of an older shim, which wrote this file only if there was a
    // command.
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
