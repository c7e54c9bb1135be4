//! The dependencies between agents: unknown names, cycles, and the order of starts.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::AgentName;
use fermata_protocol::supervision::{Dependency, DependencyState, RestartPolicy};

use super::model::DeclaredAgent;
use super::problems::Problem;
use super::section::{Located, Problems, nearest, path};
use super::supervision::table_of;

/// The dependencies of each agent, with their locations in the file.
pub type DependencyGraph = BTreeMap<AgentName, Vec<Located<Dependency>>>;

/// Reports invalid dependencies. `declared` are all agent names of the file, including those of invalid agents.
pub fn check(
    graph: &DependencyGraph,
    agents: &BTreeMap<AgentName, DeclaredAgent>,
    declared: &BTreeSet<AgentName>,
    problems: &Problems,
) {
    for (agent, dependencies) in graph {
        let key = path(&table_of(agent.as_str()), "depends_on");
        let add = |at: &Located<Dependency>, message: String, hint: Option<String>| {
            problems.add(Problem { span: at.span.clone(), key: key.clone(), message, hint });
        };
        for (i, at) in dependencies.iter().enumerate() {
            let Dependency { agent: other, until } = &at.value;
            if dependencies[..i].iter().any(|before| before.value.agent == *other) {
                add(at, format!("agent '{agent}' depends on '{other}' twice"), None);
            } else if other == agent {
                add(at, format!("agent '{agent}' depends on itself"), None);
            } else if !declared.contains(other) {
                let names: Vec<&str> = declared.iter().filter(|name| *name != agent).map(AgentName::as_str).collect();
                let hint = match nearest(other.as_str(), &names) {
                    Some(near) => format!("did you mean '{near}'?"),
                    None if names.is_empty() => "it is the only declared agent".to_owned(),
                    None => format!("declared agents: {}", names.join(", ")),
                };
                add(at, format!("agent '{agent}' depends on '{other}', which this file does not declare"), Some(hint));
            } else if *until == DependencyState::Completed
                && agents.get(other).is_some_and(|o| o.supervision.restart.policy == RestartPolicy::Always)
            {
                add(
                    at,
                    format!("agent '{agent}' waits for '{other}' to complete, but '{other}' is always restarted"),
                    Some(format!("give '{other}' restart = \"on-failure\"")),
                );
            }
        }
    }
    for cycle in cycles(graph) {
        let Some(at) = first_edge(graph, &cycle) else { continue };
        let names: Vec<&str> = cycle.iter().chain(cycle.first()).map(AgentName::as_str).collect();
        problems.add(Problem::new(
            at.span.clone(),
            path(&table_of(cycle[0].as_str()), "depends_on"),
            format!("dependency cycle: {}", names.join(" -> ")),
        ));
    }
}

/// Returns the dependency of the first agent of a cycle on the second one.
fn first_edge<'a>(graph: &'a DependencyGraph, cycle: &[AgentName]) -> Option<&'a Located<Dependency>> {
    graph.get(cycle.first()?)?.iter().find(|at| Some(&at.value.agent) == cycle.get(1))
}

/// Finds cycles of two or more agents, rotated to begin with the smallest name; of cycles with common agents at least
/// one. Iterative, since a file may hold a very long chain.
fn cycles(graph: &DependencyGraph) -> BTreeSet<Vec<AgentName>> {
    let mut found = BTreeSet::new();
    let mut done = BTreeSet::new();
    for start in graph.keys() {
        // The path from the start: each agent, and how many of its dependencies were followed.
        let mut path: Vec<(&AgentName, usize)> = vec![(start, 0)];
        let mut places: BTreeMap<&AgentName, usize> = [(start, 0)].into();
        while let Some((agent, followed)) = path.last_mut() {
            let agent = *agent;
            let next = graph.get(agent).filter(|_| !done.contains(agent)).and_then(|on| on.get(*followed));
            *followed += 1;
            let Some(next) = next.map(|at| &at.value.agent) else {
                done.insert(agent);
                places.remove(agent);
                path.pop();
                continue;
            };
            if let Some(&place) = places.get(next) {
                let mut cycle: Vec<AgentName> = path[place..].iter().map(|(name, _)| (*name).clone()).collect();
                let first = cycle.iter().enumerate().min_by_key(|(_, name)| *name).map_or(0, |(i, _)| i);
                cycle.rotate_left(first);
                if cycle.len() > 1 {
                    found.insert(cycle);
                }
            } else if !done.contains(next) {
                places.insert(next, path.len());
                path.push((next, 0));
            }
        }
    }
    found
}

/// Groups agents into layers, each sorted by name: an agent depends only on agents of earlier layers.
pub fn layers(agents: &BTreeMap<AgentName, DeclaredAgent>) -> Vec<Vec<AgentName>> {
    let mut waits: BTreeMap<&AgentName, usize> = agents.keys().map(|name| (name, 0)).collect();
    let mut dependents: BTreeMap<&AgentName, Vec<&AgentName>> = BTreeMap::new();
    for (name, agent) in agents {
        for dependency in &agent.supervision.depends_on {
            // Dependencies on other agents do not affect the order of these.
            if agents.contains_key(&dependency.agent) {
                dependents.entry(&dependency.agent).or_default().push(name);
                *waits.entry(name).or_default() += 1;
            }
        }
    }
    let mut layers = Vec::new();
    let mut layer: Vec<&AgentName> = waits.iter().filter(|(_, count)| **count == 0).map(|(name, _)| *name).collect();
    while !layer.is_empty() {
        let mut next = Vec::new();
        for dependent in layer.iter().flat_map(|name| dependents.get(name)).flatten() {
            if let Some(count) = waits.get_mut(*dependent) {
                *count -= 1;
                if *count == 0 {
                    next.push(*dependent);
                }
            }
        }
        next.sort_unstable();
        layers.push(layer.into_iter().cloned().collect());
        layer = next;
    }
    layers
}

/// Returns the named agents and their direct and indirect dependencies.
pub fn with_dependencies(agents: &BTreeMap<AgentName, DeclaredAgent>, names: &[AgentName]) -> BTreeSet<AgentName> {
    let mut found = BTreeSet::new();
    let mut next = names.to_vec();
    while let Some(name) = next.pop() {
        if let Some(agent) = agents.get(&name)
            && found.insert(name)
        {
            next.extend(agent.supervision.depends_on.iter().map(|dependency| dependency.agent.clone()));
        }
    }
    found
}
