//! The actor of a project. It takes one message at a time: decides, persists, applies, publishes, and starts the
//! effects.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::{Command, Decision};
use fermata_core::effect::Effect;
use fermata_core::project::{Direction, ProjectState};
use fermata_core::redact::Secrets;
use fermata_core::{Project, apply, decide, transition};
use fermata_protocol::event::Event;
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId, UnixMillis};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::conclude::{Conclusion, conclusions};
use super::handle::ProjectHandle;
use super::ids::NewToken;
use super::instants;
use super::links::RunWatcher;
use super::message::{ActorMessage, Begin, CommandReport, Label, ReplySender, Tell, View, reply};
use super::pause_work::SharedPauseWork;
use super::retry::{ReportRetry, discard};
use super::scan::AutomaticScans;
use crate::errors::Failure;
use crate::operations::checkpoint::warm_up;
use crate::operations::run::readiness;
use crate::operations::{AgentLink, Cancel, HistoryCell, StepContext};
use crate::services::{self, Services};
use crate::shims::link::ShimLink;
use crate::shims::reconnect::Linked;
use crate::store::commit::{Commit, MakeReply, Write, Written};
use crate::store::idempotency::Keyed;
use crate::store::{Durability, StoreError};
use fermata_shim::wire::ShimEvent;

/// Capacity of the mailbox; a sender waits while it is full.
const MAILBOX: usize = 256;

/// How many operations are queued behind a checkpoint that is being made; further ones are refused.
const DEFERRED: usize = 16;

/// Delay before a report that could not be persisted is sent again.
const RETRY: Duration = Duration::from_millis(500);

/// A run that was alive when the daemon started.
pub struct Adopted {
    pub agent: AgentName,
    pub run: RunId,
    /// The link to its shim; none where the shim could not be connected to.
    pub link: Option<Linked>,
}

/// Owns the state of one project.
pub struct Actor {
    pub(super) services: Arc<Services>,
    pub(super) project: Arc<Project>,
    pub(super) history: HistoryCell,
    pub(super) links: Arc<BTreeMap<AgentName, AgentLink>>,
    pub(super) tokens: BTreeMap<RunId, String>,
    pub(super) mailbox: mpsc::Sender<ActorMessage>,
    /// The task of the current step.
    pub(super) step: Option<JoinHandle<()>>,
    /// Cancels the current operation.
    pub(super) cancel: Cancel,
    pub(super) work: SharedPauseWork,
    pub(super) label: Label,
    /// The task that removes the files of removed checkpoints.
    pub(super) discarding: Option<JoinHandle<()>>,
    pub(super) waiters: BTreeMap<OperationId, Vec<ReplySender>>,
    /// How many reports in a row could not be persisted.
    pub(super) unwritten: u32,
    /// The agents whose start is being prepared.
    pub(super) preparing: BTreeSet<AgentName>,
    pub(super) scans: AutomaticScans,
    inbox: mpsc::Receiver<ActorMessage>,
    published: watch::Sender<Arc<Project>>,
    deferred: VecDeque<(Box<Begin>, ReplySender)>,
    leaving: Option<oneshot::Sender<()>>,
}

/// Writes, idempotency key and reply that belong to a command.
#[derive(Default)]
struct Extras {
    writes: Vec<Write>,
    keyed: Option<(Keyed, Option<OperationId>)>,
    view: Option<View>,
    reply: Option<Value>,
}

impl Actor {
    /// Creates the actor of a project and a handle to it. Messages are processed once [`Actor::run`] is polled.
    pub fn new(services: Arc<Services>, project: Project) -> (Self, ProjectHandle) {
        let (mailbox, inbox) = mpsc::channel(MAILBOX);
        let project = Arc::new(project);
        let (published, state) = watch::channel(Arc::clone(&project));
        let history = HistoryCell::default();
        let handle = ProjectHandle {
            mailbox: mailbox.clone(),
            state,
            history: history.clone(),
            services: Arc::clone(&services),
        };
        let actor = Self {
            services,
            project,
            history,
            links: Arc::default(),
            tokens: BTreeMap::new(),
            mailbox,
            step: None,
            cancel: Cancel::default(),
            work: SharedPauseWork::default(),
            label: Label::default(),
            discarding: None,
            waiters: BTreeMap::new(),
            unwritten: 0,
            preparing: BTreeSet::new(),
            scans: AutomaticScans::default(),
            inbox,
            published,
            deferred: VecDeque::new(),
            leaving: None,
        };
        (actor, handle)
    }

