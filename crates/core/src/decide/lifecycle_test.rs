//! Supervision of agents: dependencies, restarts, timeouts, readiness, staleness.

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::{Code, RunId, UnixMillis};

use super::model::*;
use crate::agent::AgentState;
use crate::command::Command;
use crate::deadlines;
use crate::effect::Effect;
use crate::project::ProjectState;

fn run(model: &mut Model, agent: u8) {
    let new = model.new_run();
    model.tell(Command::Run { agent: name(agent), spec: spec(agent), new }).expect("it may run");
    model.settle();
}

fn status(model: &Model, agent: u8) -> AgentStatus {
    model.project.agents[&name(agent)].status(false)
}

fn exits(model: &mut Model, agent: u8, code: i32) {
    let run = model.run_of(&name(agent)).expect("it has a run");
    model.end(&run, code);
    model.report_end(name(agent), run);
    model.settle();
}

fn ready(model: &mut Model, agent: u8) {
    model.tell(Command::Ready { agent: name(agent), run: None }).expect("it runs");
    model.settle();
}

fn pause(model: &mut Model, mode: PauseMode) {
    let operation = model.operation();
    model
        .tell(Command::Pause { operation, cause: PauseCause::Person, reason: None, mode, grace_ms: None })
        .expect("it may pause");
    model.settle();
    assert!(matches!(&*model.project.state, ProjectState::Paused(_)));
}

fn resume(model: &mut Model) {
    let (operation, respawn) = (model.operation(), model.respawns(false));
    model.tell(Command::Resume { operation, respawn, over_budget: false }).expect("it is paused");
    model.settle();
}

#[test]
fn a_stop_over_restored_files_has_no_grace_after_a_crash_either() {
    let mut model = Model::new();
    run(&mut model, 0);
    pause(&mut model, PauseMode::Freeze);
    let operation = model.operation();
    model.tell(Command::Restore { operation, checkpoint: 1, paths: Vec::new() }).expect("it is paused");
    model.settle();
    let run = model.run_of(&name(0)).expect("it has a run");
    let kill = Effect::Kill { agent: name(0), run };
    model.tell(Command::Stop { agent: Some(name(0)), grace_ms: Some(10) }).expect("it is frozen");
    assert_eq!(model.pending, std::slice::from_ref(&kill));
    // The daemon is killed before it has carried the kill out.
    model.recover();
    assert_eq!(model.pending, [kill]);
    model.settle();
    assert_eq!(status(&model, 0), AgentStatus::Exited);
}

#[test]
fn a_broken_project_whose_next_restore_a_crash_undid_ends_what_is_frozen() {
    let mut model = Model::new();
    run(&mut model, 0);
    pause(&mut model, PauseMode::Freeze);
    let restore = |model: &mut Model| {
        let operation = model.operation();
        model.tell(Command::Restore { operation, checkpoint: 1, paths: Vec::new() }).expect("nothing is running");
    };
    restore(&mut model);
    let plan = model.pending.remove(0);
    model.conclude(plan, true);
    while matches!(&*model.project.state, ProjectState::Restoring(_)) {
        let apply = model.pending.remove(0);
        model.conclude(apply, false);
    }
    // Another restore is requested before the agent has ended.
    let park = Effect::Park { runs: model.project.frozen_runs() };
    assert!(model.pending.contains(&park), "{:?}", model.pending);
    restore(&mut model);
    model.recover();
    assert!(matches!(&*model.project.state, ProjectState::Broken(_)));
    assert!(model.pending.contains(&park), "{:?}", model.pending);
    model.settle();
    assert!(model.world.alive.is_empty());
}

/// Otherwise the undo could thaw agents that a later pause has frozen.
#[test]
fn nothing_begins_before_a_cancelled_checkpoint_is_undone() {
    for crashes in [false, true] {
        let mut model = Model::new();
        run(&mut model, 0);
        let operation = model.operation();
        model.tell(Command::Checkpoint { operation: operation.clone(), trigger: Trigger::Manual }).expect("it begins");
        model.tell(Command::Cancel { operation: operation.clone() }).expect("it is in progress");
        model.tell(Command::Cancel { operation: operation.clone() }).expect("it is being undone");
        let outcome = Ok((Box::new(model.view(1, &operation)), 1.0));
        model.tell(Command::Checkpointed { operation: operation.clone(), outcome, imported: false }).expect("late");
        let shown = crate::view::operation(&model.project).expect("it is being undone");
        assert_eq!(shown.error.map(|error| error.data.code), Some(Code::OperationCancelled));
        let pause = Command::Pause {
            operation: model.operation(),
            cause: PauseCause::Person,
            reason: None,
            mode: PauseMode::Freeze,
            grace_ms: None,
        };
        let refusal = model.tell(pause.clone()).expect_err("a checkpoint is being undone");
        assert_eq!(refusal.code, Code::OperationInProgress);
        if crashes {
            model.recover();
        }
        model.settle();
        assert!(model.project.checkpointing.is_none());
        model.tell(pause).expect("it may pause");
        model.settle();
        assert!(model.project.agents[&name(0)].is_frozen());
    }
}

