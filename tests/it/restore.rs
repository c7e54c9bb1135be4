//! `checkpoint.restore` and `resume --checkpoint`: files, rows and context are restored exactly, nothing else changes,
//! and a crash at any instant leaves the whole restore or nothing of it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use fermata_protocol::agent::{AgentStop, StateGet, StatePut};
use fermata_protocol::checkpoint::{ChangeKind, CheckpointRestore, CheckpointRestoreResult, CheckpointShow, Trigger};
use fermata_protocol::context::{ContextItem, ContextList, ContextPut, ContextSearch, ItemType, NewItem};
use fermata_protocol::pause::{PauseMode, ProjectResume, ResumeMethod};
use fermata_protocol::project::{ProjectSet, ProjectStatus};
use fermata_protocol::task::Phase;
use fermata_protocol::task::{TaskList, TaskPut, TaskStatus, TaskView};
use fermata_protocol::{Code, ProjectName, Target};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::workspace::fingerprint;
use fermata_tests::{Fingerprint, Sandbox, Workspace, process};
use serde_json::{Value, json};

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

fn restore(sandbox: &Sandbox, number: u64) -> CheckpointRestoreResult {
    done(sandbox, &CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() })
}

/// Starts an agent and stops it again: its context stays.
fn at_rest(sandbox: &Sandbox) -> Workspace {
    Ticker::start(sandbox);
    done(sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || status(sandbox) == ProjectStatus::Stopped);
    sandbox.workspace("web")
}

/// Returns the files of the workspace without the times of directories, which a restore sets, but which the changes of
/// a test disturb.
fn files(workspace: &Workspace) -> BTreeMap<String, (i64, i64, String)> {
    let all: Fingerprint = workspace.fingerprint();
    let is_file = |path: &std::path::Path| !workspace.path().join(path).is_dir();
    all.into_iter().filter(|(path, _)| is_file(path)).map(|(path, what)| (path.display().to_string(), what)).collect()
}

/// The data of a project that a restore restores, besides the files.
#[derive(Debug, PartialEq)]
struct StoredData {
    phase: Phase,
    tasks: Vec<TaskView>,
    items: Vec<ContextItem>,
    state: Value,
}

fn stored_data(sandbox: &Sandbox, project: &ProjectName, worker: &Target) -> StoredData {
    let list = ContextList { target: Some(worker.clone()), tier: None, archived: None, before: None, limit: None };
    let shown = done(sandbox, &fermata_protocol::project::ProjectShow { project: project.clone() });
    StoredData {
        phase: shown.project.phase,
        tasks: done(sandbox, &TaskList { project: Some(project.clone()) }).tasks,
        items: done(sandbox, &list).items,
        state: done(sandbox, &StateGet { target: Some(worker.clone()) }).state,
    }
}

/// Adds a context item and a task to an agent.
fn learn(sandbox: &Sandbox, worker: &Target, what: &str) {
    let item = NewItem { kind: ItemType::Code, text: format!("knows {what}"), pinned: false };
    done(sandbox, &ContextPut { target: Some(worker.clone()), items: vec![item] });
    let task = TaskPut {
        target: Some(worker.clone()),
        id: None,
        title: Some(format!("do {what}")),
        status: Some(TaskStatus::InProgress),
        percent: Some(10.0),
    };
    done(sandbox, &task);
    done(sandbox, &StatePut { target: Some(worker.clone()), state: json!({ "about": what }) });
}

fn found(sandbox: &Sandbox, word: &str) -> usize {
    done(sandbox, &ContextSearch { target: Some(worker()), query: word.into(), limit: None }).items.len()
}