    /// Takes over runs that were alive when the daemon started.
    pub fn adopt(&mut self, runs: Vec<Adopted>) {
        for Adopted { agent, run, link } in runs {
            match link {
                Some((link, events)) => self.watch(agent, run, Arc::new(link), events),
                None => self.find_end(agent, run),
            }
        }
    }

    /// Carries out the command of the recovery before any other.
    ///
    /// # Errors
    /// When it cannot be persisted now; the actor tries it again once it runs.
    pub async fn recover(&mut self, command: Command, tokens: Vec<NewToken>) -> Result<(), Failure> {
        self.keep_tokens(tokens.clone());
        let Err(failure) = self.carry(command.clone(), Extras::default()).await else { return Ok(()) };
        let report = CommandReport { tokens, ..command.into() };
        // The mailbox is empty, since the handle has not been given out yet.
        drop(self.mailbox.try_send(ActorMessage::CommandReport(Box::new(report))));
        Err(failure)
    }

    /// Returns the context of a step that starts now.
    pub(super) fn step_context(&self) -> StepContext {
        StepContext {
            services: Arc::clone(&self.services),
            project: Arc::clone(&self.project),
            history: self.history.clone(),
            links: Arc::clone(&self.links),
            cancel: self.cancel.clone(),
        }
    }

    /// Returns a handle to this actor.
    pub(super) fn handle(&self) -> ProjectHandle {
        ProjectHandle {
            mailbox: self.mailbox.clone(),
            state: self.published.subscribe(),
            history: self.history.clone(),
            services: Arc::clone(&self.services),
        }
    }

    /// Records the link to the shim of a run and forwards the shim's events to the mailbox.
    pub(super) fn watch(
        &mut self,
        agent: AgentName,
        run: RunId,
        link: Arc<ShimLink>,
        events: mpsc::Receiver<ShimEvent>,
    ) {
        let watcher = self.watcher(&agent, &run);
        self.watch_readiness(&agent, &run);
        Arc::make_mut(&mut self.links).insert(agent, AgentLink { run, shim: Arc::clone(&link) });
        self.services.tracker.spawn(watcher.watch(link, events));
    }

    /// Waits beside the actor for the readiness condition of the agent's specification, where it has one.
    fn watch_readiness(&self, agent: &AgentName, run: &RunId) {
        let is_awaited = self.project.agents.get(agent).is_some_and(|agent| {
            let is_ready = agent.run().is_some_and(|run| run.ready_at.is_some());
            !is_ready && agent.spec.supervision.ready.is_some()
        });
        if !is_awaited {
            return;
        }
        let (step, state, mailbox) = (self.step_context(), self.published.subscribe(), self.mailbox.clone());
        let (agent, run) = (agent.clone(), run.clone());
        self.services.tracker.spawn(async move {
            if readiness::wait(&step, state, &agent, &run).await {
                let command = Command::Ready { agent, run: Some(run) };
                drop(mailbox.send(ActorMessage::CommandReport(Box::new(command.into()))).await);
            }
        });
    }

    /// Determines beside the actor whether a run whose shim could not be connected to has ended.
    fn find_end(&self, agent: AgentName, run: RunId) {
        self.watch_readiness(&agent, &run);
        self.services.tracker.spawn(self.watcher(&agent, &run).find_end());
    }

    fn watcher(&self, agent: &AgentName, run: &RunId) -> RunWatcher {
        RunWatcher {
            agent: agent.clone(),
            run: run.clone(),
            run_dir: self.services.project_dirs(&self.project.name).run(agent, run),
            boot_id: self.services.boot_id.clone(),
            patience: self.services.shim_patience(),
            mailbox: self.mailbox.clone(),
            stopping: self.services.stopping.clone(),
            tasks: self.services.tracker.clone(),
        }
    }

