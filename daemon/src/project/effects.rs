//! Carries out effects: starts step tasks, and does at once what must not come late.

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
use super::message::{CommandReport, Message};
use super::retain::make_room;
use super::retry::{discard, retry};
use super::staging::DatabaseStaging;
use crate::errors::Failure;
use crate::operations::checkpoint::database;
use crate::operations::checkpoint::order::CheckpointOrder;
use crate::operations::checkpoint::{self, RowsTiming};
use crate::operations::checkpoint::{transcripts, transfer, warm_up};
use crate::operations::maintenance::leftovers;
use crate::operations::pause::flash_save::{self, Plans};
use crate::operations::pause::freeze::{self, FrozenAgents, Renewer};
use crate::operations::pause::quiesce;
use crate::operations::restore::resume;
use crate::operations::run::launch;
use crate::operations::run::session::FoundSessions;
use crate::operations::{StepContext, ms_since, restore};
use crate::store::commit::Write;
use crate::store::pinned::Prepared;

/// How long a parked agent's processes may take to end.
const PARKING: Duration = Duration::from_secs(10);

/// What the steps of one pause hand on to each other.
#[derive(Default)]
pub struct PauseWork {
    frozen: Option<FrozenAgents>,
    renewer: Option<Renewer>,
    /// Until when the pause may be committed: then the lease of the last proof is over.
    pub(super) proven_until: Option<Instant>,
    draft: DatabaseStaging,
    /// The agents' sessions, looked for before anybody was frozen.
    scouted: Option<FoundSessions>,
    plans: Plans,
    warnings: Vec<String>,
}

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
                // The pause has come to its end: nobody renews what is held.
                *self.work.lock().await = PauseWork::default();
                fermata_failpoint::hit("pause.held");
            }
            Effect::Park { runs } => self.park(runs).await,
            Effect::Thaw { runs } => {
                if let Err(failure) = freeze::thaw(&self.step_context(), &runs).await {
                    tracing::error!(project = %self.project.name, %failure, "thaw after a restart");
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

    /// Makes freezes permanent; of those that had to be made anew it is told that their agents ran.
    pub(super) async fn commit_freeze(&mut self, runs: Vec<RunKey>) {
        for (agent, run) in freeze::commit(&self.step_context(), &runs).await {
            let detail = "its lease was over before the daemon could make the freeze permanent; \
                          it was frozen again"
                .to_owned();
            self.report(Command::FreezeBroken { agent, run, times: 1, detail }).await;
        }
    }

    fn launch(&mut self, agent: AgentName, run: RunId, continuation: Option<Continuation>) {
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
        let token = self.tokens.remove(&run).unwrap_or_default();
        self.services.tracker.spawn(async move {
            let outcome = launch::run(&site, &agent, &run, &token, continuation).await.map(Box::new);
            drop(mailbox.send(Message::Started { agent, run, outcome }).await);
        });
    }

    /// Stops a run, or kills it where there is no grace.
    fn stop(&self, agent: &AgentName, run: &RunId, grace_ms: Option<u64>) {
        let Some(link) = self.links.get(agent).filter(|link| link.run == *run).cloned() else {
            let (site, agent, run) = (self.step_context(), agent.clone(), run.clone());
            let grace = Duration::from_millis(grace_ms.unwrap_or(0));
            self.services.tracker.spawn(async move {
                if let Err(failure) = launch::stop_unreachable(&site, &agent, &run, grace).await {
                    tracing::error!(%agent, %failure, "an agent whose shim cannot be reached does not end");
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
            // A link that is closed belongs to a run that has ended; its watcher tells.
            if let Err(error) = asked
                && !link.shim.is_closed()
            {
                tracing::error!(%agent, error = fermata_protocol::error_chain(&error), "the shim does not stop its agent");
            }
        });
    }

    fn pause_step(&mut self, operation: OperationId, step: PauseStep) {
        let (site, mailbox, work) = (self.step_context(), self.mailbox.clone(), Arc::clone(&self.work));
        let task = async move {
            let start = Instant::now();
            // Only waiting is cut short. Work on a blocking thread ends by its own flag, so that the
            // undo, which waits for this task, finds nobody at work.
            let stepping = run_pause_step(&site, &mailbox, &operation, step, &work);
            let done = if step == PauseStep::Quiesce {
                tokio::select! {
                    done = stepping => done,
                    () = site.cancel.cancelled() => Err(cancelled()),
                }
            } else {
                stepping.await
            };
            let (outcome, writes) = match done {
                Ok((report, writes)) => (Ok(report), writes),
                Err(failure) => (Err(failure.into_error(Code::PauseFailed)), Vec::new()),
            };
            let command = Command::PauseStepped { operation, step, took_ms: ms_since(start), outcome };
            drop(
                mailbox
                    .send(Message::CommandReport(Box::new(CommandReport {
                        command,
                        writes,
                        reply: None,
                        tokens: Vec::new(),
                    })))
                    .await,
            );
        };
        self.step = Some(self.services.tracker.spawn(task));
    }

    /// Ends the step that is under way, lets the agents run, discards the checkpoint; again and
    /// again until it has worked.
    fn undo(&mut self, operation: OperationId, number: CheckpointNumber, runs: Vec<RunKey>) {
        self.cancel.cancel();
        let step = self.step.take();
        let (mut site, mailbox, work) = (self.step_context(), self.mailbox.clone(), Arc::clone(&self.work));
        self.services.tracker.spawn(async move {
            if let Some(step) = step {
                // It has reported, or its report is ignored; a panic in it is in the log.
                drop(step.await);
            }
            let mut left = work.lock().await;
            *left = PauseWork { draft: std::mem::take(&mut left.draft), ..PauseWork::default() };
            drop(left);
            // The undo must not be ended by the cancellation that brought it about.
            site.cancel = Default::default();
            retry("undo", &site, Some(&mailbox), |site| {
                let (runs, work) = (runs.clone(), Arc::clone(&work));
                async move {
                    crate::operations::failpoint("undo.thaw")?;
                    freeze::thaw(&site, &runs).await?;
                    // Nobody may write into what is discarded.
                    drop(work.lock().await.draft.take().await);
                    crate::operations::failpoint("undo.discard")?;
                    leftovers::discard(&site, number).await
                }
            })
            .await;
            drop(mailbox.send(Message::CommandReport(Box::new(Command::Undone { operation }.into()))).await);
        });
    }

    /// Lets all agents of a failed pause run, whether or not that can be written down.
    pub(super) async fn thaw_at_once(&self) {
        let runs = self.project.runs(self.project.alive_agents());
        if let Err(failure) = freeze::thaw(&self.step_context(), &runs).await {
            tracing::error!(project = %self.project.name, %failure, "thaw after a failed pause");
        }
    }

    /// Ends frozen processes. Done before the pause is answered: the memory is free then.
    async fn park(&mut self, runs: Vec<RunKey>) {
        let site = self.step_context();
        let each = runs.into_iter().map(|(agent, run)| {
            let link = site.links.get(&agent).filter(|link| link.run == run).cloned();
            let project = site.project.name.clone();
            async move {
                if let Some(link) = link {
                    let ended = async {
                        link.shim.kill().await?;
                        link.shim.closed().await;
                        Ok::<(), crate::shims::link::LinkError>(())
                    };
                    match tokio::time::timeout(PARKING, ended).await {
                        Ok(Ok(()) | Err(crate::shims::link::LinkError::Closed)) => {}
                        Ok(Err(error)) => {
                            tracing::error!(%project, %agent, error = fermata_protocol::error_chain(&error), "cannot be parked");
                            return None;
                        }
                        Err(_) => {
                            tracing::error!(%project, %agent, "its processes did not end in time");
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
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
        let tokens: Vec<String> = respawn.iter().map(|(_, run)| self.tokens.remove(run).unwrap_or_default()).collect();
        self.services.tracker.spawn(async move {
            let start = Instant::now();
            let mut agents = resume::thaw(&site, &thaw).await;
            let thaw_ms = ms_since(start);
            for gone in agents.iter().filter(|agent| agent.method == ResumeMethod::Failed) {
                let Some((agent, run)) = thaw.iter().find(|(agent, _)| *agent == gone.agent) else { continue };
                // Told before the resume is: the watcher of the run, who may be late, is then ignored.
                let end = end_of(&site, agent, run, gone.detail.clone().unwrap_or_default());
                drop(mailbox.send(Message::CommandReport(Box::new(end))).await);
            }
            fermata_failpoint::hit("resume.thawed");
            let again = Instant::now();
            let each = respawn.into_iter().zip(tokens).map(|((agent, run), token)| {
                let (site, mailbox) = (site.clone(), mailbox.clone());
                async move { respawn_one(&site, &mailbox, agent, run, &token, checkpoint).await }
            });
            agents.extend(crate::operations::side_by_side(each.collect::<Vec<_>>()).await);
            agents.sort_by(|a, b| a.agent.cmp(&b.agent));
            let steps_ms = [("thaw".to_owned(), thaw_ms), ("respawn".to_owned(), ms_since(again))].into();
            let command = Command::Resumed { operation, agents, steps_ms, warnings: Vec::new() };
            drop(mailbox.send(Message::CommandReport(Box::new(command.into()))).await);
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
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
        let task = async move {
            let making = match label.import {
                Some(file) => transfer::import(&site, &order, file).await.map(|made| (made, 0.0)),
                None => live_checkpoint(&site, &mailbox, order, &runs).await,
            };
            let outcome = match making {
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
                    discard(&site, number, &mailbox).await;
                    Command::Checkpointed { operation, outcome: Err(error), imported }.into()
                }
            };
            drop(mailbox.send(Message::CommandReport(Box::new(outcome))).await);
        };
        self.step = Some(self.services.tracker.spawn(task));
    }

    fn forget(&mut self, agent: &AgentName) {
        Arc::make_mut(&mut self.links).remove(agent);
        let site = self.step_context();
        // Put aside at once, so that a new agent of the same name finds a place of its own.
        match leftovers::defer_removal(&site.dirs().agent(agent)) {
            Ok(aside) => {
                self.services.tracker.spawn_blocking(move || leftovers::remove_deferred(aside));
            }
            Err(error) => tracing::warn!(%agent, %error, "what a removed agent left stays"),
        }
    }
}

type Stepped = (StepReport, Vec<Write>);

async fn run_pause_step(
    site: &StepContext,
    mailbox: &mpsc::Sender<Message>,
    operation: &OperationId,
    step: PauseStep,
    work: &tokio::sync::Mutex<PauseWork>,
) -> Result<Stepped, Failure> {
    let done = Ok((StepReport::Done, Vec::new()));
    let ProjectState::Pausing(run) = &*site.project.state else { return done };
    let mut work = work.lock().await;
    let runs = site.project.runs(site.project.running_agents());
    match step {
        PauseStep::Validate => {
            drop(work.draft.take().await);
            *work = PauseWork::default();
            make_room(site, mailbox).await?;
            // Beside the look at the workspace and the wait for the agents.
            let draft = site.services.tracker.spawn(database::stage(site.clone(), run.checkpoint));
            work.draft = DatabaseStaging::Writing(draft);
            warm_up::run(site, Some(operation)).await?;
        }
        PauseStep::Quiesce => {
            let request = quiesce::QuiesceRequest {
                grace_ms: run.grace_ms,
                reason: run.reason.clone(),
                operation: operation.to_string(),
            };
            work.warnings = quiesce::run(site, &runs, &request).await?;
            // Nobody is frozen for a draft.
            work.draft.settle().await;
        }
        PauseStep::Freeze => {
            work.scouted = Some(transcripts::find(site).await?);
            work.frozen = Some(freeze::run(site, &runs).await?);
            work.renewer = Some(Renewer::start(site, runs));
        }
        PauseStep::PlanFlashSave => {
            crate::operations::failpoint("pause.plan_flash_save")?;
            work.plans = flash_save::plan(site, None, crate::services::now()).await?;
        }
        PauseStep::Checkpoint => {
            let order = CheckpointOrder {
                operation: operation.clone(),
                number: run.checkpoint,
                name: checkpoint::default_name(Trigger::Pause, run.checkpoint),
                description: String::new(),
                trigger: Trigger::Pause,
                reason: run.reason.clone(),
                frozen: true,
                runs: runs.clone(),
            };
            let made = pause_checkpoint(site, &order, &mut work, &runs).await;
            return made.map_err(|failure| match &work.renewer {
                Some(renewer) => renewer.cause(failure),
                None => failure,
            });
        }
    }
    done
}

async fn pause_checkpoint(
    site: &StepContext,
    order: &CheckpointOrder,
    work: &mut PauseWork,
    runs: &[RunKey],
) -> Result<Stepped, Failure> {
    let now = crate::services::now();
    let plans = std::mem::take(&mut work.plans);
    let draft = work.draft.take().await;
    let (rows, scouted) = (RowsTiming::UnderFreeze(draft.map(Box::new)), work.scouted.take());
    let captured = checkpoint::capture(site, order, &plans, now, rows, scouted).await?;
    let made = checkpoint::seal(site, order, captured, now).await?;
    // The proof that nobody ran meanwhile: an expired lease cannot be renewed.
    work.proven_until = freeze::renew(site, runs).await?;
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

/// A checkpoint beside running agents: they stand still while workspace and database are read,
/// where that can be done without waking their system calls.
async fn live_checkpoint(
    site: &StepContext,
    mailbox: &mpsc::Sender<Message>,
    mut order: CheckpointOrder,
    runs: &[RunKey],
) -> Result<(checkpoint::SealedCheckpoint, f64), Failure> {
    let settings = site.services.settings();
    make_room(site, mailbox).await?;
    let partial = site.dirs().partial_checkpoint(order.number);
    // What can be done before anybody stands still.
    let (primed, prepared) = tokio::join!(warm_up::run(site, Some(&order.operation)), database::open(site, &partial));
    let prepared = primed.and(prepared)?;
    let by_signals = |(agent, _): &RunKey| {
        let processes = site.project.agents.get(agent).and_then(|a| a.run()?.processes.as_ref());
        processes.is_some_and(|p| p.mechanism == fermata_protocol::pause::FreezerKind::Signals)
    };
    let blip = settings.pause.blip_with_signals || !runs.iter().any(by_signals);
    let now = crate::services::now();
    order.frozen = blip && !runs.is_empty();
    let mut frozen_ms = 0.0;
    let captured = if order.frozen {
        let scouted = transcripts::find(site).await?;
        let frozen = freeze::run(site, runs).await;
        let renewer = Renewer::start(site, runs.to_vec());
        let captured = match &frozen {
            Ok(_) => {
                let captured = capture_frozen(site, &order, runs, now, prepared, scouted).await;
                captured.map_err(|failure| renewer.cause(failure))
            }
            Err(failure) => Err(failure.clone()),
        };
        drop(renewer);
        retry("thaw after a checkpoint", site, None, |site| {
            let runs = runs.to_vec();
            async move { freeze::thaw(&site, &runs).await }
        })
        .await;
        frozen_ms = frozen.map_or(0.0, |f| ms_since(f.since));
        captured?
    } else {
        checkpoint::capture(site, &order, &Vec::new(), now, RowsTiming::AfterThaw(Some(prepared)), None).await?
    };
    order.frozen = false;
    let mut made = checkpoint::seal(site, &order, captured, now).await?;
    if !blip && !runs.is_empty() {
        made.warnings.push("the agents ran on while the workspace was read: only signals could stop them".into());
    }
    Ok((made, frozen_ms))
}

/// Captures and proves that nobody ran meanwhile: an expired lease cannot be renewed.
async fn capture_frozen(
    site: &StepContext,
    order: &CheckpointOrder,
    runs: &[RunKey],
    now: fermata_protocol::UnixMillis,
    prepared: Prepared,
    scouted: FoundSessions,
) -> Result<checkpoint::CapturedCheckpoint, Failure> {
    let rows = RowsTiming::AfterThaw(Some(prepared));
    let captured = checkpoint::capture(site, order, &Vec::new(), now, rows, Some(scouted)).await?;
    match freeze::renew(site, runs).await {
        Ok(_) => Ok(captured),
        Err(failure) => {
            captured.discard().await;
            Err(failure)
        }
    }
}

async fn respawn_one(
    site: &StepContext,
    mailbox: &mpsc::Sender<Message>,
    agent: AgentName,
    run: RunId,
    token: &str,
    checkpoint: CheckpointNumber,
) -> AgentResumed {
    let argv = site.project.agents.get(&agent).and_then(|a| a.run()).map(|run| run.argv.clone());
    let outcome =
        launch::run(site, &agent, &run, token, Some(Continuation { checkpoint: Some(checkpoint) })).await.map(Box::new);
    let failed = outcome.as_ref().err().cloned();
    drop(mailbox.send(Message::Started { agent: agent.clone(), run, outcome }).await);
    let method = if failed.is_some() { ResumeMethod::Failed } else { ResumeMethod::Respawned };
    AgentResumed { agent, method, argv, detail: failed }
}

fn cancelled() -> Failure {
    fermata_protocol::Refusal::new(Code::OperationCancelled, "the operation was cancelled").into()
}
