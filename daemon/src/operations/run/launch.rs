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
use crate::operations::{StepContext, blocking};
use crate::shims::launch::LaunchError;
use crate::shims::link::{ShimLink, launch, read_exit, read_run};
use crate::shims::lost::end_unrecorded_run;
use crate::shims::reconnect::{self, ReconnectOutcome};
use fermata_os::death::Death;
use fermata_os::limits::{Limit, LimitKind};
use fermata_os::process;
use fermata_protocol::error_chain;
use fermata_shim::launcher::LaunchCode;
use fermata_shim::raw::Raw;
use fermata_shim::record;
use fermata_shim::record::RunRecord;
use fermata_shim::spec::{HookSpec, LaunchSpec, LogLimits, SPEC_VERSION};
use fermata_shim::wire::ShimEvent;

/// How long the processes of a run that is to be ended may take to go.
const ENDING: Duration = Duration::from_secs(10);

/// A run that has started.
pub struct Started {
    /// Its processes.
    pub processes: RunProcesses,
    /// The link to its shim and what the shim tells; none when there was nobody to connect to, most
    /// likely because the run has ended already.
    pub link: Option<(ShimLink, mpsc::Receiver<ShimEvent>)>,
}

/// Starts a run, after ending what is left of the agent's older ones.
///
/// # Errors
/// A sentence for people: the program is missing, the working directory is, …
pub async fn run(
    site: &StepContext,
    agent: &AgentName,
    run: &RunId,
    token: &str,
    continuation: Option<Continuation>,
) -> Result<Started, String> {
    end_older_runs(site, agent, run).await.map_err(|failure| failure.to_string())?;
    if let Some(found) = site.project.agents.get(agent) {
        // Once more: after a reboot nothing is enabled that was enabled when it was run first.
        let resources = &found.spec.supervision.resources;
        crate::operations::run::limits::prepare(&site.services, resources)
            .await
            .map_err(|failure| failure.to_string())?;
    }
    prune_runs(site, agent, run).await;
    let spec = spec(site, agent, run, token, continuation).await.map_err(|failure| failure.to_string())?;
    crate::operations::failpoint("launch.before").map_err(|failure| failure.to_string())?;
    let launched = match launch(&site.services.programs.shim, &spec).await {
        Ok(launched) => launched,
        // It may have been killed when the agent was there and its record was not.
        Err(LaunchError::Refused { code: LaunchCode::ShimDied, message }) => {
            return Err(give_up(site, agent, &spec, message).await);
        }
        // The shim's own sentence is the one for people.
        Err(LaunchError::Refused { message, .. }) => return Err(message),
        Err(other) => return Err(give_up(site, agent, &spec, error_chain(&other)).await),
    };
    if let Err(failure) = crate::operations::failpoint("launch.after") {
        return Err(give_up(site, agent, &spec, failure.to_string()).await);
    }
    let link = ShimLink::connect(&spec.socket).await.ok();
    let processes = RunProcesses {
        pid: launched.agent.pid,
        start_ticks: launched.agent.start_time_ticks,
        shim_pid: launched.shim.pid,
        shim_start_ticks: launched.shim.start_time_ticks,
        boot_id: site.services.boot_id.clone(),
        mechanism: launched.mechanism,
    };
    Ok(Started { processes, link })
}

/// Ends a launch of which nobody knows how far it came: a run that is told to have failed must not
/// go on unseen.
async fn give_up(site: &StepContext, agent: &AgentName, spec: &LaunchSpec, reason: String) -> String {
    if let Err(failure) = end_run(site, &spec.run_dir).await {
        tracing::error!(project = %site.project.name, %agent, %failure, "end a run that nobody can reach");
    }
    reason
}

