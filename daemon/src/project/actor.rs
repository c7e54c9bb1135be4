//! The actor: takes messages one by one; decides, persists, applies, tells, and starts what follows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use fermata_core::command::Command;
use fermata_core::effect::Effect;
use fermata_core::project::{Direction, ProjectState};
use fermata_core::redact::Secrets;
use fermata_core::{Project, apply, decide, transition};
use fermata_protocol::event::Event;
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{AgentName, Code, OperationId, Refusal, RunId};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::conclude::{Conclusion, conclusions};
use super::effects::PauseWork;
use super::handle::ProjectHandle;
use super::ids::NewToken;
use super::instants;
use super::links::Watcher;
use super::message::{Answer, Begin, CommandReport, Label, Message, Tell, View, reply};
use super::retry::discard;
use super::scan::AutomaticScans;
use crate::errors::Failure;
use crate::operations::checkpoint::warm_up;
use crate::operations::run::readiness;
use crate::operations::{AgentLink, Cancel, HistoryCell, StepContext};
use crate::services::{self, Services};
use crate::shims::link::ShimLink;
use crate::shims::reconnect::Linked;
use crate::store::commit::{Commit, Write, Written};
use crate::store::idempotency::Keyed;
use crate::store::{Durability, StoreError};
use fermata_shim::wire::ShimEvent;

/// How many messages may wait; further senders wait for a place.
const MAILBOX: usize = 256;

/// How many operations may wait for a checkpoint that is being made.
const DEFERRED: usize = 16;

/// How long a report that could not be persisted waits before it is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// A run that a new daemon has found alive.
pub struct Adopted {
    /// The agent.
    pub agent: AgentName,
    /// The run.
    pub run: RunId,
    /// The link to its shim, where it can be spoken to.
    pub link: Option<Linked>,
}

/// The owner of one project's state.
pub struct Actor {
    pub(super) services: Arc<Services>,
    pub(super) project: Arc<Project>,
    pub(super) history: HistoryCell,
    pub(super) links: Arc<BTreeMap<AgentName, AgentLink>>,
    pub(super) tokens: BTreeMap<RunId, String>,
    pub(super) mailbox: mpsc::Sender<Message>,
    /// The step that is under way, and how to end it early.
    pub(super) step: Option<JoinHandle<()>>,
    pub(super) cancel: Cancel,
    pub(super) work: Arc<tokio::sync::Mutex<PauseWork>>,
    pub(super) label: Label,
    /// What is left of removed checkpoints is being removed.
    pub(super) discarding: Option<JoinHandle<()>>,
    pub(super) waiters: BTreeMap<OperationId, Vec<Answer>>,
    /// How many reports in a row could not be persisted.
    pub(super) unwritten: u32,
    /// The agents whose start is being prepared.
    pub(super) preparing: BTreeSet<AgentName>,
    /// The looks for what automatic checkpoints would save.
    pub(super) scans: AutomaticScans,
    inbox: mpsc::Receiver<Message>,
    published: watch::Sender<Arc<Project>>,
    deferred: VecDeque<(Box<Begin>, Answer)>,
    leaving: Option<oneshot::Sender<()>>,
}

/// What carrying a command out takes besides the command.
#[derive(Default)]
struct Extras {
    writes: Vec<Write>,
    keyed: Option<(Keyed, Option<OperationId>)>,
    view: Option<View>,
    reply: Option<Value>,
}

impl Actor {
    /// Makes the actor of a project and the handle to it; [`Actor::run`] brings it to life.
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
            work: Arc::default(),
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

    /// Takes over runs that a new daemon has found alive.
    pub fn adopt(&mut self, runs: Vec<Adopted>) {
        for Adopted { agent, run, link } in runs {
            match link {
                Some((link, events)) => self.watch(agent, run, Arc::new(link), events),
                None => self.look_for_end(agent, run),
            }
        }
    }

    /// Carries out what recovery decides, before any command is taken.
    ///
    /// # Errors
    /// When it cannot be persisted now; it is tried again once the actor lives.
    pub async fn recover(&mut self, command: Command, tokens: Vec<NewToken>) -> Result<(), Failure> {
        self.keep_tokens(tokens.clone());
        let Err(failure) = self.carry(command.clone(), Extras::default()).await else { return Ok(()) };
        let outcome = CommandReport { tokens, ..command.into() };
        // The mailbox is empty: nobody has the handle yet.
        drop(self.mailbox.try_send(Message::CommandReport(Box::new(outcome))));
        Err(failure)
    }

