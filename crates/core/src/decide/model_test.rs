//! Random commands, outcomes and crashes against a model of the environment. Invariants are checked after every event
//! and when nothing is under way.

use std::sync::Arc;

use fermata_protocol::agent::Progress;
use fermata_protocol::budget::Usage;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::{AgentName, Refusal, UnixMillis};
use proptest::prelude::*;

use super::model::*;
use crate::agent::{Agent, AgentState};
use crate::command::Command;
use crate::effect::Effect;
use crate::project::{ProjectState, RestoreStage, StableState};

/// An action of a person, of the environment, or of the daemon.
#[derive(Debug, Clone)]
enum Move {
    Run(u8),
    /// Time passes, in milliseconds.
    Wait(i64),
    Ready(u8),
    /// The daemon reports one of the runs so far as ready, possibly long after its end.
    LateReady(u8),
    Report(u8),
    BringBack(u8),
    Stop(Option<u8>),
    Kill(u8),
    Restart(u8),
    Remove(u8),
    Pause(PauseMode),
    Resume {
        stale: bool,
    },
    Checkpoint,
    Restore {
        everything: bool,
    },
    /// A restore fails until it is given up.
    FailRestore,
    Cancel,
    /// A file of the workspace is changed.
    Touch,
    /// All effects under way succeed.
    Settle,
    /// An effect under way succeeds or fails.
    Conclude {
        which: u8,
        well: bool,
    },
    /// A process exits.
    Exit(u8, i32),
    /// The daemon is killed and started again.
    Crash,
    /// The daemon is killed after a restore of a paused project, before its resume, which is then requested again.
    CrashBetweenRestoreAndResume {
        everything: bool,
        reboot: bool,
    },
    /// The daemon is killed during a resume.
    CrashWithinResume {
        returned: u8,
    },
    Reboot,
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        4 => (0u8..3).prop_map(Move::Run),
        1 => prop::option::of(0u8..3).prop_map(Move::Stop),
        1 => (0u8..3).prop_map(Move::Kill),
        1 => (0u8..3).prop_map(Move::Restart),
        1 => (0u8..3).prop_map(Move::Remove),
        4 => prop::sample::select(vec![PauseMode::Freeze, PauseMode::Park]).prop_map(Move::Pause),
        4 => any::<bool>().prop_map(|stale| Move::Resume { stale }),
        4 => prop::sample::select(vec![100, 3_000, 100_000]).prop_map(Move::Wait),
        1 => (0u8..3).prop_map(Move::Ready),
        3 => any::<u8>().prop_map(Move::LateReady),
        1 => (0u8..3).prop_map(Move::Report),
        1 => (0u8..3).prop_map(Move::BringBack),
        2 => Just(Move::Checkpoint),
        2 => prop::bool::weighted(0.7).prop_map(|everything| Move::Restore { everything }),
        2 => Just(Move::FailRestore),
        1 => Just(Move::Cancel),
        2 => Just(Move::Touch),
        6 => Just(Move::Settle),
        20 => (any::<u8>(), prop::bool::weighted(0.85)).prop_map(|(which, well)| Move::Conclude { which, well }),
        2 => ((0u8..3), (0i32..2)).prop_map(|(agent, code)| Move::Exit(agent, code)),
        2 => Just(Move::Crash),
        2 => (any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(everything, reboot)| Move::CrashBetweenRestoreAndResume { everything, reboot }),
        2 => (0u8..3).prop_map(|returned| Move::CrashWithinResume { returned }),
        1 => Just(Move::Reboot),
    ]
}

impl Model {
    /// Concludes the first effect under way.
    fn conclude_next(&mut self, well: bool) {
        let effect = self.pending.remove(0);
        self.conclude(effect, well);
    }

    fn make(&mut self, what: Move) {
        // A refusal is allowed, and must change nothing.
        let before = self.project.clone();
        match self.attempt(what) {
            Ok(()) => self.follow_up(),
            Err(_) => assert_eq!(before, self.project, "a refusal changed the state"),
        }
    }

