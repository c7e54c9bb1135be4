//! Automatic checkpoints: what triggers them, what they cost, and when none is made.

use std::path::PathBuf;
use std::time::Duration;

use fermata_protocol::agent::AgentProgress;
use fermata_protocol::checkpoint::{CheckpointList, CheckpointView, Trigger};
use fermata_protocol::context::{ContextPut, ItemType, NewItem};
use fermata_protocol::event::Event;
use fermata_protocol::pause::PauseMode;
use fermata_protocol::project::{AutomaticCheckpoints, ProjectConfig, ProjectCreate, ProjectSet};
use fermata_protocol::subscription::EventsList;
use fermata_protocol::task::Phase;
use fermata_protocol::task::{TaskPut, TaskStatus};
use fermata_protocol::{Code, ProjectName};
use fermata_tests::passages::passages;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use serde_json::json;

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// The shortest interval: one second.
const OFTEN: AutomaticCheckpoints = AutomaticCheckpoints { every_ms: 1_000, ..AutomaticCheckpoints::NEVER };

const TELLING: &str = "scan.begun=tell,scan.unchanged=tell";

/// Longer than the interval of [`OFTEN`].
const LONGER: Duration = Duration::from_millis(1_500);

/// Creates a project with files in its workspace and these settings of checkpoints.
fn project_with(sandbox: &Sandbox, name: &str, automatic: AutomaticCheckpoints) {
    let create = ProjectCreate {
        name: project(name),
        workspace: furnished(sandbox, name).text().into(),
        description: String::new(),
        source: None,
        config: Some(ProjectConfig { automatic, ..ProjectConfig::default() }),
    };
    done(sandbox, &create);
}

/// Starts `web/worker` in such a project.
fn at_work(sandbox: &Sandbox, automatic: AutomaticCheckpoints) -> Ticker {
    project_with(sandbox, "web", automatic);
    Ticker::start(sandbox)
}

fn views(sandbox: &Sandbox, name: ProjectName) -> Vec<CheckpointView> {
    let mut views = done(sandbox, &CheckpointList { project: name, before: None, limit: None }).checkpoints;
    views.reverse();
    views
}

/// Waits until `web` has that many checkpoints, and returns them, oldest first.
#[track_caller]
fn wait_for_checkpoints(sandbox: &Sandbox, count: usize) -> Vec<CheckpointView> {
    wait_until(SOON, &format!("{count} checkpoints"), || views(sandbox, web()).len() >= count);
    let found = views(sandbox, web());
    assert_eq!(found.len(), count, "{:?}", found.iter().map(|view| view.trigger).collect::<Vec<_>>());
    found
}

fn events(sandbox: &Sandbox) -> Vec<Event> {
    let list = EventsList { cursor: None, filter: Default::default(), limit: Some(1_000) };
    done(sandbox, &list).events.into_iter().map(|recorded| recorded.event).collect()
}

/// Starts a daemon that records its scans for automatic checkpoints.
fn telling() -> Sandbox {
    Sandbox::builder().env(FAILPOINT, TELLING).start()
}

/// Asserts that scans find no change and publish and write nothing.
#[track_caller]
fn scans_find_nothing(sandbox: &Sandbox) {
    let (published, tried) = (events(sandbox).len(), operations(sandbox).len());
    let before = passages(sandbox.path(), "scan.unchanged");
    wait_until(SOON, "two scans without a change", || passages(sandbox.path(), "scan.unchanged") >= before + 2);
    assert_eq!(events(sandbox)[published..], []);
    assert_eq!(operations(sandbox).len(), tried);
}

/// Counts the scans that were begun for all events so far.
#[track_caller]
fn scans_begun(sandbox: &Sandbox) -> usize {
    // The actor handles one command after the other, and begins due scans after each.
    let again = ProjectSet { project: web(), description: Some("again".into()), phase: None, config: None };
    done(sandbox, &again);
    passages(sandbox.path(), "scan.begun")
}

