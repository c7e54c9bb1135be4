//! A model of a project's environment for tests: shims and processes that carry out effects, a clock, and a daemon that
//! crashes.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::agent::{AgentSpec, ExitStatus, RunProcesses};
use fermata_protocol::checkpoint::{CheckpointMetadata, CheckpointView, Trigger};
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, FreezerKind, ResumeMethod};
use fermata_protocol::project::ProjectConfig;
use fermata_protocol::supervision::{
    Dependency, DependencyState, OnStale, Readiness, ReadyWhen, Recover, Restart, RestartPolicy, Supervision,
};
use fermata_protocol::task::Phase;
use fermata_protocol::{AgentName, Code, OperationId, ProjectName, Refusal, RunId, UnixMillis};

use crate::agent::RunKey;
use crate::automatic::UnchangedScan;
use crate::automatic::{self};
use crate::command::{
    AfterEnd, Command, NewRun, PauseCommit, PreparedStart, RecoveredRun, Respawn, RestoredProject, StepReport,
};
use crate::deadlines::DueAction;
use crate::effect::Effect;
use crate::project::{PauseStep, Project, ProjectState};
use crate::{apply, decide, transition};

/// How long a restore may fail before it is given up, in milliseconds.
pub(super) const PATIENCE_MS: u64 = 3;

/// The state of the kernel and the shims.
#[derive(Debug, Default, Clone)]
pub(super) struct World {
    pub(super) alive: BTreeMap<RunId, Process>,
    pub(super) ended: BTreeMap<RunId, i32>,
}

#[derive(Debug, Default, Clone)]
pub(super) struct Process {
    pub(super) frozen: bool,
}

#[derive(Clone)]
pub(super) struct Model {
    pub(super) project: Project,
    pub(super) world: World,
    pub(super) pending: Vec<Effect>,
    pub(super) clock: i64,
    pub(super) ids: u64,
    pub(super) checkpoints: BTreeSet<u64>,
    /// Plans of restores on disk.
    pub(super) plans: BTreeSet<OperationId>,
    /// Every run that was ever announced, in this order.
    pub(super) announced: Vec<RunKey>,
    /// Every run that ever had processes.
    pub(super) launched: BTreeMap<AgentName, BTreeSet<RunId>>,
    /// The daemon's last scan that found no change.
    pub(super) unchanged: UnchangedScan,
    /// The number of scans.
    pub(super) scans: u64,
    /// Whether the workspace differs from the newest checkpoint.
    pub(super) dirty: bool,
    /// Whether checkpoints are imported.
    pub(super) imports: bool,
    /// Every checkpoint that was begun outside a pause: its trigger, and whether an agent ran.
    pub(super) begun: Vec<(Trigger, bool)>,
}

pub(super) fn name(index: u8) -> AgentName {
    AgentName::new(format!("a{index}")).expect("valid")
}

pub(super) fn refusal() -> fermata_protocol::ErrorObject {
    Refusal::new(Code::InternalError, "the step failed").into()
}

impl Model {
    pub(super) fn new() -> Self {
        let created = Event::ProjectCreated {
            workspace: "/w".into(),
            description: String::new(),
            source: None,
            config: ProjectConfig::default(),
        };
        let project = crate::apply::create(&ProjectName::new("p").expect("valid"), &created, UnixMillis(0));
        Self {
            project: project.expect("created"),
            world: World::default(),
            pending: Vec::new(),
            clock: 1,
            ids: 0,
            checkpoints: BTreeSet::new(),
            plans: BTreeSet::new(),
            announced: Vec::new(),
            launched: BTreeMap::new(),
            unchanged: UnchangedScan::default(),
            scans: 0,
            dirty: false,
            imports: false,
            begun: Vec::new(),
        }
    }

    pub(super) fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub(super) fn operation(&mut self) -> OperationId {
        OperationId::new(format!("op-{:x}", self.id())).expect("valid")
    }

