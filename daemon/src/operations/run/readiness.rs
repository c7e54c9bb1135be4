//! Detects when a run is ready, by its output or by a command. It keeps no state on disk: a new daemon reads the run's
//! log from the beginning and runs the command again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::project::ProjectState;
use fermata_os::signals;
use fermata_protocol::supervision::ReadyWhen;
use fermata_protocol::{AgentName, RunId};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::errors::Failure;
use crate::operations::run::session;
use crate::operations::{StepContext, blocking};
use fermata_shim::log_reader::{Batch, LogPosition, Start, read_once};
use fermata_shim::spec::files;

/// How often the output is searched.
const OUTPUT_PERIOD: Duration = Duration::from_millis(100);

/// How often the command is run.
const COMMAND_PERIOD: Duration = Duration::from_millis(500);

/// How long one run of the command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// How much of the log is read at once.
const BATCH_BYTES: usize = 256 << 10;

/// Waits until a run is ready and returns `true`. Returns `false` when the run is no longer the agent's current one, when
/// its readiness is not checked by the daemon, or when the daemon stops. After an error it is tried again.
pub async fn wait(
    step: &StepContext,
    mut state: watch::Receiver<Arc<Project>>,
    agent: &AgentName,
    run: &RunId,
) -> bool {
    let Some(found) = step.project.agents.get(agent) else { return false };
    let mut check = match found.spec.supervision.ready.as_ref().map(|ready| &ready.when) {
        None | Some(ReadyWhen::Reported) => return false,
        Some(ReadyWhen::Output(text)) => {
            let dir = step.dirs().run(agent, run).join(files::LOGS);
            ReadinessCheck::Output(OutputSearch { dir, start: Start::Begin, text: text.clone() })
        }
        Some(ReadyWhen::Command(argv)) => {
            ReadinessCheck::Command { argv: argv.clone(), cwd: PathBuf::from(&found.spec.cwd), env: None }
        }
    };
    let mut failed_before = false;
    loop {
        let (current, resting) = {
            let project = state.borrow_and_update();
            let current = project.agents.get(agent).and_then(|agent| agent.current_run_id()) == Some(run);
            (current, matches!(&*project.state, ProjectState::Resting(_)))
        };
        if !current || step.services.stopping.is_cancelled() {
            return false;
        }
        // A frozen agent writes no output, and a command that contacts it would time out.
        if !resting {
            if state.changed().await.is_err() {
                return false;
            }
            continue;
        }
        let period = match check.passes(step, agent).await {
            Ok(true) => return true,
            Ok(false) => {
                failed_before = false;
                check.period()
            }
            Err(failure) => {
                // Logged once, not at every try.
                if !std::mem::replace(&mut failed_before, true) {
                    let project = &step.project.name;
                    tracing::error!(%project, %agent, %failure, "the readiness of an agent cannot be checked; tried again");
                }
                COMMAND_PERIOD
            }
        };
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            () = step.services.stopping.cancelled() => return false,
        }
    }
}

/// How the daemon checks the readiness of a run.
enum ReadinessCheck {
    Output(OutputSearch),
    Command {
        argv: Vec<String>,
        cwd: PathBuf,
        /// The agent's environment, read from the store at the first check.
        env: Option<BTreeMap<String, String>>,
    },
}

impl ReadinessCheck {
    fn period(&self) -> Duration {
        match self {
            Self::Output(_) => OUTPUT_PERIOD,
            Self::Command { .. } => COMMAND_PERIOD,
        }
    }

    /// Returns whether the run is ready now.
    async fn passes(&mut self, step: &StepContext, agent: &AgentName) -> Result<bool, Failure> {
        match self {
            Self::Output(search) => search.finds().await,
            Self::Command { argv, cwd, env } => {
                let read = match env.take() {
                    Some(read) => read,
                    None => session::environment(step, agent).await?,
                };
                Ok(succeeds(argv, env.insert(read), cwd, &step.services.stopping).await)
            }
        }
    }
}

/// A search in the output of a run that reads each line once.
struct OutputSearch {
    dir: PathBuf,
    start: Start,
    text: String,
}

impl OutputSearch {
    /// Reads the new lines; returns whether one of them contains the text.
    async fn finds(&mut self) -> Result<bool, Failure> {
        loop {
            let (dir, start, text) = (self.dir.clone(), self.start, self.text.as_bytes().to_vec());
            let (found, read, position) =
                blocking("read the log", move || search_log(&dir, start, &text).map_err(Failure::io("read", &dir)))
                    .await?;
            self.start = position.map_or(self.start, Start::At);
            if found || !read {
                return Ok(found);
            }
        }
    }
}

/// Returns whether a line of the next batch contains the text, whether there was a line, and the position behind it.
fn search_log(dir: &Path, start: Start, text: &[u8]) -> std::io::Result<(bool, bool, Option<LogPosition>)> {
    let Batch { lines, position, .. } = read_once(dir, start, BATCH_BYTES)?;
    // Without the lines that Fermata itself adds to the log.
    let mut output = lines.iter().filter(|line| line.stream.is_output());
    let found = output.any(|line| memchr::memmem::find(&line.bytes, text).is_some());
    Ok((found, !lines.is_empty(), position))
}

/// Runs a command once; `false` also when it takes too long or cannot be started.
async fn succeeds(argv: &[String], env: &BTreeMap<String, String>, cwd: &Path, stopping: &CancellationToken) -> bool {
    let Some((program, arguments)) = argv.split_first() else { return false };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(env).current_dir(cwd).process_group(0).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    signals::unblock_in_child(command.as_std_mut());
    let Ok(mut child) = command.spawn() else { return false };
    let group = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let ended = tokio::select! {
        ended = child.wait() => Some(ended),
        () = tokio::time::sleep(COMMAND_TIMEOUT) => None,
        () = stopping.cancelled() => None,
    };
    match ended {
        Some(status) => status.is_ok_and(|status| status.success()),
        None => {
            // The leader is not reaped yet, so that its number is still that of the group.
            if let Some(Err(error)) = group.map(|group| killpg(group, Signal::SIGKILL)) {
                tracing::debug!(%error, "the readiness command could not be killed");
            }
            drop(child.wait().await);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_output_of_the_agent_itself_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let stamp = "2026-01-02T03:04:05.123456789Z";
        let mut log = format!("{stamp} note F it is listening\n{stamp} gap F listening was lost\n");
        let holds = |log: &str| {
            std::fs::write(dir.path().join(fermata_shim::log::CURRENT), log).expect("write");
            let (found, read, _) = search_log(dir.path(), Start::Begin, b"listening").expect("read");
            assert!(read, "the log has lines");
            found
        };
        assert!(!holds(&log));
        log += &format!("{stamp} stderr F now listening\n");
        assert!(holds(&log));
    }
}
