//! Handlers of `agent.*`: run, stop, kill, restart, remove, wait.

use std::path::Path;
use std::time::Duration;

use fermata_core::Project;
use fermata_core::agent::{Agent, AgentState};
use fermata_core::command::Command;
use fermata_core::restart::RestartKind;
use fermata_core::view;
use fermata_protocol::agent::{
    AgentKill, AgentList, AgentListResult, AgentRun, AgentSpec, AgentStatus, AgentStop, AgentView, AgentWait,
};
use fermata_protocol::project::ProjectCreate;
use fermata_protocol::{AgentName, Code, ProjectName, Refusal, RunId, Target};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::loads;
use super::reply::wire;
use super::terminals::check_size;
use crate::errors::Failure;
use crate::operations::blocking;
use crate::operations::run::limits;
use crate::project::{ProjectHandle, Projects, Tell, View, new_run};
use crate::services;
use crate::shims::link::{LinkError, ShimLink};
use crate::store::commit::Write;
use crate::store::idempotency::{self, Keyed};
use crate::store::{Connection, Durability};
use fermata_os::process::{self, ProcessId};
use fermata_shim::wire::RefusalCode;

/// How long a stop or kill waits for the end beyond the grace.
const ENDING: Duration = Duration::from_secs(20);

/// How much of a list goes into one reply; a line has at most [`fermata_protocol::MAX_LINE_BYTES`].
const PAGE_BYTES: usize = 768 << 10;

/// How many arguments, and how much environment, an agent may have in bytes; beyond that exec fails anyway.
const MAX_ARGUMENT_BYTES: usize = 1 << 20;

pub(super) async fn run(projects: &Projects, params: AgentRun, keyed: Option<Keyed>) -> Result<Value, Failure> {
    check(&params)?;
    limits::prepare(projects.services(), &params.supervision.resources).await?;
    let handle = match projects.get(&params.project) {
        Ok(handle) => handle,
        Err(missing) => {
            let Some(workspace) = params.workspace.clone() else { return Err(missing) };
            let create = ProjectCreate {
                name: params.project.clone(),
                workspace,
                description: String::new(),
                source: None,
                config: None,
            };
            match projects.create(create, None, |_| Value::Null).await {
                Ok(_) => {}
                // Another run may have created it in the meantime.
                Err(Failure::Refused(refusal)) if refusal.code == Code::ProjectExists => {}
                Err(other) => return Err(other),
            }
            projects.get(&params.project)?
        }
    };
    let project = handle.project();
    if let Some(workspace) = &params.workspace {
        same_workspace(&project, workspace).await?;
    }
    let settings = projects.services().settings();
    let profiles = projects.services().profiles();
    let profile = match &params.profile {
        Some(name) if profiles.get(name).is_some() => Some(name.clone()),
        Some(name) => {
            let known: Vec<&str> = profiles.names().collect();
            return Err(Refusal::new(Code::InvalidParams, format!("there is no profile '{name}'"))
                .hint(format!("known are: {}", known.join(", ")))
                .into());
        }
        None => params.argv.first().and_then(|program| profiles.recognise(program)).map(str::to_owned),
    };
    let spec = AgentSpec {
        argv: params.argv,
        cwd: params.cwd.unwrap_or_else(|| project.facts.workspace.clone()),
        umask: params.umask.unwrap_or(0o022),
        limits: params.limits,
        resume_argv: params.resume_argv,
        profile,
        stop_grace_ms: params.stop_grace_ms.unwrap_or(settings.agents.stop_grace_ms),
        supervision: params.supervision,
    };
    loop {
        let name = params.name.clone().map_or_else(|| name_of(&spec.argv, &handle.project()), Ok)?;
        let (new, token) = new_run();
        let run = new.id.clone();
        let shown = name.clone();
        let told = handle
            .tell(Tell {
                command: Command::Run { agent: name.clone(), spec: spec.clone(), new },
                writes: vec![Write::Environment(name.clone(), params.env.clone())],
                tokens: vec![token],
                keyed: keyed.clone(),
                view: Box::new(move |project, _| view_of(project, &shown)),
            })
            .await;
        match told {
            // Another run has taken the name in the meantime: the next one will do.
            Err(Failure::Refused(refusal)) if refusal.code == Code::AgentRunning && params.name.is_none() => {}
            Err(failure) => return Err(failure),
            Ok(_) => return started(&handle, &name, &run).await,
        }
    }
}