#[test]
fn files_come_back_exactly_and_the_safety_checkpoint_undoes_it() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    workspace.write("bin/run", "#!/bin/sh\n").write("gone.txt", "will be removed\n").write("crlf.txt", "a\r\nb\r\n");
    let run = workspace.path().join("bin/run");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o750)).expect("chmod");
    std::os::unix::fs::symlink("../README.md", workspace.path().join("src/link")).expect("link");
    fs::create_dir(workspace.path().join("empty")).expect("an empty directory");
    let before = files(&workspace);
    let first = checkpoint(&sandbox);

    workspace.write("README.md", "# Rewritten\n").remove("gone.txt").write("new/deep/file.txt", "new\n");
    fs::set_permissions(&run, fs::Permissions::from_mode(0o644)).expect("chmod");
    workspace.remove("src/link").write("src/link", "a file now\n");
    fs::remove_dir(workspace.path().join("empty")).expect("remove the empty directory");
    let later = files(&workspace);

    let restored = restore(&sandbox, first.id);
    assert_eq!(restored.warnings, Vec::<String>::new());
    assert_eq!(files(&workspace), before);
    assert_eq!(fs::metadata(&run).expect("it is back").permissions().mode() & 0o7777, 0o750);
    assert!(workspace.path().join("empty").is_dir() && !workspace.has("new"));
    let kinds: BTreeMap<&str, ChangeKind> =
        restored.changes.iter().map(|change| (change.path.as_str(), change.change)).collect();
    assert_eq!(kinds.get("README.md"), Some(&ChangeKind::Modified), "{kinds:?}");
    assert_eq!(kinds.get("gone.txt"), Some(&ChangeKind::Added), "{kinds:?}");
    assert_eq!(kinds.get("new/deep/file.txt"), Some(&ChangeKind::Removed), "{kinds:?}");

    let safety = restored.safety_checkpoint_id.expect("a safety checkpoint");
    let shown = done(&sandbox, &CheckpointShow { project: web(), checkpoint: safety });
    assert_eq!(shown.checkpoint.trigger, Trigger::Safety);
    let undone = restore(&sandbox, safety);
    assert_eq!(files(&workspace), later);
    assert_eq!(fs::metadata(&run).expect("it exists").permissions().mode() & 0o7777, 0o644);
    let second_safety = undone.safety_checkpoint_id.expect("a safety checkpoint");
    only_these_are_left(&sandbox, &[first.id, safety, second_safety]);
    all_verify(&sandbox);
}

#[test]
fn rows_and_context_come_back_and_nothing_else_is_rewound() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    let other = (project("other"), Target::agent(project("other"), agent("worker")));
    Ticker::running(&sandbox, "other", "worker", TICK);
    learn(&sandbox, &worker(), "apples");
    learn(&sandbox, &other.1, "stones");
    let before = stored_data(&sandbox, &web(), &worker());
    let first = checkpoint(&sandbox);

    learn(&sandbox, &worker(), "pears");
    learn(&sandbox, &other.1, "sand");
    let done_now = TaskPut {
        target: Some(worker()),
        id: Some(before.tasks[0].id),
        title: None,
        status: Some(TaskStatus::Completed),
        percent: None,
    };
    done(&sandbox, &done_now);
    done(&sandbox, &ProjectSet { project: web(), description: None, phase: Some(Phase::Review), config: None });
    workspace.write("README.md", "# Later\n");
    let later = stored_data(&sandbox, &web(), &worker());
    let second = checkpoint(&sandbox);
    let others = stored_data(&sandbox, &other.0, &other.1);
    let other_files = files(&sandbox.workspace("other"));

    let restored = restore(&sandbox, first.id);
    assert_eq!(stored_data(&sandbox, &web(), &worker()), before);
    assert_eq!((found(&sandbox, "apples"), found(&sandbox, "pears")), (1, 0), "the full-text index too");
    let safety = restored.safety_checkpoint_id.expect("a safety checkpoint");
    only_these_are_left(&sandbox, &[first.id, second.id, safety]);
    assert_eq!(stored_data(&sandbox, &other.0, &other.1), others);
    assert_eq!(files(&sandbox.workspace("other")), other_files);
    let events = sandbox.ctl_rows(&["events", "--project", "web"]);
    let created = events.iter().filter(|event| event.to_string().contains("checkpoint.created")).count();
    assert_eq!(created, 2, "past events stay: {events:?}");

    // Numbers that were given before a restore are not given again.
    learn(&sandbox, &worker(), "plums");
    let tasks = done(&sandbox, &TaskList { project: Some(web()) }).tasks;
    assert!(tasks.iter().all(|task| task.id == before.tasks[0].id || task.id > later.tasks[1].id), "{tasks:?}");
    learn(&sandbox, &other.1, "clay");
    let others = stored_data(&sandbox, &other.0, &other.1);
    restore(&sandbox, second.id);
    assert_eq!(stored_data(&sandbox, &web(), &worker()), later);
    assert_eq!(workspace.read("README.md"), "# Later\n");
    assert_eq!(stored_data(&sandbox, &other.0, &other.1), others);
    assert_eq!((found(&sandbox, "pears"), found(&sandbox, "plums")), (1, 0));
    all_verify(&sandbox);
}

#[test]
fn restored_rows_are_still_there_after_a_restart() {
    let mut sandbox = Sandbox::start();
    at_rest(&sandbox);
    learn(&sandbox, &worker(), "apples");
    let before = stored_data(&sandbox, &web(), &worker());
    let first = checkpoint(&sandbox);
    learn(&sandbox, &worker(), "pears");
    restore(&sandbox, first.id);
    sandbox.crash_and_restart();
    assert_eq!(stored_data(&sandbox, &web(), &worker()), before);
}