    fn attempt(&mut self, what: Move) -> Result<(), Refusal> {
        match what {
            Move::Run(agent) => {
                let new = self.new_run();
                return self.tell(Command::Run { agent: name(agent), spec: spec(agent), new });
            }
            Move::Ready(agent) => return self.tell(Command::Ready { agent: name(agent), run: None }),
            Move::Report(agent) => return self.report_progress(name(agent)),
            Move::BringBack(agent) => {
                let start = self.new_start();
                return self.tell(Command::Start { agent: name(agent), start, requested: true });
            }
            Move::Stop(agent) => return self.tell(Command::Stop { agent: agent.map(name), grace_ms: None }),
            Move::Kill(agent) => return self.tell(Command::Kill { agent: Some(name(agent)) }),
            Move::Restart(agent) => {
                let new = self.new_run();
                return self.tell(Command::Restart { agent: name(agent), new });
            }
            Move::Remove(agent) => return self.tell(Command::RemoveAgent { agent: name(agent) }),
            Move::Pause(mode) => {
                let (operation, cause) = (self.operation(), PauseCause::default());
                return self.tell(Command::Pause { operation, cause, reason: None, mode, grace_ms: None });
            }
            Move::Resume { stale } => return self.resume(stale),
            Move::Checkpoint => {
                let operation = self.operation();
                return self.tell(Command::Checkpoint { operation, trigger: Trigger::Manual });
            }
            Move::Restore { everything } => return self.restore(everything),
            Move::CrashBetweenRestoreAndResume { everything, reboot } => {
                self.restore(everything)?;
                self.crash_after_restore(reboot);
            }
            Move::Cancel => {
                if let Some(operation) = self.project.operation().cloned() {
                    return self.tell(Command::Cancel { operation });
                }
            }
            Move::Wait(ms) => self.clock += ms,
            Move::LateReady(which) => self.observe_ready(which),
            Move::FailRestore => self.fail_restore(),
            Move::Touch => self.dirty = true,
            Move::Settle => self.settle(),
            Move::Conclude { which, well } => {
                if !self.pending.is_empty() {
                    let effect = self.pending.remove(usize::from(which) % self.pending.len());
                    self.conclude(effect, well);
                }
            }
            Move::Exit(agent, code) => self.exit(name(agent), code),
            Move::Crash => self.recover(),
            Move::CrashWithinResume { returned } => self.crash_within_resume(usize::from(returned)),
            Move::Reboot => self.reboot(),
        }
        Ok(())
    }

    fn report_progress(&mut self, agent: AgentName) -> Result<(), Refusal> {
        let progress = Progress {
            percent: Some(10.0),
            message: None,
            units_done: Some(self.ids),
            reported_at: UnixMillis(self.clock),
        };
        self.tell(Command::Progress { agent, progress, phase: None })
    }

    fn fail_restore(&mut self) {
        for _ in 0..10 {
            let position = self.pending.iter().position(|e| matches!(e, Effect::ApplyRestore { .. }));
            let Some(at) = position else { break };
            let effect = self.pending.remove(at);
            self.conclude(effect, false);
        }
    }

    /// Lets the process of an agent end, unless it is frozen.
    fn exit(&mut self, agent: AgentName, code: i32) {
        if let Some(run) = self.run_of(&agent)
            && self.world.alive.get(&run).is_some_and(|process| !process.frozen)
        {
            self.end(&run, code);
            self.report_end(agent, run);
        }
    }

    fn reboot(&mut self) {
        self.world = World::default();
        self.recover();
    }

    fn resume(&mut self, stale: bool) -> Result<(), Refusal> {
        let operation = self.operation();
        let respawn = self.respawns(stale);
        self.tell(Command::Resume { operation, respawn, over_budget: false })
    }

    fn restore(&mut self, everything: bool) -> Result<(), Refusal> {
        let operation = self.operation();
        let paths = if everything { Vec::new() } else { vec!["src".to_owned()] };
        self.tell(Command::Restore { operation, checkpoint: 1, paths })
    }

    /// Completes a restore that has begun, crashes, and resumes the project if it is paused.
    fn crash_after_restore(&mut self, reboot: bool) {
        while matches!(&*self.project.state, ProjectState::Restoring(_)) {
            self.conclude_next(true);
        }
        if reboot {
            self.reboot()
        } else {
            self.recover()
        }
        if let ProjectState::Paused(paused) = &*self.project.state {
            assert!(paused.restored.is_some(), "the restore was lost in the crash");
            self.resume(false).expect("a restored project can be resumed");
        }
    }