fn units(sandbox: &Sandbox, units_done: u64) {
    let progress = AgentProgress {
        target: Some(worker()),
        percent: None,
        message: None,
        units_done: Some(units_done),
        phase: None,
    };
    done(sandbox, &progress);
}

#[test]
fn an_interval_makes_a_checkpoint_of_a_changed_project_only() {
    let sandbox = telling();
    let ticker = at_work(&sandbox, OFTEN);
    let first = wait_for_checkpoints(&sandbox, 1);
    assert_eq!((first[0].trigger, first[0].name.as_str()), (Trigger::Auto, "auto 1"));
    scans_find_nothing(&sandbox);
    is_untouched(&sandbox, &ticker, &[1]);
    sandbox.workspace("web").write("src/lib.rs", "//! Changed.\n");
    wait_for_checkpoints(&sandbox, 2);
    // Session files beside the workspace count as well.
    let items = vec![NewItem { kind: ItemType::Code, text: "fn main() {}".into(), pinned: false }];
    done(&sandbox, &ContextPut { target: Some(worker()), items });
    let third = wait_for_checkpoints(&sandbox, 3);
    assert_eq!(third[2].metadata.context_items, 1);
    // A changed mode is a change, reading a file is not.
    sandbox.workspace("web").read("README.md");
    scans_find_nothing(&sandbox);
    is_untouched(&sandbox, &ticker, &[1, 2, 3]);
    all_verify(&sandbox);
}

#[test]
fn units_of_progress_and_completed_tasks_make_a_checkpoint() {
    let mut sandbox = telling();
    at_work(&sandbox, AutomaticCheckpoints { every_units: 10, ..AutomaticCheckpoints::NEVER });
    units(&sandbox, 9);
    assert_eq!(scans_begun(&sandbox), 0);
    // The counters survive the daemon.
    sandbox.crash_and_restart();
    units(&sandbox, 10);
    assert_eq!(wait_for_checkpoints(&sandbox, 1)[0].trigger, Trigger::Auto);
    for n in 0..10 {
        let put = TaskPut {
            target: Some(worker()),
            id: None,
            title: Some(format!("task {n}")),
            status: Some(TaskStatus::Completed),
            percent: None,
        };
        done(&sandbox, &put);
    }
    assert_eq!(wait_for_checkpoints(&sandbox, 2)[1].metadata.tasks_done, 10);
    all_verify(&sandbox);
}

#[test]
fn a_new_phase_makes_a_checkpoint_and_an_idle_project_makes_none() {
    let sandbox = telling();
    at_work(&sandbox, AutomaticCheckpoints::default());
    let phase = |phase| ProjectSet { project: web(), description: None, phase: Some(phase), config: None };
    done(&sandbox, &phase(Phase::Review));
    let made = wait_for_checkpoints(&sandbox, 1);
    assert_eq!((made[0].trigger, made[0].metadata.phase), (Trigger::PhaseTransition, Phase::Review));
    sandbox.ctl(&["kill", "web"]);
    wait_until(SOON, "the agent to end", || show(&sandbox).project.agents_running == 0);
    let begun = scans_begun(&sandbox);
    done(&sandbox, &phase(Phase::Complete));
    assert_eq!(scans_begun(&sandbox), begun);
    only_these_are_left(&sandbox, &[1]);
}

#[test]
fn where_only_signals_can_stop_an_agent_it_runs_on() {
    let sandbox = Sandbox::builder().config(BY_SIGNALS).start();
    let ticker = at_work(&sandbox, OFTEN);
    let made = wait_for_checkpoints(&sandbox, 1);
    assert!(made[0].metadata.parts_ms.contains_key("snapshot"), "{made:?}");
    let created = events(&sandbox).into_iter().find_map(|event| match event {
        Event::CheckpointCreated { frozen_ms, .. } => Some(frozen_ms),
        _ => None,
    });
    assert_eq!(created, Some(0.0), "the agent was frozen");
    is_untouched(&sandbox, &ticker, &[1]);
}