    /// Returns what a step needs to know now.
    pub(super) fn step_context(&self) -> StepContext {
        StepContext {
            services: Arc::clone(&self.services),
            project: Arc::clone(&self.project),
            history: self.history.clone(),
            links: Arc::clone(&self.links),
            cancel: self.cancel.clone(),
        }
    }

    /// Returns how others reach this actor.
    pub(super) fn handle(&self) -> ProjectHandle {
        ProjectHandle {
            mailbox: self.mailbox.clone(),
            state: self.published.subscribe(),
            history: self.history.clone(),
            services: Arc::clone(&self.services),
        }
    }

    /// Watches the shim of a run.
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

    /// Finds out when a run is ready, where it does not say so itself.
    fn watch_readiness(&self, agent: &AgentName, run: &RunId) {
        let asks = self.project.agents.get(agent).is_some_and(|found| {
            let known = found.run().is_some_and(|run| run.ready_at.is_some());
            !known && found.spec.supervision.ready.is_some()
        });
        if !asks {
            return;
        }
        let (site, state, mailbox) = (self.step_context(), self.published.subscribe(), self.mailbox.clone());
        let (agent, run) = (agent.clone(), run.clone());
        self.services.tracker.spawn(async move {
            if readiness::wait(&site, state, &agent, &run).await {
                let command = Command::Ready { agent, run: Some(run) };
                drop(mailbox.send(Message::CommandReport(Box::new(command.into()))).await);
            }
        });
    }

    /// Finds out what has become of a run whose shim could not be connected to.
    fn look_for_end(&self, agent: AgentName, run: RunId) {
        self.watch_readiness(&agent, &run);
        self.services.tracker.spawn(self.watcher(&agent, &run).find_end());
    }

