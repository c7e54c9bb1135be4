//! Dependencies between agents of one project.

use std::collections::BTreeSet;

use fermata_protocol::AgentName;
use fermata_protocol::supervision::{Dependency, DependencyState};

use crate::agent::{Agent, AgentState, EndedBy};
use crate::project::Project;

/// Returns the agents of the dependencies that are not satisfied. That on a removed agent is satisfied.
pub fn waits_for(project: &Project, depends_on: &[Dependency]) -> Vec<AgentName> {
    let is_open = |dependency: &&Dependency| {
        project.agents.get(&dependency.agent).is_some_and(|agent| !satisfies(agent, dependency.until))
    };
    depends_on.iter().filter(is_open).map(|dependency| dependency.agent.clone()).collect()
}

/// An agent that has ended with exit code 0 satisfies every dependency.
fn satisfies(agent: &Agent, until: DependencyState) -> bool {
    match (&agent.state, until) {
        (AgentState::Ended { by: EndedBy::Itself, .. }, _) => true,
        (AgentState::Running(_), DependencyState::Started) => true,
        (AgentState::Running(run), DependencyState::Ready) => run.ready_at.is_some(),
        (AgentState::Running(_), DependencyState::Completed)
        | (AgentState::Ended { by: EndedBy::Person, .. }, _)
        | (AgentState::Waiting { .. } | AgentState::Backoff { .. } | AgentState::Starting(_), _)
        | (AgentState::Frozen(_) | AgentState::Parked(_) | AgentState::Stopping { .. }, _)
        | (AgentState::Failed { .. } | AgentState::TimedOut { .. } | AgentState::Interrupted { .. }, _) => false,
    }
}

/// Returns the cycle that would arise if `name` had these dependencies: it begins and ends with `name`.
pub fn cycle(project: &Project, name: &AgentName, depends_on: &[Dependency]) -> Option<Vec<AgentName>> {
    let mut visited = BTreeSet::new();
    let mut path = vec![name.clone()];
    follow(project, name, depends_on, &mut visited, &mut path).then_some(path)
}

fn follow(
    project: &Project,
    name: &AgentName,
    depends_on: &[Dependency],
    visited: &mut BTreeSet<AgentName>,
    path: &mut Vec<AgentName>,
) -> bool {
    for dependency in depends_on {
        path.push(dependency.agent.clone());
        if dependency.agent == *name {
            return true;
        }
        if visited.insert(dependency.agent.clone())
            && let Some(agent) = project.agents.get(&dependency.agent)
            && follow(project, name, &agent.spec.supervision.depends_on, visited, path)
        {
            return true;
        }
        path.pop();
    }
    false
}