fn check(params: &AgentRun) -> Result<(), Refusal> {
    let invalid = |message: String| Err(Refusal::new(Code::InvalidParams, message));
    if params.argv.first().is_none_or(String::is_empty) {
        return invalid("'argv' names no program".into());
    }
    if params.resume_argv.as_ref().is_some_and(|argv| argv.first().is_none_or(String::is_empty)) {
        return invalid("'resume_argv' names no program".into());
    }
    let hooks = [("pre_start", &params.supervision.pre_start), ("post_stop", &params.supervision.post_stop)];
    for (field, hook) in hooks.iter().filter_map(|(field, hook)| Some((field, hook.as_ref()?))) {
        if hook.argv.first().is_none_or(String::is_empty) {
            return invalid(format!("'supervision.{field}' names no program"));
        }
    }
    let hook_words = hooks.iter().filter_map(|(_, hook)| hook.as_ref()).flat_map(|hook| &hook.argv);
    let words =
        params.argv.iter().chain(params.resume_argv.iter().flatten()).chain(params.cwd.iter()).chain(hook_words);
    if words.clone().any(|word| word.contains('\0'))
        || params.env.iter().any(|(k, v)| k.contains('\0') || v.contains('\0'))
    {
        return invalid("an argument or variable holds a NUL byte".into());
    }
    if let Some(name) = params.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return invalid(format!("'{name}' is no name for an environment variable"));
    }
    let bytes: usize = words.map(String::len).sum::<usize>()
        + params.env.iter().map(|(name, value)| name.len() + value.len() + 2).sum::<usize>();
    if bytes > MAX_ARGUMENT_BYTES {
        return Err(Refusal::new(
            Code::TooLarge,
            format!("arguments and environment have {bytes} bytes, more than {MAX_ARGUMENT_BYTES}"),
        ));
    }
    if let Some(size) = params.supervision.terminal {
        check_size(size)?;
    }
    if params.cwd.as_ref().is_some_and(|cwd| !Path::new(cwd).is_absolute()) {
        return invalid("'cwd' is not an absolute path".into());
    }
    Ok(())
}

/// A run may name the workspace of a project that exists, but not another one.
async fn same_workspace(project: &Project, given: &str) -> Result<(), Failure> {
    let (given_path, own) = (given.to_owned(), project.facts.workspace.clone());
    let same = blocking("compare workspaces", move || {
        Ok(Path::new(&given_path).canonicalize().is_ok_and(|path| path == Path::new(&own)))
    })
    .await?;
    if same {
        return Ok(());
    }
    Err(Refusal::new(
        Code::ProjectExists,
        format!("project '{}' has the workspace {}, not {given}", project.name, project.facts.workspace),
    )
    .hint("leave --workspace out, or give the project another name")
    .into())
}

/// Makes a name of the program's, with a number where it is taken.
fn name_of(argv: &[String], project: &Project) -> Result<AgentName, Refusal> {
    let file = argv.first().map(|program| Path::new(program).file_name().unwrap_or_default().to_string_lossy());
    let mut base: String = file
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' })
        .take(50)
        .collect();
    if !base.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        base.insert_str(0, "agent");
    }
    let invalid = |e: fermata_protocol::ids::InvalidId| Refusal::new(Code::InvalidParams, e.to_string());
    let free = |name: &AgentName| project.agents.get(name).is_none_or(|agent| agent.is_terminal());
    let first = AgentName::new(base.clone()).map_err(invalid)?;
    if free(&first) {
        return Ok(first);
    }
    (2..)
        .filter_map(|n: u32| AgentName::new(format!("{base}-{n}")).ok())
        .find(free)
        .ok_or_else(|| Refusal::new(Code::InvalidParams, "no name is free"))
}