#[test]
fn paused_time_does_not_count() {
    let sandbox = telling();
    let ticker = at_work(&sandbox, OFTEN);
    wait_for_checkpoints(&sandbox, 1);
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    sandbox.workspace("web").write("README.md", "# Changed while it is paused\n");
    let begun = scans_begun(&sandbox);
    // Only time triggers this checkpoint.
    std::thread::sleep(LONGER);
    assert_eq!(scans_begun(&sandbox), begun);
    resume(&sandbox).expect("resume");
    let made = wait_for_checkpoints(&sandbox, 3);
    assert_eq!(
        made.iter().map(|view| view.trigger).collect::<Vec<_>>(),
        [Trigger::Auto, Trigger::Pause, Trigger::Auto]
    );
    ticker.runs(SOON);
}

#[test]
fn a_failed_automatic_checkpoint_is_reported_once_and_tried_again_later() {
    let sandbox = Sandbox::start();
    let ticker = at_work(&sandbox, OFTEN);
    wait_for_checkpoints(&sandbox, 1);
    let (workspace, aside) = (sandbox.workspace("web").path().to_owned(), sandbox.path().join("aside"));
    std::fs::rename(&workspace, &aside).expect("take the workspace away");
    let failed = || -> Vec<(i64, Code)> {
        let list = EventsList { cursor: None, filter: Default::default(), limit: Some(1_000) };
        let failures = done(&sandbox, &list).events.into_iter().filter_map(|recorded| match recorded.event {
            Event::CheckpointFailed { error, .. } => Some((recorded.at.0, error.data.code)),
            _ => None,
        });
        failures.collect()
    };
    wait_until(SOON, "two failures to be reported", || failed().len() >= 2);
    let failures = failed();
    assert_eq!(failures[0].1, Code::WorkspaceRefused);
    // The retries back off: after 2 s, then 4 s.
    assert!(failures[1].0 - failures[0].0 >= 2_000, "{failures:?}");
    std::fs::rename(&aside, &workspace).expect("bring the workspace back");
    std::fs::write(workspace.join("new.txt"), "new\n").expect("write");
    wait_until(SOON, "the next try", || views(&sandbox, web()).len() == 2);
    assert!(the_agent(&sandbox).pid.is_some_and(|pid| !is_frozen(pid)));
    ticker.runs(SOON);
    all_verify(&sandbox);
}

#[test]
fn a_daemon_that_dies_in_an_automatic_checkpoint_leaves_nothing_and_the_next_makes_it() {
    for failpoint in ["pause.frozen", "checkpoint.captured", "checkpoint.sealed", "checkpoint.commit"] {
        let mut sandbox = Sandbox::builder().env(FAILPOINT, &format!("{failpoint}=abort")).start();
        project_with(&sandbox, "web", OFTEN);
        let ticker = Ticker::start(&sandbox);
        wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
        sandbox.forget_env(FAILPOINT);
        sandbox.crash_and_restart();
        wait_until(SOON, "the checkpoint", || !views(&sandbox, web()).is_empty());
        let made = views(&sandbox, web());
        assert_eq!(made[0].trigger, Trigger::Auto, "{failpoint}");
        settled(&sandbox);
        is_untouched(&sandbox, &ticker, &[made[0].id]);
        all_verify(&sandbox);
    }
}

#[test]
fn a_scan_leaves_nothing_behind_when_the_daemon_dies_in_it() {
    let mut sandbox = Sandbox::start();
    let ticker = at_work(&sandbox, OFTEN);
    wait_for_checkpoints(&sandbox, 1);
    // The last scan is not stored: a new daemon scans at once.
    sandbox.give_env(FAILPOINT, "history.pack.written=abort");
    sandbox.restart_to_its_death();
    ticker.runs(SOON);
    sandbox.forget_env(FAILPOINT);
    sandbox.give_env(FAILPOINT, TELLING);
    sandbox.start_daemon();
    settled(&sandbox);
    scans_find_nothing(&sandbox);
    is_untouched(&sandbox, &ticker, &[1]);
}