    /// Processes messages until the project is removed or the daemon shuts down.
    pub async fn run(mut self) {
        match self.project.state.status() {
            ProjectStatus::Stopped | ProjectStatus::Completed => {}
            ProjectStatus::Init
            | ProjectStatus::Planning
            | ProjectStatus::Active
            | ProjectStatus::Pausing
            | ProjectStatus::Paused
            | ProjectStatus::Resuming
            | ProjectStatus::Restoring
            | ProjectStatus::Failed => warm_up::in_background(self.step_context()),
        }
        let mut alarm = self.follow_up().await;
        loop {
            let woken = tokio::select! {
                message = self.inbox.recv() => Some(message),
                () = sleep_until(alarm) => None,
            };
            let go_on = match woken {
                Some(Some(message)) => self.take(message).await,
                Some(None) => false,
                // The alarm.
                None => true,
            };
            if !go_on {
                break;
            }
            if self.project.checkpointing.is_none() {
                self.scans.end_turn();
            }
            while self.project.checkpointing.is_none()
                && let Some((begin, answer)) = self.deferred.pop_front()
            {
                self.begin(begin, answer).await;
            }
            alarm = self.follow_up().await;
            if self.leaving.is_some() && self.project.operation().is_none() {
                break;
            }
        }
        if let Some(done) = self.leaving.take()
            && done.send(()).is_err()
        {
            tracing::debug!("the caller of the shutdown no longer waits for the actor");
        }
    }

    async fn take(&mut self, message: ActorMessage) -> bool {
        match message {
            ActorMessage::Tell(tell, answer) => {
                let carried = self.carry_tell(*tell).await;
                let removed = matches!(&carried, Ok(Carried { removed: true, .. }));
                reply(answer, carried.map(|carried| carried.reply.unwrap_or(Value::Null)));
                return !removed;
            }
            ActorMessage::Begin(begin, answer) => self.begin(begin, answer).await,
            ActorMessage::Await(operation, answer) => {
                if self.project.operation() == Some(&operation) {
                    self.waiters.entry(operation).or_default().push(answer);
                } else {
                    let refusal =
                        Refusal::new(Code::OperationNotFound, format!("operation {operation} is not under way"));
                    reply(answer, Err(refusal.into()));
                }
            }
            ActorMessage::Retain(retain, answer) => self.retain(*retain, answer).await,
            ActorMessage::CommandReport(report) => self.take_report(*report).await,
            ActorMessage::Started { agent, run, outcome } => {
                let outcome = match outcome {
                    Ok(started) => {
                        match started.link {
                            Some((link, events)) => self.watch(agent.clone(), run.clone(), Arc::new(link), events),
                            None => self.find_end(agent.clone(), run.clone()),
                        }
                        Ok(started.processes)
                    }
                    Err(reason) => Err(reason),
                };
                self.take_report(Command::Launched { agent, run, outcome }.into()).await;
            }
            ActorMessage::Linked { agent, run, link } => {
                let current = self.project.agents.get(&agent).and_then(|agent| agent.current_run_id());
                if current == Some(&run) {
                    Arc::make_mut(&mut self.links).insert(agent.clone(), AgentLink { run: run.clone(), shim: link });
                    self.refreeze(agent, run).await;
                }
            }
            ActorMessage::Prepared { agent, prepared } => self.prepared(agent, *prepared).await,
            ActorMessage::Scanned(scan) => self.scanned(*scan).await,
            ActorMessage::Blocked(failure) => self.answer_blocked_waiters(&failure),
            ActorMessage::Thawed { agent, run } => self.refreeze(agent, run).await,
            ActorMessage::Shutdown(done) => self.leave(done).await,
        }
        true
    }

    /// Freezes an agent of a paused project again after its lease has expired or its link was replaced.
    async fn refreeze(&mut self, agent: AgentName, run: RunId) {
        let must_be_frozen = matches!(&*self.project.state, ProjectState::Paused(_))
            && self
                .project
                .agents
                .get(&agent)
                .is_some_and(|agent| agent.current_run_id() == Some(&run) && agent.is_frozen());
        if must_be_frozen {
            self.commit_freeze(vec![(agent, run)]).await;
        }
    }

    /// Begins the shutdown. A pause is undone, since its leases cannot be renewed without a daemon; other operations
    /// are short and end by themselves, or are rolled forward by the next daemon.
    async fn leave(&mut self, done: oneshot::Sender<()>) {
        self.leaving = Some(done);
        self.scans.give_way();
        let ProjectState::Pausing(pause) = &*self.project.state else { return };
        if pause.direction != Direction::Forward {
            return;
        }
        let operation = pause.operation.clone();
        if let Err(failure) = self.carry(Command::Cancel { operation }, Extras::default()).await {
            tracing::error!(project = %self.project.name, %failure, "failed to cancel the pause at shutdown");
        }
    }

