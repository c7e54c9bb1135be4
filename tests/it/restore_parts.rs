//! Restores of some paths, the preview, the answer, and the verification afterwards.

use std::fs;

use fermata_protocol::Code;
use fermata_protocol::Target;
use fermata_protocol::agent::AgentStop;
use fermata_protocol::checkpoint::{CheckpointRestore, CheckpointRestoreResult};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::project::{ProjectSet, ProjectStatus};
use fermata_protocol::task::Phase;
use fermata_protocol::task::{TaskList, TaskPut, TaskStatus};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace};

use crate::scene::*;

fn at_rest(sandbox: &Sandbox) -> Workspace {
    Ticker::start(sandbox);
    done(sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || status(sandbox) == ProjectStatus::Stopped);
    sandbox.workspace("web")
}

fn of_paths(number: u64, paths: &[&str]) -> CheckpointRestore {
    let paths = paths.iter().map(|path| (*path).to_owned()).collect();
    CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths }
}

fn task(sandbox: &Sandbox, title: &str) {
    let task = TaskPut {
        target: Some(worker()),
        id: None,
        title: Some(title.to_owned()),
        status: Some(TaskStatus::Pending),
        percent: None,
    };
    done(sandbox, &task);
}

#[test]
fn some_paths_are_restored_and_nothing_else() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    workspace.write("dir/a b", "old").write("dir/c", "old").write("gone/d", "old");
    task(&sandbox, "before");
    let first = checkpoint(&sandbox);
    workspace.write("dir/a b", "newer").write("dir/new", "new").write("README.md", "# Later\n");
    fs::remove_dir_all(workspace.path().join("gone")).expect("remove");
    task(&sandbox, "after");
    done(
        &sandbox,
        &ProjectSet { phase: Some(Phase::Review), ..serde_json::from_str(r#"{"project":"web"}"#).expect("valid") },
    );

    let shown = done(&sandbox, &CheckpointRestore { dry_run: true, ..of_paths(first.id, &["dir", "gone/d"]) });
    let result: CheckpointRestoreResult = done(&sandbox, &of_paths(first.id, &["dir", "gone/d"]));
    assert_eq!((shown.changes, shown.written, shown.removed), (result.changes.clone(), result.written, result.removed));
    assert_eq!((result.written, result.removed), (2, 1), "{result:?}");
    assert_eq!((workspace.read("dir/a b"), workspace.read("gone/d")), ("old".into(), "old".into()));
    assert_eq!((workspace.read("README.md"), workspace.has("dir/new")), ("# Later\n".into(), false));
    // Rows stay unchanged, and the answer says so.
    let tasks = done(&sandbox, &TaskList { project: Some(web()) }).tasks;
    assert_eq!((tasks.len(), show(&sandbox).project.phase), (2, Phase::Review));
    assert!(result.warnings.iter().any(|text| text.starts_with("only files are restored")), "{:?}", result.warnings);
    assert_eq!(result.undo.as_deref(), Some("fermatactl checkpoint restore web 2 --paths dir gone"));

    // The command in the answer undoes it.
    sandbox.ctl(&["checkpoint", "restore", "web", "2", "--paths", "dir", "gone"]);
    assert_eq!(
        (workspace.read("dir/a b"), workspace.has("gone"), workspace.has("dir/new")),
        ("newer".into(), false, true)
    );
    let absolute = workspace.path().join("dir/a b");
    let out = sandbox.ctl(&["checkpoint", "restore", "web", "1", "--paths", absolute.to_str().expect("UTF-8")]);
    assert!(out.contains("only dir/a b") && out.contains("--paths 'dir/a b'"), "{out}");
    assert_eq!(workspace.read("dir/a b"), "old");
    all_verify(&sandbox);
}

#[test]
fn paths_that_make_no_sense_are_refused_before_anything_is_done() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n");
    let refusals = [
        ("no/such/file", Code::PathNotFound),
        ("../outside", Code::InvalidParams),
        ("/etc/passwd", Code::InvalidParams),
        ("a//b", Code::InvalidParams),
        ("%zz", Code::InvalidParams),
        (".git/config", Code::InvalidParams),
        ("sub/.GIT/hooks", Code::InvalidParams),
    ];
    for (path, code) in refusals {
        for dry_run in [false, true] {
            let refusal = refused(&sandbox, &CheckpointRestore { dry_run, ..of_paths(first.id, &[path]) });
            assert_eq!(refusal.code, code, "{path}: {refusal:?}");
        }
    }
    assert_eq!(checkpoints(&sandbox), [1]);
    assert_eq!(workspace.read("README.md"), "# Later\n");
    let missing = sandbox.ctl_output(&["checkpoint", "restore", "web", "1", "--paths", "no/such/file"]);
    assert_eq!(missing.status.code(), Some(3), "{missing:?}");
    let outside = sandbox.ctl_output(&["checkpoint", "restore", "web", "1", "--paths", "/etc/passwd"]);
    assert_eq!(outside.status.code(), Some(2), "{outside:?}");
}

