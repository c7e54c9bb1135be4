//! What a command's arguments mean: the agents behind a target, a text that may come from stdin.

use std::io::Read as _;

use fermata_protocol::agent::{AgentList, AgentView};
use fermata_protocol::{Code, ProjectName, Target};

use crate::errors::{CommandError, Exit};
use crate::session::DaemonSession;

/// Returns all agents, of one project or of all, page by page.
pub fn all_agents(session: &mut DaemonSession, project: Option<&ProjectName>) -> Result<Vec<AgentView>, CommandError> {
    let mut params = AgentList { project: project.cloned(), after: None };
    let mut agents = Vec::new();
    loop {
        let page = session.call(&params)?;
        agents.extend(page.agents);
        match page.next {
            Some(next) => params.after = Some(next),
            None => return Ok(agents),
        }
    }
}

/// Returns the agents of a target.
///
/// # Errors
/// With exit code 3 when there are none.
pub fn agents_of(session: &mut DaemonSession, target: &Target) -> Result<Vec<AgentView>, CommandError> {
    let mut agents = all_agents(session, Some(&target.project))?;
    if let Some(name) = &target.agent {
        agents.retain(|agent| agent.name == *name);
    }
    if agents.is_empty() {
        return Err(CommandError::new(
            Exit::NotFound,
            Code::AgentNotFound.as_str(),
            match &target.agent {
                Some(_) => format!("there is no agent {target}"),
                None => format!("the project {target} has no agents"),
            },
        )
        .hint(format!("start one: fermatactl run --project {} -- COMMAND", target.project)));
    }
    Ok(agents)
}

/// Returns the one agent of a target; a project stands for its only agent.
///
/// # Errors
/// When the project has several agents.
pub fn one_agent(session: &mut DaemonSession, target: &Target) -> Result<Target, CommandError> {
    if target.agent.is_some() {
        return Ok(target.clone());
    }
    let agents = agents_of(session, target)?;
    match &agents[..] {
        [agent] => Ok(target_of(agent)),
        several => {
            let names: Vec<String> = several.iter().map(|a| target_of(a).to_string()).collect();
            Err(CommandError::usage(format!(
                "the project {target} has {} agents, and this command takes one",
                several.len()
            ))
            .hint(format!("name one of {}", names.join(", "))))
        }
    }
}

pub fn target_of(agent: &AgentView) -> Target {
    Target::agent(agent.project.clone(), agent.name.clone())
}

/// Returns a text argument, read from stdin when it is left out or `-`.
pub fn text_or_stdin(text: Option<String>) -> Result<String, CommandError> {
    match text {
        Some(text) if text != "-" => Ok(text),
        _ => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|e| CommandError::io("read stdin", &e))?;
            Ok(text)
        }
    }
}
