//! Carries out effects. Most are tasks beside the actor that report once; committing and thawing a freeze and parking
//! are awaited, since the next command must not overtake them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fermata_core::agent::RunKey;
use fermata_core::command::{Command, PauseCommit, StepReport};
use fermata_core::effect::{Continuation, Effect};
use fermata_core::project::{PauseStep, ProjectState};
use fermata_protocol::checkpoint::{CheckpointCreateResult, Trigger};
use fermata_protocol::pause::{AgentResumed, ResumeMethod};
use fermata_protocol::{AgentName, CheckpointNumber, Code, OperationId, RunId};
use serde_json::json;
use tokio::sync::mpsc;

use super::actor::Actor;
use super::links::end_of;
use super::message::{ActorMessage, CommandReport};
use super::pause_work::PauseWork;
use super::retain::make_room;
use super::retry::{discard, retry};
use super::staging::DatabaseStaging;
use crate::errors::Failure;
use crate::operations::checkpoint::database;
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::{self, RowsTiming};
use crate::operations::checkpoint::{transcripts, transfer, warm_up};
use crate::operations::maintenance::leftovers;
use crate::operations::pause::flash_save;
use crate::operations::pause::freeze::{self, Renewer};
use crate::operations::pause::quiesce;
use crate::operations::restore::resume;
use crate::operations::run::launch;
use crate::operations::run::session::FoundSessions;
use crate::operations::{StepContext, ms_since, restore};
use crate::shims::link::LinkError;
use crate::store::commit::Write;
use crate::store::pinned::PreparedCopy;

/// How long the processes of a parked agent may take to end.
const PARKING: Duration = Duration::from_secs(10);

impl Actor {
    pub(super) async fn start(&mut self, effect: Effect) {
        match effect {
            Effect::Launch { agent, run, continuation } => self.launch(agent, run, continuation),
            Effect::Stop { agent, run, grace_ms } => self.stop(&agent, &run, Some(grace_ms)),
            Effect::Kill { agent, run } => self.stop(&agent, &run, None),
            Effect::PauseForBudget {} => {
                self.services.tracker.spawn(super::automatic::pause_for_budget(self.handle()));
            }
            Effect::PauseStep { operation, step } => self.pause_step(operation, step),
            Effect::Undo { operation, checkpoint, runs } => self.undo(operation, checkpoint, runs),
            Effect::CommitFreeze { runs } => {
                self.commit_freeze(runs).await;
                // Ends the renewal of the leases, which are permanent now.
                *self.work.lock() = PauseWork::default();
                fermata_failpoint::hit("pause.held");
            }
            Effect::Park { runs } => self.park(runs).await,
            Effect::Thaw { runs } => {
                if let Err(failure) = freeze::thaw(&self.step_context(), &runs).await {
                    tracing::error!(project = %self.project.name, %failure, "failed to thaw agents after a restart");
                }
            }
            Effect::Resume { operation, thaw, respawn, checkpoint } => {
                self.resume(operation, thaw, respawn, checkpoint);
            }
            Effect::Checkpoint { operation, checkpoint, trigger, runs } => {
                self.checkpoint(operation, checkpoint, trigger, runs);
            }
            Effect::DiscardCheckpoints { checkpoints } => self.discard_checkpoints(checkpoints),
            Effect::PlanRestore { operation, checkpoint, safety, paths } => {
                self.plan_restore(operation, checkpoint, safety, paths);
            }
            Effect::ApplyRestore { operation, checkpoint, safety, after_ms } => {
                self.apply_restore(operation, checkpoint, safety, Duration::from_millis(after_ms));
            }
            Effect::ForgetPlan { operation } => restore::remove_plan(&self.step_context(), &operation),
            Effect::ForgetAgent { agent } => self.forget(&agent),
        }
    }

    /// Makes freezes permanent. Reports the agents that ran since their lease had expired, and had to be frozen again.
    pub(super) async fn commit_freeze(&mut self, runs: Vec<RunKey>) {
        for (agent, run) in freeze::commit(&self.step_context(), &runs).await {
            let detail =
                "its lease expired before the daemon could make the freeze permanent; it was frozen again".to_owned();
            self.report(Command::FreezeBroken { agent, run, times: 1, detail }).await;
        }
    }

    fn launch(&mut self, agent: AgentName, run: RunId, continuation: Option<Continuation>) {
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        let token = self.tokens.remove(&run).unwrap_or_default();
        self.services.tracker.spawn(async move {
            let outcome = launch::run(&step, &agent, &run, &token, continuation).await.map(Box::new);
            drop(mailbox.send(ActorMessage::Started { agent, run, outcome }).await);
        });
    }

