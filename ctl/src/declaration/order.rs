//! Which agent comes before which: names that are not there, circles, and the order of a start.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::AgentName;
use fermata_protocol::supervision::{Dependency, DependencyState, RestartPolicy};

use super::DeclaredAgent;
use super::problems::Problem;
use super::section::{At, Problems, nearest, path};
use super::supervision::table_of;

/// What each agent depends on, with the places where it says so.
pub type Wishes = BTreeMap<AgentName, Vec<At<Dependency>>>;

/// Checks what the agents depend on; `declared` are all names of the file, those of agents that
/// could not be read among them.
pub fn check(
    wishes: &Wishes,
    agents: &BTreeMap<AgentName, DeclaredAgent>,
    declared: &BTreeSet<AgentName>,
    problems: &Problems,
) {
    for (agent, dependencies) in wishes {
        let key = path(&table_of(agent.as_str()), "depends_on");
        let add = |at: &At<Dependency>, message: String, hint: Option<String>| {
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
                    None if names.is_empty() => "it is the only one".to_owned(),
                    None => format!("the file has: {}", names.join(", ")),
                };
                add(at, format!("agent '{agent}' depends on '{other}', which this file does not declare"), Some(hint));
            } else if *until == DependencyState::Completed
                && agents.get(other).is_some_and(|o| o.supervision.restart.policy == RestartPolicy::Always)
            {
                add(
                    at,
                    format!(
                        "agent '{agent}' waits for '{other}' to complete, which never comes: it is always restarted"
                    ),
                    Some(format!("give '{other}' restart = \"on-failure\"")),
                );
            }
        }
    }
    for circle in circles(wishes) {
        let Some(at) = closing(wishes, &circle) else { continue };
        let names: Vec<&str> = circle.iter().chain(circle.first()).map(AgentName::as_str).collect();
        problems.add(Problem::new(
            at.span.clone(),
            path(&table_of(circle[0].as_str()), "depends_on"),
            format!("these agents wait for each other: {}", names.join(" -> ")),
        ));
    }
}

/// The dependency of a circle's first agent on its second one.
fn closing<'a>(wishes: &'a Wishes, circle: &[AgentName]) -> Option<&'a At<Dependency>> {
    wishes.get(circle.first()?)?.iter().find(|at| Some(&at.value.agent) == circle.get(1))
}

/// Finds circles of two agents and more, beginning with their first name: at least one of those that
/// have agents in common. Without recursion, since a file may hold a very long chain.
fn circles(wishes: &Wishes) -> BTreeSet<Vec<AgentName>> {
    let mut found = BTreeSet::new();
    let mut done = BTreeSet::new();
    for start in wishes.keys() {
        // The way from the start to here: each agent and how many of its dependencies were followed.
        let mut way: Vec<(&AgentName, usize)> = vec![(start, 0)];
        let mut places: BTreeMap<&AgentName, usize> = [(start, 0)].into();
        while let Some((agent, followed)) = way.last_mut() {
            let agent = *agent;
            let next = wishes.get(agent).filter(|_| !done.contains(agent)).and_then(|on| on.get(*followed));
            *followed += 1;
            let Some(next) = next.map(|at| &at.value.agent) else {
                done.insert(agent);
                places.remove(agent);
                way.pop();
                continue;
            };
            if let Some(&place) = places.get(next) {
                let mut circle: Vec<AgentName> = way[place..].iter().map(|(name, _)| (*name).clone()).collect();
                let first = circle.iter().enumerate().min_by_key(|(_, name)| *name).map_or(0, |(i, _)| i);
                circle.rotate_left(first);
                if circle.len() > 1 {
                    found.insert(circle);
                }
            } else if !done.contains(next) {
                places.insert(next, way.len());
                way.push((next, 0));
            }
        }
    }
    found
}

/// Puts agents into layers: an agent depends only on agents of earlier layers. Sorted by name inside.
pub fn layers(agents: &BTreeMap<AgentName, DeclaredAgent>) -> Vec<Vec<AgentName>> {
    let mut waits: BTreeMap<&AgentName, usize> = agents.keys().map(|name| (name, 0)).collect();
    let mut dependents: BTreeMap<&AgentName, Vec<&AgentName>> = BTreeMap::new();
    for (name, agent) in agents {
        for dependency in &agent.supervision.depends_on {
            // What is not among these agents is waited for elsewhere.
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

/// Returns the named agents and all that they depend on, directly or not.
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
