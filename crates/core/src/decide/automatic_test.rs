//! Automatic checkpoints: when they are due, and when they are not.

use fermata_protocol::UnixMillis;
use fermata_protocol::agent::Progress;
use fermata_protocol::checkpoint::Trigger;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::{AutomaticCheckpoints, ProjectConfig};
use fermata_protocol::task::Phase;
use fermata_protocol::task::TaskStatus;

use super::model::*;
use crate::automatic;
use crate::command::Command;
use crate::effect::Effect;

/// An agent that runs, in a project whose checkpoints are due after 10 units or two minutes.
fn at_work() -> Model {
    let mut model = Model::new();
    let new = model.new_run();
    model.tell(Command::Run { agent: name(0), spec: spec(0), new }).expect("it may run");
    model.settle();
    model
}

fn configure(model: &mut Model, automatic: AutomaticCheckpoints) {
    let config = ProjectConfig { automatic, ..ProjectConfig::default() };
    model.tell(Command::Set { description: None, phase: None, config: Some(config) }).expect("accepted");
    model.settle();
}

fn report(model: &mut Model, units: Option<u64>) {
    let progress =
        Progress { percent: None, message: Some("on".into()), units_done: units, reported_at: UnixMillis(model.clock) };
    model.tell(Command::Progress { agent: name(0), progress, phase: None }).expect("accepted");
    model.settle();
}

fn wait(model: &mut Model, ms: i64) {
    model.clock += ms;
    model.settle();
}

fn triggers(model: &Model) -> Vec<Trigger> {
    model.begun.iter().map(|(trigger, _)| *trigger).collect()
}

fn pause(model: &mut Model) {
    let operation = model.operation();
    let (cause, mode) = (PauseCause::Person, PauseMode::Freeze);
    model.tell(Command::Pause { operation, cause, reason: None, mode, grace_ms: None }).expect("it may pause");
    model.settle();
}

fn resume(model: &mut Model) {
    let (operation, respawn) = (model.operation(), model.respawns(false));
    model.tell(Command::Resume { operation, respawn, over_budget: false }).expect("it is paused");
    model.settle();
}

fn phase(model: &mut Model, phase: Phase) {
    model.tell(Command::Set { description: None, phase: Some(phase), config: None }).expect("accepted");
    model.settle();
}

#[test]
fn a_checkpoint_is_due_after_two_minutes_of_running_and_only_where_something_changed() {
    let mut model = at_work();
    wait(&mut model, 119_000);
    assert_eq!((triggers(&model), model.scans), (vec![], 0));
    // Each project's interval is longer by at most a sixteenth.
    wait(&mut model, 9_000);
    assert_eq!(triggers(&model), [Trigger::Auto], "the first checkpoint");
    wait(&mut model, 130_000);
    assert_eq!((triggers(&model).len(), model.scans), (1, 2), "nothing has changed");
    wait(&mut model, 60_000);
    assert_eq!(model.scans, 2, "no scan before the end of the interval");
    model.dirty = true;
    wait(&mut model, 70_000);
    assert_eq!(triggers(&model).len(), 2);
}

#[test]
fn changes_of_the_context_count_as_well() {
    let mut model = at_work();
    wait(&mut model, 130_000);
    model.tell(Command::AddContext { agent: name(0), items: 1, tokens: 5 }).expect("accepted");
    wait(&mut model, 130_000);
    assert_eq!(triggers(&model).len(), 2);
    wait(&mut model, 130_000);
    assert_eq!(triggers(&model).len(), 2);
}

#[test]
fn ten_units_of_progress_make_one_and_a_burst_makes_no_more() {
    let mut model = at_work();
    wait(&mut model, 2_000);
    report(&mut model, Some(9));
    assert_eq!(triggers(&model), []);
    report(&mut model, None);
    report(&mut model, Some(10));
    assert_eq!(triggers(&model), [Trigger::Auto]);
    model.dirty = true;
    for units in [20, 40, 60] {
        report(&mut model, Some(units));
    }
    assert_eq!(triggers(&model).len(), 1, "not within a second of the one before");
    wait(&mut model, 1_000);
    assert_eq!(triggers(&model).len(), 2);
    // A new run counts from zero.
    wait(&mut model, 2_000);
    model.dirty = true;
    report(&mut model, Some(9));
    assert_eq!(triggers(&model).len(), 2);
    report(&mut model, Some(12));
    assert_eq!(triggers(&model).len(), 3);
}

#[test]
fn a_completed_task_is_a_unit_once() {
    let mut model = at_work();
    configure(&mut model, AutomaticCheckpoints { every_units: 1, every_ms: 0, ..AutomaticCheckpoints::default() });
    wait(&mut model, 2_000);
    let put = |model: &mut Model, id, status| {
        let title = Some("write it".to_owned());
        let command = Command::PutTask { agent: Some(name(0)), id, title, status: Some(status), percent: None };
        model.tell(command).expect("accepted");
        wait(model, 2_000);
    };
    put(&mut model, None, TaskStatus::InProgress);
    assert_eq!(triggers(&model), []);
    put(&mut model, Some(1), TaskStatus::Completed);
    assert_eq!(triggers(&model).len(), 1);
    put(&mut model, Some(1), TaskStatus::Completed);
    assert_eq!(triggers(&model).len(), 1);
}

