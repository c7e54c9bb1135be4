//! Starts one run of an agent: environment, spec, shim, link.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fermata_core::agent::Agent;
use fermata_core::effect::Continuation;
use fermata_protocol::agent::RunProcesses;
use fermata_protocol::supervision::Hook;
use fermata_protocol::{AgentName, RunId};
use tokio::sync::mpsc;

use crate::errors::Failure;
use crate::operations::maintenance::leftovers;
use crate::operations::run::limits::tree_limits;
use crate::operations::run::session;
use crate::operations::{StepContext, blocking, directory, failpoint};
use crate::services::Services;
use crate::shims::launch::LaunchError;
use crate::shims::link::{LinkError, ShimLink, launch, read_exit, read_run};
use crate::shims::lost::end_unrecorded_run;
use crate::shims::reconnect::{self, ReconnectOutcome};
use fermata_os::death::Death;
use fermata_os::limits::{Limit, LimitKind};
use fermata_os::process;
use fermata_protocol::error_chain;
use fermata_shim::launch_report::LaunchCode;
use fermata_shim::raw::RawString;
use fermata_shim::record;
use fermata_shim::record::RunRecord;
use fermata_shim::spec::{HookSpec, LaunchSpec, LogLimits, SPEC_VERSION};
use fermata_shim::wire::ShimEvent;

/// How long the processes of a run that is being ended may take to exit.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A run that has started.
pub struct StartedRun {
    pub processes: RunProcesses,
    /// The link to its shim and the shim's events; `None` when the connection failed, usually because the run has ended
    /// already.
    pub link: Option<(ShimLink, mpsc::Receiver<ShimEvent>)>,
}

/// Starts a run, after ending what is left of the agent's older ones.
///
/// # Errors
/// A message for the user, for instance that the program does not exist.
pub async fn run(
    step: &StepContext,
    agent: &AgentName,
    run: &RunId,
    token: &str,
    continuation: Option<Continuation>,
) -> Result<StartedRun, String> {
    end_older_runs(step, agent, run).await.map_err(|failure| failure.to_string())?;
    if let Some(found) = step.project.agents.get(agent) {
        // Again at every launch: a reboot disables the controllers that an earlier launch has enabled.
        let resources = &found.spec.supervision.resources;
        crate::operations::run::limits::prepare(&step.services, resources)
            .await
            .map_err(|failure| failure.to_string())?;
    }
    prune_runs(step, agent, run).await;
    let spec = spec(step, agent, run, token, continuation).await.map_err(|failure| failure.to_string())?;
    failpoint("launch.before").map_err(|failure| failure.to_string())?;
    let launched = match launch(&step.services.programs.shim, &spec).await {
        Ok(launched) => launched,
        // The agent may have been started and its record not yet written.
        Err(LaunchError::Refused { code: LaunchCode::ShimDied, message }) => {
            return Err(abandon_launch(step, agent, &spec, message).await);
        }
        // The shim's message is for the user as it is.
        Err(LaunchError::Refused { message, .. }) => return Err(message),
        Err(other) => return Err(abandon_launch(step, agent, &spec, error_chain(&other)).await),
    };
    if let Err(failure) = failpoint("launch.after") {
        return Err(abandon_launch(step, agent, &spec, failure.to_string()).await);
    }
    let link = ShimLink::connect(&spec.socket, &step.services.tracker).await.ok();
    let processes = RunProcesses {
        pid: launched.agent.pid,
        start_ticks: launched.agent.start_time_ticks,
        shim_pid: launched.shim.pid,
        shim_start_ticks: launched.shim.start_time_ticks,
        boot_id: step.services.boot_id.clone(),
        mechanism: launched.mechanism,
    };
    Ok(StartedRun { processes, link })
}

/// Ends a launch that failed at an unknown point, since a run that is reported as failed must not run on without
/// supervision. Returns `reason`.
async fn abandon_launch(step: &StepContext, agent: &AgentName, spec: &LaunchSpec, reason: String) -> String {
    if let Err(failure) = end_run(step, &spec.run_dir).await {
        tracing::error!(project = %step.project.name, %agent, %failure, "the processes of a failed launch were not ended");
    }
    reason
}

pub fn processes_of(record: &RunRecord) -> RunProcesses {
    RunProcesses {
        pid: record.agent.pid,
        start_ticks: record.agent.start_time_ticks,
        shim_pid: record.shim.pid,
        shim_start_ticks: record.shim.start_time_ticks,
        boot_id: record.boot_id.clone(),
        mechanism: record.mechanism,
    }
}