#[test]
fn a_restore_under_running_agents_is_refused() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    let first = checkpoint(&sandbox);
    sandbox.workspace("web").write("README.md", "# Later\n");
    let refusal = refused(
        &sandbox,
        &CheckpointRestore { project: web(), checkpoint: first.id, dry_run: false, paths: Vec::new() },
    );
    assert_eq!(refusal.code, Code::AgentsRunning, "{refusal:?}");
    assert!(refusal.hint.as_deref().is_some_and(|hint| hint.contains("--checkpoint 1")), "{refusal:?}");
    assert_eq!(sandbox.workspace("web").read("README.md"), "# Later\n");
    is_untouched(&sandbox, &ticker, &[first.id]);
}

#[test]
fn a_checkpoint_that_does_not_exist_is_not_restored() {
    let sandbox = Sandbox::start();
    at_rest(&sandbox);
    for dry_run in [false, true] {
        let refusal =
            refused(&sandbox, &CheckpointRestore { project: web(), checkpoint: 7, dry_run, paths: Vec::new() });
        assert_eq!(refusal.code, Code::CheckpointNotFound);
    }
    only_these_are_left(&sandbox, &[]);
}

#[test]
fn a_dry_run_tells_what_a_restore_does_and_changes_nothing() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    workspace.write("gone.txt", "will be removed\n");
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n").remove("gone.txt").write("new.txt", "new\n");
    let look = || (workspace.fingerprint(), fingerprint(&project_dir(&sandbox)), sandbox.ctl(&["events", "--json"]));
    let before = look();

    let dry =
        done(&sandbox, &CheckpointRestore { project: web(), checkpoint: first.id, dry_run: true, paths: Vec::new() });
    assert_eq!((&dry.operation_id, dry.safety_checkpoint_id), (&None, None));
    assert_eq!(look(), before);
    let wet = restore(&sandbox, first.id);
    assert_eq!(dry.changes, wet.changes);
    assert_eq!(wet.changes.len(), 3, "{:?}", wet.changes);
}

#[test]
fn a_damaged_checkpoint_is_refused_before_anything_is_touched() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n");
    let backup = project_dir(&sandbox).join("checkpoints/1/database.sqlite");
    fs::write(&backup, "no database at all, but long enough to be read").expect("damage the backup");
    let refusal = refused(
        &sandbox,
        &CheckpointRestore { project: web(), checkpoint: first.id, dry_run: false, paths: Vec::new() },
    );
    assert_eq!(refusal.code, Code::CheckpointDamaged, "{refusal:?}");
    assert_eq!(workspace.read("README.md"), "# Later\n");
    assert_eq!(status(&sandbox), ProjectStatus::Stopped);
    only_these_are_left(&sandbox, &[first.id]);
}

#[test]
fn after_a_restore_into_a_paused_project_no_agent_is_thawed() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    let workspace = sandbox.workspace("web");
    let pid = the_agent(&sandbox).pid.expect("it runs");
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    workspace.write("README.md", "# Changed by a person\n");
    let restored = restore(&sandbox, paused.checkpoint_id);
    assert_eq!(status(&sandbox), ProjectStatus::Paused);
    assert_eq!(workspace.read("README.md"), "# A project\n");
    assert!(is_frozen(pid));
    // This also holds when the files are those of the pause.
    restore(&sandbox, restored.safety_checkpoint_id.expect("a safety checkpoint"));
    assert_eq!(workspace.read("README.md"), "# Changed by a person\n");
    ticker.stands_still();
    let resumed = resume(&sandbox).expect("resume");
    assert_eq!(resumed.agents[0].method, ResumeMethod::Respawned, "{resumed:?}");
    assert_eq!(resumed.restored, restored.safety_checkpoint_id);
    ticker.runs(SOON);
    assert!(!process::is_alive(pid), "the old processes are gone");
}