    /// Reports a run as ready, which has an effect only on the current run of a live agent.
    fn observe_ready(&mut self, which: u8) {
        if self.announced.is_empty() {
            return;
        }
        let (agent, run) = self.announced[usize::from(which) % self.announced.len()].clone();
        let before = self.project.clone();
        let is_current = before.agents.get(&agent).is_some_and(|a| a.is_alive() && a.current_run_id() == Some(&run));
        self.tell(Command::Ready { agent, run: Some(run.clone()) }).expect("an observation is not refused");
        assert!(is_current || before == self.project, "the late report of {run} changed the state");
    }

    /// Checks the invariants that hold at every instant, and those that hold after everything has ended: without a crash,
    /// after a crash of the daemon now, and after a reboot now.
    fn check(&self) {
        self.invariant_frozen_agents_do_not_run();
        self.invariant_no_process_runs_on_restored_files();
        self.invariant_an_idle_project_makes_no_automatic_checkpoint();
        self.invariant_saved_activity_is_at_most_the_activity();
        let coming_back: Vec<AgentName> = match &*self.project.state {
            ProjectState::Resuming(_) => {
                let comes = |agent: &&Arc<Agent>| agent.is_paused() || matches!(agent.state, AgentState::Starting(_));
                self.project.agents.values().filter(comes).map(|agent| agent.name.clone()).collect()
            }
            _ => Vec::new(),
        };
        for happens in [None, Some(Move::Crash), Some(Move::Reboot)] {
            let mut model = self.clone();
            happens.into_iter().for_each(|what| model.make(what));
            model.settle();
            for agent in &coming_back {
                let state = &model.project.agents[agent].state;
                assert!(!matches!(state, AgentState::Interrupted { .. }), "the resume has lost {agent}: {state:?}");
            }
            model.invariant_no_operation_is_unfinished();
            model.invariant_the_kernel_agrees_with_the_state();
            model.invariant_a_broken_project_is_repaired_by_a_restore();
            model.invariant_the_kernel_agrees_with_the_state();
            model.invariant_an_idle_project_makes_no_automatic_checkpoint();
            model.invariant_saved_activity_is_at_most_the_activity();
        }
    }

    fn invariant_frozen_agents_do_not_run(&self) {
        if !self.project.stays_frozen() {
            return;
        }
        for (agent, run) in self.project.frozen_runs() {
            let runs = self.world.alive.get(&run).is_some_and(|process| !process.frozen);
            assert!(!runs, "{agent} runs in a project that is {}", self.project.state.status());
        }
    }

    /// The memory of a process that was frozen before a restore does not match the restored files.
    pub(super) fn invariant_no_process_runs_on_restored_files(&self) {
        let restored = match &*self.project.state {
            ProjectState::Restoring(run) => run.stage == RestoreStage::Applying,
            ProjectState::Broken(_) => true,
            ProjectState::Paused(paused) => paused.restored.is_some(),
            ProjectState::Resting(_) | ProjectState::Pausing(_) | ProjectState::Resuming(_) => false,
        };
        if restored {
            for (run, process) in &self.world.alive {
                assert!(process.frozen, "{run} runs on restored files");
            }
        }
    }

    fn invariant_no_operation_is_unfinished(&self) {
        match &*self.project.state {
            ProjectState::Pausing(_) | ProjectState::Resuming(_) | ProjectState::Restoring(_) => {
                panic!("unfinished: {:?}", self.project.state)
            }
            ProjectState::Resting(_) | ProjectState::Paused(_) => {}
            ProjectState::Broken(_) => {
                assert!(self.world.alive.is_empty(), "processes are alive on half restored files");
            }
        }
        assert!(self.project.checkpointing.is_none(), "a checkpoint was left unfinished");
    }