async fn spec(
    step: &StepContext,
    name: &AgentName,
    run: &RunId,
    token: &str,
    continuation: Option<Continuation>,
) -> Result<LaunchSpec, Failure> {
    let settings = step.services.settings();
    let agent = step.project.agents.get(name);
    let env = session::environment(step, name).await?;
    let argv = agent.and_then(|agent| agent.run()).map(|run| run.argv.clone()).unwrap_or_default();
    Ok(LaunchSpec {
        version: SPEC_VERSION,
        project: step.project.name.to_string(),
        agent: name.to_string(),
        run_id: run.to_string(),
        argv: argv.into_iter().map(RawString::from).collect(),
        env: environment(step, name, env, token, continuation),
        cwd: PathBuf::from(agent.map(|agent| agent.spec.cwd.as_str()).unwrap_or("/")),
        umask: agent.map_or(0o022, |agent| agent.spec.umask),
        rlimits: limits(agent.map(|agent| &**agent), step.services.programs.open_files),
        run_dir: step.dirs().run(name, run),
        socket: step.services.shim_socket(run),
        cgroup_parent: settings.agents.cgroup_parent.clone(),
        cgroup_name: format!("fermata-{run}"),
        mechanism: settings.agents.freezer,
        tree_limits: agent.map(|agent| tree_limits(&agent.spec.supervision.resources)).unwrap_or_default(),
        terminal: agent.and_then(|agent| agent.spec.supervision.terminal),
        log: LogLimits {
            max_bytes: settings.agents.log_max_bytes,
            max_files: settings.agents.log_max_files,
            max_age_ms: settings.agents.log_max_age_ms,
        },
        stop_grace_ms: agent.map_or(settings.agents.stop_grace_ms, |agent| agent.spec.stop_grace_ms),
        output: agent.map(|agent| agent.spec.supervision.output).unwrap_or_default(),
        pre_start: agent.and_then(|agent| agent.spec.supervision.pre_start.as_ref()).map(hook),
        post_stop: agent.and_then(|agent| agent.spec.supervision.post_stop.as_ref()).map(hook),
    })
}

fn hook(hook: &Hook) -> HookSpec {
    HookSpec {
        argv: hook.argv.iter().map(|word| RawString::from(word.as_str())).collect(),
        timeout_ms: hook.timeout_ms.unwrap_or(Hook::DEFAULT_TIMEOUT_MS),
    }
}

fn environment(
    step: &StepContext,
    agent: &AgentName,
    mut env: BTreeMap<String, String>,
    token: &str,
    continuation: Option<Continuation>,
) -> Vec<(RawString, RawString)> {
    for name in ["FERMATA_RESUME", "FERMATA_CONTEXT", "FERMATA_CHECKPOINT"] {
        env.remove(name);
    }
    if step.project.agents.get(agent).is_some_and(|agent| agent.spec.supervision.terminal.is_some()) {
        // The client's terminal may have another size than the agent's.
        env.remove("LINES");
        env.remove("COLUMNS");
        env.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    }
    let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
    set("FERMATA_SOCKET", step.services.paths.socket.to_string_lossy().into_owned());
    set("FERMATA_PROJECT", step.project.name.to_string());
    set("FERMATA_AGENT", agent.to_string());
    set("FERMATA_TOKEN", token.to_owned());
    if let Some(Continuation { checkpoint }) = continuation {
        set("FERMATA_RESUME", "1".to_owned());
        if let Some(number) = checkpoint {
            let context = step.dirs().checkpoint(number).join(crate::operations::checkpoint::layout::CONTEXT);
            set("FERMATA_CONTEXT", context.to_string_lossy().into_owned());
            set("FERMATA_CHECKPOINT", number.to_string());
        }
    }
    env.into_iter().map(|(name, value)| (RawString::from(name), RawString::from(value))).collect()
}

/// Returns the resource limits of an agent: those of the client that created it. Without a limit for open files among
/// them, it gets the one that the daemon was started with, not the one to which the daemon has raised its own.
fn limits(agent: Option<&Agent>, open_files: Option<Limit>) -> Vec<Limit> {
    let kind_of = |name: &str| -> Option<LimitKind> { serde_json::from_value(serde_json::Value::from(name)).ok() };
    let of_client = agent.into_iter().flat_map(|agent| &agent.spec.limits);
    let mut limits: Vec<Limit> = of_client
        .filter_map(|(name, limit)| Some(Limit { kind: kind_of(name)?, soft: limit.soft, hard: limit.hard }))
        .collect();
    if let Some(open_files) = open_files
        && !limits.iter().any(|limit| limit.kind == open_files.kind)
    {
        limits.push(open_files);
    }
    limits
}

/// Ends the processes of every run of an agent except the current one, so that none is left behind and no session has two
/// writers.
///
/// # Errors
/// When a process cannot be ended.
pub async fn end_older_runs(step: &StepContext, agent: &AgentName, current: &RunId) -> Result<(), Failure> {
    let (dir, current) = (step.dirs().runs(agent), current.clone());
    let older = blocking("list runs", move || {
        let entries = directory::entries(&dir).map_err(Failure::io("list", &dir))?;
        let others = entries.flatten().filter(|entry| entry.file_name().to_str() != Some(current.as_str()));
        let may_run = |run_dir: &PathBuf| !read_exit(run_dir).is_ok_and(|exit| exit.is_some());
        Ok(others.map(|entry| entry.path()).filter(may_run).collect::<Vec<_>>())
    });
    for run_dir in older.await? {
        end_run(step, &run_dir).await?;
    }
    Ok(())
}

