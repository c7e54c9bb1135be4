//! The content of a `fermata.toml` after all checks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fermata_protocol::project::ProjectConfig;
use fermata_protocol::supervision::Supervision;
use fermata_protocol::{AgentName, ProjectName};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::environment::Environment;
use crate::units::hex;

/// A checked `fermata.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Declaration {
    /// The absolute path of the file.
    pub file: PathBuf,
    /// The directory of the file.
    pub workspace: PathBuf,
    pub project: ProjectName,
    pub description: Option<String>,
    /// `None` when the file has no `[project.config]`.
    pub config: Option<ProjectConfig>,
    pub agents: BTreeMap<AgentName, DeclaredAgent>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DeclaredAgent {
    /// The program and its arguments; not empty.
    pub argv: Vec<String>,
    /// The working directory, absolute.
    pub cwd: PathBuf,
    pub env: Environment,
    /// The name of the profile; recognised from the program when `None`.
    pub profile: Option<String>,
    /// The program and arguments that restart the agent in its earlier session.
    pub resume_argv: Option<Vec<String>>,
    /// The time between SIGTERM and SIGKILL in milliseconds.
    pub stop_grace_ms: Option<u64>,
    pub supervision: Supervision,
}

impl DeclaredAgent {
    /// Returns the SHA-256 of the declaration in hexadecimal, independent of how the file is formatted. It covers only the
    /// names of variables: the daemon has the values and compares them itself.
    pub fn digest(&self) -> String {
        let text = json!({
            "argv": self.argv,
            "cwd": self.cwd.to_string_lossy(),
            "variables": self.env.set.keys().collect::<Vec<_>>(),
            "pass_env": self.env.pass,
            "profile": self.profile,
            "resume_argv": self.resume_argv,
            "stop_grace_ms": self.stop_grace_ms,
            "supervision": self.supervision,
        })
        .to_string();
        hex(&Sha256::digest(text.as_bytes()))
    }
}
