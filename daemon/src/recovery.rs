//! The start of a daemon: loads the projects, finds out what has become of their agents, sweeps
//! what a crash has left, and lets the core decide what follows.

use std::collections::BTreeMap;
use std::sync::Arc;

use fermata_core::Project;
use fermata_core::agent::{Agent, Run};
use fermata_core::command::{AfterEnd, Command, RecoveredRun, Respawn};
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::{AgentName, RunId, UnixMillis};

use crate::errors::Failure;
use crate::operations::maintenance::{leftovers, storage};
use crate::operations::run::{launch, session};
use crate::operations::{StepContext, side_by_side};
use crate::project::{Actor, Adopted, NewToken, Projects, RunInspection, inspect_run, new_run};
use crate::services::Services;
use crate::store::{events, rows};
use fermata_shim::log::CURRENT;
use fermata_shim::spec::files;

/// Brings every stored project back to life; returns what a person should know.
///
/// With `operations` switched off, running agents are adopted, but what the last daemon left
/// unfinished stays so until somebody cancels it.
///
/// # Errors
/// When the projects cannot be loaded.
pub async fn run(projects: &Arc<Projects>, operations: bool) -> Result<Vec<String>, Failure> {
    let services = projects.services();
    let stored = services.store.read(rows::load_all).await.map_err(|e| Failure::fault("load the projects", &e))?;
    let before = services.store.read(events::latest_at).await.map_err(|e| Failure::fault("read events", &e))?;
    let mut report = sweep_removed(services, &stored);
    let each = stored.into_iter().map(|project| {
        let projects = Arc::clone(projects);
        async move { one(&projects, project, operations, before).await }
    });
    report.extend(side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten());
    report.sort();
    Ok(report)
}

/// Sweeps what removals have put aside. A directory that the database does not know is left alone:
/// where the database was lost or replaced by an older one, it holds the checkpoints.
fn sweep_removed(services: &Services, stored: &[Project]) -> Vec<String> {
    let dir = services.paths.state.join("projects");
    leftovers::sweep_deferred(&dir);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
    let known = |name: &str| stored.iter().any(|project| project.name.as_str() == name);
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| !name.starts_with('.') && !known(name))
        .map(|name| format!("{name}: the database knows no such project; its files are left in {}", dir.display()))
        .collect()
}

async fn one(projects: &Projects, project: Project, operations: bool, before: Option<UnixMillis>) -> Vec<String> {
    let services = projects.services();
    let name = project.name.clone();
    let (mut actor, handle) = Actor::new(Arc::clone(services), project);
    let mut report = Vec::new();
    let site = handle.step_context();
    if let Err(failure) = leftovers::sweep(&site).await {
        report.push(format!("{name}: {failure}"));
    }
    leftovers::sweep_deferred(&site.dirs().agents());
    if let Err(failure) = storage::measure(&site).await {
        report.push(format!("{name}: {failure}"));
    }
    let mut observed = BTreeMap::new();
    let mut adopted = Vec::new();
    for (agent, run, seen) in side_by_side(inspections(&site)).await {
        match seen {
            Ok(Some(found)) => {
                if let Some(why) = &found.unreachable {
                    report.push(format!("{name}/{agent}: it runs on, but cannot be reached: {why}"));
                }
                if matches!(found.observed, RecoveredRun::Alive(_)) {
                    adopted.push(Adopted { agent: agent.clone(), run, link: found.link });
                }
                observed.insert(agent, found.observed);
            }
            Ok(None) => {}
            Err(failure) => report.push(format!("{name}/{agent}: {failure}")),
        }
    }
    if !adopted.is_empty() {
        report.push(format!("{name}: agents adopted: {}", adopted.len()));
    }
    actor.adopt(adopted);
    if operations {
        if let Some(operation) = site.project.operation() {
            report.push(format!("{name}: operation {operation} was under way and is brought to an end"));
        }
        let (respawn, tokens) = respawns(&site).await;
        let command = Command::Recover { agents: observed, respawn, last_seen: last_seen(&site, before) };
        if let Err(failure) = actor.recover(command, tokens).await {
            report.push(format!("{name}: {failure}; it is tried again"));
        }
    } else {
        for (command, tokens) in ends(&site.project, observed) {
            if let Err(failure) = actor.recover(command, tokens).await {
                report.push(format!("{name}: {failure}"));
            }
        }
    }
    projects.start(actor, handle);
    report
}