/// Removes the files of older runs except the newest ones. All of them must have ended; a checkpoint does not use these
/// files.
async fn prune_runs(step: &StepContext, agent: &AgentName, current: &RunId) {
    let keep = step.services.settings().agents.keep_runs as usize;
    if keep == 0 {
        return;
    }
    let (dir, current) = (step.dirs().runs(agent), current.to_string());
    let pruned = blocking("remove older runs", move || {
        let Ok(entries) = std::fs::read_dir(&dir) else { return Ok(()) };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // Ids begin with the time, so that they sort by age.
        let mut older: Vec<String> = names.filter(|name| name.starts_with("run-") && *name < current).collect();
        older.sort_unstable();
        let surplus = (older.len() + 1).saturating_sub(keep);
        for name in &older[..surplus] {
            let path = dir.join(name);
            leftovers::remove_deferred(leftovers::defer_removal(&path).map_err(Failure::io("remove", &path))?);
        }
        leftovers::sweep_deferred(&dir);
        Ok(())
    });
    if let Err(failure) = pruned.await {
        tracing::warn!(project = %step.project.name, %agent, %failure, "the files of older runs stay until the next launch");
    }
}

/// Stops a run whose shim cannot be reached: SIGTERM to its main process, and the end of its tree when the grace is over.
///
/// # Errors
/// When a process cannot be ended.
pub async fn stop_unreachable(
    step: &StepContext,
    agent: &AgentName,
    run: &RunId,
    grace: Duration,
) -> Result<(), Failure> {
    let run_dir = step.dirs().run(agent, run);
    if let Ok(Some(record)) = read_run(&run_dir)
        && record.boot_id == step.services.boot_id
        && !grace.is_zero()
        && let (Ok(death), Ok(shim)) = (Death::of(record.agent), Death::of(record.shim))
    {
        // Fails when the process has ended.
        process::signal(record.agent, libc::SIGTERM).ok();
        if tokio::time::timeout(grace, death.wait()).await.is_ok() {
            // Its shim ends the rest of the tree and records the exit.
            drop(tokio::time::timeout(END_TIMEOUT, shim.wait()).await);
        }
    }
    end_run(step, &run_dir).await
}

/// Ends a run that may be alive: through its shim, or directly where the shim is dead or cannot be reached.
///
/// # Errors
/// When a process cannot be ended.
pub async fn end_run(step: &StepContext, run_dir: &std::path::Path) -> Result<(), Failure> {
    let mut record = read_run(run_dir);
    if matches!(record, Ok(None)) {
        record::abandon(run_dir).map_err(|e| Failure::fault("abandon an older launch", &e))?;
        record = read_run(run_dir);
    }
    let record = match record {
        Ok(Some(record)) => record,
        Ok(None) => {
            let dir = run_dir.to_path_buf();
            let ended = blocking("end a launch without a record", move || {
                end_unrecorded_run(&dir, END_TIMEOUT).map_err(|e| Failure::fault("end an older launch", &e))
            });
            return ended.await.map(drop);
        }
        Err(error) => return Err(Failure::fault("read an older run", &error)),
    };
    if record.boot_id != step.services.boot_id {
        return Ok(());
    }
    let mut unreached = None;
    if process::is_alive(record.shim).unwrap_or(false) {
        let Services { tracker, .. } = &*step.services;
        match reconnect::connect(&record, step.services.shim_patience(), tracker).await {
            Ok((link, _events)) => {
                let ended = async {
                    link.kill().await?;
                    link.closed().await;
                    Ok::<(), LinkError>(())
                };
                match tokio::time::timeout(END_TIMEOUT, ended).await {
                    Ok(Ok(()) | Err(LinkError::Closed)) => return Ok(()),
                    Ok(Err(error)) => unreached = Some(error_chain(&error)),
                    Err(_) => unreached = Some("its processes did not end in time".to_owned()),
                }
            }
            Err(error) => unreached = Some(error),
        }
    }
    match reconnect::end(run_dir, &record, &step.services.boot_id, unreached).await {
        ReconnectOutcome::Lost { remaining: Some(error), .. } => Err(Failure::fault("end an older run", &error)),
        ReconnectOutcome::Lost { remaining: None, .. }
        | ReconnectOutcome::Linked(_)
        | ReconnectOutcome::Ended(_)
        | ReconnectOutcome::Foreign(_)
        | ReconnectOutcome::Unknown(_) => Ok(()),
    }
}
