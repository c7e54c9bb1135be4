//! What follows by itself: after every change the actor decides what is due, and looks again when
//! the next thing will be.

use std::time::Duration;

use fermata_core::agent::{Agent, AgentState};
use fermata_core::command::{Command, PreparedStart};
use fermata_core::deadlines::{self, DueAction};
use fermata_core::effect::Continuation;
use fermata_core::restart::RestartKind;
use fermata_protocol::AgentName;
use tokio::time::Instant;

use super::actor::Actor;
use super::ids::{new_operation, new_run};
use super::message::{CommandReport, Message, Prepared};
use crate::errors::Failure;
use crate::operations::run::session;
use crate::operations::{Cancel, StepContext};
use crate::services;

/// How often things may fall due one after the other before others get their turn.
const ROUNDS: u32 = 8;

/// When to look again where something could not be decided.
const RETRY: Duration = Duration::from_secs(1);

/// The longest sleep: a wall clock that is set forward makes things due earlier than a sleep ends.
const LONGEST: Duration = Duration::from_secs(60);

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
            for action in deadlines::due_actions(&self.project, now) {
                let action = match action {
                    DueAction::Start(agent) => {
                        self.prepare(agent);
                        continue;
                    }
                    action @ (DueAction::PlanEnds(_)
                    | DueAction::End(_)
                    | DueAction::Stale(_)
                    | DueAction::NotReady(_)) => action,
                };
                decided = true;
                if let DueAction::PlanEnds(_) = action {
                    // It takes a checkpoint, which nobody has cancelled.
                    self.cancel = Cancel::default();
                }
                if let Err(failure) = self.carry_due(Command::Due { action, operation: new_operation() }).await {
                    tracing::error!(project = %self.project.name, %failure, "what is due is tried again");
                    return Some(Instant::now() + RETRY);
                }
            }
            if !decided {
                let next = [deadlines::next(&self.project, now), self.scan_if_due(now)].into_iter().flatten().min()?;
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
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
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
                let command = Command::Start { agent, start, requested: false };
                self.outcome(CommandReport { tokens: vec![token], ..command.into() }).await;
            }
            Err(failure) => {
                tracing::error!(project = %self.project.name, %agent, %failure, "a start is tried again");
            }
        }
    }
}

fn again(agent: &Agent) -> RestartKind {
    match &agent.state {
        AgentState::Backoff { restart, .. } => *restart,
        AgentState::Waiting { .. }
        | AgentState::Starting(_)
        | AgentState::Running(_)
        | AgentState::Frozen(_)
        | AgentState::Parked(_)
        | AgentState::Stopping { .. }
        | AgentState::Ended { .. }
        | AgentState::Failed { .. }
        | AgentState::TimedOut { .. }
        | AgentState::Interrupted { .. } => RestartKind::Anew,
    }
}

/// Chooses the command of a start outside a resume of the project, and makes its run.
///
/// # Errors
/// When the store cannot be read.
pub async fn start(site: &StepContext, agent: &Agent, again: RestartKind) -> Prepared {
    let (new, token) = new_run();
    let start = match again {
        RestartKind::Anew => PreparedStart { new, argv: agent.spec.argv.clone(), session: None, continuation: None },
        RestartKind::GoesOn => {
            let chosen = session::restart_command(site, agent).await?;
            let continuation =
                Continuation { checkpoint: Some(site.project.counters.context).filter(|number| *number > 0) };
            PreparedStart { new, argv: chosen.argv, session: chosen.session, continuation: Some(continuation) }
        }
    };
    Ok((start, token))
}
