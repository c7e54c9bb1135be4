//! Waiting until agents are ready: looks once, then at each agent of which an event speaks,
//! and at all that are left when nothing is told.

use std::collections::BTreeMap;
use std::time::Duration;

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::agent::{AgentDetail, AgentShow};
use fermata_protocol::subscription::{EventFilter, EventsSubscribe};
use fermata_protocol::{AgentName, Code, ProjectName, Target};

use super::up::standing;
use crate::errors::{Exit, Failure};
use crate::output::note;
use crate::session::{Session, Told};

/// How long nothing is told before all that are left are looked at again …
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// … which grows so far while nothing is told.
const LOOK_AGAIN_AT_LAST: Duration = Duration::from_secs(8);

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

/// The agents that are not there yet, each with those that its start waits for.
type Left = BTreeMap<AgentName, Vec<AgentName>>;

/// Waits until every agent is ready or has completed; `false` when one will not.
pub fn wait(session: &mut Session, project: &ProjectName, names: &[AgentName]) -> Result<bool, Failure> {
    let mut left: Left = names.iter().map(|name| (name.clone(), Vec::new())).collect();
    let filter = EventFilter { project: Some(project.clone()), kinds: vec!["agent.*".into()] };
    loop {
        // Subscribed before the first look: what happens in between is told.
        session.call_lasting(&EventsSubscribe { cursor: None, filter: filter.clone() })?;
        if let Some(ready) = follow(session, project, names, &mut left)? {
            return Ok(ready);
        }
    }
}

fn is_farewell(failure: &Failure) -> bool {
    match failure {
        Failure::Said(report) => report.exit == Exit::Unreachable || failure.is(Code::ShuttingDown),
        Failure::ReaderGone => false,
    }
}

/// Looks at all that are left, then goes by what is told; `None` when the daemon was away meanwhile.
fn follow(
    session: &mut Session,
    project: &ProjectName,
    names: &[AgentName],
    left: &mut Left,
) -> Result<Option<bool>, Failure> {
    let all_of = |left: &Left| names.iter().filter(|name| left.contains_key(*name)).cloned().collect();
    let mut next: Vec<AgentName> = all_of(left);
    let mut patience = LOOK_AGAIN;
    loop {
        for name in next {
            match look(session, project, &name, left) {
                Ok(true) => {}
                Ok(false) => return Ok(Some(false)),
                // A look must not go on over a new connection: the subscription is lost with the
                // old one, and what follows would never be told.
                Err(failure) if is_farewell(&failure) => return Ok(None),
                Err(failure) => return Err(failure),
            }
        }
        if left.is_empty() {
            return Ok(Some(true));
        }
        let notification = match session.next_notification_within(patience)? {
            Told::Notification(notification) => notification,
            // An event is told as soon as it is written, which may be before a look shows what it has
            // changed. When it was the last one, nothing else would bring about another look.
            Told::Nothing => {
                next = all_of(left);
                patience = (patience * 2).min(LOOK_AGAIN_AT_LAST);
                continue;
            }
            Told::CameBack => return Ok(None),
        };
        patience = LOOK_AGAIN;
        let about = notification.params.pointer("/event/data/agent").and_then(|name| name.as_str()).unwrap_or_default();
        let concerns = |(name, waits): (&AgentName, &Vec<AgentName>)| {
            (name.as_str() == about || waits.iter().any(|other| other.as_str() == about)).then(|| name.clone())
        };
        next = left.iter().filter_map(concerns).collect();
    }
}

/// Looks at one agent; `false` when it has failed, or waits for one that has.
fn look(session: &mut Session, project: &ProjectName, name: &AgentName, left: &mut Left) -> Result<bool, Failure> {
    let (target, detail) = show(session, project, name)?;
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
        Come::OnItsWay => {
            for other in &detail.agent.waits_for {
                let (other, detail) = show(session, project, other)?;
                if matches!(come(&detail), Come::Failed) {
                    note(&format!("{target} is not ready: it waits for {other}, which is {}", standing(&detail.agent)));
                    return Ok(false);
                }
            }
            left.insert(name.clone(), detail.agent.waits_for);
            Ok(true)
        }
    }
}

fn show(session: &mut Session, project: &ProjectName, name: &AgentName) -> Result<(Target, AgentDetail), Failure> {
    let target = Target::agent(project.clone(), name.clone());
    let detail = session.call(&AgentShow { target: target.clone(), env: Default::default() })?;
    Ok((target, detail))
}
