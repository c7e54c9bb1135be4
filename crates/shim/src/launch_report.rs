//! The result of a launch: the report that the launcher prints, and the reason of a failure.

use std::io;
use std::path::{Path, PathBuf};

use fermata_protocol::pause::FreezerKind;
use serde::{Deserialize, Serialize};

use super::reply::failed_to;
use super::spec::{HookSpec, LaunchSpec};
use fermata_os::process::ProcessId;
use fermata_os::spawn_error::{SpawnError, SpawnStage};

/// Why a launch has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaunchCode {
    /// The launch spec cannot be read or used.
    BadSpec,
    /// No such program, neither by path nor in the agent's PATH.
    ProgramNotFound,
    /// The program exists but cannot be executed.
    ProgramNotExecutable,
    /// The script exists, but not the interpreter that its first line names.
    InterpreterMissing,
    /// The working directory does not exist.
    CwdMissing,
    /// The working directory cannot be entered.
    CwdDenied,
    /// A resource limit cannot be set.
    LimitRefused,
    SocketPathTooLong,
    /// The socket cannot be created.
    SocketFailed,
    /// The run's directory cannot be written.
    RunDirFailed,
    /// The process cannot be created.
    SpawnFailed,
    /// The shim ended before it reported.
    ShimDied,
    /// A code of a newer shim.
    #[serde(other)]
    Other,
}

/// The line that the launcher prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LaunchReport {
    /// The agent runs.
    Running {
        /// Always true.
        ok: bool,
        shim: ProcessId,
        /// The main process.
        agent: ProcessId,
        /// How the tree will be frozen.
        mechanism: FreezerKind,
        /// Why the tree is frozen by signals and not by a control group.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// No agent runs.
    Failed {
        /// Always false.
        ok: bool,
        code: LaunchCode,
        /// A sentence for people.
        message: String,
    },
}

/// A failure before the agent ran.
#[derive(Debug)]
pub(super) struct LaunchFailure {
    pub(super) code: LaunchCode,
    /// A sentence for people.
    pub(super) message: String,
}

impl LaunchFailure {
    pub(super) fn new(code: LaunchCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { code, message: failed_to(error) }
    }

    pub(super) fn io(code: LaunchCode, what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let text = format!("failed to {what} {}", path.display());
        move |error| Self { code, message: format!("{text}: {error}") }
    }
}

/// Turns an errno into a message for the user who typed the command.
pub(super) fn explain(spec: &LaunchSpec, error: &SpawnError) -> LaunchFailure {
    let errno = error.source.raw_os_error();
    let name = spec.argv.first().map(|name| Path::new(name.as_ref()).display().to_string()).unwrap_or_default();
    let (program, cwd) = (shorten(&name), shorten(&spec.cwd.display().to_string()));
    let (code, message) = match (error.stage, errno) {
        (SpawnStage::Exec, Some(libc::ENOENT | libc::ENOTDIR)) => {
            let path = spec.cwd.join(PathBuf::from(&name));
            if name.contains('/') && path.exists() {
                (
                    LaunchCode::InterpreterMissing,
                    format!("the interpreter (or loader) that {program} names was not found"),
                )
            } else if name.contains('/') {
                (LaunchCode::ProgramNotFound, format!("there is no program {program}"))
            } else {
                (LaunchCode::ProgramNotFound, format!("there is no program {program} in the agent's PATH"))
            }
        }
        (SpawnStage::Exec, _) => {
            (LaunchCode::ProgramNotExecutable, format!("{program} cannot be executed: {}", error.source))
        }
        (SpawnStage::WorkingDirectory, Some(libc::ENOENT | libc::ENOTDIR)) => {
            (LaunchCode::CwdMissing, format!("the working directory {cwd} does not exist"))
        }
        (SpawnStage::WorkingDirectory, _) => {
            (LaunchCode::CwdDenied, format!("the working directory {cwd} cannot be entered: {}", error.source))
        }
        (SpawnStage::Limits, _) => (LaunchCode::LimitRefused, failed_to(error)),
        (SpawnStage::ExecBefore, _) => {
            let line = spec.pre_start.as_ref().map(HookSpec::line).unwrap_or_default();
            let message = format!("the pre-start command '{line}' cannot be executed: {}", error.source);
            (LaunchCode::ProgramNotExecutable, message)
        }
        (
            SpawnStage::Fork | SpawnStage::Cgroup | SpawnStage::ProcessGroup | SpawnStage::Stdio | SpawnStage::Terminal,
            _,
        ) => (LaunchCode::SpawnFailed, failed_to(error)),
    };
    LaunchFailure { code, message }
}

/// Shortens a name for a message: the exit record has limited space.
fn shorten(name: &str) -> String {
    const MOST: usize = 200;
    if name.chars().count() <= MOST { name.to_owned() } else { name.chars().take(MOST).chain(['…']).collect() }
}
