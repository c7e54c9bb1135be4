//! Changes to a project itself: its settings, its phase, its removal.

use fermata_protocol::event::Event;
use fermata_protocol::project::ProjectConfig;
use fermata_protocol::task::Phase;
use fermata_protocol::{Code, Refusal, UnixMillis};

use super::checks::refuse_during_operation;
use crate::apply::apply;
use crate::budget;
use crate::command::Decision;
use crate::effect::Effect;
use crate::project::Project;

pub(super) fn set(
    project: &Project,
    description: Option<String>,
    phase: Option<Phase>,
    config: Option<ProjectConfig>,
) -> Decision {
    let new_budget = config.is_some();
    let mut events = Vec::new();
    if description.is_some() || config.is_some() {
        events.push(Event::ProjectChanged { description, config });
    }
    let mut after = project.clone();
    for event in &events {
        // No budget depends on the time of the change.
        apply(&mut after, event, UnixMillis(0));
    }
    // A budget below what is spent already must not wait for the next report of usage.
    let pauses = new_budget && budget::calls_for_pause(project, &after);
    events.extend(phase_change(project, phase));
    let decision = Decision::events(events);
    if pauses { decision.then(Effect::PauseForBudget {}) } else { decision }
}

/// Returns the change to a phase, unless the project is in it already.
pub(super) fn phase_change(project: &Project, phase: Option<Phase>) -> Option<Event> {
    let from = project.facts.phase;
    phase.filter(|to| *to != from).map(|to| Event::PhaseChanged { from, to })
}

pub(super) fn remove(project: &Project, checkpoints: u64, with_checkpoints: bool) -> Result<Decision, Refusal> {
    refuse_during_operation(project)?;
    if let Some(agent) = project.unfinished_agents().next() {
        return Err(Refusal::new(
            Code::AgentsRunning,
            format!("project '{}' has running agents, '{}' among them", project.name, agent.name),
        )
        .hint(format!("fermatactl stop {}", project.name)));
    }
    if checkpoints > 0 && !with_checkpoints {
        return Err(Refusal::new(
            Code::CheckpointProtected,
            format!("project '{}' has {checkpoints} checkpoints, which would be lost", project.name),
        )
        .hint(format!("fermatactl project rm {} --with-checkpoints", project.name)));
    }
    Ok(Decision::events(vec![Event::ProjectRemoved {}]))
}