/// The actor repeats a report that is refused.
#[test]
fn a_late_report_of_readiness_changes_nothing() {
    let mut model = Model::new();
    run(&mut model, 1);
    let observed = |model: &mut Model, run: RunId| {
        let before = model.project.clone();
        model.tell(Command::Ready { agent: name(1), run: Some(run) }).expect("an observation is not refused");
        assert_eq!(model.project, before);
    };
    let first = model.run_of(&name(1)).expect("it has a run");
    let new = model.new_run();
    model.tell(Command::Restart { agent: name(1), new }).expect("it runs");
    model.settle();
    observed(&mut model, first);
    let second = model.run_of(&name(1)).expect("it has a run");
    pause(&mut model, PauseMode::Park);
    observed(&mut model, second.clone());
    let refusal = model.tell(Command::Ready { agent: name(1), run: None }).expect_err("it is parked");
    assert_eq!(refusal.code, Code::AgentNotRunning);
    model.tell(Command::Stop { agent: None, grace_ms: None }).expect("it is parked");
    model.settle();
    observed(&mut model, second.clone());
    model.tell(Command::RemoveAgent { agent: name(1) }).expect("it has ended");
    observed(&mut model, second);
}

#[test]
fn a_dependent_waits_until_the_other_is_ready_and_no_longer() {
    let mut model = Model::new();
    run(&mut model, 1);
    run(&mut model, 2);
    assert_eq!(status(&model, 1), AgentStatus::Running);
    let view = crate::view::agent(&model.project, &model.project.agents[&name(2)], UnixMillis(model.clock));
    assert_eq!((view.status, view.detail.as_deref()), (AgentStatus::Starting, Some("waits for a1")));
    assert_eq!(view.waits_for, [name(1)]);
    ready(&mut model, 1);
    assert_eq!(status(&model, 2), AgentStatus::Running);
}

#[test]
fn a_wait_survives_a_crash_and_a_stop_calls_it_off() {
    let mut model = Model::new();
    run(&mut model, 1);
    run(&mut model, 2);
    model.recover();
    model.settle();
    assert_eq!(status(&model, 2), AgentStatus::Starting);
    model.tell(Command::Stop { agent: Some(name(2)), grace_ms: None }).expect("it may be stopped");
    model.settle();
    assert_eq!(status(&model, 2), AgentStatus::Exited);
    ready(&mut model, 1);
    assert_eq!(status(&model, 2), AgentStatus::Exited, "the stop is permanent");
}

#[test]
fn unknown_and_circular_dependencies_are_refused() {
    let mut model = Model::new();
    let new = model.new_run();
    let error = model.tell(Command::Run { agent: name(2), spec: spec(2), new }).expect_err("a1 is not there");
    assert!(error.code == Code::InvalidParams && error.message.contains("a1"), "{error:?}");
    run(&mut model, 1);
    run(&mut model, 2);
    let mut circular = spec(1);
    circular.supervision.depends_on = vec![fermata_protocol::supervision::Dependency {
        agent: name(2),
        until: fermata_protocol::supervision::DependencyState::Started,
    }];
    exits(&mut model, 1, 0);
    model.tell(Command::Stop { agent: Some(name(1)), grace_ms: None }).expect("it may be stopped");
    model.settle();
    let new = model.new_run();
    let error = model.tell(Command::Run { agent: name(1), spec: circular, new }).expect_err("a circle");
    assert!(error.message.contains("a1 -> a2 -> a1"), "{}", error.message);
}

