//! Why a program could not be started: the failed stage of the child's preparation, and its errno.

use std::io;

/// A stage of starting a program. Its number is the first byte of the child's message to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SpawnStage {
    /// The fork, or a preparation in the parent.
    Fork = 1,
    /// Joining the control group.
    Cgroup = 2,
    /// Creating a process group.
    ProcessGroup = 3,
    /// Setting a resource limit.
    Limits = 4,
    /// Entering the working directory.
    WorkingDirectory = 5,
    /// Connecting the standard streams.
    Stdio = 6,
    /// Executing the program.
    Exec = 7,
    /// Executing the program that runs before it.
    ExecBefore = 8,
    /// Becoming the foreground process group of the terminal.
    Terminal = 9,
}

impl SpawnStage {
    pub(super) fn from_byte(byte: u8) -> Self {
        match byte {
            2 => Self::Cgroup,
            3 => Self::ProcessGroup,
            4 => Self::Limits,
            5 => Self::WorkingDirectory,
            6 => Self::Stdio,
            7 => Self::Exec,
            8 => Self::ExecBefore,
            9 => Self::Terminal,
            _ => Self::Fork,
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Cgroup => "join the control group",
            Self::ProcessGroup => "create a process group",
            Self::Limits => "set a resource limit",
            Self::WorkingDirectory => "enter the working directory",
            Self::Stdio => "connect the standard streams",
            Self::Exec => "execute the program",
            Self::ExecBefore => "execute the program that runs before it",
            Self::Terminal => "become the foreground process group of the terminal",
        }
    }
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{}", stage.verb())]
pub struct SpawnError {
    /// The stage that failed.
    pub stage: SpawnStage,
    #[source]
    pub source: io::Error,
}