    pub(super) fn new_run(&mut self) -> NewRun {
        NewRun { id: RunId::new(format!("run-{:x}", self.id())).expect("valid"), token_sha256: String::new() }
    }

    pub(super) fn new_start(&mut self) -> PreparedStart {
        PreparedStart { new: self.new_run(), argv: vec!["x".into()], session: None, continuation: None }
    }

    /// Carries out what is due, as the actor does after every change.
    pub(super) fn follow_up(&mut self) {
        for _ in 0..20 {
            let due = crate::deadlines::due_actions(&self.project, UnixMillis(self.clock + 1));
            if due.is_empty() && !self.scan() {
                return;
            }
            for due in due {
                let command = match due {
                    DueAction::Start(agent) => Command::Start { agent, start: self.new_start(), requested: false },
                    due => Command::Due { action: due, operation: self.operation() },
                };
                self.tell(command).expect("what is due is not refused");
            }
        }
        panic!("there is always something due");
    }

    /// Makes the automatic checkpoint that is due if anything has changed; returns whether it did.
    fn scan(&mut self) -> bool {
        let now = UnixMillis(self.clock + 1);
        let Some(trigger) = automatic::due_trigger(&self.project, &self.unchanged, now) else { return false };
        self.scans += 1;
        if !self.dirty && !self.project.counters.activity.has_changed() {
            self.unchanged = UnchangedScan::at(&self.project, now);
            assert_eq!(
                automatic::due_trigger(&self.project, &self.unchanged, now),
                None,
                "no scan is due before the end of the interval"
            );
            return false;
        }
        let operation = self.operation();
        self.tell(Command::Checkpoint { operation, trigger }).expect("what is due is not refused");
        true
    }

    pub(super) fn tell(&mut self, command: Command) -> Result<(), Refusal> {
        self.clock += 1;
        let decision = decide(&self.project, command, UnixMillis(self.clock))?;
        for event in &decision.events {
            self.check_event(event);
            let before = self.project.state.status();
            apply(&mut self.project, event, UnixMillis(self.clock));
            let after = self.project.state.status();
            assert!(transition::is_allowed(before, after), "{before} -> {after} by {}", event.kind());
            if let Event::CheckpointStarted { trigger, .. } = event {
                self.begun.push((*trigger, self.project.running_agents().next().is_some()));
            }
            let number = match event {
                Event::PauseStarted { checkpoint, .. } | Event::CheckpointStarted { checkpoint, .. } => *checkpoint,
                Event::RestoreStarted { safety, .. } => *safety,
                _ => continue,
            };
            assert!(self.checkpoints.insert(number), "checkpoint number {number} was given twice");
        }
        self.pending.extend(decision.effects);
        Ok(())
    }

    /// Checks that an event agrees with the state that it is applied to.
    fn check_event(&mut self, event: &Event) {
        match event {
            Event::AgentStarting { agent, run, .. } => self.announced.push((agent.clone(), run.clone())),
            Event::AgentReady { agent, run } => {
                let state = &self.project.agents[agent];
                let current = state.run().filter(|current| current.id == *run && current.ended.is_none());
                assert!(state.is_alive() && current.is_some(), "{run} of {agent} is reported as ready: {state:?}");
            }
            _ => {}
        }
    }

    /// Carries out effects and what is due until there is nothing left.
    pub(super) fn settle(&mut self) {
        self.follow_up();
        let mut rounds = 0;
        while !self.pending.is_empty() {
            let effect = self.pending.remove(0);
            self.conclude(effect, true);
            self.follow_up();
            rounds += 1;
            assert!(rounds < 1000, "there is always another effect");
        }
    }

    pub(super) fn run_of(&self, agent: &AgentName) -> Option<RunId> {
        self.project.agents.get(agent).and_then(|a| a.run()).map(|run| run.id.clone())
    }

    pub(super) fn freeze(&mut self, runs: &[RunKey], frozen: bool) {
        for (_, run) in runs {
            if let Some(process) = self.world.alive.get_mut(run) {
                process.frozen = frozen;
            }
        }
    }

