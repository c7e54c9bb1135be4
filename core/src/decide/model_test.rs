//! Random commands, outcomes and crashes against a small model of the world, with invariants
//! checked after every event and whenever nothing is under way.

use std::collections::{BTreeMap, BTreeSet};

use fermata_protocol::agent::{AgentSpec, ExitStatus, RunProcesses, Usage};
use fermata_protocol::budget::Budget;
use fermata_protocol::checkpoint::{CheckpointMetadata, CheckpointView, Trigger};
use fermata_protocol::event::Event;
use fermata_protocol::pause::{AgentResumed, Mechanism, PauseCause, PauseMode, Rung};
use fermata_protocol::project::{Phase, ProjectConfig};
use fermata_protocol::{AgentName, Code, OperationId, ProjectName, Refusal, RunId, UnixMillis};
use proptest::prelude::*;

use crate::agent::{AgentState, Held};
use crate::command::{AgentRun, Command, Effect, NewRun, Observed, Respawn, Sealed, StepReport};
use crate::project::{PauseStep, Project, ProjectState};
use crate::{apply, decide, transition};

/// What someone, or the world, does next.
#[derive(Debug, Clone)]
enum Move {
    Run(u8),
    Stop(Option<u8>),
    Kill(u8),
    Restart(u8),
    Pause(PauseMode),
    Resume {
        stale: bool,
    },
    Checkpoint,
    Restore,
    Cancel,
    /// An effect under way concludes, well or not.
    Conclude {
        which: u8,
        well: bool,
    },
    /// A process ends by itself.
    Exit(u8, i32),
    /// kill -9 of the daemon, and a new one.
    Crash,
    /// The machine goes down and comes back.
    Reboot,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (0u8..3).prop_map(Move::Run),
        1 => prop::option::of(0u8..3).prop_map(Move::Stop),
        1 => (0u8..3).prop_map(Move::Kill),
        1 => (0u8..3).prop_map(Move::Restart),
        4 => prop::sample::select(vec![PauseMode::Freeze, PauseMode::Park]).prop_map(Move::Pause),
        4 => any::<bool>().prop_map(|stale| Move::Resume { stale }),
        2 => Just(Move::Checkpoint),
        2 => Just(Move::Restore),
        1 => Just(Move::Cancel),
        20 => (any::<u8>(), prop::bool::weighted(0.85)).prop_map(|(which, well)| Move::Conclude { which, well }),
        2 => ((0u8..3), (0i32..2)).prop_map(|(agent, code)| Move::Exit(agent, code)),
        2 => Just(Move::Crash),
        1 => Just(Move::Reboot),
    ]
}

/// What the kernel and the shims know.
#[derive(Debug, Default)]
struct World {
    alive: BTreeMap<RunId, Process>,
    ended: BTreeMap<RunId, i32>,
}

#[derive(Debug, Default, Clone)]
struct Process {
    frozen: bool,
}

struct Model {
    project: Project,
    world: World,
    pending: Vec<Effect>,
    clock: i64,
    ids: u64,
    checkpoints: BTreeSet<u64>,
    /// Plans of restores on disk.
    plans: BTreeSet<OperationId>,
    /// Every run that ever had processes.
    launched: BTreeMap<AgentName, BTreeSet<RunId>>,
}

fn name(index: u8) -> AgentName {
    AgentName::new(format!("a{index}")).expect("valid")
}

fn refusal() -> fermata_protocol::ErrorObject {
    Refusal::new(Code::InternalError, "the step failed").into()
}