    async fn begin(&mut self, begin: Box<Begin>, answer: ReplySender) {
        if self.leaving.is_some() {
            let refusal = Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned());
            return reply(answer, Err(refusal.into()));
        }
        // A checkpoint is short: an operation that is requested meanwhile is queued, not refused.
        if self.project.checkpointing.is_some() && self.deferred.len() < DEFERRED {
            self.deferred.push_back((begin, answer));
            return;
        }
        let Begin { command, operation, label, tokens, keyed } = *begin;
        self.scans.give_way();
        self.keep_tokens(tokens);
        let (cancel, old_label) = (Cancel::default(), std::mem::replace(&mut self.label, label));
        let old_cancel = std::mem::replace(&mut self.cancel, cancel);
        // Registered before `carry`: a short operation may end while its effects are being started.
        self.waiters.entry(operation.clone()).or_default().push(answer);
        let extras = Extras { keyed: keyed.map(|k| (k, Some(operation.clone()))), ..Extras::default() };
        if let Err(failure) = self.carry(command, extras).await {
            (self.label, self.cancel) = (old_label, old_cancel);
            for answer in self.waiters.remove(&operation).unwrap_or_default() {
                reply(answer, Err(failure.clone()));
            }
        }
    }

    /// Returns whether the actor is shutting down.
    pub(super) fn leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Carries out a command that ends with its transaction.
    pub(super) async fn carry_tell(&mut self, tell: Tell) -> Result<Carried, Failure> {
        let Tell { command, writes, tokens, keyed, view } = tell;
        self.keep_tokens(tokens);
        let extras = Extras { writes, keyed: keyed.map(|k| (k, None)), view: Some(view), reply: None };
        self.carry(command, extras).await
    }

    /// Carries out a command of the actor itself, which has no caller.
    pub(super) async fn carry_due(&mut self, command: Command) -> Result<(), Failure> {
        self.carry(command, Extras::default()).await.map(drop)
    }

    /// Carries out a report. It states a fact and cannot be refused: a report that cannot be persisted is tried again.
    pub(super) async fn take_report(&mut self, report: CommandReport) {
        let again = report.clone();
        let CommandReport { command, writes, reply, tokens } = report;
        self.keep_tokens(tokens);
        let extras = Extras { writes, reply, ..Extras::default() };
        let Err(failure) = self.carry(command, extras).await else {
            self.unwritten = 0;
            return;
        };
        self.note_blocked(&failure);
        tracing::error!(project = %self.project.name, %failure, "a report could not be persisted; trying again");
        let ReportRetry { report, orphan } = ReportRetry::of(again, failure);
        if let Command::PauseStepped { outcome: Err(_), .. } = &report.command {
            // The agents do not stay frozen until the database can be written to.
            self.thaw_at_once().await;
        }
        let (step, mailbox) = (self.step_context(), self.mailbox.clone());
        self.services.tracker.spawn(async move {
            if let Some(number) = orphan {
                discard(&step, number, &mailbox).await;
            }
            tokio::time::sleep(RETRY).await;
            drop(mailbox.send(ActorMessage::CommandReport(Box::new(report))).await);
        });
    }

    /// Keeps the tokens of runs that may be launched next, and drops those of runs that were never started.
    fn keep_tokens(&mut self, tokens: Vec<NewToken>) {
        let project = Arc::clone(&self.project);
        let current = |run: &RunId| project.agents.values().any(|agent| agent.current_run_id() == Some(run));
        self.tokens.retain(|run, _| current(run));
        self.tokens.extend(tokens.into_iter().map(|new| (new.run, new.token)));
    }

    /// Decides on a command, persists the events, applies and publishes them, starts the effects. No state is changed
    /// in any other way.
    async fn carry(&mut self, command: Command, extras: Extras) -> Result<Carried, Failure> {
        let now = services::now();
        let Decision { events, effects } = decide(&self.project, command, now)?;
        if events.is_empty() {
            // A report that no longer applies, for instance of an earlier run: its writes are dropped.
            let reply = extras.view.map(|view| view(&self.project, &Written::default()));
            self.start_all(effects).await;
            return Ok(Carried { reply, removed: false });
        }
        let next = Arc::new(self.applied(&events, now)?);
        let removed = events.iter().any(|event| matches!(event, Event::ProjectRemoved {}));
        let result = extras.reply.clone();
        instants::before(&events)?;
        let commit = self.commit_of(&events, &next, extras, now);
        let written = self.services.store.commit(commit).await.map_err(|error| {
            if matches!(error, StoreError::TooLate) {
                let message = "the lease of the freeze expired before the pause was committed: the agents may have run";
                Refusal::new(Code::PauseFailed, message).hint("try again").into()
            } else {
                Failure::fault("save the change", &error)
            }
        })?;
        instants::after(&events);
        self.project = Arc::clone(&next);
        self.published.send_replace(next);
        self.notify_plugins(&events, now.0);
        let conclusions = conclusions(&events, result.as_ref());
        self.start_all(effects).await;
        self.answer_waiters(&conclusions);
        if !conclusions.is_empty() {
            // Lets the callers' replies be sent before the maintenance begins.
            tokio::task::yield_now().await;
        }
        self.maintain_checkpoints(&events);
        self.answer_blocked_restores(&events);
        Ok(Carried { reply: written.reply, removed })
    }

    /// Returns the project after some events.
    ///
    /// # Errors
    /// When an event would change the status in a way that the table of transitions does not have.
    fn applied(&self, events: &[Event], now: UnixMillis) -> Result<Project, Failure> {
        let mut next = Project::clone(&self.project);
        for event in events {
            let before = next.state.status();
            apply(&mut next, event, now);
            let after = next.state.status();
            if !transition::is_allowed(before, after) {
                let message = format!("{} would lead from {before} to {after}", event.kind());
                return Err(Refusal::new(Code::InternalError, message).into());
            }
        }
        Ok(next)
    }

    /// Returns the transaction of some events, which lead to the state `next`.
    fn commit_of(&self, events: &[Event], next: &Arc<Project>, extras: Extras, now: UnixMillis) -> Commit {
        let Extras { writes, keyed, view, reply } = extras;
        let has = |wanted: fn(&Event) -> bool| events.iter().any(wanted);
        let only_before = match has(|event| matches!(event, Event::ProjectPaused { .. })) {
            true => self.work.lock().proven_until,
            false => None,
        };
        let state_for_reply = Arc::clone(next);
        Commit {
            project: next.name.clone(),
            before: Some(Arc::clone(&self.project)),
            after: (!has(|event| matches!(event, Event::ProjectRemoved {}))).then(|| Arc::clone(next)),
            durability: durability(events),
            events: events.to_vec(),
            writes,
            keyed,
            reply: view.map(|view| -> MakeReply { Box::new(move |written| view(&state_for_reply, written)) }),
            result: reply,
            only_before,
            now,
        }
    }

    async fn start_all(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            // Boxed: an effect that reports at once calls `carry` again.
            Box::pin(self.start(effect)).await;
        }
    }

    /// Carries out the report of an effect that ends while it is being started.
    pub(super) async fn report(&mut self, command: Command) {
        Box::pin(self.take_report(command.into())).await;
    }

    fn answer_waiters(&mut self, conclusions: &[Conclusion]) {
        if !conclusions.is_empty() {
            self.services.settled.notify_one();
        }
        for conclusion in conclusions {
            for answer in self.waiters.remove(&conclusion.operation).unwrap_or_default() {
                reply(answer, conclusion.answer());
            }
        }
    }

    fn notify_plugins(&self, events: &[Event], at: i64) {
        for event in events {
            let mut value = json!(event);
            Secrets::default().redact_json(&mut value);
            if let Value::Object(members) = &mut value {
                members.insert("project".into(), json!(self.project.name));
                members.insert("at".into(), json!(at));
            }
            self.services.plugins.notify(&Arc::new(value));
        }
    }
}

/// Sleeps until the alarm, or for ever without one.
async fn sleep_until(alarm: Option<tokio::time::Instant>) {
    match alarm {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The result of a command that was carried out.
pub(super) struct Carried {
    reply: Option<Value>,
    /// Whether it removed the project.
    removed: bool,
}

/// Returns how durable the events must be: announcements of steps and progress mean nothing after a power failure, all
/// others must survive it.
fn durability(events: &[Event]) -> Durability {
    let cheap = events.iter().all(|event| {
        matches!(
            event,
            Event::PauseStarted { .. }
                | Event::OperationStepped { .. }
                | Event::OperationUndoing { .. }
                | Event::CheckpointStarted { .. }
                | Event::AgentProgressed { .. }
                | Event::AgentAdopted { .. }
                | Event::AgentUnreachable { .. }
                | Event::RestoreRetried { .. }
                | Event::RestoreChecked { .. }
        )
    });
    if cheap { Durability::Process } else { Durability::Power }
}