    pub(super) fn end(&mut self, run: &RunId, code: i32) {
        if self.world.alive.remove(run).is_some() {
            self.world.ended.insert(run.clone(), code);
        }
    }

    /// The shim reports the end of a run to the daemon, which always runs in this model.
    pub(super) fn report_end(&mut self, agent: AgentName, run: RunId) {
        let Some(code) = self.world.ended.get(&run).copied() else { return };
        let new = self.new_run();
        let command = Command::RunEnded {
            agent,
            run,
            exit: ExitStatus::Code(code),
            detail: None,
            ended_at: UnixMillis(self.clock),
            new,
            then: AfterEnd::ByPolicy,
        };
        self.tell(command).expect("a report is not refused");
    }

    pub(super) fn view(&self, number: u64, operation: &OperationId) -> CheckpointView {
        CheckpointView {
            project: self.project.name.clone(),
            id: number,
            name: String::new(),
            description: String::new(),
            trigger: Trigger::Pause,
            format: 1,
            created_at: UnixMillis(self.clock),
            operation_id: operation.clone(),
            pause_reason: None,
            git_commit: String::new(),
            database_backup: String::new(),
            context_snapshot: String::new(),
            manifest_sha256: String::new(),
            size_bytes: 0,
            pinned: false,
            metadata: CheckpointMetadata::default(),
        }
    }

    fn end_older_runs(&mut self, agent: &AgentName, run: &RunId) {
        for old in self.launched.get(agent).cloned().unwrap_or_default() {
            if old != *run {
                self.end(&old, 9);
            }
        }
    }

    fn start_processes(&mut self, agent: AgentName, run: RunId) {
        self.launched.entry(agent).or_default().insert(run.clone());
        self.world.alive.insert(run, Process::default());
    }

    pub(super) fn launch(&mut self, agent: AgentName, run: RunId, well: bool) {
        let outcome = if well {
            self.start_processes(agent.clone(), run.clone());
            Ok(processes())
        } else {
            Err("no such program".to_owned())
        };
        self.tell(Command::Launched { agent, run, outcome }).expect("a report is not refused");
    }