/// Returns the processes of a recorded run.
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
    site: &StepContext,
    name: &AgentName,
    run: &RunId,
    token: &str,
    continuation: Option<Continuation>,
) -> Result<LaunchSpec, Failure> {
    let settings = site.services.settings();
    let agent = site.project.agents.get(name);
    let env = session::environment(site, name).await?;
    let argv = agent.and_then(|agent| agent.run()).map(|run| run.argv.clone()).unwrap_or_default();
    Ok(LaunchSpec {
        version: SPEC_VERSION,
        project: site.project.name.to_string(),
        agent: name.to_string(),
        run_id: run.to_string(),
        argv: argv.into_iter().map(Raw::from).collect(),
        env: environment(site, name, env, token, continuation),
        cwd: PathBuf::from(agent.map(|agent| agent.spec.cwd.as_str()).unwrap_or("/")),
        umask: agent.map_or(0o022, |agent| agent.spec.umask),
        rlimits: limits(agent.map(|agent| &**agent), site.services.programs.open_files),
        run_dir: site.dirs().run(name, run),
        socket: site.services.shim_socket(run),
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
        argv: hook.argv.iter().map(|word| Raw::from(word.as_str())).collect(),
        timeout_ms: hook.timeout_ms.unwrap_or(Hook::DEFAULT_TIMEOUT_MS),
    }
}

fn environment(
    site: &StepContext,
    agent: &AgentName,
    mut env: BTreeMap<String, String>,
    token: &str,
    continuation: Option<Continuation>,
) -> Vec<(Raw, Raw)> {
    for name in ["FERMATA_RESUME", "FERMATA_CONTEXT", "FERMATA_CHECKPOINT"] {
        env.remove(name);
    }
    if site.project.agents.get(agent).is_some_and(|agent| agent.spec.supervision.terminal.is_some()) {
        // The size is the terminal's to tell, and the caller's own may be another.
        env.remove("LINES");
        env.remove("COLUMNS");
        env.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    }
    let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
    set("FERMATA_SOCKET", site.services.paths.socket.to_string_lossy().into_owned());
    set("FERMATA_PROJECT", site.project.name.to_string());
    set("FERMATA_AGENT", agent.to_string());
    set("FERMATA_TOKEN", token.to_owned());
    if let Some(Continuation { checkpoint }) = continuation {
        set("FERMATA_RESUME", "1".to_owned());
        if let Some(number) = checkpoint {
            let context = site.dirs().checkpoint(number).join(crate::operations::checkpoint::layout::CONTEXT);
            set("FERMATA_CONTEXT", context.to_string_lossy().into_owned());
            set("FERMATA_CHECKPOINT", number.to_string());
        }
    }
    env.into_iter().map(|(name, value)| (Raw::from(name), Raw::from(value))).collect()
}

/// The limits that an agent gets: its caller's. Where that one said nothing of open files it gets what
/// the daemon was started with, not what the daemon has raised its own to.
fn limits(agent: Option<&Agent>, open_files: Option<Limit>) -> Vec<Limit> {
    let known = |name: &str| -> Option<LimitKind> { serde_json::from_value(serde_json::Value::from(name)).ok() };
    let of_caller = agent.into_iter().flat_map(|agent| &agent.spec.limits);
    let mut limits: Vec<Limit> = of_caller
        .filter_map(|(name, limit)| Some(Limit { kind: known(name)?, soft: limit.soft, hard: limit.hard }))
        .collect();
    if let Some(own) = open_files
        && !limits.iter().any(|limit| limit.kind == own.kind)
    {
        limits.push(own);
    }
    limits
}

/// Ends what is left of every run of an agent but one: nothing is left behind, and one session
/// has one writer.
///
/// # Errors
/// When a process cannot be ended.
pub async fn end_older_runs(site: &StepContext, agent: &AgentName, current: &RunId) -> Result<(), Failure> {
    let (dir, current) = (site.dirs().runs(agent), current.clone());
    let older = blocking("list runs", move || {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Failure::fault(&format!("list {}", dir.display()), &error)),
        };
        let others = entries.flatten().filter(|entry| entry.file_name().to_str() != Some(current.as_str()));
        let goes_on = |run_dir: &PathBuf| !read_exit(run_dir).is_ok_and(|exit| exit.is_some());
        Ok(others.map(|entry| entry.path()).filter(goes_on).collect())
    });
    for run_dir in older.await? {
        end_run(site, &run_dir).await?;
    }
    Ok(())
}

