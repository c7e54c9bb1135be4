//! Finds out when a run is ready, by its output or by a command. Nothing is remembered: a new daemon
//! reads the run's log from its beginning, and asks the command again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::project::ProjectState;
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

/// How often output is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How often a command is tried.
const TRY: Duration = Duration::from_millis(500);

/// How long one try of a command may take.
const TRY_WITHIN: Duration = Duration::from_secs(10);

/// How much of the log is read at once.
const BATCH_BYTES: usize = 256 << 10;

/// Waits until a run is ready; returns whether it is. Ends without an answer when the run is no
/// longer the agent's current one or there is nothing to find out. What cannot be read now is tried
/// again: nobody else would look.
pub async fn wait(
    site: &StepContext,
    mut state: watch::Receiver<Arc<Project>>,
    agent: &AgentName,
    run: &RunId,
) -> bool {
    let Some(found) = site.project.agents.get(agent) else { return false };
    let ready = match found.spec.supervision.ready.as_ref().map(|ready| &ready.when) {
        None | Some(ReadyWhen::Reported) => return false,
        Some(when) => when.clone(),
    };
    let cwd = PathBuf::from(&found.spec.cwd);
    let mut env = None;
    let mut told = false;
    let mut output = Output { dir: site.dirs().run(agent, run).join(files::LOGS), start: Start::Begin };
    loop {
        let (current, held) = {
            let project = state.borrow_and_update();
            let current = project.agents.get(agent).and_then(|agent| agent.current_run_id()) == Some(run);
            (current, !matches!(&*project.state, ProjectState::Resting(_)))
        };
        if !current || site.services.stopping.is_cancelled() {
            return false;
        }
        // What is held changes nothing, and a command would time out on it.
        if held {
            if state.changed().await.is_err() {
                return false;
            }
            continue;
        }
        let (looked, pace) = match &ready {
            ReadyWhen::Reported => return false,
            ReadyWhen::Output(wanted) => (output.holds(wanted).await, LOOK),
            ReadyWhen::Command(argv) => match environment_of(&mut env, site, agent).await {
                Ok(env) => (Ok(succeeds(argv, env, &cwd, &site.services.stopping).await), TRY),
                Err(failure) => (Err(failure), TRY),
            },
        };
        let pace = match looked {
            Ok(true) => return true,
            Ok(false) => {
                told = false;
                pace
            }
            Err(failure) => {
                // Once, not twice a second.
                if !std::mem::replace(&mut told, true) {
                    let project = &site.project.name;
                    tracing::error!(%project, %agent, %failure, "find out when it is ready; tried again");
                }
                TRY
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pace) => {}
            () = site.services.stopping.cancelled() => return false,
        }
    }
}

/// The environment of a command, read once.
async fn environment_of<'a>(
    env: &'a mut Option<BTreeMap<String, String>>,
    site: &StepContext,
    agent: &AgentName,
) -> Result<&'a BTreeMap<String, String>, Failure> {
    let read = match env.take() {
        Some(read) => read,
        None => session::environment(site, agent).await?,
    };
    Ok(env.insert(read))
}

/// The output of a run, read once.
struct Output {
    dir: PathBuf,
    start: Start,
}

impl Output {
    /// Reads what is new; says whether a line of it holds the text.
    async fn holds(&mut self, wanted: &str) -> Result<bool, Failure> {
        loop {
            let (dir, start, needle) = (self.dir.clone(), self.start, wanted.as_bytes().to_vec());
            let (found, read, position) = blocking("read the log", move || {
                search_log(&dir, start, &needle).map_err(|e| Failure::fault(&format!("read {}", dir.display()), &e))
            })
            .await?;
            self.start = position.map_or(self.start, Start::At);
            if found || !read {
                return Ok(found);
            }
        }
    }
}

fn search_log(dir: &Path, start: Start, wanted: &[u8]) -> std::io::Result<(bool, bool, Option<LogPosition>)> {
    let Batch { lines, position, .. } = read_once(dir, start, BATCH_BYTES)?;
    // What Fermata itself notes in the log is no word of the agent's.
    let mut output = lines.iter().filter(|line| line.stream.is_output());
    let found = output.any(|line| memchr::memmem::find(&line.bytes, wanted).is_some());
    Ok((found, !lines.is_empty(), position))
}

/// Runs a command once; one that takes too long, or cannot be started, does not succeed.
async fn succeeds(argv: &[String], env: &BTreeMap<String, String>, cwd: &Path, stopping: &CancellationToken) -> bool {
    let Some((program, arguments)) = argv.split_first() else { return false };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(env).current_dir(cwd).process_group(0).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let group = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let ended = tokio::select! {
        ended = child.wait() => Some(ended),
        () = tokio::time::sleep(TRY_WITHIN) => None,
        () = stopping.cancelled() => None,
    };
    match ended {
        Some(status) => status.is_ok_and(|status| status.success()),
        None => {
            // Not reaped yet, so the number is still this group's.
            if let Some(Err(error)) = group.map(|group| killpg(group, Signal::SIGKILL)) {
                tracing::debug!(%error, "a command that tells readiness ended by itself");
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
    fn only_the_words_of_the_agent_itself_count() {
        let dir = tempfile::tempdir().expect("a directory");
        let stamp = "2026-01-02T03:04:05.123456789Z";
        let mut log = format!("{stamp} note F it is listening\n{stamp} gap F listening was lost\n");
        let holds = |log: &str| {
            std::fs::write(dir.path().join(fermata_shim::log::CURRENT), log).expect("write");
            let (found, read, _) = search_log(dir.path(), Start::Begin, b"listening").expect("read");
            assert!(read, "the lines are lines of a log");
            found
        };
        assert!(!holds(&log));
        log += &format!("{stamp} stderr F now listening\n");
        assert!(holds(&log));
    }
}
