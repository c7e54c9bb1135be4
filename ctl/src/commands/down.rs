//! `down`: stops the agents that a `fermata.toml` declares, dependents first. Checkpoints, logs and the project are
//! kept.

use std::collections::BTreeSet;

use fermata_protocol::agent::{AgentRemove, AgentView};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::project::ProjectDetail;
use fermata_protocol::{AgentName, Code, ProjectName, Target};

use super::declared_agents::{self, Action, ActionReport, ActionRow, refusal_row, selected, stop_all};
use crate::cli::{DownArgs, PauseArgs};
use crate::declaration::order;
use crate::errors::{CommandError, CommandResult};
use crate::output::note;
use crate::session::DaemonSession;

pub fn down(session: &mut DaemonSession, args: &DownArgs) -> CommandResult {
    let declaration = declared_agents::load(session, &args.declared)?;
    let agents = selected(&declaration, &args.declared.agents, false)?;
    let name = declaration.project.clone();
    let Some(project) = declared_agents::project(session, &declaration)? else {
        if session.out.is_human() {
            note(&format!("{name}: the project does not exist; nothing is running"));
        }
        return Ok(0);
    };
    if args.pause {
        return pause(session, &project.project.name, project.project.pause.is_some());
    }
    // The order is that of the whole file: two named agents may depend on each other through a third.
    let mut layers = order::layers(&declaration.agents);
    layers.reverse();
    for layer in &mut layers {
        layer.retain(|agent| agents.contains_key(agent));
    }
    let names: Vec<AgentName> = layers.concat();
    let mut report = ActionReport::new(&name, &names, false);
    for layer in &layers {
        stop_layer(session, &project, layer, args.remove, &mut report)?;
    }
    let undeclared = project
        .agents
        .iter()
        .filter(|agent| !agent.status.is_terminal() && !declaration.agents.contains_key(&agent.name))
        .map(|agent| agent.name.as_str())
        .collect::<Vec<_>>();
    if session.out.is_human() {
        let mut message = match (report.count(Action::Failed), report.has_changes()) {
            (0, true) => format!("{name}: done"),
            (0, false) => format!("{name}: nothing was running"),
            (failed, _) => format!("{name}: {failed} failed"),
        };
        if args.declared.agents.is_empty() && !undeclared.is_empty() {
            message.push_str(&format!("; not declared, left running: {}", undeclared.join(", ")));
        }
        note(&message);
    }
    Ok(u8::from(report.has_failures()))
}

/// Stops the agents of one layer, and removes those that were stopped when `remove` is set.
fn stop_layer(
    session: &mut DaemonSession,
    project: &ProjectDetail,
    layer: &[AgentName],
    remove: bool,
    report: &mut ActionReport,
) -> Result<(), CommandError> {
    let project_name = &project.project.name;
    let existing: BTreeSet<&AgentName> = project.agents.iter().map(|agent| &agent.name).collect();
    let is_running = |name: &AgentName| project.agents.iter().any(|a| a.name == *name && !a.status.is_terminal());
    let running: Vec<AgentName> = layer.iter().filter(|name| is_running(name)).cloned().collect();
    let mut failed = BTreeSet::new();
    for (name, result) in stop_all(session, project_name, &running) {
        let target = Target::agent(project_name.clone(), name.clone());
        let row = match result {
            Ok(Some(agent)) => ActionRow::new(target, Action::Stopped).detail(ending(&agent)).agent(&agent),
            Ok(None) => ActionRow::new(target, Action::NotRunning),
            Err(error) => {
                failed.insert(name);
                refusal_row(target, error)?
            }
        };
        report.add(session, row)?;
    }
    for name in layer {
        let target = Target::agent(project_name.clone(), name.clone());
        if remove && existing.contains(name) && !failed.contains(name) {
            let row = match session.call(&AgentRemove { target: target.clone() }) {
                Ok(_) => ActionRow::new(target, Action::Removed),
                Err(error) if error.is(Code::AgentNotFound) => ActionRow::new(target, Action::NotRunning),
                Err(error) => refusal_row(target, error)?,
            };
            report.add(session, row)?;
        } else if !is_running(name) {
            report.add(session, ActionRow::new(target, Action::NotRunning))?;
        }
    }
    Ok(())
}

fn ending(agent: &AgentView) -> String {
    agent.exit.map_or_else(|| agent.status.to_string(), |exit| exit.to_string())
}

fn pause(session: &mut DaemonSession, project: &ProjectName, paused: bool) -> CommandResult {
    if paused {
        if session.out.is_human() {
            note(&format!("{project} is already paused"));
        }
        return Ok(0);
    }
    let reason = Some("fermatactl down --pause".to_owned());
    super::pause::pause(session, PauseArgs { project: project.clone(), reason, mode: PauseMode::Park, grace: None })
}