    #[expect(clippy::too_many_lines, reason = "a table of all effects")]
    pub(super) fn conclude(&mut self, effect: Effect, well: bool) {
        match effect {
            Effect::Launch { agent, run, .. } => self.launch(agent, run, well),
            Effect::Stop { agent, run, .. } => {
                // Thawed, so that it receives the SIGTERM.
                self.freeze(&[(agent.clone(), run.clone())], false);
                self.invariant_no_process_runs_on_restored_files();
                self.end(&run, 15);
                self.report_end(agent, run);
            }
            Effect::Kill { agent, run } => {
                self.end(&run, 9);
                self.report_end(agent, run);
            }
            Effect::PauseStep { operation, step } => {
                let runs = self.project.runs(self.project.running_agents());
                if step == PauseStep::Freeze {
                    self.freeze(&runs, true);
                }
                let agents = runs.into_iter().map(|(agent, _)| agent).collect();
                let outcome = match (well, step) {
                    (false, _) => Err(refusal()),
                    (true, PauseStep::Checkpoint) => Ok(StepReport::Sealed(Box::new(PauseCommit {
                        checkpoint: self.view(self.project.counters.checkpoint, &operation),
                        flash_save: Default::default(),
                        mechanism: FreezerKind::Cgroup,
                        processes: 1,
                        frozen_ms: 1.0,
                        agents,
                        sessions: Vec::new(),
                        warnings: Vec::new(),
                    }))),
                    (true, _) => Ok(StepReport::Done),
                };
                let command = Command::PauseStepped { operation, step, took_ms: 1.0, outcome };
                self.tell(command).expect("steps are not refused");
            }
            Effect::Undo { ref operation, ref runs, .. } => {
                if !well {
                    self.pending.push(effect);
                    return;
                }
                let operation = operation.clone();
                // The daemon ends a step that is still running before it undoes it.
                let is_its_step = |effect: &Effect| {
                    matches!(effect, Effect::PauseStep { operation: of, .. } | Effect::Checkpoint { operation: of, .. }
                        if *of == operation)
                };
                self.pending.retain(|effect| !is_its_step(effect));
                self.freeze(&runs.clone(), false);
                self.tell(Command::Undone { operation }).expect("not refused");
            }
            Effect::CommitFreeze { runs } => self.commit_freeze(&runs),
            Effect::Thaw { runs } => self.freeze(&runs, false),
            Effect::Park { runs } => {
                for (agent, run) in runs {
                    self.end(&run, 9);
                    self.tell(Command::Parked { agent: agent.clone(), run: run.clone() }).expect("not refused");
                    // The report of the run's end comes later.
                    self.report_end(agent, run);
                }
            }
            Effect::Resume { operation, thaw, respawn, .. } => {
                if let ProjectState::Resuming(run) = &*self.project.state {
                    let is_restored = run.paused.restored.is_some();
                    assert!(!is_restored || thaw.is_empty(), "thawed on restored files: {thaw:?}");
                }
                let mut agents = Vec::new();
                for (agent, run) in thaw {
                    let is_alive = self.world.alive.contains_key(&run);
                    self.freeze(&[(agent.clone(), run)], false);
                    let method = if is_alive { ResumeMethod::Thawed } else { ResumeMethod::Failed };
                    agents.push(AgentResumed { agent, method, argv: None, detail: None });
                }
                for (agent, run) in respawn {
                    self.end_older_runs(&agent, &run);
                    self.launch(agent.clone(), run, well);
                    let method = if well { ResumeMethod::Respawned } else { ResumeMethod::Failed };
                    agents.push(AgentResumed { agent, method, argv: None, detail: None });
                }
                let command = Command::Resumed { operation, agents, steps_ms: BTreeMap::new(), warnings: Vec::new() };
                self.tell(command).expect("not refused");
            }
            Effect::Checkpoint { operation, checkpoint, .. } => {
                self.dirty &= !well;
                let outcome =
                    if well { Ok((Box::new(self.view(checkpoint, &operation)), 1.0)) } else { Err(refusal()) };
                self.tell(Command::Checkpointed { operation, outcome, imported: self.imports }).expect("not refused");
            }
            Effect::PlanRestore { operation, safety, .. } => {
                self.plans.insert(operation.clone());
                let outcome = if well { Ok(Box::new(self.view(safety, &operation))) } else { Err(refusal()) };
                self.tell(Command::RestorePlanned { operation, outcome }).expect("not refused");
            }
            Effect::ApplyRestore { operation, .. } => {
                assert!(self.plans.contains(&operation), "a restore has lost its plan");
                let command = if well {
                    let rows = Some(RestoredProject { phase: Phase::Active, tasks: Vec::new() });
                    Command::Restored { operation, rows, written: 1, removed: 0 }
                } else {
                    Command::RestoreFailing { operation, error: refusal(), patience_ms: PATIENCE_MS }
                };
                self.tell(command).expect("not refused");
            }
            Effect::ForgetPlan { operation } => {
                self.plans.remove(&operation);
            }
            Effect::ForgetAgent { .. } | Effect::PauseForBudget {} | Effect::DiscardCheckpoints { .. } => {}
        }
    }

    /// Freezes the agents that are still paused; a late commit has no effect on a resumed agent.
    pub(super) fn commit_freeze(&mut self, runs: &[RunKey]) {
        for run in runs {
            let is_frozen = self.project.agents.get(&run.0).is_some_and(|a| a.is_frozen());
            if is_frozen && matches!(&*self.project.state, ProjectState::Paused(_)) {
                self.freeze(std::slice::from_ref(run), true);
            }
        }
    }