#[test]
fn the_daemon_saves_what_has_changed_before_it_ends_and_leaves_the_agents() {
    let mut sandbox = Sandbox::start();
    let ticker = at_work(&sandbox, AutomaticCheckpoints { before_shutdown: true, ..AutomaticCheckpoints::NEVER });
    for _ in 0..2 {
        assert!(sandbox.stop_daemon().success());
        ticker.runs(SOON);
        sandbox.start_daemon();
        assert_eq!(wait_for_checkpoints(&sandbox, 1)[0].trigger, Trigger::Shutdown, "the second time nothing changed");
    }
    sandbox.workspace("web").write("README.md", "# Changed\n");
    assert!(sandbox.stop_daemon().success());
    sandbox.start_daemon();
    wait_for_checkpoints(&sandbox, 2);
    is_untouched(&sandbox, &ticker, &[1, 2]);
    all_verify(&sandbox);
}

#[test]
fn a_pause_does_not_wait_for_scans() {
    let sandbox = Sandbox::start();
    let ticker = at_work(&sandbox, OFTEN);
    for n in 0..10 {
        sandbox.workspace("web").write("README.md", format!("# {n}\n"));
        pause(&sandbox, PauseMode::Freeze).expect("pause");
        ticker.stands_still();
        assert!(resume(&sandbox).expect("resume").success);
        ticker.runs(SOON);
    }
    all_verify(&sandbox);
}

#[test]
fn those_of_many_projects_come_a_few_at_once() {
    let sandbox = Sandbox::start();
    let names: Vec<String> = (0..12).map(|n| format!("p{n}")).collect();
    for name in &names {
        project_with(&sandbox, name, OFTEN);
        Ticker::running(&sandbox, name, "worker", TICK);
    }
    wait_until(SOON, "every project to have one", || {
        names.iter().all(|name| !views(&sandbox, project(name)).is_empty())
    });
    let (mut now, mut most) = (0_i32, 0);
    for event in events(&sandbox) {
        match event {
            Event::CheckpointStarted { .. } => now += 1,
            Event::CheckpointCreated { .. } | Event::CheckpointFailed { .. } => now -= 1,
            _ => {}
        }
        most = most.max(now);
    }
    assert!((1..=2).contains(&most), "{most} at once");
}

#[test]
fn the_command_line_and_the_declaration_set_them() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "-w", workspace.text(), "--checkpoint-every", "5m"]);
    sandbox.ctl(&["project", "set", "web", "--checkpoint-units", "0", "--checkpoint-on-phase", "false"]);
    let set = show(&sandbox).config.automatic;
    assert_eq!(
        set,
        AutomaticCheckpoints { every_units: 0, every_ms: 300_000, on_phase_change: false, before_shutdown: true }
    );
    let shown = sandbox.ctl(&["status", "web"]);
    assert!(shown.contains("every 5m of run time, on daemon shutdown"), "{shown}");
    workspace.write(
        "fermata.toml",
        "[project]\nname = \"web\"\n[project.config]\nautomatic = { every_ms = \"30s\", every_units = 5 }\n\
         [agents.worker]\ncommand = \"sleep 1000\"\n",
    );
    let file: PathBuf = workspace.path().join("fermata.toml");
    sandbox.ctl(&["up", "--file", file.to_str().expect("a temporary path is ASCII")]);
    let shown = sandbox.ctl_json(&["project", "show", "web"]);
    assert_eq!(shown["config"]["automatic"]["every_ms"], json!(30_000), "{shown}");
    assert_eq!(show(&sandbox).config.automatic.every_units, 5);
}