#[test]
fn a_new_phase_makes_one_of_its_own_kind() {
    let mut model = at_work();
    wait(&mut model, 2_000);
    phase(&mut model, Phase::Review);
    assert_eq!(triggers(&model), [Trigger::PhaseTransition]);
    phase(&mut model, Phase::Review);
    wait(&mut model, 2_000);
    assert_eq!(triggers(&model).len(), 1);
}

#[test]
fn nothing_is_due_where_it_is_switched_off() {
    let mut model = at_work();
    configure(&mut model, AutomaticCheckpoints::NEVER);
    model.dirty = true;
    report(&mut model, Some(1_000));
    phase(&mut model, Phase::Review);
    wait(&mut model, 10_000_000);
    assert_eq!((triggers(&model), model.scans), (vec![], 0));
    assert!(!automatic::due_before_shutdown(&model.project));
    assert_eq!(automatic::next(&model.project, &model.unchanged, UnixMillis(model.clock)), None);
}

#[test]
fn an_idle_project_makes_none_and_its_clock_stops() {
    let mut model = at_work();
    wait(&mut model, 100_000);
    let run = model.run_of(&name(0)).expect("it runs");
    model.end(&run, 0);
    model.report_end(name(0), run);
    phase(&mut model, Phase::Complete);
    wait(&mut model, 10_000_000);
    assert_eq!(triggers(&model), []);
    assert!(!automatic::due_before_shutdown(&model.project));
    let new = model.new_run();
    model.tell(Command::Restart { agent: name(0), new }).expect("it may run again");
    model.settle();
    assert_eq!(triggers(&model), [Trigger::PhaseTransition], "the checkpoint is still due");
}

#[test]
fn paused_time_does_not_count_and_the_checkpoint_of_a_pause_does() {
    let mut model = at_work();
    wait(&mut model, 100_000);
    pause(&mut model);
    wait(&mut model, 10_000_000);
    resume(&mut model);
    wait(&mut model, 100_000);
    assert_eq!((triggers(&model), model.scans), (vec![], 0), "the pause made one 100 seconds ago");
    model.dirty = true;
    wait(&mut model, 30_000);
    assert_eq!(triggers(&model), [Trigger::Auto]);
}

#[test]
fn what_changes_while_a_checkpoint_is_made_is_saved_by_the_next() {
    let mut model = at_work();
    let operation = model.operation();
    model.tell(Command::Checkpoint { operation, trigger: Trigger::Manual }).expect("it may");
    model.tell(Command::SaveState { agent: name(0), bytes: 3 }).expect("accepted");
    model.settle();
    assert!(model.project.counters.activity.has_changed());
    wait(&mut model, 130_000);
    assert_eq!(triggers(&model), [Trigger::Manual, Trigger::Auto]);
}

#[test]
fn while_something_is_under_way_nothing_is_due() {
    let mut model = at_work();
    let operation = model.operation();
    model.tell(Command::Checkpoint { operation, trigger: Trigger::Manual }).expect("it may");
    model.clock += 200_000;
    model.follow_up();
    assert_eq!(triggers(&model), [Trigger::Manual]);
    model.settle();
    assert_eq!(triggers(&model), [Trigger::Manual], "it made one");
}

#[test]
fn the_wait_after_a_failure_doubles_up_to_a_limit() {
    let mut model = at_work();
    model.dirty = true;
    let mut waits = Vec::new();
    for _ in 0..6 {
        let at = automatic::next(&model.project, &model.unchanged, UnixMillis(model.clock)).expect("one will be due");
        waits.push((at.0 - model.clock) / 60_000);
        model.clock = at.0;
        model.follow_up();
        let effect = model.pending.remove(0);
        assert!(matches!(effect, Effect::Checkpoint { .. }));
        model.conclude(effect, false);
    }
    assert_eq!(waits, [2, 4, 8, 16, 30, 30], "{waits:?}");
    assert_eq!(model.project.counters.activity.failures, 6);
    model.clock += 1_900_000;
    model.settle();
    assert_eq!(model.project.counters.activity.failures, 0, "a success resets the count");
    assert_eq!(triggers(&model).len(), 7);
}

#[test]
fn a_crash_forgets_neither_units_nor_time() {
    let mut model = at_work();
    wait(&mut model, 2_000);
    report(&mut model, Some(7));
    wait(&mut model, 60_000);
    model.recover();
    model.settle();
    report(&mut model, Some(10));
    assert_eq!(triggers(&model), [Trigger::Auto]);
    wait(&mut model, 100_000);
    model.recover();
    model.dirty = true;
    wait(&mut model, 30_000);
    assert_eq!(triggers(&model).len(), 2);
}

#[test]
fn after_a_restore_the_project_differs_from_the_newest_checkpoint() {
    let mut model = at_work();
    wait(&mut model, 130_000);
    let run = model.run_of(&name(0)).expect("it runs");
    model.end(&run, 0);
    model.report_end(name(0), run);
    let operation = model.operation();
    model.tell(Command::Restore { operation, checkpoint: 1, paths: Vec::new() }).expect("it may");
    model.settle();
    let activity = model.project.counters.activity;
    assert_eq!((activity.checkpoint, activity.has_changed()), (2, true));
}
