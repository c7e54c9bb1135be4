//! `down`: stops what a `fermata.toml` declares, those that depend on others first. Checkpoints,
//! logs and the project itself stay.

use std::collections::BTreeSet;

use fermata_protocol::agent::{AgentRemove, AgentView};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::{AgentName, Code, Target};

use super::Ended;
use super::declared_agents::{self as declared, Action, Row, Rows, chosen, stop_all};
use crate::cli::PauseArgs;
use crate::cli::workspace::DownArgs;
use crate::declaration::order;
use crate::output::note;
use crate::session::Session;

/// Runs `down`.
pub fn down(session: &mut Session, args: &DownArgs) -> Ended {
    let declaration = declared::load(session, &args.declared)?;
    let agents = chosen(&declaration, &args.declared.agents, false)?;
    let project = declaration.project.clone();
    let Some(known) = declared::project(session, &declaration)? else {
        if session.out.is_human() {
            note(&format!("{project}: there is no such project, so nothing runs"));
        }
        return Ok(0);
    };
    if args.pause {
        return pause(session, &known.project.name, known.project.pause.is_some());
    }
    // The order is that of the whole file: two named agents may depend on each other through a third.
    let mut layers = order::layers(&declaration.agents);
    layers.reverse();
    let names: Vec<AgentName> = layers.iter().flatten().filter(|name| agents.contains_key(*name)).cloned().collect();
    let mut rows = Rows::begin(&project, &names, false);
    let there: BTreeSet<&AgentName> = known.agents.iter().map(|agent| &agent.name).collect();
    let is_running = |name: &AgentName| known.agents.iter().any(|a| a.name == *name && !a.status.is_terminal());
    for layer in &layers {
        let meant: Vec<AgentName> = layer.iter().filter(|name| agents.contains_key(*name)).cloned().collect();
        let running: Vec<AgentName> = meant.iter().filter(|name| is_running(name)).cloned().collect();
        let mut failed = BTreeSet::new();
        for (name, result) in stop_all(session, &project, &running) {
            let target = Target::agent(project.clone(), name.clone());
            let row = match result {
                Ok(Some(agent)) => Row::new(target, Action::Stopped).detail(ending(&agent)).agent(&agent),
                Ok(None) => Row::new(target, Action::NotRunning),
                Err(failure) => {
                    failed.insert(name);
                    declared::refused(target, failure)?
                }
            };
            rows.add(session, row)?;
        }
        for name in &meant {
            let target = Target::agent(project.clone(), name.clone());
            if args.remove && there.contains(name) && !failed.contains(name) {
                let row = match session.call(&AgentRemove { target: target.clone() }) {
                    Ok(_) => Row::new(target, Action::Removed),
                    Err(failure) if failure.is(Code::AgentNotFound) => Row::new(target, Action::NotRunning),
                    Err(failure) => declared::refused(target, failure)?,
                };
                rows.add(session, row)?;
            } else if !is_running(name) {
                rows.add(session, Row::new(target, Action::NotRunning))?;
            }
        }
    }
    let others = known
        .agents
        .iter()
        .filter(|agent| !agent.status.is_terminal() && !declaration.agents.contains_key(&agent.name))
        .map(|agent| agent.name.as_str())
        .collect::<Vec<_>>();
    if session.out.is_human() {
        let mut said = match (rows.count(Action::Failed), rows.changed()) {
            (0, true) => format!("{project}: done"),
            (0, false) => format!("{project}: nothing was running"),
            (failed, _) => format!("{project}: {failed} failed"),
        };
        if args.declared.agents.is_empty() && !others.is_empty() {
            said.push_str(&format!("; not declared, left running: {}", others.join(", ")));
        }
        note(&said);
    }
    Ok(u8::from(rows.failed()))
}

fn ending(agent: &AgentView) -> String {
    agent.exit.map_or_else(|| agent.status.to_string(), |exit| exit.to_string())
}

fn pause(session: &mut Session, project: &fermata_protocol::ProjectName, paused: bool) -> Ended {
    if paused {
        if session.out.is_human() {
            note(&format!("{project} is paused already"));
        }
        return Ok(0);
    }
    let reason = Some("fermatactl down --pause".to_owned());
    super::pause::pause(session, PauseArgs { project: project.clone(), reason, mode: PauseMode::Park, grace: None })
}