fn resume_with_a_checkpoint(config: &str, mode: PauseMode) {
    let sandbox = Sandbox::builder().config(config).start();
    let script = format!(
        "printf '%s %s %s' \"$FERMATA_RESUME\" \"$FERMATA_CHECKPOINT\" \"$FERMATA_CONTEXT\" \
        > \"$MARKS.env\"; {TICK}"
    );
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    learn(&sandbox, &worker(), "apples");
    let first = checkpoint(&sandbox);
    learn(&sandbox, &worker(), "pears");
    let workspace = sandbox.workspace("web");
    workspace.write("README.md", "# Later\n");
    let pid = the_agent(&sandbox).pid.expect("it runs");
    pause(&sandbox, mode).expect("pause");

    let resumed = done(&sandbox, &ProjectResume { project: web(), checkpoint: Some(first.id), over_budget: false });

    assert_eq!(resumed.restored, Some(first.id));
    assert_eq!(resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(), [ResumeMethod::Respawned]);
    assert_eq!(workspace.read("README.md"), "# A project\n");
    assert_eq!(found(&sandbox, "pears"), 0);
    ticker.runs(SOON);
    assert!(!process::is_alive(pid));
    let env = ticker.text("env").expect("it was started");
    let [resume, number, context] = env.split(' ').collect::<Vec<_>>()[..] else { panic!("{env}") };
    assert_eq!((resume, number), ("1", "1"));
    let context: Value = serde_json::from_slice(&fs::read(context).expect("a context file")).expect("JSON");
    assert!(context.to_string().contains("knows apples") && !context.to_string().contains("pears"));
    // The next pause is an ordinary one again.
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    assert_eq!(super::scene::resume(&sandbox).expect("resume").agents[0].method, ResumeMethod::Thawed);
}

#[test]
fn a_resume_with_a_checkpoint_starts_frozen_agents_again() {
    resume_with_a_checkpoint(BY_GROUP, PauseMode::Freeze);
}

#[test]
fn a_resume_with_a_checkpoint_starts_stopped_agents_again() {
    resume_with_a_checkpoint(BY_SIGNALS, PauseMode::Freeze);
}

#[test]
fn a_resume_with_a_checkpoint_starts_parked_agents_again() {
    resume_with_a_checkpoint(BY_GROUP, PauseMode::Park);
}

/// The result of a crash in the middle of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Unchanged,
    Restored,
}

fn crash(failpoint: &str, paused: bool, after: After) {
    let mut sandbox = Sandbox::builder().env(FAILPOINT, failpoint).start();
    let (workspace, ticker) =
        if paused { (sandbox.workspace("web"), Some(Ticker::start(&sandbox))) } else { (at_rest(&sandbox), None) };
    workspace.write("gone.txt", "will be removed\n");
    learn(&sandbox, &worker(), "apples");
    let first = checkpoint(&sandbox);
    let before = (files(&workspace), stored_data(&sandbox, &web(), &worker()));
    workspace.write("README.md", "# Later\n").remove("gone.txt").write("new/deep/file.txt", "new\n");
    learn(&sandbox, &worker(), "pears");
    let mut numbers = vec![first.id];
    let mut resting = ProjectStatus::Stopped;
    if paused {
        numbers.push(pause(&sandbox, PauseMode::Freeze).expect("pause").checkpoint_id);
        resting = ProjectStatus::Paused;
    }
    let later = (files(&workspace), stored_data(&sandbox, &web(), &worker()));

    let restore = CheckpointRestore { project: web(), checkpoint: first.id, dry_run: false, paths: Vec::new() };
    let answer = sandbox.rpc().call(&restore);
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    let shown = settled(&sandbox);

    assert_eq!(shown.project.status, resting);
    let now = (files(&workspace), stored_data(&sandbox, &web(), &worker()));
    match after {
        After::Unchanged => assert_eq!(now, later),
        After::Restored => {
            assert_eq!(now, before);
            numbers.push(numbers.len() as u64 + 1);
        }
    }
    // The plan is removed right after the operation is shown as ended.
    let no_plan = || {
        !fs::read_dir(project_dir(&sandbox))
            .expect("the project's directory")
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("restore-"))
    };
    wait_until(SOON, "the plan to be gone", no_plan);
    only_these_are_left(&sandbox, &numbers);
    all_verify(&sandbox);
    if after == After::Restored {
        // The safety checkpoint still undoes the restore.
        done(
            &sandbox,
            &CheckpointRestore {
                project: web(),
                checkpoint: *numbers.last().expect("one"),
                dry_run: false,
                paths: Vec::new(),
            },
        );
        assert_eq!((files(&workspace), stored_data(&sandbox, &web(), &worker())), later);
    }
    if let Some(ticker) = ticker {
        ticker.stands_still();
        let rung = if after == After::Restored { ResumeMethod::Respawned } else { ResumeMethod::Thawed };
        assert_eq!(super::scene::resume(&sandbox).expect("resume").agents[0].method, rung);
        ticker.runs(SOON);
    }
}

