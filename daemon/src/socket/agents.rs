//! Handlers of `agent.run`, `list`, `stop`, `kill`, `restart`, `resume`, `remove` and `wait`.

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

/// How long a stop or kill waits for the end after the grace period.
const ENDING: Duration = Duration::from_secs(20);

/// The size of a list in one reply, in bytes; a line has at most [`fermata_protocol::MAX_LINE_BYTES`].
const PAGE_BYTES: usize = 768 << 10;

/// The size of arguments and environment together, in bytes; `exec` fails with more.
const MAX_ARGUMENT_BYTES: usize = 1 << 20;

pub(super) async fn run(projects: &Projects, params: AgentRun, keyed: Option<Keyed>) -> Result<Value, Failure> {
    check(&params)?;
    limits::prepare(projects.services(), &params.supervision.resources).await?;
    let handle = find_or_create(projects, &params).await?;
    let project = handle.project();
    if let Some(workspace) = &params.workspace {
        same_workspace(&project, workspace).await?;
    }
    let settings = projects.services().settings();
    let profile = profile(projects, &params)?;
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
        let of_view = name.clone();
        let reply = handle
            .tell(Tell {
                command: Command::Run { agent: name.clone(), spec: spec.clone(), new },
                writes: vec![Write::Environment(name.clone(), params.env.clone())],
                tokens: vec![token],
                keyed: keyed.clone(),
                view: Box::new(move |project, _| view_of(project, &of_view)),
            })
            .await;
        match reply {
            // A concurrent call has taken the name that was chosen here: chooses another one.
            Err(Failure::Refused(refusal)) if refusal.code == Code::AgentRunning && params.name.is_none() => {}
            Err(failure) => return Err(failure),
            Ok(_) => return started(&handle, &name, &run).await,
        }
    }
}

/// Finds the project of a run; creates it if the call names a workspace.
async fn find_or_create(projects: &Projects, params: &AgentRun) -> Result<ProjectHandle, Failure> {
    let missing = match projects.get(&params.project) {
        Ok(handle) => return Ok(handle),
        Err(missing) => missing,
    };
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
        // A concurrent call may have created it.
        Err(Failure::Refused(refusal)) if refusal.code == Code::ProjectExists => {}
        Err(failure) => return Err(failure),
    }
    projects.get(&params.project)
}

/// Returns the profile that a run names, else the one of its program.
fn profile(projects: &Projects, params: &AgentRun) -> Result<Option<String>, Refusal> {
    let profiles = projects.services().profiles();
    match &params.profile {
        Some(name) if profiles.get(name).is_some() => Ok(Some(name.clone())),
        Some(name) => {
            let names: Vec<&str> = profiles.names().collect();
            Err(Refusal::new(Code::InvalidParams, format!("there is no profile '{name}'"))
                .hint(format!("the profiles are: {}", names.join(", "))))
        }
        None => Ok(params.argv.first().and_then(|program| profiles.recognise(program)).map(str::to_owned)),
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
        return invalid("an argument or variable contains a NUL byte".into());
    }
    if let Some(name) = params.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return invalid(format!("'{name}' is not the name of an environment variable"));
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

/// Refuses a run that names another workspace than its existing project has.
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

/// Derives a name from that of the program, with a number if an agent that has not ended uses it.
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
        .ok_or_else(|| Refusal::new(Code::InvalidParams, "every name derived from the program is in use"))
}

/// Returns the view of an agent.
pub(super) fn shown(project: &Project, agent: &Agent) -> AgentView {
    view::agent(project, agent, services::now())
}

fn view_of(project: &Project, name: &AgentName) -> Value {
    project.agents.get(name).map_or(Value::Null, |agent| json!(shown(project, agent)))
}