#[test]
fn an_agent_that_fails_backs_off_and_is_given_up_after_its_limit() {
    let mut model = Model::new();
    run(&mut model, 1);
    for start in 1..=3_u32 {
        exits(&mut model, 1, 1);
        assert_eq!(status(&model, 1), AgentStatus::Backoff, "start {start}");
        let at = deadlines::next(&model.project, UnixMillis(model.clock)).expect("a start is to come");
        assert!(at.0 - model.clock <= 9_000);
        model.clock = at.0;
        model.settle();
        assert_eq!(status(&model, 1), AgentStatus::Running, "start {start}");
    }
    exits(&mut model, 1, 1);
    assert_eq!(status(&model, 1), AgentStatus::Failed);
    let AgentState::Failed { detail: Some(detail), .. } = &model.project.agents[&name(1)].state else {
        panic!("a reason")
    };
    assert!(detail.contains("3 times"), "{detail}");
    let new = model.new_run();
    model.tell(Command::Restart { agent: name(1), new }).expect("a person may try again");
    model.settle();
    exits(&mut model, 1, 1);
    assert_eq!(status(&model, 1), AgentStatus::Backoff, "and begins a new streak");
}

#[test]
fn a_backoff_waits_for_the_end_of_a_pause() {
    let mut model = Model::new();
    run(&mut model, 0);
    run(&mut model, 1);
    exits(&mut model, 1, 1);
    pause(&mut model, PauseMode::Freeze);
    model.clock += 100_000;
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::Backoff, "nothing starts in a paused project");
    resume(&mut model);
    assert_eq!(status(&model, 1), AgentStatus::Running);
}

#[test]
fn when_time_is_up_a_checkpoint_comes_first_and_paused_time_does_not_count() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    model.clock += 30_000;
    pause(&mut model, PauseMode::Freeze);
    model.clock += 500_000;
    resume(&mut model);
    model.clock += 19_000;
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::Running, "49 of 50 seconds have passed");
    model.clock += 1_000;
    model.follow_up();
    let trigger = model.project.checkpointing.as_ref().map(|run| run.trigger);
    assert_eq!((trigger, status(&model, 1)), (Some(Trigger::Timeout), AgentStatus::Running));
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::TimedOut);
    let start = model.new_start();
    model.tell(Command::Start { agent: name(1), start, requested: true }).expect("it can be brought back");
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::Running);
}

#[test]
fn a_timeout_whose_checkpoint_a_crash_undid_still_ends_the_agent() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    model.clock += 50_000;
    model.follow_up();
    assert!(model.project.checkpointing.is_some());
    model.recover();
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::TimedOut);
}

#[test]
fn parking_is_part_of_the_same_time() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    model.clock += 40_000;
    pause(&mut model, PauseMode::Park);
    resume(&mut model);
    ready(&mut model, 1);
    model.clock += 10_000;
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::TimedOut);
}

#[test]
fn an_agent_that_is_not_ready_in_time_counts_as_failed() {
    let mut model = Model::new();
    run(&mut model, 1);
    model.clock += 2_000;
    model.settle();
    // Its policy restarts it.
    assert_eq!(status(&model, 1), AgentStatus::Backoff);
}

#[test]
fn only_an_agent_that_has_reported_is_stale_and_not_while_it_waits_for_a_person() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    run(&mut model, 2);
    model.clock += 10_000;
    model.settle();
    assert_eq!(model.project.agents[&name(2)].runs, 1, "it never reported");
    let ask = Command::Ask { agent: name(2), text: "may I?".into(), choices: Vec::new() };
    model.tell(ask).expect("it may ask");
    model.clock += 10_000;
    model.settle();
    assert_eq!(model.project.agents[&name(2)].runs, 1, "it waits for a person");
    model.tell(Command::Answer { id: 1, answer: "yes".into() }).expect("it is open");
    model.clock += 2_400;
    model.settle();
    assert_eq!(model.project.agents[&name(2)].runs, 1);
    model.clock += 100;
    model.settle();
    assert_eq!((model.project.agents[&name(2)].runs, status(&model, 2)), (2, AgentStatus::Running));
}

#[test]
fn after_a_reboot_agents_return_by_policy_and_paused_ones_stay_paused() {
    let mut model = Model::new();
    run(&mut model, 0);
    run(&mut model, 1);
    ready(&mut model, 1);
    run(&mut model, 2);
    model.world = World::default();
    model.recover();
    model.follow_up();
    assert_eq!(status(&model, 0), AgentStatus::Interrupted, "nothing says that it should return");
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::Running);
    assert_eq!(status(&model, 2), AgentStatus::Backoff, "it waits until the other is ready");
    ready(&mut model, 1);
    assert_eq!(status(&model, 2), AgentStatus::Running);
    pause(&mut model, PauseMode::Freeze);
    model.world = World::default();
    model.recover();
    model.settle();
    for agent in [1, 2] {
        assert!(matches!(model.project.agents[&name(agent)].state, AgentState::Parked(_)));
    }
}

