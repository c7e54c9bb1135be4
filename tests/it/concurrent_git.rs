//! Git runs in the workspace while checkpoints are made and restored: neither disturbs the other.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use fermata_protocol::Target;
use fermata_protocol::agent::AgentStop;
use fermata_protocol::checkpoint::{CheckpointDiff, CheckpointRestore};
use fermata_protocol::pause::PauseMode;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::workspace::fingerprint;
use fermata_tests::{Sandbox, Workspace};

use crate::scene::*;

fn restore_of(number: u64) -> CheckpointRestore {
    CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() }
}

/// A repository with two branches that differ in many files.
fn repository(sandbox: &Sandbox) -> Workspace {
    let workspace = furnished(sandbox, "web");
    for n in 0..60 {
        workspace.write(&format!("many/{}/{n}.txt", n % 6), format!("main {n}\n"));
    }
    workspace.git_init();
    workspace.git(&["checkout", "-q", "-b", "side"]);
    for n in 0..60 {
        workspace.write(&format!("many/{}/{n}.txt", n % 6), format!("side {n}\n"));
    }
    workspace.git_commit("side");
    workspace.git(&["checkout", "-q", "main"]);
    workspace
}

/// Runs git, which may fail because another git process holds a lock.
fn try_git(workspace: &Workspace, args: &[&str]) {
    let output = Command::new("git")
        .args(["-c", "user.name=Test", "-c", "user.email=test@localhost"])
        .args(args)
        .current_dir(workspace.path())
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .expect("run git");
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for damage in ["fatal: bad object", "corrupt", "unable to read tree", "broken"] {
            assert!(!said.contains(damage), "git {args:?}: {said}");
        }
    }
}

/// Lets several users run git until the work is done; one after the other, since a `gc --prune=now` can damage another
/// process's commit even without Fermata.
fn while_git_is_used(workspace: &Workspace, work: impl FnOnce()) {
    let (stop, turn) = (AtomicBool::new(false), Mutex::new(()));
    let try_git = |args: &[&str]| {
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        try_git(workspace, args);
    };
    struct Stop<'s>(&'s AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _ends = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                try_git(&["gc", "--quiet", "--prune=now"]);
            }
        });
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                workspace.write("README.md", format!("# Round {round}\n"));
                try_git(&["commit", "-q", "-a", "-m", "a round"]);
                workspace.write("src/lib.rs", format!("//! {round}\n"));
                try_git(&["stash", "-q"]);
                try_git(&["stash", "pop", "-q"]);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for branch in ["side", "main"] {
                    try_git(&["checkout", "-q", "-f", branch]);
                }
            }
        });
        work();
    });
}

/// Asserts that the repository is intact and that Fermata writes nothing there.
fn git_is_whole_and_left_alone(sandbox: &Sandbox, workspace: &Workspace) {
    workspace.git(&["fsck", "--strict", "--no-dangling"]);
    let git = workspace.path().join(".git");
    let before = fingerprint(&git);
    for round in 0..3 {
        workspace.write("README.md", format!("# Alone {round}\n"));
        checkpoint(sandbox);
    }
    assert_eq!(fingerprint(&git), before);
}

#[test]
fn checkpoints_that_are_made_while_git_is_used_are_whole() {
    let sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    let ticker = Ticker::start(&sandbox);
    while_git_is_used(&workspace, || {
        for _ in 0..7 {
            checkpoint(&sandbox);
        }
    });
    git_is_whole_and_left_alone(&sandbox, &workspace);
    let numbers: Vec<u64> = (1..=10).collect();
    is_untouched(&sandbox, &ticker, &numbers);
    all_verify(&sandbox);
    // A checkpoint still restores objects that git has removed since.
    done(&sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || the_agent(&sandbox).status.is_terminal());
    workspace.git(&["stash", "clear"]);
    workspace.git(&["reflog", "expire", "--expire=now", "--all"]);
    workspace.git(&["gc", "--quiet", "--prune=now"]);
    let git = fingerprint(&workspace.path().join(".git"));
    for number in [1, 5, 10] {
        done(&sandbox, &restore_of(number));
    }
    assert_eq!(fingerprint(&workspace.path().join(".git")), git);
    all_verify(&sandbox);
}