/// Waits until a run has started.
///
/// # Errors
/// `launch_failed` with the reason.
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
            AgentState::Backoff { .. }
            | AgentState::Starting(_)
            | AgentState::Running(_)
            | AgentState::Frozen(_)
            | AgentState::Parked(_)
            | AgentState::Stopping { .. }
            | AgentState::Ended { .. }
            | AgentState::Failed { .. }
            | AgentState::TimedOut { .. }
            | AgentState::Interrupted { .. } => {
                if !same || launched {
                    return wire(&shown(&project, agent));
                }
            }
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
    let states: Vec<_> = handles.iter().map(ProjectHandle::project).collect();
    let states: Vec<&Project> = states.iter().map(|project| &**project).collect();
    let views = states.iter().flat_map(|project| project.agents.values().map(|agent| shown(project, agent)));
    let after = params.after.as_ref().map(|after| (&after.project, after.agent.as_ref()));
    let wanted = views.filter(|view| after.is_none_or(|after| (&view.project, Some(&view.name)) > after));
    let mut agents: Vec<AgentView> = wanted.collect();
    loads::fill(projects.services(), &states, &mut agents).await;
    let next = cut(&mut agents, PAGE_BYTES);
    wire(&AgentListResult { agents, next })
}

/// Truncates a list to the agents whose JSON fits into `bytes`, at least one; returns the last one if the list was
/// truncated.
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

/// Returns the agents of a command's target that have not ended.
fn targets(project: &Project, agent: Option<&AgentName>) -> Vec<AgentName> {
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
    let names = targets(&project, params.target.agent.as_ref());
    let grace = params.grace_ms.unwrap_or_else(|| longest_grace(&project, &names));
    let command = Command::Stop { agent: params.target.agent.clone(), grace_ms: params.grace_ms };
    let reply = tell_list(&handle, command, names, keyed).await?;
    runs_ended(&handle, &reply, Duration::from_millis(grace) + ENDING).await
}

pub(super) async fn kill(projects: &Projects, params: &AgentKill, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&params.target.project)?;
    if params.target.agent.as_ref().is_some_and(|name| !handle.project().agents.contains_key(name)) {
        return Err(not_found(&params.target));
    }
    let names = targets(&handle.project(), params.target.agent.as_ref());
    match &params.signal {
        Some(signal) => send_signal(projects, &handle, params, signal, &names, keyed).await,
        None => {
            if !names.is_empty() {
                remember(projects, keyed, &wire(&list_of(&handle.project(), &names))?).await?;
            }
            let command = Command::Kill { agent: params.target.agent.clone() };
            let reply = tell_list(&handle, command, names, None).await?;
            runs_ended(&handle, &reply, ENDING).await
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
            Refusal::new(Code::InvalidParams, format!("'{signal}' is not a signal"))
                .hint("give a name or number, for instance TERM, USR1 or 10")
        })?;
    let project = handle.project();
    if names.is_empty() {
        return Err(Refusal::new(Code::AgentNotRunning, format!("{target} has no running agent")).into());
    }
    let is_paused = |name: &&AgentName| project.agents.get(*name).is_some_and(|a| a.is_paused());
    if number == Signal::SIGCONT
        && let Some(name) = names.iter().find(is_paused)
    {
        return Err(refuse_continue(&target.project, name).into());
    }
    let reply = wire(&list_of(&project, names))?;
    remember(projects, keyed, &reply).await?;
    for name in names {
        let processes = project.agents.get(name).and_then(|agent| agent.processes());
        let Some(processes) = processes else { continue };
        // The shim continues the whole process group of its child.
        let run = project.agents.get(name).and_then(|agent| agent.run());
        if number == Signal::SIGCONT
            && let Some(run) = run
            && let services = projects.services()
            && let Ok((link, _events)) = ShimLink::connect(&services.shim_socket(&run.id), &services.tracker).await
        {
            match link.signal(number as i32).await {
                Ok(()) => continue,
                // A pause has begun meanwhile.
                Err(LinkError::Refused { code: RefusalCode::AgentFrozen, .. }) => {
                    return Err(refuse_continue(&target.project, name).into());
                }
                // The signal is sent to the agent's main process instead.
                Err(_) => {}
            }
        }
        // Identified by pid and start time, so that a process which got the same pid later is never signalled.
        let id = ProcessId { pid: processes.pid, start_time_ticks: processes.start_ticks };
        process::signal(id, number as i32)
            .map_err(|e| Failure::fault(&format!("send {} to agent '{name}'", number.as_str()), &e))?;
    }
    Ok(reply)
}