    /// Stops a run; without a grace period kills it.
    fn stop(&self, agent: &AgentName, run: &RunId, grace_ms: Option<u64>) {
        let Some(link) = self.links.get(agent).filter(|link| link.run == *run).cloned() else {
            let (step, agent, run) = (self.step_context(), agent.clone(), run.clone());
            let grace = Duration::from_millis(grace_ms.unwrap_or(0));
            self.services.tracker.spawn(async move {
                if let Err(failure) = launch::stop_unreachable(&step, &agent, &run, grace).await {
                    tracing::error!(%agent, %failure, "failed to stop an agent whose shim cannot be connected to");
                }
            });
            return;
        };
        let agent = agent.clone();
        self.services.tracker.spawn(async move {
            let asked = match grace_ms {
                Some(grace) => link.shim.stop(Some(Duration::from_millis(grace))).await,
                None => link.shim.kill().await,
            };
            // When the link is closed the run has probably ended; its watcher reports that.
            if let Err(error) = asked
                && !link.shim.is_closed()
            {
                tracing::error!(%agent, error = fermata_protocol::error_chain(&error), "the shim failed to stop its agent");
            }
        });
    }

    fn pause_step(&mut self, operation: OperationId, pause_step: PauseStep) {
        let (step, mailbox, work) = (self.step_context(), self.mailbox.clone(), self.work.clone());
        let task = async move {
            let start = Instant::now();
            let mut borrowed = work.borrow_for_step();
            // Only waiting is cancelled by dropping its future. Blocking work ends by its own flag, so that none is
            // running any more when this task, for which the undo waits, has ended.
            let stepping = run_pause_step(&step, &mailbox, &operation, pause_step, &mut borrowed.work);
            let result = if pause_step == PauseStep::Quiesce {
                tokio::select! {
                    result = stepping => result,
                    () = step.cancel.cancelled() => Err(cancelled()),
                }
            } else {
                stepping.await
            };
            // Put back before the report: the actor reads the work when it commits the pause.
            drop(borrowed);
            let (outcome, writes) = match result {
                Ok((report, writes)) => (Ok(report), writes),
                Err(failure) => (Err(failure.into_error(Code::PauseFailed)), Vec::new()),
            };
            let command = Command::PauseStepped { operation, step: pause_step, took_ms: ms_since(start), outcome };
            let report = CommandReport { command, writes, reply: None, tokens: Vec::new() };
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(report))).await);
        };
        self.step = Some(self.services.tracker.spawn(task));
    }

    /// Cancels the current step, thaws the agents and discards the checkpoint; each is tried again until it succeeds.
    fn undo(&mut self, operation: OperationId, number: CheckpointNumber, runs: Vec<RunKey>) {
        self.cancel.cancel();
        let current = self.step.take();
        let (mut step, mailbox, work) = (self.step_context(), self.mailbox.clone(), self.work.clone());
        self.services.tracker.spawn(async move {
            if let Some(current) = current {
                // Its report is either in the mailbox or ignored; the panic hook has logged a panic.
                drop(current.await);
            }
            // Also ends the renewal of the leases.
            let mut database = std::mem::take(&mut *work.lock()).database;
            // The cancellation that caused the undo must not end it.
            step.cancel = Default::default();
            retry("thaw the agents of a pause", &step, Some(&mailbox), |step| {
                let runs = runs.clone();
                async move {
                    crate::operations::failpoint("undo.thaw")?;
                    freeze::thaw(&step, &runs).await
                }
            })
            .await;
            // The writer of the database part must have ended before its files are discarded.
            drop(database.take().await);
            retry("discard the checkpoint of a pause", &step, Some(&mailbox), |step| async move {
                crate::operations::failpoint("undo.discard")?;
                leftovers::discard(&step, number).await
            })
            .await;
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(Command::Undone { operation }.into()))).await);
        });
    }

    /// Thaws all agents of a pause whose failure cannot be persisted yet.
    pub(super) async fn thaw_at_once(&self) {
        let runs = self.project.runs(self.project.alive_agents());
        if let Err(failure) = freeze::thaw(&self.step_context(), &runs).await {
            tracing::error!(project = %self.project.name, %failure, "failed to thaw agents after a failed pause");
        }
    }

    /// Ends the processes of frozen agents, before the caller of the pause is answered: then their memory is free.
    ///
    /// The actor waits for it, up to [`PARKING`]. A message that it processed meanwhile
    /// would find the agents frozen although they are being ended: a resume would thaw what is killed, and the end of
    /// a run would count as one by itself. Reads of the state are not delayed.
    async fn park(&mut self, runs: Vec<RunKey>) {
        let step = self.step_context();
        let each = runs.into_iter().map(|(agent, run)| {
            let link = step.links.get(&agent).filter(|link| link.run == run).cloned();
            let project = step.project.name.clone();
            async move {
                if let Some(link) = link {
                    let ended = async {
                        link.shim.kill().await?;
                        link.shim.closed().await;
                        Ok::<(), LinkError>(())
                    };
                    match tokio::time::timeout(PARKING, ended).await {
                        Ok(Ok(()) | Err(LinkError::Closed)) => {}
                        Ok(Err(error)) => {
                            let error = fermata_protocol::error_chain(&error);
                            tracing::error!(%project, %agent, error, "failed to park an agent");
                            return None;
                        }
                        Err(_) => {
                            tracing::error!(%project, %agent, "the processes of a parked agent did not end in time");
                            return None;
                        }
                    }
                }
                Some((agent, run))
            }
        });
        let parked = crate::operations::side_by_side(each.collect::<Vec<_>>()).await;
        fermata_failpoint::hit("pause.parked");
        for (agent, run) in parked.into_iter().flatten() {
            self.report(Command::Parked { agent, run }).await;
        }
    }

    fn resume(
        &mut self,
        operation: OperationId,
        thaw: Vec<RunKey>,
        respawn: Vec<RunKey>,
        checkpoint: CheckpointNumber,
    ) {
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        let tokens: Vec<String> = respawn.iter().map(|(_, run)| self.tokens.remove(run).unwrap_or_default()).collect();
        self.services.tracker.spawn(async move {
            let start = Instant::now();
            let mut agents = resume::thaw(&step, &thaw).await;
            let thaw_ms = ms_since(start);
            for failed in agents.iter().filter(|agent| agent.method == ResumeMethod::Failed) {
                let Some((agent, run)) = thaw.iter().find(|(agent, _)| *agent == failed.agent) else { continue };
                // Reported before the end of the resume; the later report of the run's watcher is then ignored.
                let end = end_of(&step, agent, run, failed.detail.clone().unwrap_or_default());
                drop(mailbox.send(ActorMessage::CommandReport(Box::new(end))).await);
            }
            fermata_failpoint::hit("resume.thawed");
            let respawn_start = Instant::now();
            let each = respawn.into_iter().zip(tokens).map(|((agent, run), token)| {
                let (step, mailbox) = (step.clone(), mailbox.clone());
                async move { respawn_one(&step, &mailbox, agent, run, &token, checkpoint).await }
            });
            agents.extend(crate::operations::side_by_side(each.collect::<Vec<_>>()).await);
            agents.sort_by(|a, b| a.agent.cmp(&b.agent));
            let steps_ms = [("thaw".to_owned(), thaw_ms), ("respawn".to_owned(), ms_since(respawn_start))].into();
            let command = Command::Resumed { operation, agents, steps_ms, warnings: Vec::new() };
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(command.into()))).await);
        });
    }

    fn checkpoint(&mut self, operation: OperationId, number: CheckpointNumber, trigger: Trigger, runs: Vec<RunKey>) {
        let label = std::mem::take(&mut self.label);
        let imported = label.import.is_some();
        let order = CheckpointOrder {
            operation: operation.clone(),
            number,
            name: label.name.unwrap_or_else(|| checkpoint::default_name(trigger, number)),
            description: label.description,
            trigger,
            reason: None,
            frozen: false,
            runs: runs.clone(),
        };
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        let task = async move {
            let made = match label.import {
                Some(file) => transfer::import(&step, &order, file).await.map(|made| (made, 0.0)),
                None => live_checkpoint(&step, &mailbox, order, &runs).await,
            };
            let report = match made {
                Ok((made, frozen_ms)) => {
                    let result = CheckpointCreateResult {
                        operation_id: operation.clone(),
                        checkpoint_id: number,
                        checkpoint: made.view.clone(),
                        frozen_ms,
                        steps_ms: made.view.metadata.parts_ms.clone(),
                        warnings: made.warnings,
                    };
                    let writes = vec![Write::Checkpoint(Box::new(made.view.clone()))];
                    let outcome = Ok((Box::new(made.view), frozen_ms));
                    let command = Command::Checkpointed { operation, outcome, imported };
                    CommandReport { command, writes, reply: Some(json!(result)), tokens: Vec::new() }
                }
                Err(failure) => {
                    let error = failure.into_error(Code::CheckpointFailed);
                    discard(&step, number, &mailbox).await;
                    Command::Checkpointed { operation, outcome: Err(error), imported }.into()
                }
            };
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(report))).await);
        };
        self.step = Some(self.services.tracker.spawn(task));
    }

    fn forget(&mut self, agent: &AgentName) {
        Arc::make_mut(&mut self.links).remove(agent);
        let step = self.step_context();
        // Renamed at once, so that a new agent of the same name gets a directory of its own.
        match leftovers::defer_removal(&step.dirs().agent(agent)) {
            Ok(aside) => {
                self.services.tracker.spawn_blocking(move || leftovers::remove_deferred(aside));
            }
            Err(error) => tracing::warn!(%agent, %error, "failed to remove the files of a removed agent"),
        }
    }
}