#[test]
fn after_some_paths_were_restored_no_agent_is_thawed_and_the_context_is_that_of_the_pause() {
    let sandbox = Sandbox::start();
    let script = format!("printf '%s' \"$FERMATA_CHECKPOINT\" > \"$MARKS.env\"; {TICK}");
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    let first = checkpoint(&sandbox);
    sandbox.workspace("web").write("README.md", "# Later\n");
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    done(&sandbox, &of_paths(first.id, &["README.md"]));
    assert_eq!(sandbox.workspace("web").read("README.md"), "# A project\n");
    let resumed = resume(&sandbox).expect("resume");
    assert_eq!(resumed.agents[0].method, fermata_protocol::pause::ResumeMethod::Respawned);
    ticker.runs(SOON);
    assert_eq!(ticker.text("env"), Some(paused.checkpoint_id.to_string()));
}

#[test]
fn the_answer_names_what_is_left_alone_and_where_the_repository_stands() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    workspace.git_init();
    workspace.write(".gitignore", "*.o\n").write("held", "a file").git_commit("one");
    let first = checkpoint(&sandbox);
    workspace.remove("held").write("held/kept.o", "ignored");
    workspace.git(&["checkout", "-q", "-b", "side"]);
    let shown = done(&sandbox, &CheckpointRestore { dry_run: true, ..of_paths(first.id, &[]) });
    let result: CheckpointRestoreResult = done(&sandbox, &of_paths(first.id, &[]));
    assert_eq!((&shown.left_alone, &shown.warnings), (&result.left_alone, &result.warnings));
    assert_eq!(result.left_alone.iter().map(|one| one.path.as_str()).collect::<Vec<_>>(), ["held"]);
    assert!(result.warnings.iter().any(|text| text.contains("the repository is on branch 'side'")), "{result:?}");
    assert_eq!(workspace.read("held/kept.o"), "ignored");
}

#[test]
fn after_a_restore_the_whole_workspace_is_verified() {
    let sandbox = Sandbox::start();
    let workspace = at_rest(&sandbox);
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n");
    let result: CheckpointRestoreResult = done(&sandbox, &of_paths(first.id, &[]));
    let operation = result.operation_id.expect("it was done");
    let check = || {
        let shown = operations(&sandbox).into_iter().find(|one| one.id == operation)?;
        shown.result?.get("check").cloned()
    };
    wait_until(SOON, "the full check", || check().is_some());
    let check = check().expect("it exists");
    assert_eq!(check["differing"], 0, "{check}");
    assert!(check["paths"].as_u64().is_some_and(|paths| paths > 2), "{check}");
    assert!(sandbox.ctl(&["events", "--project", "web", "--json"]).contains("restore.checked"));
}