    fn watcher(&self, agent: &AgentName, run: &RunId) -> Watcher {
        Watcher {
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

    /// Takes messages until the project is removed or the daemon ends.
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
        if let Some(left) = self.leaving.take() {
            // The one who asked may have given up waiting.
            if left.send(()).is_err() {
                tracing::debug!("nobody waits for the end of an actor");
            }
        }
    }

    async fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Tell(tell, answer) => {
                let done = self.carry_told(*tell).await;
                let removed = matches!(&done, Ok(Carried { removed: true, .. }));
                reply(answer, done.map(|carried| carried.reply.unwrap_or(Value::Null)));
                return !removed;
            }
            Message::Begin(begin, answer) => self.begin(begin, answer).await,
            Message::Await(operation, answer) => {
                if self.project.operation() == Some(&operation) {
                    self.waiters.entry(operation).or_default().push(answer);
                } else {
                    let refusal =
                        Refusal::new(Code::OperationNotFound, format!("operation {operation} is not under way"));
                    reply(answer, Err(refusal.into()));
                }
            }
            Message::Retain(retain, answer) => self.retain(*retain, answer).await,
            Message::CommandReport(outcome) => self.outcome(*outcome).await,
            Message::Started { agent, run, outcome } => {
                let outcome = match outcome {
                    Ok(started) => {
                        match started.link {
                            Some((link, events)) => self.watch(agent.clone(), run.clone(), Arc::new(link), events),
                            None => self.look_for_end(agent.clone(), run.clone()),
                        }
                        Ok(started.processes)
                    }
                    Err(reason) => Err(reason),
                };
                self.outcome(Command::Launched { agent, run, outcome }.into()).await;
            }
            Message::Linked { agent, run, link } => {
                let current = self.project.agents.get(&agent).and_then(|agent| agent.current_run_id());
                if current == Some(&run) {
                    Arc::make_mut(&mut self.links).insert(agent.clone(), AgentLink { run: run.clone(), shim: link });
                    self.refreeze(agent, run).await;
                }
            }
            Message::Prepared { agent, prepared } => self.prepared(agent, *prepared).await,
            Message::Scanned(found) => self.scanned(*found).await,
            Message::Blocked(failure) => self.tell_waiters(&failure),
            Message::Thawed { agent, run } => self.refreeze(agent, run).await,
            Message::Shutdown(done) => self.leave(done).await,
        }
        true
    }

    /// Paused stays paused: what was committed as held is held, whatever has happened to its lease.
    async fn refreeze(&mut self, agent: AgentName, run: RunId) {
        let held = matches!(&*self.project.state, ProjectState::Paused(_))
            && self
                .project
                .agents
                .get(&agent)
                .is_some_and(|found| found.current_run_id() == Some(&run) && found.is_frozen());
        if held {
            self.commit_freeze(vec![(agent, run)]).await;
        }
    }

    /// Begins to end: a pause is undone, so that no agent stays frozen for a daemon that is gone;
    /// other operations are short and come to their own end, or are rolled forward by the next daemon.
    async fn leave(&mut self, done: oneshot::Sender<()>) {
        self.leaving = Some(done);
        self.scans.give_way();
        let operation = match &*self.project.state {
            ProjectState::Pausing(run) if run.direction == Direction::Forward => run.operation.clone(),
            _ => return,
        };
        if let Err(failure) = self.carry(Command::Cancel { operation }, Extras::default()).await {
            tracing::error!(project = %self.project.name, %failure, "cancel a pause at the end");
        }
    }

    async fn begin(&mut self, begin: Box<Begin>, answer: Answer) {
        if self.leaving.is_some() {
            let refusal = Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned());
            return reply(answer, Err(refusal.into()));
        }
        // A checkpoint takes a moment; whoever pauses meanwhile wants the pause, not an excuse.
        if self.project.checkpointing.is_some() && self.deferred.len() < DEFERRED {
            self.deferred.push_back((begin, answer));
            return;
        }
        let Begin { command, operation, label, tokens, keyed } = *begin;
        self.scans.give_way();
        self.keep_tokens(tokens);
        let (cancel, old_label) = (Cancel::default(), std::mem::replace(&mut self.label, label));
        let old_cancel = std::mem::replace(&mut self.cancel, cancel);
        // Registered first: a short operation may end while its effects are being started.
        self.waiters.entry(operation.clone()).or_default().push(answer);
        let extras = Extras { keyed: keyed.map(|k| (k, Some(operation.clone()))), ..Extras::default() };
        if let Err(failure) = self.carry(command, extras).await {
            (self.label, self.cancel) = (old_label, old_cancel);
            for answer in self.waiters.remove(&operation).unwrap_or_default() {
                reply(answer, Err(failure.clone()));
            }
        }
    }

    /// Says whether the actor is on its way to its end.
    pub(super) fn leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Carries out a command that is done with one transaction.
    pub(super) async fn carry_told(&mut self, tell: Tell) -> Result<Carried, Failure> {
        let Tell { command, writes, tokens, keyed, view } = tell;
        self.keep_tokens(tokens);
        let extras = Extras { writes, keyed: keyed.map(|k| (k, None)), view: Some(view), reply: None };
        self.carry(command, extras).await
    }

    /// Carries out a command that nobody waits for.
    pub(super) async fn carry_due(&mut self, command: Command) -> Result<(), Failure> {
        self.carry(command, Extras::default()).await.map(drop)
    }

    /// Takes a report. A report is a fact: when it cannot be persisted it is tried again.
    pub(super) async fn outcome(&mut self, outcome: CommandReport) {
        let CommandReport { command, writes, reply, tokens } = outcome;
        self.keep_tokens(tokens.clone());
        let again = CommandReport { command: command.clone(), writes: writes.clone(), reply: reply.clone(), tokens };
        let extras = Extras { writes, reply, ..Extras::default() };
        let Err(failure) = self.carry(command, extras).await else {
            self.unwritten = 0;
            return;
        };
        self.note_blocked(&failure);
        tracing::error!(project = %self.project.name, %failure, "a report could not be persisted; trying again");
        // The commit of a pause that cannot be written is a pause that failed. Its undo discards the
        // checkpoint; the others' has no row either, and nobody else would.
        let mut in_vain = None;
        let again = match again.command {
            Command::PauseStepped { operation, step, took_ms, outcome: Ok(_) } => {
                let error = failure.into_error(Code::PauseFailed);
                Command::PauseStepped { operation, step, took_ms, outcome: Err(error) }.into()
            }
            Command::Checkpointed { operation, outcome: Ok((made, _)), imported } => {
                in_vain = Some(made.id);
                let error = failure.into_error(Code::CheckpointFailed);
                Command::Checkpointed { operation, outcome: Err(error), imported }.into()
            }
            Command::RestorePlanned { operation, outcome: Ok(made) } => {
                in_vain = Some(made.id);
                let error = failure.into_error(Code::RestoreFailed);
                Command::RestorePlanned { operation, outcome: Err(error) }.into()
            }
            _ => again,
        };
        if let Command::PauseStepped { outcome: Err(_), .. } = &again.command {
            // Whatever the disk says, the agents do not wait for it frozen.
            self.thaw_at_once().await;
        }
        let (site, mailbox) = (self.step_context(), self.mailbox.clone());
        self.services.tracker.spawn(async move {
            if let Some(number) = in_vain {
                discard(&site, number, &mailbox).await;
            }
            tokio::time::sleep(RETRY).await;
            drop(mailbox.send(Message::CommandReport(Box::new(again))).await);
        });
    }

    /// Keeps the tokens of runs that may be launched next; those of runs that never came go.
    fn keep_tokens(&mut self, tokens: Vec<NewToken>) {
        let project = Arc::clone(&self.project);
        let current = |run: &RunId| project.agents.values().any(|agent| agent.current_run_id() == Some(run));
        self.tokens.retain(|run, _| current(run));
        self.tokens.extend(tokens.into_iter().map(|new| (new.run, new.token)));
    }

    /// The one way: decide, persist, apply, tell, then start what follows.
    async fn carry(&mut self, command: Command, extras: Extras) -> Result<Carried, Failure> {
        let now = services::now();
        let decision = decide(&self.project, command, now)?;
        let Extras { writes, keyed, view, reply } = extras;
        if decision.events.is_empty() {
            // A report of something that is no longer so: its writes belong to nothing.
            let reply = view.map(|view| view(&self.project, &Written::default()));
            self.start_all(decision.effects).await;
            return Ok(Carried { reply, removed: false });
        }
        let mut next = Project::clone(&self.project);
        for event in &decision.events {
            let before = next.state.status();
            apply(&mut next, event, now);
            let after = next.state.status();
            if !transition::is_allowed(before, after) {
                let refusal =
                    Refusal::new(Code::InternalError, format!("{} would lead from {before} to {after}", event.kind()));
                return Err(refusal.into());
            }
        }
        let removed = decision.events.iter().any(|event| matches!(event, Event::ProjectRemoved {}));
        let next = Arc::new(next);
        instants::before(&decision.events)?;
        let only_before = match decision.events.iter().any(|event| matches!(event, Event::ProjectPaused { .. })) {
            true => self.work.lock().await.proven_until,
            false => None,
        };
        let state_for_reply = Arc::clone(&next);
        let commit = Commit {
            project: next.name.clone(),
            before: Some(Arc::clone(&self.project)),
            after: (!removed).then(|| Arc::clone(&next)),
            durability: durability(&decision.events),
            events: decision.events.clone(),
            writes,
            keyed,
            reply: view.map(|view| -> crate::store::commit::MakeReply {
                Box::new(move |written| view(&state_for_reply, written))
            }),
            result: reply.clone(),
            only_before,
            now,
        };
        let written = self.services.store.commit(commit).await.map_err(|error| match error {
            StoreError::TooLate => Refusal::new(
                Code::PauseFailed,
                "the lease of the freeze was over before the pause could be committed: the agents may have run"
                    .to_owned(),
            )
            .hint("try again")
            .into(),
            error => Failure::fault("save the change", &error),
        })?;
        instants::after(&decision.events);
        self.project = Arc::clone(&next);
        self.published.send_replace(next);
        self.tell_plugins(&decision.events, now.0);
        let conclusions = conclusions(&decision.events, reply.as_ref());
        let decision_events = decision.events;
        self.start_all(decision.effects).await;
        self.answer_waiters(&conclusions);
        if !conclusions.is_empty() {
            // Whoever waits does not wait for what follows.
            tokio::task::yield_now().await;
        }
        self.look_after_checkpoints(&decision_events);
        self.tell_of_trouble(&decision_events);
        Ok(Carried { reply: written.reply, removed })
    }

    async fn start_all(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            // Boxed, since an effect may report at once and so come back to `carry`.
            Box::pin(self.start(effect)).await;
        }
    }

    /// Takes what an effect reports while it is being started.
    pub(super) async fn report(&mut self, command: Command) {
        Box::pin(self.outcome(command.into())).await;
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

    fn tell_plugins(&self, events: &[Event], at: i64) {
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

/// Sleeps until the alarm, for ever where there is none.
async fn sleep_until(alarm: Option<tokio::time::Instant>) {
    match alarm {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What carrying a command out brought about.
pub(super) struct Carried {
    reply: Option<Value>,
    removed: bool,
}

/// What the loss of the last moments would cost: announcements of steps and progress are worth
/// nothing after a power failure, everything else is.
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
