//! Agents that have to come before others.

use std::collections::BTreeSet;

use fermata_protocol::AgentName;
use fermata_protocol::supervision::{Dependency, DependencyState};

use crate::agent::{Agent, AgentState, Ended};
use crate::project::Project;

/// Returns the agents that the start of this one waits for now.
pub fn waits_for(project: &Project, depends_on: &[Dependency]) -> Vec<AgentName> {
    // One that is not there was removed since: nobody can wait for it.
    let open = |dependency: &&Dependency| {
        project.agents.get(&dependency.agent).is_some_and(|agent| !has_come(agent, dependency.until))
    };
    depends_on.iter().filter(open).map(|dependency| dependency.agent.clone()).collect()
}

/// Says whether an agent has come so far. One that has ended with exit code 0 has done all that it
/// is for.
fn has_come(agent: &Agent, until: DependencyState) -> bool {
    match (&agent.state, until) {
        (AgentState::Ended(Ended::ByItself), _) => true,
        (AgentState::Running, DependencyState::Started) => true,
        (AgentState::Running, DependencyState::Ready) => agent.run.as_ref().is_some_and(|run| run.ready_at.is_some()),
        _ => false,
    }
}

/// Finds a circle of agents that would wait for each other if `name` depended on these; it begins
/// and ends with `name`.
pub fn circle(project: &Project, name: &AgentName, depends_on: &[Dependency]) -> Option<Vec<AgentName>> {
    let mut seen = BTreeSet::new();
    let mut path = vec![name.clone()];
    follow(project, name, depends_on, &mut seen, &mut path).then_some(path)
}

fn follow(
    project: &Project,
    name: &AgentName,
    depends_on: &[Dependency],
    seen: &mut BTreeSet<AgentName>,
    path: &mut Vec<AgentName>,
) -> bool {
    for dependency in depends_on {
        path.push(dependency.agent.clone());
        if dependency.agent == *name {
            return true;
        }
        if seen.insert(dependency.agent.clone())
            && let Some(agent) = project.agents.get(&dependency.agent)
            && follow(project, name, &agent.spec.supervision.depends_on, seen, path)
        {
            return true;
        }
        path.pop();
    }
    false
}