macro_rules! crashes {
    ($($name:ident: $rest:literal, $paused:literal, $after:ident;)*) => {
        $(mod $name {
            use super::*;

            #[test]
            fn a_restore_whose_daemon_dies_here_is_rolled_forward_or_has_changed_nothing() {
                crash($rest, false, After::$after);
            }

            #[test]
            fn a_restore_into_a_paused_project_whose_daemon_dies_here_is_rolled_forward_too() {
                crash($paused, true, After::$after);
            }
        })*
    };
}

// In a stopped project the safety checkpoint is the second, in a paused project the third.
crashes! {
    at_begin: "restore.begin=abort", "restore.begin=abort", Unchanged;
    at_safety_captured: "checkpoint.captured@2=abort", "checkpoint.captured@3=abort", Unchanged;
    at_safety_sealed: "checkpoint.sealed@2=abort", "checkpoint.sealed@3=abort", Unchanged;
    at_planned: "restore.planned=abort", "restore.planned=abort", Unchanged;
    at_announce: "restore.announce=abort", "restore.announce=abort", Unchanged;
    at_announced: "restore.announced=abort", "restore.announced=abort", Restored;
    at_apply: "restore.apply=abort", "restore.apply=abort", Restored;
    at_staged: "history.restore.staged=abort", "history.restore.staged=abort", Restored;
    at_first_step: "history.restore.step=abort", "history.restore.step=abort", Restored;
    at_third_step: "history.restore.step@3=abort", "history.restore.step@3=abort", Restored;
    at_flushed: "history.restore.flushed=abort", "history.restore.flushed=abort", Restored;
    at_applied: "restore.applied=abort", "restore.applied=abort", Restored;
    at_commit: "restore.commit=abort", "restore.commit=abort", Restored;
    at_committed: "restore.committed=abort", "restore.committed=abort", Restored;
}

/// An error in a restore: nothing has changed, or the step is tried again until it succeeds.
fn error(failpoint: &str, after: After) {
    let sandbox = Sandbox::builder().env(FAILPOINT, failpoint).start();
    let workspace = at_rest(&sandbox);
    learn(&sandbox, &worker(), "apples");
    let first = checkpoint(&sandbox);
    let before = (files(&workspace), stored_data(&sandbox, &web(), &worker()));
    workspace.write("README.md", "# Later\n").write("new/deep/file.txt", "new\n");
    learn(&sandbox, &worker(), "pears");
    let later = (files(&workspace), stored_data(&sandbox, &web(), &worker()));
    let restore = CheckpointRestore { project: web(), checkpoint: first.id, dry_run: false, paths: Vec::new() };
    match after {
        After::Unchanged => {
            assert_eq!(refused(&sandbox, &restore).code, Code::RestoreFailed);
            assert_eq!((files(&workspace), stored_data(&sandbox, &web(), &worker())), later);
            only_these_are_left(&sandbox, &[first.id]);
            done(&sandbox, &restore);
        }
        After::Restored => drop(done(&sandbox, &restore)),
    }
    assert_eq!((files(&workspace), stored_data(&sandbox, &web(), &worker())), before);
    assert_eq!(status(&sandbox), ProjectStatus::Stopped);
    all_verify(&sandbox);
}

#[test]
fn a_restore_that_fails_before_its_plan_is_announced_changes_nothing() {
    for failpoint in
        ["restore.begin", "checkpoint.captured@2", "checkpoint.sealed@2", "restore.planned", "restore.announce"]
    {
        error(&format!("{failpoint}=error"), After::Unchanged);
    }
}

#[test]
fn a_restore_that_fails_after_that_is_tried_again_until_it_has_worked() {
    for failpoint in
        ["restore.apply", "history.restore.staged", "history.restore.step@2", "restore.applied", "restore.commit"]
    {
        error(&format!("{failpoint}=error"), After::Restored);
    }
}

#[test]
fn a_workspace_that_is_gone_comes_back_once_its_directory_is_there() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    let before = files(&workspace);
    let first = checkpoint(&sandbox);
    fs::remove_dir_all(workspace.path()).expect("lose the workspace");
    let restore = CheckpointRestore { project: web(), checkpoint: first.id, dry_run: false, paths: Vec::new() };
    let refusal = refused(&sandbox, &restore);
    assert_eq!(refusal.code, Code::WorkspaceRefused, "{refusal:?}");
    assert_eq!(status(&sandbox), ProjectStatus::Stopped);
    fs::create_dir(workspace.path()).expect("make the directory");
    only_these_are_left(&sandbox, &[first.id]);
    done(&sandbox, &restore);
    assert_eq!(files(&workspace), before);
}