#[test]
fn with_recovery_switched_off_nothing_returns() {
    let mut model = Model::new();
    run(&mut model, 1);
    let run = model.run_of(&name(1)).expect("it has a run");
    model.end(&run, 1);
    let new = model.new_run();
    let then = crate::command::AfterEnd::Stay;
    let exit = ExitStatus::Code(1);
    let command =
        Command::RunEnded { agent: name(1), run, exit, detail: None, ended_at: UnixMillis(model.clock), new, then };
    model.tell(command).expect("not refused");
    assert!(!model.pending.iter().any(|effect| matches!(effect, Effect::Launch { .. })));
    assert_eq!(status(&model, 1), AgentStatus::Failed);
}

#[test]
fn downtime_does_not_count_as_running_time() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    model.clock += 10_000;
    let last_seen = [(name(1), UnixMillis(model.clock))].into();
    model.world = World::default();
    model.pending.clear();
    model.clock += 8 * 3_600_000;
    let observed = [(name(1), crate::command::RecoveredRun::Lost { detail: "gone".into() })].into();
    let respawn = model.respawns(false);
    model.tell(Command::Recover { agents: observed, respawn, last_seen }).expect("recovery is not refused");
    model.settle();
    let agent = &model.project.agents[&name(1)];
    assert_eq!(agent.status(false), AgentStatus::Running);
    let left = crate::view::agent(&model.project, agent, UnixMillis(model.clock)).time_left_ms;
    assert!(left.is_some_and(|left| (39_000..=40_000).contains(&left)), "{left:?} of 50 s");
}

#[test]
fn a_restart_whose_shim_dies_still_starts_the_agent() {
    let mut model = Model::new();
    run(&mut model, 0);
    let new = model.new_run();
    model.tell(Command::Restart { agent: name(0), new }).expect("it may be restarted");
    model.pending.clear();
    let lost = model.run_of(&name(0)).expect("it has a run");
    model.world.alive.remove(&lost);
    let then = crate::command::AfterEnd::ByPolicy;
    model
        .tell(Command::RunLost { agent: name(0), run: lost, detail: "its shim was killed".into(), then })
        .expect("a report is not refused");
    model.settle();
    assert_eq!((status(&model, 0), model.project.agents[&name(0)].runs), (AgentStatus::Running, 2));
}

#[test]
fn a_kill_of_an_agent_whose_time_is_up_leaves_it_timed_out() {
    let mut model = Model::new();
    run(&mut model, 1);
    ready(&mut model, 1);
    model.clock += 50_000;
    model.follow_up();
    let at = model.pending.iter().position(|effect| matches!(effect, Effect::Checkpoint { .. })).expect("one");
    let effect = model.pending.remove(at);
    model.conclude(effect, true);
    model.follow_up();
    assert_eq!(status(&model, 1), AgentStatus::Stopping);
    model.tell(Command::Kill { agent: Some(name(1)) }).expect("it may be killed");
    model.settle();
    assert_eq!(status(&model, 1), AgentStatus::TimedOut);
}

#[test]
fn after_a_restore_agents_continue_with_the_restored_context() {
    let mut model = Model::new();
    run(&mut model, 0);
    for _ in 0..2 {
        let operation = model.operation();
        model.tell(Command::Checkpoint { operation, trigger: Trigger::Manual }).expect("it may");
        model.settle();
    }
    assert_eq!(model.project.counters.context, 2);
    exits(&mut model, 0, 1);
    let operation = model.operation();
    model.tell(Command::Restore { operation, checkpoint: 1, paths: Vec::new() }).expect("no agent runs");
    model.settle();
    assert_eq!((model.project.counters.context, model.project.counters.checkpoint), (1, 3));
}

#[test]
fn an_imported_checkpoint_changes_neither_the_agents_context_nor_the_saved_activity() {
    let mut model = Model::new();
    run(&mut model, 0);
    let make = |model: &mut Model| {
        let operation = model.operation();
        model.tell(Command::Checkpoint { operation, trigger: Trigger::Manual }).expect("it may");
        model.settle();
    };
    make(&mut model);
    let saved = model.project.counters.activity;
    model.imports = true;
    make(&mut model);
    assert_eq!((model.project.counters.context, model.project.counters.checkpoint), (1, 2));
    assert_eq!(model.project.counters.activity, saved);
    assert!(model.project.checkpointing.is_none());
    model.imports = false;
    make(&mut model);
    assert_eq!(model.project.counters.context, 3);
}
