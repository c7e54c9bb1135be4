//! Recovery at the start of the daemon: loads the projects, determines the state of their runs, removes the leftovers of
//! a crash, and lets the core decide what follows.

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

/// Starts the actor of every stored project; returns the report for the user, one line each.
///
/// Without `operations`, running agents are adopted, but unfinished operations stay as they are until they are
/// cancelled.
///
/// # Errors
/// The projects cannot be loaded.
pub async fn run(projects: &Arc<Projects>, operations: bool) -> Result<Vec<String>, Failure> {
    let services = projects.services();
    let stored = services.store.read(rows::load_all).await.map_err(|e| Failure::fault("load the projects", &e))?;
    let before = services.store.read(events::latest_at).await.map_err(|e| Failure::fault("read events", &e))?;
    let mut report = sweep_removed(services, &stored);
    let each = stored.into_iter().map(|project| {
        let projects = Arc::clone(projects);
        async move { recover(&projects, project, operations, before).await }
    });
    report.extend(side_by_side(each.collect::<Vec<_>>()).await.into_iter().flatten());
    report.sort();
    Ok(report)
}

/// Completes deferred removals, and reports directories without a project in the database. These are not removed: if
/// the database was lost or replaced by an older one, they have the checkpoints.
fn sweep_removed(services: &Services, stored: &[Project]) -> Vec<String> {
    let dir = services.paths.state.join("projects");
    leftovers::sweep_deferred(&dir);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
    let is_stored = |name: &str| stored.iter().any(|project| project.name.as_str() == name);
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| !name.starts_with('.') && !is_stored(name))
        .map(|name| format!("{name}: the database has no such project; its files stay in {}", dir.display()))
        .collect()
}

async fn recover(projects: &Projects, project: Project, operations: bool, before: Option<UnixMillis>) -> Vec<String> {
    let services = projects.services();
    let name = project.name.clone();
    let (mut actor, handle) = Actor::new(Arc::clone(services), project);
    let mut report = Vec::new();
    let step = handle.step_context();
    if let Err(failure) = leftovers::sweep(&step).await {
        report.push(format!("{name}: {failure}"));
    }
    leftovers::sweep_deferred(&step.dirs().agents());
    if let Err(failure) = storage::measure(&step).await {
        report.push(format!("{name}: {failure}"));
    }
    let mut states = BTreeMap::new();
    let mut adopted = Vec::new();
    for (agent, run, inspected) in side_by_side(inspections(&step)).await {
        match inspected {
            Ok(Some(inspection)) => {
                if let Some(why) = &inspection.unreachable {
                    report.push(format!("{name}/{agent}: it is running, but its shim cannot be connected to: {why}"));
                }
                if matches!(inspection.state, RecoveredRun::Alive(_)) {
                    adopted.push(Adopted { agent: agent.clone(), run, link: inspection.link });
                }
                states.insert(agent, inspection.state);
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
        if let Some(operation) = step.project.operation() {
            report.push(format!("{name}: operation {operation} was under way and is completed or undone"));
        }
        let (respawn, tokens) = respawns(&step).await;
        let command = Command::Recover { agents: states, respawn, last_seen: last_seen(&step, before) };
        if let Err(failure) = actor.recover(command, tokens).await {
            report.push(format!("{name}: {failure}; trying again"));
        }
    } else {
        for (command, tokens) in ends(&step.project, states) {
            if let Err(failure) = actor.recover(command, tokens).await {
                report.push(format!("{name}: {failure}"));
            }
        }
    }
    projects.start(actor, handle);
    report
}

/// Returns when each agent was last known to run: the later one of its last log line and the last event of any project.
/// It may have run longer, but not while the machine was off.
fn last_seen(step: &StepContext, before: Option<UnixMillis>) -> BTreeMap<AgentName, UnixMillis> {
    let of_agent = |agent: &Arc<Agent>| {
        let run = agent.run()?;
        let log = step.dirs().run(&agent.name, &run.id).join(files::LOGS).join(CURRENT);
        let written = std::fs::metadata(log).and_then(|meta| meta.modified()).ok();
        let written = written.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        let written = written.and_then(|at| i64::try_from(at.as_millis()).ok()).map(UnixMillis);
        Some((agent.name.clone(), written.max(before)?.max(run.started_at)))
    };
    step.project.agents.values().filter_map(of_agent).collect()
}

type InspectedRun = (AgentName, RunId, Result<Option<RunInspection>, Failure>);

/// Inspects every agent: ends the processes that its older runs have left, and determines the state of the run that
/// should be alive.
fn inspections(step: &StepContext) -> Vec<impl Future<Output = InspectedRun> + Send + use<>> {
    let runs = step.project.agents.values().filter_map(|agent| Some((Arc::clone(agent), agent.run().cloned()?)));
    let inspect = |(agent, run): (Arc<Agent>, Run)| {
        let step = step.clone();
        async move {
            let ended = launch::end_older_runs(&step, &agent.name, &run.id).await;
            let inspected = if agent.is_alive() {
                let run_dir = step.dirs().run(&agent.name, &run.id);
                let inspection = inspect_run(run_dir, run.processes, &step.services).await;
                if let Err(failure) = ended {
                    // Does not prevent the adoption of the current run.
                    let agent = &agent.name;
                    tracing::error!(project = %step.project.name, %agent, %failure, "failed to end older runs");
                }
                Ok(Some(inspection))
            } else {
                ended.map(|()| None)
            };
            (agent.name.clone(), run.id, inspected)
        }
    };
    runs.map(inspect).collect()
}

/// Returns the reports of what happened to the runs, after which nothing follows. Paused agents are left out: the resume
/// starts them again.
fn ends(project: &Project, states: BTreeMap<AgentName, RecoveredRun>) -> Vec<(Command, Vec<NewToken>)> {
    let report = |(name, state): (AgentName, RecoveredRun)| {
        let agent = project.agents.get(&name)?;
        let (run, status) = (agent.run()?.id.clone(), agent.status(false));
        if status == AgentStatus::Paused {
            return None;
        }
        let agent = name;
        match state {
            // The daemon ended before its launch was reported.
            RecoveredRun::Alive(processes) if status == AgentStatus::Starting => {
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
    states.into_iter().filter_map(report).collect()
}

/// Prepares a new run for every agent that the recovery may have to start.
async fn respawns(step: &StepContext) -> (BTreeMap<AgentName, Respawn>, Vec<NewToken>) {
    let mut respawn = BTreeMap::new();
    let mut tokens = Vec::new();
    for agent in step.project.agents.values().filter(|agent| !agent.is_terminal()) {
        let (new, token) = new_run();
        // Falls back to the agent's own command when that of its profile cannot be determined.
        let (argv, session) = match session::restart_command(step, agent).await {
            Ok(again) => (again.argv, again.session),
            Err(_) => (agent.spec.argv.clone(), None),
        };
        respawn.insert(agent.name.clone(), Respawn { new, argv, instead_of_thaw: None, session });
        tokens.push(token);
    }
    (respawn, tokens)
}