type Stepped = (StepReport, Vec<Write>);

async fn run_pause_step(
    step: &StepContext,
    mailbox: &mpsc::Sender<ActorMessage>,
    operation: &OperationId,
    pause_step: PauseStep,
    work: &mut PauseWork,
) -> Result<Stepped, Failure> {
    let done = Ok((StepReport::Done, Vec::new()));
    let ProjectState::Pausing(pause) = &*step.project.state else { return done };
    let runs = step.project.runs(step.project.running_agents());
    match pause_step {
        PauseStep::Validate => {
            drop(work.database.take().await);
            *work = PauseWork::default();
            make_room(step, mailbox).await?;
            // Runs beside the warm-up scan and the quiescing.
            let writer = step.services.tracker.spawn(database::stage(step.clone(), pause.checkpoint));
            work.database = DatabaseStaging::Writing(writer);
            warm_up::run(step, Some(operation)).await?;
        }
        PauseStep::Quiesce => {
            let request = quiesce::QuiesceRequest {
                grace_ms: pause.grace_ms,
                reason: pause.reason.clone(),
                operation: operation.to_string(),
            };
            work.warnings = quiesce::run(step, &runs, &request).await?;
            // No agent is frozen while the database part is being written.
            work.database.settle().await;
        }
        PauseStep::Freeze => {
            work.scouted = Some(transcripts::find(step).await?);
            work.frozen = Some(freeze::run(step, &runs).await?);
            work.renewer = Some(Renewer::start(step, runs));
        }
        PauseStep::PlanFlashSave => {
            crate::operations::failpoint("pause.plan_flash_save")?;
            work.plans = flash_save::plan(step, None, crate::services::now()).await?;
        }
        PauseStep::Checkpoint => {
            let order = CheckpointOrder {
                operation: operation.clone(),
                number: pause.checkpoint,
                name: checkpoint::default_name(Trigger::Pause, pause.checkpoint),
                description: String::new(),
                trigger: Trigger::Pause,
                reason: pause.reason.clone(),
                frozen: true,
                runs: runs.clone(),
            };
            let made = pause_checkpoint(step, &order, work, &runs).await;
            return made.map_err(|failure| match &work.renewer {
                Some(renewer) => renewer.cause(failure),
                None => failure,
            });
        }
    }
    done
}

