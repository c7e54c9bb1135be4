//! The steps that several events share: a change of one agent, and what a project comes to when its agents have ended.

use std::sync::Arc;

use fermata_protocol::AgentName;

use crate::agent::{Agent, AgentState, EndedBy};
use crate::project::{Project, ProjectState, Resting, StableState};

pub(super) fn change_agent(project: &mut Project, name: &AgentName, change: impl FnOnce(&mut Agent)) {
    if let Some(agent) = project.agents.get_mut(name) {
        change(Arc::make_mut(agent));
    }
}

pub(super) fn rest(project: &mut Project, resting: Resting) {
    project.state = Arc::new(ProjectState::Resting(resting));
}

/// Returns the status that the project returns to after an operation that begins now.
pub(super) fn resting(project: &Project) -> Resting {
    match &*project.state {
        ProjectState::Resting(resting) => *resting,
        ProjectState::Pausing(pause) => pause.before,
        ProjectState::Restoring(restore) => match restore.before.clone().stable() {
            StableState::Resting(resting) => resting,
            StableState::Paused(_) => Resting::Active,
        },
        ProjectState::Broken(broken) => match &broken.before {
            StableState::Resting(resting) => *resting,
            StableState::Paused(_) => Resting::Active,
        },
        ProjectState::Paused(_) | ProjectState::Resuming(_) => Resting::Active,
    }
}

/// Gives an active project whose agents have all ended the status that follows from how they ended.
pub(super) fn settle(project: &mut Project) {
    if *project.state != ProjectState::Resting(Resting::Active) || !project.agents.values().all(|a| a.is_terminal()) {
        return;
    }
    let any = |wanted: fn(&AgentState) -> bool| project.agents.values().any(|agent| wanted(&agent.state));
    let failed = any(|state| {
        matches!(state, AgentState::Failed { .. } | AgentState::TimedOut { .. } | AgentState::Interrupted { .. })
    });
    let stopped = any(|state| matches!(state, AgentState::Ended { by: EndedBy::Person, .. }));
    rest(
        project,
        if failed {
            Resting::Failed
        } else if stopped {
            Resting::Stopped
        } else {
            Resting::Completed
        },
    );
}