/// Shows an agent as it is now.
pub(super) fn shown(project: &Project, agent: &Agent) -> AgentView {
    view::agent(project, agent, services::now())
}

fn view_of(project: &Project, name: &AgentName) -> Value {
    project.agents.get(name).map_or(Value::Null, |agent| json!(shown(project, agent)))
}

/// Waits until a run has started, or says why it has not.
async fn started(handle: &ProjectHandle, name: &AgentName, run: &RunId) -> Result<Value, Failure> {
    let mut state = handle.watch();
    loop {
        let project = state.borrow_and_update().clone();
        let Some(agent) = project.agents.get(name) else { return Ok(Value::Null) };
        let same = agent.run().is_some_and(|r| r.id == *run);
        let launched = agent.run().is_some_and(|r| r.processes.is_some() || r.ended.is_some());
        match &agent.state {
            AgentState::Failed { detail: Some(reason), .. } if same => {
                return Err(Refusal::new(
                    Code::LaunchFailed,
                    format!("agent '{name}' of project '{}' could not be started: {reason}", project.name),
                )
                .into());
            }
            AgentState::Waiting { .. } => return wire(&shown(&project, agent)),
            _ if !same || launched => return wire(&shown(&project, agent)),
            _ => {}
        }
        if state.changed().await.is_err() {
            return Err(shutting_down());
        }
    }
}

pub(super) fn shutting_down() -> Failure {
    Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned()).into()
}

pub(super) async fn list(projects: &Projects, params: &AgentList) -> Result<Value, Failure> {
    let handles = match &params.project {
        Some(name) => vec![projects.get(name)?],
        None => projects.all(),
    };
    let found: Vec<_> = handles.iter().map(ProjectHandle::project).collect();
    let found: Vec<&Project> = found.iter().map(|project| &**project).collect();
    let views = found.iter().flat_map(|project| project.agents.values().map(|agent| shown(project, agent)));
    let after = params.after.as_ref().map(|after| (&after.project, after.agent.as_ref()));
    let wanted = views.filter(|view| after.is_none_or(|after| (&view.project, Some(&view.name)) > after));
    let mut agents: Vec<AgentView> = wanted.collect();
    loads::fill(projects.services(), &found, &mut agents).await;
    let next = cut(&mut agents, PAGE_BYTES);
    wire(&AgentListResult { agents, next })
}

/// Leaves as many agents as fit into so many bytes, at least one; returns the last one when others
/// are left out.
fn cut(agents: &mut Vec<AgentView>, bytes: usize) -> Option<Target> {
    let mut used = 0;
    let fit = agents.iter().take_while(|agent| {
        used += serde_json::to_vec(agent).map_or(0, |text| text.len() + 1);
        used <= bytes
    });
    let count = fit.count().max(1);
    if count >= agents.len() {
        return None;
    }
    agents.truncate(count);
    agents.last().map(|last| Target::agent(last.project.clone(), last.name.clone()))
}

/// The agents that a command aims at and that have not ended.
fn aimed(project: &Project, agent: Option<&AgentName>) -> Vec<AgentName> {
    project
        .agents
        .values()
        .filter(|a| agent.is_none_or(|name| a.name == *name) && !a.is_terminal())
        .map(|a| a.name.clone())
        .collect()
}

pub(super) async fn stop(projects: &Projects, params: &AgentStop, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&params.target.project)?;
    let project = handle.project();
    let names = aimed(&project, params.target.agent.as_ref());
    let grace = params.grace_ms.unwrap_or_else(|| longest_grace(&project, &names));
    let command = Command::Stop { agent: params.target.agent.clone(), grace_ms: params.grace_ms };
    let told = tell_list(&handle, command, names, keyed).await?;
    runs_ended(&handle, &told, Duration::from_millis(grace) + ENDING).await
}