async fn pause_checkpoint(
    step: &StepContext,
    order: &CheckpointOrder,
    work: &mut PauseWork,
    runs: &[RunKey],
) -> Result<Stepped, Failure> {
    let now = crate::services::now();
    let plans = std::mem::take(&mut work.plans);
    let staged = work.database.take().await;
    let (rows, scouted) = (RowsTiming::UnderFreeze(staged.map(Box::new)), work.scouted.take());
    let captured = checkpoint::capture(step, order, &plans, now, rows, scouted).await?;
    let made = checkpoint::seal(step, order, captured, now).await?;
    // Proves that no process ran meanwhile: an expired lease cannot be renewed.
    work.proven_until = freeze::renew(step, runs).await?;
    let frozen = work.frozen.clone();
    let mut warnings = std::mem::take(&mut work.warnings);
    warnings.extend(made.warnings);
    let sealed = PauseCommit {
        checkpoint: made.view.clone(),
        flash_save: flash_save::total(&plans),
        mechanism: frozen.as_ref().map_or(fermata_protocol::pause::FreezerKind::Cgroup, |f| f.mechanism),
        processes: frozen.as_ref().map_or(0, |f| f.processes),
        frozen_ms: frozen.as_ref().map_or(0.0, |f| ms_since(f.since)),
        agents: frozen.map(|f| f.agents).unwrap_or_default(),
        sessions: made.sessions,
        warnings,
    };
    let mut writes: Vec<Write> = plans.into_iter().map(|(_, plan)| Write::FlashSave(plan)).collect();
    writes.push(Write::Checkpoint(Box::new(made.view)));
    Ok((StepReport::Sealed(Box::new(sealed)), writes))
}