impl Model {
    fn new() -> Self {
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
            launched: BTreeMap::new(),
        }
    }

    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn operation(&mut self) -> OperationId {
        OperationId::new(format!("op-{:x}", self.id())).expect("valid")
    }

    fn new_run(&mut self) -> NewRun {
        NewRun { id: RunId::new(format!("run-{:x}", self.id())).expect("valid"), token_sha256: String::new() }
    }

    fn tell(&mut self, command: Command) -> Result<(), Refusal> {
        self.clock += 1;
        let decision = decide(&self.project, command, UnixMillis(self.clock))?;
        for event in &decision.events {
            let before = self.project.state.status();
            apply(&mut self.project, event, UnixMillis(self.clock));
            let after = self.project.state.status();
            assert!(transition::is_allowed(before, after), "{before} -> {after} by {}", event.kind());
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

    fn run_of(&self, agent: &AgentName) -> Option<RunId> {
        self.project.agents.get(agent).and_then(|a| a.run.as_ref()).map(|run| run.id.clone())
    }

    fn freeze(&mut self, runs: &[AgentRun], frozen: bool) {
        for (_, run) in runs {
            if let Some(process) = self.world.alive.get_mut(run) {
                process.frozen = frozen;
            }
        }
    }

    fn end(&mut self, run: &RunId, code: i32) {
        if self.world.alive.remove(run).is_some() {
            self.world.ended.insert(run.clone(), code);
        }
    }

    /// The shim tells the daemon, which always listens in this model.
    fn report_end(&mut self, agent: AgentName, run: RunId) {
        let Some(code) = self.world.ended.get(&run).copied() else { return };
        let new = self.new_run();
        let command = Command::RunEnded {
            agent,
            run,
            exit: ExitStatus::Code(code),
            detail: None,
            ended_at: UnixMillis(self.clock),
            new,
        };
        self.tell(command).expect("the world is not refused");
    }

    fn view(&self, number: u64, operation: &OperationId) -> CheckpointView {
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

    fn launch(&mut self, agent: AgentName, run: RunId, well: bool) {
        let outcome = if well {
            self.launched.entry(agent.clone()).or_default().insert(run.clone());
            self.world.alive.insert(run.clone(), Process::default());
            Ok(processes())
        } else {
            Err("no such program".to_owned())
        };
        self.tell(Command::Launched { agent, run, outcome }).expect("the world is not refused");
    }

    fn conclude(&mut self, effect: Effect, well: bool) {
        match effect {
            Effect::Launch { agent, run } => self.launch(agent, run, well),
            Effect::Stop { agent, run, .. } | Effect::Kill { agent, run } => {
                self.end(&run, 15);
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
                    (true, PauseStep::Checkpoint) => Ok(StepReport::Sealed(Box::new(Sealed {
                        checkpoint: self.view(self.project.counters.checkpoint, &operation),
                        flash_save: Default::default(),
                        mechanism: Mechanism::Cgroup,
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
                // A step that still ran is stopped and joined before its work is undone.
                self.pending.retain(|e| !matches!(e, Effect::PauseStep { operation: o, .. } if *o == operation));
                self.freeze(&runs.clone(), false);
                self.tell(Command::Undone { operation }).expect("not refused");
            }
            Effect::Hold { runs } => self.freeze_held(&runs),
            Effect::Thaw { runs } => self.freeze(&runs, false),
            Effect::Park { runs } => {
                for (agent, run) in runs {
                    self.end(&run, 9);
                    self.tell(Command::Parked { agent: agent.clone(), run: run.clone() }).expect("not refused");
                    // The shim's own news of the end comes later.
                    self.report_end(agent, run);
                }
            }
            Effect::Resume { operation, thaw, respawn, .. } => {
                let mut agents = Vec::new();
                for (agent, run) in thaw {
                    let there = self.world.alive.contains_key(&run);
                    self.freeze(&[(agent.clone(), run)], false);
                    let rung = if there { Rung::Thawed } else { Rung::Failed };
                    agents.push(AgentResumed { agent, rung, argv: None, detail: None });
                }
                for (agent, run) in respawn {
                    // What is left of older runs is ended first.
                    let older = self.launched.entry(agent.clone()).or_default().clone();
                    for old in older.iter().filter(|old| **old != run) {
                        self.end(old, 9);
                    }
                    self.launch(agent.clone(), run, well);
                    let rung = if well { Rung::Respawned } else { Rung::Failed };
                    agents.push(AgentResumed { agent, rung, argv: None, detail: None });
                }
                let command = Command::Resumed { operation, agents, steps_ms: BTreeMap::new(), warnings: Vec::new() };
                self.tell(command).expect("not refused");
            }
            Effect::Checkpoint { operation, checkpoint, .. } => {
                let outcome =
                    if well { Ok((Box::new(self.view(checkpoint, &operation)), 1.0)) } else { Err(refusal()) };
                self.tell(Command::Checkpointed { operation, outcome }).expect("not refused");
            }
            Effect::PlanRestore { operation, safety, .. } => {
                self.plans.insert(operation.clone());
                let outcome = if well { Ok(Box::new(self.view(safety, &operation))) } else { Err(refusal()) };
                self.tell(Command::RestorePlanned { operation, outcome }).expect("not refused");
            }
            Effect::ApplyRestore { ref operation, .. } => {
                assert!(self.plans.contains(operation), "a restore has lost its plan");
                if !well {
                    self.pending.push(effect);
                    return;
                }
                let command = Command::Restored {
                    operation: operation.clone(),
                    phase: Phase::Active,
                    tasks: Vec::new(),
                    written: 1,
                    removed: 0,
                };
                self.tell(command).expect("not refused");
            }
            Effect::ForgetPlan { operation } => {
                self.plans.remove(&operation);
            }
            Effect::Forget { .. } | Effect::PauseForBudget {} => {}
        }
    }

    /// A hold makes the freeze of what is still held permanent; late holds of a resumed agent do nothing.
    fn freeze_held(&mut self, runs: &[AgentRun]) {
        for run in runs {
            let held = self.project.agents.get(&run.0).is_some_and(|a| a.state == AgentState::Held(Held::Frozen));
            if held && matches!(&*self.project.state, ProjectState::Paused(_)) {
                self.freeze(std::slice::from_ref(run), true);
            }
        }
    }

    fn recover(&mut self) {
        self.pending.clear();
        // The daemon's rule: what is left of older runs is ended before anything else.
        for (agent, runs) in self.launched.clone() {
            let current = self.run_of(&agent);
            for old in runs.iter().filter(|run| current.as_ref() != Some(run)) {
                self.end(old, 9);
            }
        }
        let mut observed = BTreeMap::new();
        for agent in self.project.alive_agents() {
            let Some(run) = agent.run.as_ref() else { continue };
            let seen = match (self.world.alive.get(&run.id), self.world.ended.get(&run.id)) {
                (Some(_), _) => Observed::Alive(processes()),
                (None, Some(code)) => {
                    Observed::Ended { exit: ExitStatus::Code(*code), detail: None, at: UnixMillis(self.clock) }
                }
                (None, None) => Observed::Lost { detail: "gone".into() },
            };
            observed.insert(agent.name.clone(), seen);
        }
        let respawn = self.respawns(false);
        self.tell(Command::Recover { agents: observed, respawn }).expect("recovery is not refused");
        // The daemon carries this one out before it takes commands, so that it cannot come late
        // and thaw what a new pause has frozen.
        while let Some(at) = self.pending.iter().position(|e| matches!(e, Effect::Thaw { .. })) {
            let effect = self.pending.remove(at);
            self.conclude(effect, true);
        }
    }

    fn respawns(&mut self, stale: bool) -> BTreeMap<AgentName, Respawn> {
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

    fn make(&mut self, what: Move) {
        // A refusal is a fine answer; what matters is that it changes nothing.
        let before = self.project.clone();
        let refused = match what {
            Move::Run(agent) => {
                let new = self.new_run();
                self.tell(Command::Run { agent: name(agent), spec: spec(), new }).is_err()
            }
            Move::Stop(agent) => self.tell(Command::Stop { agent: agent.map(name), grace_ms: None }).is_err(),
            Move::Kill(agent) => self.tell(Command::Kill { agent: Some(name(agent)) }).is_err(),
            Move::Restart(agent) => {
                let new = self.new_run();
                self.tell(Command::Restart { agent: name(agent), new }).is_err()
            }
            Move::Pause(mode) => {
                let operation = self.operation();
                let cause = PauseCause::default();
                self.tell(Command::Pause { operation, cause, reason: None, mode, grace_ms: None }).is_err()
            }
            Move::Resume { stale } => {
                let operation = self.operation();
                let respawn = self.respawns(stale);
                self.tell(Command::Resume { operation, respawn, over_budget: false }).is_err()
            }
            Move::Checkpoint => {
                let operation = self.operation();
                self.tell(Command::Checkpoint { operation, trigger: Trigger::Manual }).is_err()
            }
            Move::Restore => {
                let operation = self.operation();
                self.tell(Command::Restore { operation, checkpoint: 1 }).is_err()
            }
            Move::Cancel => match self.project.operation().cloned() {
                Some(operation) => self.tell(Command::Cancel { operation }).is_err(),
                None => false,
            },
            Move::Conclude { which, well } => {
                if !self.pending.is_empty() {
                    let effect = self.pending.remove(usize::from(which) % self.pending.len());
                    self.conclude(effect, well);
                }
                false
            }
            Move::Exit(agent, code) => {
                if let Some(run) = self.run_of(&name(agent)) {
                    let runs = self.world.alive.get(&run).is_some_and(|process| !process.frozen);
                    if runs {
                        self.end(&run, code);
                        self.report_end(name(agent), run);
                    }
                }
                false
            }
            Move::Crash => {
                self.recover();
                false
            }
            Move::Reboot => {
                self.world = World::default();
                self.recover();
                false
            }
        };
        if refused {
            assert_eq!(before, self.project, "a refusal changed the state");
        }
    }

    fn drain(&mut self) {
        let mut rounds = 0;
        while !self.pending.is_empty() {
            let effect = self.pending.remove(0);
            self.conclude(effect, true);
            rounds += 1;
            assert!(rounds < 1000, "effects follow each other for ever");
        }
    }

    fn invariant_nothing_is_left_between(&self) {
        match &*self.project.state {
            ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
                panic!("left between: {:?}", self.project.state)
            }
            ProjectState::Resting(_) | ProjectState::Paused(_) => {}
        }
        assert!(self.project.checkpointing.is_none(), "a checkpoint was left unfinished");
    }

    fn invariant_the_kernel_agrees_with_the_state(&self) {
        // No process of an older run is left behind.
        for run in self.world.alive.keys() {
            let current = self.project.agents.values().any(|a| a.run.as_ref().is_some_and(|r| r.id == *run));
            assert!(current, "{run} is left behind");
        }
        for agent in self.project.agents.values() {
            let process = agent.run.as_ref().and_then(|run| self.world.alive.get(&run.id));
            match &agent.state {
                AgentState::Running => {
                    assert!(process.is_some_and(|p| !p.frozen), "{} should run: {process:?}", agent.name);
                }
                AgentState::Held(Held::Frozen) => {
                    assert!(process.is_some_and(|p| p.frozen), "{} should be frozen: {process:?}", agent.name);
                }
                AgentState::Starting | AgentState::Stopping(_) => panic!("{} is left between", agent.name),
                _ => assert!(process.is_none(), "{} should have no process", agent.name),
            }
        }
    }
}

fn processes() -> RunProcesses {
    RunProcesses {
        pid: 10,
        start_ticks: 1,
        shim_pid: 9,
        shim_start_ticks: 1,
        boot_id: "b".into(),
        mechanism: Mechanism::Cgroup,
    }
}

fn spec() -> AgentSpec {
    AgentSpec {
        argv: vec!["x".into()],
        cwd: "/w".into(),
        umask: 0o022,
        limits: BTreeMap::new(),
        resume_argv: None,
        profile: None,
        stop_grace_ms: 10,
        supervision: Default::default(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_commands_outcomes_and_crashes_leave_nothing_between(moves in prop::collection::vec(moves(), 1..60)) {
        let mut model = Model::new();
        for what in moves {
            model.make(what);
        }
        model.drain();
        model.invariant_nothing_is_left_between();
        model.invariant_the_kernel_agrees_with_the_state();
    }
}

#[test]
fn a_budget_that_is_reached_pauses_and_a_resume_needs_more_of_it() {
    let usage = |tokens| Usage { input_tokens: tokens, output_tokens: 0, cost_micro_usd: tokens };
    let mut model = Model::new();
    let budget = Budget { tokens: Some(100), ..Budget::default() };
    let config = ProjectConfig { budget, ..ProjectConfig::default() };
    let set = |config| Command::Set { description: None, phase: None, config: Some(config) };
    model.tell(set(config.clone())).expect("accepted");
    for agent in [0, 1] {
        model.make(Move::Run(agent));
        model.drain();
    }
    let asked = |model: &mut Model| {
        let asked = model.pending.contains(&Effect::PauseForBudget {});
        model.drain();
        asked
    };
    model.tell(Command::Use { agent: name(0), usage: usage(60) }).expect("accepted");
    assert!(!asked(&mut model));
    // Who is removed takes nothing of it along.
    model.make(Move::Exit(0, 0));
    model.tell(Command::RemoveAgent { agent: name(0) }).expect("it has ended");
    model.tell(Command::Use { agent: name(1), usage: usage(40) }).expect("accepted");
    assert!(asked(&mut model));
    model.make(Move::Pause(PauseMode::Freeze));
    model.drain();
    // A report that comes late asks for nothing more.
    model.tell(Command::Use { agent: name(1), usage: usage(1) }).expect("accepted");
    assert!(!asked(&mut model));
    let resume = |model: &mut Model, over_budget| {
        let (operation, respawn) = (model.operation(), model.respawns(false));
        model.tell(Command::Resume { operation, respawn, over_budget })
    };
    let refusal = resume(&mut model, false).expect_err("the budget is reached");
    assert_eq!(refusal.code, Code::BudgetExceeded);
    resume(&mut model, true).expect("a person wants it");
    model.drain();
    model.tell(Command::Use { agent: name(1), usage: usage(50) }).expect("accepted");
    assert!(!asked(&mut model), "it is waived");
    model.tell(set(config)).expect("accepted");
    model.tell(Command::Use { agent: name(1), usage: usage(1) }).expect("accepted");
    assert!(asked(&mut model), "a budget that is set anew counts");
}

#[test]
fn usage_adds_up_without_overflow() {
    let mut model = Model::new();
    model.make(Move::Run(0));
    for _ in 0..2 {
        let usage = Usage { input_tokens: u64::MAX - 1, output_tokens: 2, cost_micro_usd: 3 };
        model.tell(Command::Use { agent: name(0), usage }).expect("accepted");
    }
    let agent = &model.project.agents[&name(0)];
    assert_eq!((agent.usage.input_tokens, agent.usage.output_tokens), (u64::MAX, 4));
}