fn refuse_continue(project: &ProjectName, agent: &AgentName) -> Refusal {
    Refusal::new(Code::ProjectPaused, format!("agent {project}/{agent} is frozen, or about to be: SIGCONT is not sent"))
        .hint(format!("fermatactl resume {project}"))
}

/// Stores the idempotency key of a signal, kill or input before it is sent, since no transaction follows that could
/// store it.
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
    let (tokens, of_view) = (vec![token], name.clone());
    let view: View = Box::new(move |project, _| view_of(project, &of_view));
    handle.tell(Tell { command, writes: Vec::new(), tokens, keyed, view }).await?;
    started_after(&handle, name, before.as_ref()).await
}

/// Starts an agent that has ended; the new run continues the session of the last one if the agent's tool can.
pub(super) async fn resume(projects: &Projects, target: &Target, keyed: Option<Keyed>) -> Result<Value, Failure> {
    let handle = projects.get(&target.project)?;
    let name = one_agent(target)?;
    let step = handle.step_context();
    let agent = step.project.agents.get(name).ok_or_else(|| not_found(target))?;
    let (start, token) = crate::project::start(&step, agent, RestartKind::GoesOn).await?;
    let before = agent.run().map(|run| run.id.clone());
    let command = Command::Start { agent: name.clone(), start, requested: true };
    let (tokens, of_view) = (vec![token], name.clone());
    let view: View = Box::new(move |project, _| view_of(project, &of_view));
    handle.tell(Tell { command, writes: Vec::new(), tokens, keyed, view }).await?;
    started_after(&handle, name, before.as_ref()).await
}

/// Waits until another run than `before` has started.
///
/// # Errors
/// `agent_not_running` when the agent has ended without another run, `launch_failed` with the reason.
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

/// Completes the stored reply of a run, restart or resume, which shows the agent as it was in the call's transaction.
pub(super) async fn finish_start(projects: &Projects, reply: Value) -> Result<Value, Failure> {
    let agent: AgentView = from_memory(&reply)?;
    let (Ok(handle), Some(run)) = (projects.get(&agent.project), &agent.run) else { return Ok(reply) };
    let completed = if agent.status == AgentStatus::Stopping {
        started_after(&handle, &agent.name, Some(run)).await?
    } else {
        started(&handle, &agent.name, run).await?
    };
    // Null when the agent was removed since.
    Ok(if completed.is_null() { reply } else { completed })
}

/// Completes the stored reply of a stop or kill.
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

/// Waits until the runs in the reply of a stop or kill have ended. A later run of the same agent is not waited for.
async fn runs_ended(handle: &ProjectHandle, reply: &Value, patience: Duration) -> Result<Value, Failure> {
    let views = from_memory::<AgentListResult>(reply)?.agents;
    let names: Vec<AgentName> = views.iter().map(|view| view.name.clone()).collect();
    let has_later_run = |agent: &Agent| {
        let target = views.iter().find(|view| view.name == agent.name).and_then(|view| view.run.as_ref());
        target.is_some_and(|target| agent.run().is_some_and(|run| run.id != *target))
    };
    ended(handle, &names, patience, has_later_run).await
}

fn from_memory<T: DeserializeOwned>(reply: &Value) -> Result<T, Failure> {
    T::deserialize(reply).map_err(|e| Failure::fault("read the stored reply", &e))
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

/// Waits until each agent has ended or `is_over`; returns their views.
///
/// # Errors
/// `timed_out` after `patience`.
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

/// Sends a command whose reply is the list of these agents.
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