pub(super) async fn kill(projects: &Projects, params: &AgentKill, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&params.target.project)?;
    if params.target.agent.as_ref().is_some_and(|name| !handle.project().agents.contains_key(name)) {
        return Err(not_found(&params.target));
    }
    let names = aimed(&handle.project(), params.target.agent.as_ref());
    match &params.signal {
        Some(signal) => send_signal(projects, &handle, params, signal, &names, keyed).await,
        None => {
            if !names.is_empty() {
                remember(projects, keyed, &wire(&list_of(&handle.project(), &names))?).await?;
            }
            let command = Command::Kill { agent: params.target.agent.clone() };
            let told = tell_list(&handle, command, names, None).await?;
            runs_ended(&handle, &told, ENDING).await
        }
    }
}

async fn send_signal(
    projects: &Projects,
    handle: &ProjectHandle,
    params: &AgentKill,
    signal: &str,
    names: &[AgentName],
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let target = &params.target;
    let name = signal.to_ascii_uppercase();
    let full = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let number = full
        .parse::<Signal>()
        .ok()
        .or_else(|| signal.parse::<i32>().ok().and_then(|n| Signal::try_from(n).ok()))
        .ok_or_else(|| {
            Refusal::new(Code::InvalidParams, format!("'{signal}' is no signal")).hint("for instance TERM, USR1 or 10")
        })?;
    let project = handle.project();
    if names.is_empty() {
        return Err(Refusal::new(Code::AgentNotRunning, format!("{target} has no running agent")).into());
    }
    let held = |name: &&AgentName| project.agents.get(*name).is_some_and(|a| a.is_paused());
    if number == Signal::SIGCONT
        && let Some(name) = names.iter().find(held)
    {
        return Err(held_still(&target.project, name).into());
    }
    let reply = wire(&list_of(&project, names))?;
    remember(projects, keyed, &reply).await?;
    for name in names {
        let processes = project.agents.get(name).and_then(|agent| agent.processes());
        let Some(processes) = processes else { continue };
        // A stopped group is continued as a whole, by the shim, whose child its leader is.
        let run = project.agents.get(name).and_then(|agent| agent.run());
        if number == Signal::SIGCONT
            && let Some(run) = run
            && let services = projects.services()
            && let Ok((link, _events)) = ShimLink::connect(&services.shim_socket(&run.id), &services.tracker).await
        {
            match link.signal(number as i32).await {
                Ok(()) => continue,
                // A pause that has begun meanwhile.
                Err(LinkError::Refused { code: RefusalCode::AgentFrozen, .. }) => {
                    return Err(held_still(&target.project, name).into());
                }
                Err(_) => {}
            }
        }
        // By pid and start time: a recycled pid is never signalled.
        let id = ProcessId { pid: processes.pid, start_time_ticks: processes.start_ticks };
        process::signal(id, number as i32)
            .map_err(|e| Failure::fault(&format!("send {} to agent '{name}'", number.as_str()), &e))?;
    }
    Ok(reply)
}

fn held_still(project: &ProjectName, agent: &AgentName) -> Refusal {
    Refusal::new(Code::ProjectPaused, format!("agent {project}/{agent} is frozen, or about to be: SIGCONT is not sent"))
        .hint(format!("fermatactl resume {project}"))
}

/// Remembers the key of a signal or kill before it is sent: it is no event, and leaves nothing in the
/// store that the key could be kept with.
pub(super) async fn remember(projects: &Projects, keyed: Option<Keyed>, reply: &Value) -> Result<(), Failure> {
    let Some(keyed) = keyed else { return Ok(()) };
    let (reply, now) = (reply.clone(), services::now());
    let write = move |c: &Connection| idempotency::remember(c, &keyed, None, Some(&reply), now);
    let store = &projects.services().store;
    store.write(Durability::Power, write).await.map_err(|e| Failure::fault("remember the idempotency key", &e))
}

fn list_of(project: &Project, names: &[AgentName]) -> AgentListResult {
    let agents = names.iter().filter_map(|name| Some(shown(project, project.agents.get(name)?))).collect();
    AgentListResult { agents, next: None }
}