/// Says when each agent was last known to run: when it wrote to its log, or when any event was told,
/// whichever was later. What ran then may have gone on for a while, but a machine that is off runs
/// nothing.
fn last_seen(site: &StepContext, before: Option<UnixMillis>) -> BTreeMap<AgentName, UnixMillis> {
    let seen = |agent: &Arc<Agent>| {
        let run = agent.run()?;
        let log = site.dirs().run(&agent.name, &run.id).join(files::LOGS).join(CURRENT);
        let written = std::fs::metadata(log).and_then(|meta| meta.modified()).ok();
        let written = written.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let written = written.and_then(|at| i64::try_from(at.as_millis()).ok()).map(UnixMillis);
        Some((agent.name.clone(), written.max(before)?.max(run.started_at)))
    };
    site.project.agents.values().filter_map(seen).collect()
}

type InspectedRun = (AgentName, RunId, Result<Option<RunInspection>, Failure>);

/// Inspects every agent: ends the processes that its older runs have left, and determines the state of the run that
/// should be alive.
fn inspections(site: &StepContext) -> Vec<impl Future<Output = InspectedRun> + Send + use<>> {
    let runs = site.project.agents.values().filter_map(|agent| Some((Arc::clone(agent), agent.run().cloned()?)));
    let look = |(agent, run): (Arc<Agent>, Run)| {
        let site = site.clone();
        async move {
            let ended = launch::end_older_runs(&site, &agent.name, &run.id).await;
            let seen = if agent.is_alive() {
                let run_dir = site.dirs().run(&agent.name, &run.id);
                let found = inspect_run(run_dir, run.processes, &site.services).await;
                if let Err(failure) = ended {
                    // What lives is worth more than what is left of the past.
                    tracing::error!(project = %site.project.name, agent = %agent.name, %failure, "at the start");
                }
                Ok(Some(found))
            } else {
                ended.map(|()| None)
            };
            (agent.name.clone(), run.id, seen)
        }
    };
    runs.map(look).collect()
}

/// What happened to agents that run no more, without anything that recovery would decide about it.
/// Paused ones stay so: the resume brings them back.
fn ends(project: &Project, observed: BTreeMap<AgentName, RecoveredRun>) -> Vec<(Command, Vec<NewToken>)> {
    let ended = |(agent, seen): (AgentName, RecoveredRun)| {
        let known = project.agents.get(&agent)?;
        let run = known.run()?.id.clone();
        if known.status(false) == AgentStatus::Paused {
            return None;
        }
        match seen {
            // Its launch was reported to nobody.
            RecoveredRun::Alive(processes) if known.status(false) == AgentStatus::Starting => {
                Some((Command::Launched { agent, run, outcome: Ok(processes) }, Vec::new()))
            }
            RecoveredRun::Alive(_) => None,
            RecoveredRun::Ended { exit, detail, at } => {
                let (new, token) = new_run();
                let then = AfterEnd::Stay;
                Some((Command::RunEnded { agent, run, exit, detail, ended_at: at, new, then }, vec![token]))
            }
            RecoveredRun::Lost { detail } => {
                Some((Command::RunLost { agent, run, detail, then: AfterEnd::Stay }, Vec::new()))
            }
        }
    };
    observed.into_iter().filter_map(ended).collect()
}

/// Prepares a new run for every agent that recovery may have to start.
async fn respawns(site: &crate::operations::StepContext) -> (BTreeMap<AgentName, Respawn>, Vec<NewToken>) {
    let mut respawn = BTreeMap::new();
    let mut tokens = Vec::new();
    for agent in site.project.agents.values().filter(|agent| !agent.is_terminal()) {
        let (new, token) = new_run();
        // Without its profile's command an agent is still started by its own.
        let (argv, session) = match session::restart_command(site, agent).await {
            Ok(again) => (again.argv, again.session),
            Err(_) => (agent.spec.argv.clone(), None),
        };
        respawn.insert(agent.name.clone(), Respawn { new, argv, instead_of_thaw: None, session });
        tokens.push(token);
    }
    (respawn, tokens)
}