    /// A restore after one that was given up succeeds.
    fn invariant_a_broken_project_is_repaired_by_a_restore(&mut self) {
        let ProjectState::Broken(broken) = &*self.project.state else { return };
        let was_paused = matches!(broken.before, StableState::Paused(_));
        let operation = self.operation();
        self.tell(Command::Restore { operation, checkpoint: 1, paths: Vec::new() }).expect("a later restore begins");
        self.settle();
        match &*self.project.state {
            ProjectState::Paused(paused) => assert!(was_paused && paused.restored == Some(1)),
            ProjectState::Resting(_) => assert!(!was_paused),
            other => panic!("still broken: {other:?}"),
        }
    }

    fn invariant_an_idle_project_makes_no_automatic_checkpoint(&self) {
        for (trigger, ran) in &self.begun {
            let is_automatic = matches!(trigger, Trigger::Auto | Trigger::PhaseTransition);
            assert!(*ran || !is_automatic, "{trigger:?} although no agent ran");
        }
    }

    fn invariant_saved_activity_is_at_most_the_activity(&self) {
        let activity = &self.project.counters.activity;
        assert!(
            activity.saved.units <= activity.counters.units && activity.saved.changes <= activity.counters.changes,
            "{activity:?}"
        );
        assert!(activity.checkpoint <= self.project.counters.checkpoint, "{activity:?}");
    }

    fn invariant_the_kernel_agrees_with_the_state(&self) {
        // No process of an older run is left behind.
        for run in self.world.alive.keys() {
            let current = self.project.agents.values().any(|a| a.run().is_some_and(|r| r.id == *run));
            assert!(current, "{run} is left behind");
        }
        for agent in self.project.agents.values() {
            let process = agent.run().and_then(|run| self.world.alive.get(&run.id));
            match &agent.state {
                AgentState::Running(_) => {
                    assert!(process.is_some_and(|p| !p.frozen), "{} should run: {process:?}", agent.name);
                }
                AgentState::Frozen(_) => {
                    assert!(process.is_some_and(|p| p.frozen), "{} should be frozen: {process:?}", agent.name);
                }
                AgentState::Starting(_) | AgentState::Stopping { .. } => panic!("{} is {:?}", agent.name, agent.state),
                _ => assert!(process.is_none(), "{} should have no process", agent.name),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20_000, ..fermata_test_seeds::cases(4000) })]

    #[test]
    fn random_commands_outcomes_and_crashes_leave_nothing_unfinished(moves in prop::collection::vec(moves(), 1..60)) {
        let mut model = Model::new();
        for what in moves {
            model.make(what);
            model.check();
        }
    }
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

#[test]
fn a_restore_that_always_fails_is_given_up_and_leaves_no_agent_frozen() {
    let mut model = Model::new();
    model.make(Move::Run(0));
    model.settle();
    model.make(Move::Pause(PauseMode::Freeze));
    model.settle();
    model.make(Move::Restore { everything: true });
    model.conclude_next(true);
    let mut tries = 0;
    while let ProjectState::Restoring(run) = &*model.project.state {
        assert!(tries < 100, "never given up: {run:?}");
        tries += 1;
        model.conclude_next(false);
    }
    assert!(tries >= 6, "given up after {tries} tries");
    let ProjectState::Broken(broken) = &*model.project.state else { panic!("{:?}", model.project.state) };
    assert_eq!((broken.checkpoint, broken.safety), (1, 2));
    assert!(broken.error.data.hint.as_deref().is_some_and(|hint| hint.contains("checkpoint restore p 2")));
    model.settle();
    assert!(model.world.alive.is_empty(), "the frozen agent is ended");
    for refused in [
        Command::Run { agent: name(1), spec: spec(0), new: model.new_run() },
        Command::Resume { operation: model.operation(), respawn: model.respawns(false), over_budget: false },
    ] {
        let refusal = model.tell(refused).expect_err("no agent starts on half restored files");
        assert_eq!(refusal.code, fermata_protocol::Code::RestoreFailed);
    }
    // The state survives a restart of the daemon.
    model.recover();
    model.settle();
    model.invariant_a_broken_project_is_repaired_by_a_restore();
    let (operation, respawn) = (model.operation(), model.respawns(false));
    model.tell(Command::Resume { operation, respawn, over_budget: false }).expect("resumed");
    model.settle();
    model.invariant_the_kernel_agrees_with_the_state();
    assert_eq!(model.world.alive.len(), 1);
}