/// Removes what older runs have left, but for the newest ones. All of them have ended: the caller
/// has seen to that, and a checkpoint has copies of its own.
async fn prune_runs(site: &StepContext, agent: &AgentName, current: &RunId) {
    let keep = site.services.settings().agents.keep_runs as usize;
    if keep == 0 {
        return;
    }
    let (dir, current) = (site.dirs().runs(agent), current.to_string());
    let pruned = blocking("remove older runs", move || {
        let Ok(entries) = std::fs::read_dir(&dir) else { return Ok(()) };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // Ids begin with the time: the order of their names is that of the runs.
        let mut older: Vec<String> = names.filter(|name| name.starts_with("run-") && *name < current).collect();
        older.sort_unstable();
        let surplus = (older.len() + 1).saturating_sub(keep);
        for name in &older[..surplus] {
            let path = dir.join(name);
            let failed = |e| Failure::fault(&format!("remove {}", path.display()), &e);
            leftovers::remove_aside(leftovers::put_aside(&path).map_err(failed)?);
        }
        leftovers::sweep_aside(&dir);
        Ok(())
    });
    if let Err(failure) = pruned.await {
        tracing::warn!(project = %site.project.name, %agent, %failure, "older runs stay until the next start");
    }
}

/// Stops a run whose shim cannot be asked to: SIGTERM to its main process, and when the grace is over
/// the end of everything.
///
/// # Errors
/// When a process cannot be ended.
pub async fn stop_unreachable(
    site: &StepContext,
    agent: &AgentName,
    run: &RunId,
    grace: Duration,
) -> Result<(), Failure> {
    let run_dir = site.dirs().run(agent, run);
    if let Ok(Some(record)) = read_run(&run_dir)
        && record.boot_id == site.services.boot_id
        && !grace.is_zero()
        && let (Ok(death), Ok(shim)) = (Death::of(record.agent), Death::of(record.shim))
    {
        // Who is gone, or another's now, has no more need of it.
        process::signal(record.agent, libc::SIGTERM).ok();
        if tokio::time::timeout(grace, death.wait()).await.is_ok() {
            // Its shim clears up behind it and records the exit.
            drop(tokio::time::timeout(ENDING, shim.wait()).await);
        }
    }
    end_run(site, &run_dir).await
}

/// Ends a run that may be alive: through its shim, or without it where the shim is gone.
///
/// # Errors
/// When a process cannot be ended.
pub async fn end_run(site: &StepContext, run_dir: &std::path::Path) -> Result<(), Failure> {
    let mut record = read_run(run_dir);
    if matches!(record, Ok(None)) {
        record::abandon(run_dir).map_err(|e| Failure::fault("give an older launch up", &e))?;
        record = read_run(run_dir);
    }
    let record = match record {
        Ok(Some(record)) => record,
        Ok(None) => {
            let dir = run_dir.to_path_buf();
            let ended = blocking("end a launch without a record", move || {
                end_unrecorded_run(&dir, ENDING).map_err(|e| Failure::fault("end an older launch", &e))
            });
            return ended.await.map(drop);
        }
        Err(error) => return Err(Failure::fault("read an older run", &error)),
    };
    if record.boot_id != site.services.boot_id {
        return Ok(());
    }
    let mut why = None;
    if process::is_alive(record.shim).unwrap_or(false) {
        match reconnect::connect(&record, site.services.shim_patience()).await {
            Ok((link, _events)) => {
                let ended = async {
                    link.kill().await?;
                    link.closed().await;
                    Ok::<(), crate::shims::link::LinkError>(())
                };
                match tokio::time::timeout(ENDING, ended).await {
                    Ok(Ok(()) | Err(crate::shims::link::LinkError::Closed)) => return Ok(()),
                    Ok(Err(error)) => why = Some(error_chain(&error)),
                    Err(_) => why = Some("its processes did not end in time".to_owned()),
                }
            }
            Err(error) => why = Some(error),
        }
    }
    match reconnect::give_up(run_dir, &record, &site.services.boot_id, why).await {
        ReconnectOutcome::Lost { left: Some(error), .. } => Err(Failure::fault("end an older run", &error)),
        _ => Ok(()),
    }
}