#[test]
fn restores_while_git_is_used_damage_neither_git_nor_a_checkpoint() {
    let sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    let was = files(&workspace);
    let first = checkpoint(&sandbox).id;
    while_git_is_used(&workspace, || {
        for _ in 0..8 {
            // Other processes write to the same files: the restore succeeds with or without a warning.
            done(&sandbox, &restore_of(first));
        }
    });
    settled(&sandbox);
    git_is_whole_and_left_alone(&sandbox, &workspace);
    all_verify(&sandbox);
    done(&sandbox, &restore_of(first));
    assert_eq!(files(&workspace), was);
}

/// The content of a workspace without its repository.
fn files(workspace: &Workspace) -> BTreeMap<String, String> {
    let all = workspace.fingerprint().into_iter();
    let files = all.filter(|(path, _)| !path.starts_with(".git") && workspace.path().join(path).is_file());
    files.map(|(path, (_, _, hash))| (path.display().to_string(), hash)).collect()
}

/// An agent that runs one git command after the other.
const GIT: &str = "export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=T GIT_AUTHOR_EMAIL=t@l GIT_COMMITTER_NAME=T \
    GIT_COMMITTER_EMAIL=t@l; cd \"$WORK\"; n=0; while :; do n=$((n+1)); printf . >> \"$MARKS\"; \
    git checkout -q -f side; echo $n > README.md; git commit -q -a -m $n; git checkout -q -f main; echo $n > src/lib.rs; \
    git stash -q; git stash pop -q; git checkout -q -f main; git gc -q --prune=now; done";

#[test]
fn a_pause_in_the_middle_of_the_agents_git_saves_exactly_what_stands_still() {
    let sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    let script = format!("WORK='{}'; {GIT}", workspace.text());
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    let mut held = BTreeMap::new();
    for _ in 0..8 {
        let paused = pause_within(&sandbox, PauseMode::Freeze, Some(0)).expect("pause");
        let standing = files(&workspace);
        let difference =
            done(&sandbox, &CheckpointDiff { project: web(), from: paused.checkpoint_id, to: None, patch: false });
        assert_eq!(difference.changes, [], "checkpoint {}", paused.checkpoint_id);
        let git = fingerprint(&workspace.path().join(".git"));
        checkpoint(&sandbox);
        assert_eq!(fingerprint(&workspace.path().join(".git")), git, "we do not write there");
        held.insert(paused.checkpoint_id, standing);
        assert!(resume(&sandbox).expect("resume").success);
        ticker.runs(SOON);
    }
    done(&sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || the_agent(&sandbox).status.is_terminal());
    all_verify(&sandbox);
    for (number, standing) in held {
        done(&sandbox, &restore_of(number));
        assert_eq!(files(&workspace), standing, "checkpoint {number}");
    }
}

/// Writes the same number into one file after the other, without a delay.
const IN_TURN: &str = "cd \"$WORK\"; n=0; while :; do n=$((n+1)); printf . >> \"$MARKS\"; \
    for f in 0 1 2 3 4 5 6 7 8 9; do echo $n > turn/.draft; mv turn/.draft turn/$f; done; done";

#[test]
fn a_checkpoint_of_a_frozen_agent_is_one_instant_of_its_work() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    workspace.write(".gitignore", ".draft\n");
    for file in 0..10 {
        workspace.write(&format!("turn/{file}"), "0\n");
    }
    let script = format!("WORK='{}'; {IN_TURN}", workspace.text());
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    for _ in 0..10 {
        checkpoint(&sandbox);
        ticker.runs(SOON);
    }
    done(&sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || the_agent(&sandbox).status.is_terminal());
    for number in 1..=10 {
        done(&sandbox, &restore_of(number));
        let turns: Vec<u64> =
            (0..10).map(|file| workspace.read(&format!("turn/{file}")).trim().parse().expect("a number")).collect();
        assert!(turns.is_sorted_by(|a, b| a >= b), "checkpoint {number}: {turns:?}");
        assert!(turns[0] - turns[9] <= 1, "checkpoint {number}: {turns:?}");
    }
    all_verify(&sandbox);
}
