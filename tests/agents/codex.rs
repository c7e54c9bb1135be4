//! The Codex CLI: its path, the home directory of a test, and the session files that it writes there.

use std::fs;
use std::path::{Path, PathBuf};

use fermata_tests::sandbox::output_of;
use fermata_tests::workspace::{Fingerprint, fingerprint};
use fermata_tests::{Sandbox, Workspace};
use serde_json::Value;

use crate::model_server::ModelServer;

/// A Codex with a home directory of its own that is configured for a model server.
pub struct Codex {
    program: PathBuf,
    home: tempfile::TempDir,
}

impl Codex {
    /// Creates a home directory whose configuration names the model server.
    ///
    /// # Panics
    /// When the CLI is not installed: `make test-agents` does that.
    pub fn with_model(server: &ModelServer) -> Self {
        let program = std::env::var_os("FERMATA_TEST_CODEX").expect("FERMATA_TEST_CODEX: run `make test-agents`");
        // The CLI complains about a home below the system's temporary directory.
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("create CODEX_HOME");
        let config = format!(
            "model = \"scripted\"\n\
             model_provider = \"scripted\"\n\
             approval_policy = \"never\"\n\
             sandbox_mode = \"danger-full-access\"\n\
             [model_providers.scripted]\n\
             name = \"scripted\"\n\
             base_url = \"{}\"\n\
             wire_api = \"responses\"\n",
            server.base_url()
        );
        fs::write(home.path().join("config.toml"), config).expect("write config.toml");
        Self { program: program.into(), home }
    }

    /// Returns the path of the program as text.
    pub fn program(&self) -> &str {
        self.program.to_str().expect("the path of the CLI is UTF-8")
    }

    /// Returns the directory for `CODEX_HOME`.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Starts `codex exec --json PROMPT` as an agent of a project in a workspace.
    pub fn run(&self, sandbox: &Sandbox, project: &str, workspace: &Workspace, prompt: &str) {
        let mut command = sandbox.ctl_command(&["run", "--project", project, "--workspace", workspace.text()]);
        command.args(["--name", "codex", "--", self.program(), "exec", "--json", prompt]);
        command.current_dir(workspace.path()).env("CODEX_HOME", self.home.path());
        let output = output_of(command);
        assert!(output.status.success(), "run codex: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Returns the only session file.
    ///
    /// # Panics
    /// When there is none, or more than one.
    #[track_caller]
    pub fn session(&self) -> Session {
        let sessions = self.sessions();
        assert_eq!(sessions.len(), 1, "exactly one session file: {sessions:?}");
        Session { path: sessions.into_iter().next().unwrap_or_default() }
    }

    /// Returns the fingerprint of the session directory.
    pub fn sessions_fingerprint(&self) -> Fingerprint {
        fingerprint(&self.home.path().join("sessions"))
    }

    fn sessions(&self) -> Vec<PathBuf> {
        let root = self.home.path().join("sessions");
        let files = fingerprint(&root).into_keys().filter(|path| path.extension().is_some_and(|e| e == "jsonl"));
        files.map(|path| root.join(path)).collect()
    }
}

/// A session file: `rollout-<time>-<uuid>.jsonl`.
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
}

impl Session {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the session's id, with which its file name ends.
    pub fn id(&self) -> String {
        let stem = self.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let id = stem.len().checked_sub(36).and_then(|start| stem.get(start..));
        id.unwrap_or_else(|| panic!("{} ends with no uuid", self.path.display())).to_owned()
    }

    pub fn text(&self) -> String {
        fs::read_to_string(&self.path).unwrap_or_else(|e| panic!("read {}: {e}", self.path.display()))
    }

    /// Counts the command outputs in the file.
    pub fn outputs(&self) -> usize {
        let text = self.text();
        // The last line may be incomplete while the agent runs.
        let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        records.filter(|record| record["payload"]["type"] == "function_call_output").count()
    }
}
