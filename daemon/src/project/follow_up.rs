//! Deadlines of a project: after every change the actor carries out what is due and sets its alarm to the next
//! deadline.

use std::time::Duration;

use fermata_core::agent::Agent;
use fermata_core::command::{Command, PreparedStart};
use fermata_core::deadlines::{self, DueAction};
use fermata_core::effect::Continuation;
use fermata_core::restart::RestartKind;
use fermata_protocol::AgentName;
use tokio::time::Instant;

use super::actor::Actor;
use super::ids::{new_operation, new_run};
use super::message::{ActorMessage, CommandReport, StartPreparation};
use crate::errors::Failure;
use crate::operations::run::session;
use crate::operations::{Cancel, StepContext};
use crate::services;

/// How often in a row something new may fall due before the actor processes its mailbox again.
const ROUNDS: u32 = 8;

/// Delay after a due action that could not be persisted, or a start that could not be prepared.
const RETRY: Duration = Duration::from_secs(1);

/// The longest sleep: a deadline comes earlier when the wall clock is set forward.
const LONGEST: Duration = Duration::from_secs(60);

impl Actor {
    /// Carries out what is due; returns when the next deadline is.
    pub(super) async fn follow_up(&mut self) -> Option<Instant> {
        if self.leaving() {
            return None;
        }
        for _ in 0..ROUNDS {
            // The clock is read once for both, so that each deadline is either due now or has the alarm set to it.
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
                    // It makes a checkpoint, which must not see the cancellation of an earlier operation.
                    self.cancel = Cancel::default();
                }
                if let Err(failure) = self.carry_due(Command::Due { action, operation: new_operation() }).await {
                    tracing::error!(project = %self.project.name, %failure, "a due action failed; trying again");
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

    /// Prepares the start of an agent beside the actor, which receives [`ActorMessage::Prepared`].
    fn prepare(&mut self, agent: AgentName) {
        if !self.preparing.insert(agent.clone()) {
            return;
        }
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        self.services.tracker.spawn(async move {
            let prepared = match step.project.agents.get(&agent) {
                Some(agent) => {
                    let kind = agent.state.pending_start().map_or(RestartKind::Anew, |pending| pending.restart);
                    start(&step, agent, kind).await
                }
                None => Err(Failure::from(fermata_protocol::Refusal::new(
                    fermata_protocol::Code::AgentNotFound,
                    format!("agent '{agent}' was removed"),
                ))),
            };
            if prepared.is_err() {
                // The start stays due, and is tried again.
                tokio::time::sleep(RETRY).await;
            }
            drop(mailbox.send(ActorMessage::Prepared { agent, prepared: Box::new(prepared) }).await);
        });
    }

    /// Carries out a prepared start.
    pub(super) async fn prepared(&mut self, agent: AgentName, prepared: StartPreparation) {
        self.preparing.remove(&agent);
        match prepared {
            Ok((start, token)) => {
                let command = Command::Start { agent, start, requested: false };
                self.take_report(CommandReport { tokens: vec![token], ..command.into() }).await;
            }
            Err(failure) => {
                tracing::error!(project = %self.project.name, %agent, %failure, "preparing a start failed; trying again");
            }
        }
    }
}

/// Chooses the command of a start outside a resume of the project, and makes its run.
///
/// # Errors
/// When the store cannot be read.
pub async fn start(step: &StepContext, agent: &Agent, kind: RestartKind) -> StartPreparation {
    let (new, token) = new_run();
    let start = match kind {
        RestartKind::Anew => PreparedStart { new, argv: agent.spec.argv.clone(), session: None, continuation: None },
        RestartKind::GoesOn => {
            let chosen = session::restart_command(step, agent).await?;
            let continuation =
                Continuation { checkpoint: Some(step.project.counters.context).filter(|number| *number > 0) };
            PreparedStart { new, argv: chosen.argv, session: chosen.session, continuation: Some(continuation) }
        }
    };
    Ok((start, token))
}