    pub(super) fn recover(&mut self) {
        self.pending.clear();
        self.unchanged = UnchangedScan::default();
        // As the daemon does, ends the processes of older runs first.
        for (agent, runs) in self.launched.clone() {
            let current = self.run_of(&agent);
            for old in runs.iter().filter(|run| current.as_ref() != Some(run)) {
                self.end(old, 9);
            }
        }
        let mut runs = BTreeMap::new();
        for agent in self.project.alive_agents() {
            let Some(run) = agent.run() else { continue };
            let state = match (self.world.alive.get(&run.id), self.world.ended.get(&run.id)) {
                (Some(_), _) => RecoveredRun::Alive(processes()),
                (None, Some(code)) => {
                    RecoveredRun::Ended { exit: ExitStatus::Code(*code), detail: None, at: UnixMillis(self.clock) }
                }
                (None, None) => RecoveredRun::Lost { detail: "gone".into() },
            };
            runs.insert(agent.name.clone(), state);
        }
        let respawn = self.respawns(false);
        self.tell(Command::Recover { agents: runs, respawn, last_seen: BTreeMap::new() })
            .expect("recovery is not refused");
        // The daemon carries this effect out before it takes commands, so that it cannot thaw what a later pause has
        // frozen.
        while let Some(at) = self.pending.iter().position(|e| matches!(e, Effect::Thaw { .. })) {
            let effect = self.pending.remove(at);
            self.conclude(effect, true);
        }
    }

    /// The daemon is killed during a resume: the first agents are running again, and that is not recorded.
    pub(super) fn crash_within_resume(&mut self, returned: usize) {
        let resume = self.pending.iter().find_map(|effect| match effect {
            Effect::Resume { thaw, respawn, .. } => Some((thaw.clone(), respawn.clone())),
            _ => None,
        });
        if let Some((thaw, respawn)) = resume {
            let thawed = returned.min(thaw.len());
            self.freeze(&thaw[..thawed], false);
            for (agent, run) in respawn.into_iter().take(returned - thawed) {
                self.end_older_runs(&agent, &run);
                self.start_processes(agent, run);
            }
        }
        self.recover();
    }

    pub(super) fn respawns(&mut self, stale: bool) -> BTreeMap<AgentName, Respawn> {
        let names: Vec<AgentName> = self.project.agents.keys().cloned().collect();
        names
            .into_iter()
            .map(|agent| {
                let new = self.new_run();
                let why = stale.then(|| "frozen for too long".to_owned());
                (agent, Respawn { new, argv: vec!["x".into()], instead_of_thaw: why, session: None })
            })
            .collect()
    }
}

pub(super) fn processes() -> RunProcesses {
    RunProcesses {
        pid: 10,
        start_ticks: 1,
        shim_pid: 9,
        shim_start_ticks: 1,
        boot_id: "b".into(),
        mechanism: FreezerKind::Cgroup,
    }
}

/// The first agent has no supervision; the second is restarted and has a timeout; the third waits for the second, and is
/// restarted when it is stale.
pub(super) fn spec(index: u8) -> AgentSpec {
    let restart =
        Restart { policy: RestartPolicy::Always, delay_ms: 1_000, max_delay_ms: 9_000, limit: 3, within_ms: 99_000 };
    let supervision = match index {
        0 => Supervision::default(),
        1 => Supervision {
            restart,
            timeout_ms: Some(50_000),
            ready: Some(Readiness { when: ReadyWhen::Reported, timeout_ms: Some(2_000) }),
            ..Supervision::default()
        },
        _ => Supervision {
            depends_on: vec![Dependency { agent: name(1), until: DependencyState::Ready }],
            recover: Recover::Always,
            stale_after_ms: Some(2_500),
            on_stale: OnStale::Restart,
            ..Supervision::default()
        },
    };
    AgentSpec {
        argv: vec!["x".into()],
        cwd: "/w".into(),
        umask: 0o022,
        limits: BTreeMap::new(),
        resume_argv: None,
        profile: None,
        stop_grace_ms: 10,
        supervision: Box::new(supervision),
    }
}
