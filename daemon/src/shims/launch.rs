//! The daemon's side of a launch: writes the spec, runs the launcher, parses its report.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use fermata_protocol::pause::FreezerKind;
use tokio::process::Command;

use fermata_os::fsync::{DurableWriteError, write_atomic};
use fermata_os::process::ProcessId;
use fermata_shim::launch_report::{LaunchCode, LaunchReport};
use fermata_shim::spec::{LaunchSpec, files};

/// How long a launch may take until the agent's program is executed.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);

/// A running agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    pub shim: ProcessId,
    /// The agent's main process.
    pub agent: ProcessId,
    /// How its tree will be frozen.
    pub mechanism: FreezerKind,
    /// Why the freezer is not a control group, where it is not.
    pub why: Option<String>,
}

/// Why an agent was not launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("create {}", path.display())]
    RunDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("encode the launch spec of run {run_id}")]
    Encode {
        run_id: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("write the launch spec")]
    Write(#[source] DurableWriteError),
    /// The launcher could not be run.
    #[error("run {}", binary.display())]
    Shim {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The shim reports why the agent was not started; the message is for the user.
    #[error("launch: {message}")]
    Refused { code: LaunchCode, message: String },
    /// The launcher printed no valid report. Whether the run has started is known from its record only.
    #[error("parse the report of the launcher of run {run_id}: {output:?}")]
    NoReport {
        run_id: String,
        /// The beginning of its output.
        output: String,
    },
    /// The launcher was too slow and was killed. Whether the run has started is known from its record only.
    #[error("launch run {run_id} within {waited_s} s")]
    Timeout { run_id: String, waited_s: u64 },
}

/// Launches an agent. Returns when its program is executed.
pub async fn launch(shim_binary: &Path, spec: &LaunchSpec) -> Result<Launched, LaunchError> {
    let bytes =
        serde_json::to_vec(spec).map_err(|source| LaunchError::Encode { run_id: spec.run_id.clone(), source })?;
    let run_dir = spec.run_dir.clone();
    match tokio::task::spawn_blocking(move || write_spec(&run_dir, &bytes)).await {
        Ok(written) => written?,
        Err(error) => {
            return Err(LaunchError::RunDir { path: spec.run_dir.clone(), source: io::Error::other(error) });
        }
    }
    let launcher = Command::new(shim_binary)
        .arg(&spec.run_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(LAUNCH_TIMEOUT, launcher).await {
        Ok(Ok(output)) => output,
        Ok(Err(source)) => {
            return Err(LaunchError::Shim { binary: shim_binary.to_path_buf(), source });
        }
        Err(_) => {
            let waited_s = LAUNCH_TIMEOUT.as_secs();
            return Err(LaunchError::Timeout { run_id: spec.run_id.clone(), waited_s });
        }
    };
    match serde_json::from_slice(&output.stdout) {
        Ok(LaunchReport::Running { shim, agent, mechanism, why, .. }) => Ok(Launched { shim, agent, mechanism, why }),
        Ok(LaunchReport::Failed { code, message, .. }) => Err(LaunchError::Refused { code, message }),
        Err(_) => {
            let printed = [output.stdout, output.stderr].concat();
            let output = String::from_utf8_lossy(&printed).chars().take(500).collect();
            Err(LaunchError::NoReport { run_id: spec.run_id.clone(), output })
        }
    }
}

fn write_spec(run_dir: &Path, bytes: &[u8]) -> Result<(), LaunchError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run_dir)
        .map_err(|source| LaunchError::RunDir { path: run_dir.to_path_buf(), source })?;
    write_atomic(&run_dir.join(files::LAUNCH), bytes, 0o600).map_err(LaunchError::Write)
}
