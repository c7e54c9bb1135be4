//! `up --wait`: waits until agents are ready. Each is checked once, then on every event about it, and all pending ones
//! when no event arrives for a while.

use std::collections::BTreeMap;
use std::time::Duration;

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::agent::{AgentDetail, AgentShow};
use fermata_protocol::subscription::{EventFilter, EventsSubscribe};
use fermata_protocol::{AgentName, Code, ProjectName, Target};

use super::status::agent_state;
use crate::errors::{CommandError, Exit};
use crate::output::note;
use crate::session::{DaemonSession, Wakeup};

/// How long to wait for an event before all pending agents are checked again …
const RECHECK_INTERVAL: Duration = Duration::from_millis(250);

/// … doubled up to this while no event arrives.
const MAX_RECHECK_INTERVAL: Duration = Duration::from_secs(8);

/// How far the start of an agent has come.
enum AgentReadiness {
    /// Ready or completed; the verb phrase says which.
    Ready(&'static str),
    /// Will not become ready.
    Failed,
    Pending,
}

fn readiness_of(detail: &AgentDetail) -> AgentReadiness {
    let agent = &detail.agent;
    match agent.status {
        _ if detail.completed => AgentReadiness::Ready("has completed"),
        AgentStatus::Running | AgentStatus::WaitingForInput if agent.ready => AgentReadiness::Ready("is ready"),
        AgentStatus::Running | AgentStatus::WaitingForInput | AgentStatus::Starting | AgentStatus::Backoff => {
            AgentReadiness::Pending
        }
        // Stopped or paused on purpose, or failed.
        AgentStatus::Paused
        | AgentStatus::Stopping
        | AgentStatus::Exited
        | AgentStatus::Failed
        | AgentStatus::TimedOut
        | AgentStatus::Interrupted => AgentReadiness::Failed,
    }
}

/// The agents that are not ready yet, each with the agents that its start waits for.
type PendingAgents = BTreeMap<AgentName, Vec<AgentName>>;

/// Waits until every agent is ready or completed; `false` when one has failed.
pub fn wait(session: &mut DaemonSession, project: &ProjectName, names: &[AgentName]) -> Result<bool, CommandError> {
    let mut pending: PendingAgents = names.iter().map(|name| (name.clone(), Vec::new())).collect();
    let filter = EventFilter { project: Some(project.clone()), kinds: vec!["agent.*".into()] };
    loop {
        // Subscribed before the first check, so that no change is missed in between.
        session.call_across_restarts(&EventsSubscribe { cursor: None, filter: filter.clone() })?;
        if let Some(ready) = follow(session, project, names, &mut pending)? {
            return Ok(ready);
        }
    }
}

fn is_disconnect(error: &CommandError) -> bool {
    match error {
        CommandError::Reported(report) => report.exit == Exit::Unreachable || error.is(Code::ShuttingDown),
        CommandError::OutputClosed => false,
    }
}

/// Checks all pending agents, then those that events are about; `None` when the daemon restarted.
fn follow(
    session: &mut DaemonSession,
    project: &ProjectName,
    names: &[AgentName],
    pending: &mut PendingAgents,
) -> Result<Option<bool>, CommandError> {
    let all_pending =
        |pending: &PendingAgents| names.iter().filter(|name| pending.contains_key(*name)).cloned().collect();
    let mut next: Vec<AgentName> = all_pending(pending);
    let mut interval = RECHECK_INTERVAL;
    loop {
        for name in next {
            match check(session, project, &name, pending) {
                Ok(true) => {}
                Ok(false) => return Ok(Some(false)),
                // The subscription is lost with the connection, so the caller must subscribe again.
                Err(error) if is_disconnect(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        if pending.is_empty() {
            return Ok(Some(true));
        }
        let notification = match session.next_notification_within(interval)? {
            Wakeup::Notification(notification) => notification,
            // An event may arrive before a check shows its effect. After the last event only the timeout leads to
            // another check.
            Wakeup::TimedOut => {
                next = all_pending(pending);
                interval = (interval * 2).min(MAX_RECHECK_INTERVAL);
                continue;
            }
            Wakeup::Reconnected => return Ok(None),
        };
        interval = RECHECK_INTERVAL;
        let subject =
            notification.params.pointer("/event/data/agent").and_then(|name| name.as_str()).unwrap_or_default();
        let concerns = |(name, waits): (&AgentName, &Vec<AgentName>)| {
            (name.as_str() == subject || waits.iter().any(|other| other.as_str() == subject)).then(|| name.clone())
        };
        next = pending.iter().filter_map(concerns).collect();
    }
}

/// Checks one agent; `false` when it, or an agent that it waits for, has failed.
fn check(
    session: &mut DaemonSession,
    project: &ProjectName,
    name: &AgentName,
    pending: &mut PendingAgents,
) -> Result<bool, CommandError> {
    let (target, detail) = show(session, project, name)?;
    match readiness_of(&detail) {
        AgentReadiness::Ready(verb) => {
            pending.remove(name);
            if session.out.is_human() {
                note(&format!("{target} {verb}"));
            }
            Ok(true)
        }
        AgentReadiness::Failed => {
            note(&format!("{target} will not become ready: {}", agent_state(&detail.agent)));
            Ok(false)
        }
        AgentReadiness::Pending => {
            for other in &detail.agent.waits_for {
                let (other, detail) = show(session, project, other)?;
                if matches!(readiness_of(&detail), AgentReadiness::Failed) {
                    note(&format!(
                        "{target} will not become ready: waiting for {other}, {}",
                        agent_state(&detail.agent)
                    ));
                    return Ok(false);
                }
            }
            pending.insert(name.clone(), detail.agent.waits_for);
            Ok(true)
        }
    }
}

fn show(
    session: &mut DaemonSession,
    project: &ProjectName,
    name: &AgentName,
) -> Result<(Target, AgentDetail), CommandError> {
    let target = Target::agent(project.clone(), name.clone());
    let detail = session.call(&AgentShow { target: target.clone(), env: Default::default() })?;
    Ok((target, detail))
}
