//! Waiting until agents are ready: looks once, then at each agent of which an event speaks.

use std::collections::BTreeSet;

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::declaration::{AgentDetail, AgentShow};
use fermata_protocol::subscription::{EventFilter, EventsSubscribe};
use fermata_protocol::{AgentName, ProjectName, Target};

use super::up::standing;
use crate::errors::Failure;
use crate::output::note;
use crate::session::Session;

/// How far an agent has come.
enum Come {
    /// It is ready, or has done its work.
    There(&'static str),
    /// It will not come there any more.
    Failed,
    /// It may still.
    OnItsWay,
}

fn come(detail: &AgentDetail) -> Come {
    let agent = &detail.agent;
    match agent.status {
        _ if detail.completed => Come::There("has completed"),
        AgentStatus::Running | AgentStatus::WaitingForInput if agent.ready => Come::There("is ready"),
        AgentStatus::Running | AgentStatus::WaitingForInput | AgentStatus::Starting | AgentStatus::Backoff => {
            Come::OnItsWay
        }
        // Whoever stops or pauses it does not want it to come there.
        AgentStatus::Paused
        | AgentStatus::Stopping
        | AgentStatus::Exited
        | AgentStatus::Failed
        | AgentStatus::TimedOut
        | AgentStatus::Interrupted => Come::Failed,
    }
}

/// Waits until every agent is ready or has completed; `false` when one will not.
pub fn wait(session: &mut Session, project: &ProjectName, names: &[AgentName]) -> Result<bool, Failure> {
    let mut left: BTreeSet<AgentName> = names.iter().cloned().collect();
    let filter = EventFilter { project: Some(project.clone()), kinds: vec!["agent.*".into()] };
    loop {
        // Subscribed before the first look: what happens in between is told.
        session.call_lasting(&EventsSubscribe { cursor: None, filter: filter.clone() })?;
        for name in left.clone() {
            if !look(session, project, &name, &mut left)? {
                return Ok(false);
            }
        }
        loop {
            if left.is_empty() {
                return Ok(true);
            }
            // The daemon was away: what it told meanwhile is lost, so everything is looked at again.
            let Some(notification) = session.next_notification()? else { break };
            let about = notification.params.pointer("/event/data/agent").and_then(|name| name.as_str());
            let Some(name) = about.and_then(|name| left.iter().find(|left| left.as_str() == name).cloned()) else {
                continue;
            };
            if !look(session, project, &name, &mut left)? {
                return Ok(false);
            }
        }
    }
}

/// Looks at one agent; `false` when it has failed.
fn look(
    session: &mut Session,
    project: &ProjectName,
    name: &AgentName,
    left: &mut BTreeSet<AgentName>,
) -> Result<bool, Failure> {
    let target = Target::agent(project.clone(), name.clone());
    let detail = session.call_lasting(&AgentShow { target: target.clone(), env: Default::default() })?;
    match come(&detail) {
        Come::There(how) => {
            left.remove(name);
            if session.out.is_human() {
                note(&format!("{target} {how}"));
            }
            Ok(true)
        }
        Come::Failed => {
            note(&format!("{target} is not ready: it is {}", standing(&detail.agent)));
            Ok(false)
        }
        Come::OnItsWay => Ok(true),
    }
}