pub(super) async fn restart(projects: &Projects, target: &Target, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&target.project)?;
    let name = one_agent(target)?;
    let (new, token) = new_run();
    let before = handle.project().agents.get(name).and_then(|agent| agent.run().map(|run| run.id.clone()));
    let command = Command::Restart { agent: name.clone(), new };
    let (tokens, shown) = (vec![token], name.clone());
    let view: View = Box::new(move |project, _| view_of(project, &shown));
    handle.tell(Tell { command, writes: Vec::new(), tokens, keyed, view }).await?;
    started_after(&handle, name, before.as_ref()).await
}

/// Brings back an agent that has ended: it goes on where it was, as far as its tool can.
pub(super) async fn resume(projects: &Projects, target: &Target, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&target.project)?;
    let name = one_agent(target)?;
    let site = handle.step_context();
    let agent = site.project.agents.get(name).ok_or_else(|| not_found(target))?;
    let (start, token) = crate::project::start(&site, agent, RestartKind::GoesOn).await?;
    let before = agent.run().map(|run| run.id.clone());
    let command = Command::Start { agent: name.clone(), start, requested: true };
    let (tokens, shown) = (vec![token], name.clone());
    let view: View = Box::new(move |project, _| view_of(project, &shown));
    handle.tell(Tell { command, writes: Vec::new(), tokens, keyed, view }).await?;
    started_after(&handle, name, before.as_ref()).await
}

/// Waits until another run than that one has started, or says why it has not.
async fn started_after(handle: &ProjectHandle, name: &AgentName, before: Option<&RunId>) -> Result<Value, Failure> {
    let mut state = handle.watch();
    loop {
        let project = state.borrow_and_update().clone();
        let Some((agent, run)) = project.agents.get(name).and_then(|agent| Some((agent, agent.run()?))) else {
            return Ok(Value::Null);
        };
        if before == Some(&run.id) && agent.is_terminal() {
            let message = format!("agent '{name}' of project '{}' has ended and was not started again", project.name);
            return Err(Refusal::new(Code::AgentNotRunning, message).into());
        }
        let waits = project.agents.get(name).is_some_and(|agent| matches!(agent.state, AgentState::Waiting { .. }));
        if waits || before != Some(&run.id) {
            return started(handle, name, &run.id.clone()).await;
        }
        if state.changed().await.is_err() {
            return Err(shutting_down());
        }
    }
}

/// Completes the remembered reply of a run or restart: an agent as it was when the call was persisted.
pub(super) async fn finish_start(projects: &Projects, reply: Value) -> Result<Value, Failure> {
    let agent: AgentView = from_memory(&reply)?;
    let (Ok(handle), Some(run)) = (projects.get(&agent.project), &agent.run) else { return Ok(reply) };
    let done = match agent.status {
        AgentStatus::Stopping => started_after(&handle, &agent.name, Some(run)).await?,
        _ => started(&handle, &agent.name, run).await?,
    };
    // It was removed since.
    Ok(if done.is_null() { reply } else { done })
}

/// Completes the remembered reply of a stop or kill.
pub(super) async fn finish_end(
    projects: &Projects,
    project: &ProjectName,
    grace_ms: Option<u64>,
    reply: Value,
) -> Result<Value, Failure> {
    let Ok(handle) = projects.get(project) else { return Ok(reply) };
    let names: Vec<_> = from_memory::<AgentListResult>(&reply)?.agents.into_iter().map(|agent| agent.name).collect();
    let patience = Duration::from_millis(grace_ms.unwrap_or(longest_grace(&handle.project(), &names))) + ENDING;
    runs_ended(&handle, &reply, patience).await
}

/// Waits until the runs that a stop or kill was aimed at have ended. Somebody else may have started
/// an agent again since: that run is not meant.
async fn runs_ended(handle: &ProjectHandle, told: &Value, patience: Duration) -> Result<Value, Failure> {
    let agents = from_memory::<AgentListResult>(told)?.agents;
    let names: Vec<AgentName> = agents.iter().map(|agent| agent.name.clone()).collect();
    let is_another = |agent: &Agent| {
        let meant = agents.iter().find(|told| told.name == agent.name).and_then(|told| told.run.as_ref());
        meant.is_some_and(|meant| agent.run().is_some_and(|run| run.id != *meant))
    };
    ended(handle, &names, patience, is_another).await
}