/// Makes a checkpoint of running agents. They are frozen while workspace and database are read; not if that would need
/// signals, which interrupt system calls, and the settings do not allow it.
async fn live_checkpoint(
    step: &StepContext,
    mailbox: &mpsc::Sender<ActorMessage>,
    mut order: CheckpointOrder,
    runs: &[RunKey],
) -> Result<(checkpoint::SealedCheckpoint, f64), Failure> {
    let settings = step.services.settings();
    make_room(step, mailbox).await?;
    let partial = step.dirs().partial_checkpoint(order.number);
    // Shortens the freeze.
    let (warmed_up, prepared) =
        tokio::join!(warm_up::run(step, Some(&order.operation)), database::open(step, &partial));
    let prepared = warmed_up.and(prepared)?;
    let by_signals = |(agent, _): &RunKey| {
        let processes = step.project.agents.get(agent).and_then(|a| a.run()?.processes.as_ref());
        processes.is_some_and(|p| p.mechanism == fermata_protocol::pause::FreezerKind::Signals)
    };
    let blip = settings.pause.blip_with_signals || !runs.iter().any(by_signals);
    let now = crate::services::now();
    order.frozen = blip && !runs.is_empty();
    let mut frozen_ms = 0.0;
    let captured = if order.frozen {
        let scouted = transcripts::find(step).await?;
        let frozen = freeze::run(step, runs).await;
        let renewer = Renewer::start(step, runs.to_vec());
        let captured = match &frozen {
            Ok(_) => {
                let captured = capture_frozen(step, &order, runs, now, prepared, scouted).await;
                captured.map_err(|failure| renewer.cause(failure))
            }
            Err(failure) => Err(failure.clone()),
        };
        drop(renewer);
        retry("thaw after a checkpoint", step, None, |step| {
            let runs = runs.to_vec();
            async move { freeze::thaw(&step, &runs).await }
        })
        .await;
        frozen_ms = frozen.map_or(0.0, |f| ms_since(f.since));
        captured?
    } else {
        checkpoint::capture(step, &order, &Vec::new(), now, RowsTiming::AfterThaw(Some(prepared)), None).await?
    };
    order.frozen = false;
    let mut made = checkpoint::seal(step, &order, captured, now).await?;
    if !blip && !runs.is_empty() {
        made.warnings.push("the agents ran while the workspace was read: they could be stopped only by signals".into());
    }
    Ok((made, frozen_ms))
}

/// Captures, and proves that no process ran meanwhile: an expired lease cannot be renewed.
async fn capture_frozen(
    step: &StepContext,
    order: &CheckpointOrder,
    runs: &[RunKey],
    now: fermata_protocol::UnixMillis,
    prepared: PreparedCopy,
    scouted: FoundSessions,
) -> Result<checkpoint::CapturedCheckpoint, Failure> {
    let rows = RowsTiming::AfterThaw(Some(prepared));
    let captured = checkpoint::capture(step, order, &Vec::new(), now, rows, Some(scouted)).await?;
    match freeze::renew(step, runs).await {
        Ok(_) => Ok(captured),
        Err(failure) => {
            captured.discard().await;
            Err(failure)
        }
    }
}

async fn respawn_one(
    step: &StepContext,
    mailbox: &mpsc::Sender<ActorMessage>,
    agent: AgentName,
    run: RunId,
    token: &str,
    checkpoint: CheckpointNumber,
) -> AgentResumed {
    let argv = step.project.agents.get(&agent).and_then(|a| a.run()).map(|run| run.argv.clone());
    let outcome =
        launch::run(step, &agent, &run, token, Some(Continuation { checkpoint: Some(checkpoint) })).await.map(Box::new);
    let failed = outcome.as_ref().err().cloned();
    drop(mailbox.send(ActorMessage::Started { agent: agent.clone(), run, outcome }).await);
    let method = if failed.is_some() { ResumeMethod::Failed } else { ResumeMethod::Respawned };
    AgentResumed { agent, method, argv, detail: failed }
}

fn cancelled() -> Failure {
    fermata_protocol::Refusal::new(Code::OperationCancelled, "the operation was cancelled").into()
}
