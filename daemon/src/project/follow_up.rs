//! What follows by itself: after every change the actor decides what is due, and looks again when
//! the next thing will be.

use std::time::Duration;

use fermata_core::agent::{Agent, AgentState};
use fermata_core::command::{ComesBack, Command, Start};
use fermata_core::due::{self, Due};
use fermata_core::restart::Again;
use fermata_protocol::AgentName;
use tokio::time::Instant;

use super::actor::Actor;
use super::handle::{Message, Outcome};
use super::ids::{NewToken, new_operation, new_run};
use crate::errors::Failure;
use crate::services;
use crate::steps::{Cancel, Site, session};

/// How often things may fall due one after the other before others get their turn.
const ROUNDS: u32 = 8;

/// When to look again where something could not be decided.
const RETRY: Duration = Duration::from_secs(1);

/// The longest sleep: a wall clock that is set forward makes things due earlier than a sleep ends.
const LONGEST: Duration = Duration::from_secs(60);

/// A start whose run and command are known, or why they are not.
pub type Prepared = Result<(Start, NewToken), Failure>;

impl Actor {
    /// Decides what is due; returns when to look again.
    pub(super) async fn follow_up(&mut self) -> Option<Instant> {
        if self.leaving() {
            return None;
        }
        for _ in 0..ROUNDS {
            // One look at the clock for both: what is not due now is what the alarm is set to.
            let now = services::now();
            let mut decided = false;
            for what in due::due(&self.project, now) {
                let due = match what {
                    Due::Start(agent) => {
                        self.prepare(agent);
                        continue;
                    }
                    due @ (Due::Ending(_) | Due::End(_) | Due::Stale(_) | Due::NotReady(_)) => due,
                };
                decided = true;
                if let Due::Ending(_) = due {
                    // It takes a checkpoint, which nobody has cancelled.
                    self.cancel = Cancel::default();
                }
                if let Err(failure) = self.carry_due(Command::FallDue { due, operation: new_operation() }).await {
                    tracing::error!(project = %self.project.name, %failure, "what is due is tried again");
                    return Some(Instant::now() + RETRY);
                }
            }
            if !decided {
                let next = [due::next(&self.project, now), self.look_if_due(now)].into_iter().flatten().min()?;
                let wait = Duration::from_millis(u64::try_from(next.since(now)).unwrap_or(0));
                return Some(Instant::now() + wait.min(LONGEST));
            }
        }
        Some(Instant::now())
    }

    /// Finds out how an agent is started, beside the actor; it answers with [`Message::Prepared`].
    fn prepare(&mut self, agent: AgentName) {
        if !self.preparing.insert(agent.clone()) {
            return;
        }
        let (site, mailbox) = (self.site(), self.mailbox.clone());
        self.services.tracker.spawn(async move {
            let prepared = match site.project.agents.get(&agent) {
                Some(found) => start(&site, found, again(found)).await,
                None => Err(Failure::from(fermata_protocol::Refusal::new(
                    fermata_protocol::Code::AgentNotFound,
                    format!("agent '{agent}' was removed"),
                ))),
            };
            if prepared.is_err() {
                // It stays due, and is tried again.
                tokio::time::sleep(RETRY).await;
            }
            drop(mailbox.send(Message::Prepared { agent, prepared: Box::new(prepared) }).await);
        });
    }

    /// Takes a prepared start.
    pub(super) async fn prepared(&mut self, agent: AgentName, prepared: Prepared) {
        self.preparing.remove(&agent);
        match prepared {
            Ok((start, token)) => {
                let command = Command::Start { agent, start, asked: false };
                self.outcome(Outcome { tokens: vec![token], ..command.into() }).await;
            }
            Err(failure) => {
                tracing::error!(project = %self.project.name, %agent, %failure, "a start is tried again");
            }
        }
    }
}

fn again(agent: &Agent) -> Again {
    match &agent.state {
        AgentState::Backoff { again, .. } => *again,
        _ => Again::Anew,
    }
}

/// Chooses the command of a start outside a resume of the project, and makes its run.
///
/// # Errors
/// When the store cannot be read.
pub async fn start(site: &Site, agent: &Agent, again: Again) -> Prepared {
    let (new, token) = new_run();
    let start = match again {
        Again::Anew => Start { new, argv: agent.spec.argv.clone(), session: None, checkpoint: None },
        Again::GoesOn => {
            let chosen = session::start_again(site, agent).await?;
            let comes_back = ComesBack { checkpoint: Some(site.project.counters.context).filter(|number| *number > 0) };
            Start { new, argv: chosen.argv, session: chosen.session, checkpoint: Some(comes_back) }
        }
    };
    Ok((start, token))
}