fn from_memory<T: DeserializeOwned>(reply: &Value) -> Result<T, Failure> {
    T::deserialize(reply).map_err(|e| Failure::fault("read the remembered reply", &e))
}

fn longest_grace(project: &Project, names: &[AgentName]) -> u64 {
    names.iter().filter_map(|name| project.agents.get(name)).map(|agent| agent.spec.stop_grace_ms).max().unwrap_or(0)
}

pub(super) async fn remove(projects: &Projects, target: &Target, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&target.project)?;
    tell(&handle, Command::RemoveAgent { agent: one_agent(target)?.clone() }, keyed).await?;
    Ok(json!({}))
}

pub(super) async fn wait(projects: &Projects, params: &AgentWait) -> Result<Value, Failure> {
    let handle = projects.get(&params.target.project)?;
    let name = one_agent(&params.target)?;
    if !handle.project().agents.contains_key(name) {
        return Err(not_found(&params.target));
    }
    let names = [name.clone()];
    let waiting = ended(&handle, &names, Duration::MAX, |_| false);
    let value = match params.timeout_ms {
        None => waiting.await?,
        Some(ms) => match tokio::time::timeout(Duration::from_millis(ms), waiting).await {
            Ok(value) => value?,
            Err(_) => {
                return Err(Refusal::new(
                    Code::TimedOut,
                    format!("agent {} has not ended within {ms} ms", params.target),
                )
                .into());
            }
        },
    };
    Ok(value.get("agents").and_then(|agents| agents.get(0)).cloned().unwrap_or(Value::Null))
}

/// Waits until agents have ended, and shows them.
async fn ended(
    handle: &ProjectHandle,
    names: &[AgentName],
    patience: Duration,
    is_over: impl Fn(&Agent) -> bool,
) -> Result<Value, Failure> {
    let mut state = handle.watch();
    let all_ended = async {
        loop {
            let project = state.borrow_and_update().clone();
            let agents: Vec<_> = names.iter().filter_map(|name| project.agents.get(name)).collect();
            if agents.iter().all(|agent| agent.is_terminal() || is_over(agent)) {
                let views: Vec<AgentView> = agents.iter().map(|agent| shown(&project, agent)).collect();
                return wire(&AgentListResult { agents: views, next: None });
            }
            if state.changed().await.is_err() {
                return Err(shutting_down());
            }
        }
    };
    match tokio::time::timeout(patience, all_ended).await {
        Ok(result) => result,
        Err(_) => Err(Refusal::new(Code::TimedOut, format!("agents have not ended within {} s", patience.as_secs()))
            .hint("fermatactl kill")
            .into()),
    }
}

/// Tells a command; its reply, for as long as its key is remembered, are these agents.
async fn tell_list(
    handle: &ProjectHandle,
    command: Command,
    names: Vec<AgentName>,
    keyed: Option<Keyed>,
) -> Result<Value, Failure> {
    let view: View = Box::new(move |project, _| json!(list_of(project, &names)));
    handle.tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view }).await
}

async fn tell(handle: &ProjectHandle, command: Command, keyed: Option<Keyed>) -> Result<Value, Failure> {
    handle.tell(Tell { command, writes: Vec::new(), tokens: Vec::new(), keyed, view: Box::new(|_, _| json!({})) }).await
}

pub(super) fn one_agent(target: &Target) -> Result<&AgentName, Refusal> {
    target.agent.as_ref().ok_or_else(|| {
        Refusal::new(Code::InvalidParams, format!("'{target}' is a project, not one of its agents"))
            .hint(format!("{target}/AGENT"))
    })
}

pub(super) fn not_found(target: &Target) -> Failure {
    Refusal::new(Code::AgentNotFound, format!("there is no agent {target}"))
        .hint(format!("fermatactl ps {}", target.project))
        .into()
}
