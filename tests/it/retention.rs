//! `checkpoint.remove`, `checkpoint.prune` and retention: what is kept, what a crash leaves behind, quota and free
//! space.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use fermata_protocol::Code;
use fermata_protocol::checkpoint::{
    CheckpointCreate, CheckpointList, CheckpointPin, CheckpointRestore, CheckpointShow,
};
use fermata_protocol::event::Event;
use fermata_protocol::pause::PauseMode;
use fermata_protocol::project::{ProjectConfig, ProjectSet};
use fermata_protocol::retention::{CheckpointPrune, CheckpointRemove, RemovalReason, Retention};
use fermata_protocol::subscription::EventsList;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace, process};

use crate::checkpoint::SmallDisk;
use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// Creates the project `web` without running agents, and that many checkpoints, each with a file of its own.
fn with_checkpoints(sandbox: &Sandbox, count: u64) -> Workspace {
    let workspace = furnished(sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for number in 1..=count {
        workspace.write(&format!("file-{number}.txt"), format!("{number}\n")).write("last.txt", format!("{number}\n"));
        assert_eq!(checkpoint(sandbox).id, number);
    }
    workspace
}

fn remove(numbers: &[u64]) -> CheckpointRemove {
    CheckpointRemove { project: web(), checkpoints: numbers.to_vec() }
}

fn prune() -> CheckpointPrune {
    CheckpointPrune { project: web(), keep: None, older_than_ms: None, max_bytes: None, dry_run: false }
}

fn pin(sandbox: &Sandbox, checkpoint: u64, pinned: bool) {
    done(sandbox, &CheckpointPin { project: web(), checkpoint, pinned });
}

fn set(sandbox: &Sandbox, retention: Retention) {
    let config = ProjectConfig { retention, ..show(sandbox).config };
    done(sandbox, &ProjectSet { project: web(), description: None, phase: None, config: Some(config) });
}

/// Returns the removals among the events, with their reasons.
fn removals(sandbox: &Sandbox) -> Vec<(u64, RemovalReason)> {
    let events = done(sandbox, &EventsList { limit: Some(500), ..EventsList::default() }).events;
    let removal = |event: Event| match event {
        Event::CheckpointRemoved { checkpoint, reason, .. } => Some((checkpoint, reason)),
        _ => None,
    };
    events.into_iter().filter_map(|recorded| removal(recorded.event)).collect()
}

#[track_caller]
fn left(sandbox: &Sandbox, numbers: &[u64]) {
    wait_until(SOON, &format!("{numbers:?} to be left"), || checkpoints(sandbox) == numbers);
}

#[test]
fn what_is_removed_is_gone_and_the_others_are_whole() {
    let mut sandbox = Sandbox::start();
    let workspace = with_checkpoints(&sandbox, 4);
    let result = done(&sandbox, &remove(&[3, 1]));
    assert_eq!(result.removed.iter().map(|one| one.checkpoint_id).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(result.kept, 2);
    only_these_are_left(&sandbox, &[2, 4]);
    all_verify(&sandbox);
    assert_eq!(removals(&sandbox), [(1, RemovalReason::Asked), (3, RemovalReason::Asked)]);
    for number in [1, 3] {
        assert_eq!(
            refused(&sandbox, &CheckpointShow { project: web(), checkpoint: number }).code,
            Code::CheckpointNotFound
        );
        assert_eq!(refused(&sandbox, &remove(&[number])).code, Code::CheckpointNotFound);
        let restore = CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() };
        assert_eq!(refused(&sandbox, &restore).code, Code::CheckpointNotFound);
    }
    assert_eq!(checkpoint(&sandbox).id, 5, "no number is given twice");
    sandbox.crash_and_restart();
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 2, dry_run: false, paths: Vec::new() });
    assert_eq!(workspace.read("last.txt"), "2\n");
    assert!(workspace.has("file-1.txt") && !workspace.has("file-3.txt"));
    only_these_are_left(&sandbox, &[2, 4, 5, 6]);
    all_verify(&sandbox);
}

#[test]
fn the_last_number_is_not_given_again_either() {
    let mut sandbox = Sandbox::start();
    with_checkpoints(&sandbox, 3);
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 2, dry_run: false, paths: Vec::new() });
    // 4 is the safety checkpoint, and agents continue with the context of 2.
    done(&sandbox, &remove(&[4]));
    sandbox.crash_and_restart();
    assert_eq!(checkpoint(&sandbox).id, 5);
    assert_eq!(checkpoints(&sandbox), [1, 2, 3, 5]);
    all_verify(&sandbox);
}

#[test]
fn what_is_pinned_or_in_use_is_not_removed() {
    let sandbox = Sandbox::start();
    with_checkpoints(&sandbox, 3);
    pin(&sandbox, 2, true);
    let refusal = refused(&sandbox, &remove(&[1, 2]));
    assert_eq!(refusal.code, Code::CheckpointProtected);
    assert!(refusal.message.contains("checkpoint 2") && refusal.message.contains("pinned"), "{refusal:?}");
    assert_eq!(refusal.hint.as_deref(), Some("fermatactl checkpoint unpin web 2"));
    let refusal = refused(&sandbox, &remove(&[1, 9]));
    assert_eq!(refusal.code, Code::CheckpointNotFound);
    assert_eq!(checkpoints(&sandbox), [1, 2, 3], "all or none");
    let refusal = refused(&sandbox, &remove(&[3]));
    assert_eq!(refusal.code, Code::CheckpointProtected);
    assert!(refusal.message.contains("context"), "{refusal:?}");
    pin(&sandbox, 2, false);
    done(&sandbox, &remove(&[1, 2]));
    only_these_are_left(&sandbox, &[3]);
    assert_eq!(refused(&sandbox, &remove(&[])).code, Code::InvalidParams);
}

#[test]
fn the_checkpoint_of_the_pause_stays_until_the_project_goes_on() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    checkpoint(&sandbox);
    let refusal = refused(&sandbox, &remove(&[1]));
    assert_eq!(refusal.code, Code::CheckpointProtected);
    assert!(refusal.message.contains("paused with"), "{refusal:?}");
    assert_eq!(refusal.hint.as_deref(), Some("fermatactl resume web"));
    let everything = CheckpointPrune { keep: Some(0), ..prune() };
    assert_eq!(done(&sandbox, &everything).removed, []);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
    done(&sandbox, &remove(&[1]));
    only_these_are_left(&sandbox, &[2]);
    all_verify(&sandbox);
}

#[test]
fn after_each_checkpoint_what_is_kept_no_longer_goes() {
    let sandbox = Sandbox::builder().config("[retention]\nkeep_manual = 3\n").start();
    with_checkpoints(&sandbox, 2);
    pin(&sandbox, 1, true);
    for number in 3..=6 {
        assert_eq!(checkpoint(&sandbox).id, number);
    }
    left(&sandbox, &[1, 4, 5, 6]);
    assert_eq!(removals(&sandbox), [(2, RemovalReason::Count), (3, RemovalReason::Count)]);
    all_verify(&sandbox);

    // The project's own settings take precedence, from the next checkpoint on.
    set(&sandbox, Retention { keep_manual: Some(1), ..Retention::default() });
    checkpoint(&sandbox);
    left(&sandbox, &[1, 7]);
    pin(&sandbox, 1, false);
    checkpoint(&sandbox);
    left(&sandbox, &[8]);
    wait_until(SOON, "their files to be gone", || {
        fs::read_dir(project_dir(&sandbox).join("checkpoints")).is_ok_and(|dir| dir.count() == 1)
    });
    all_verify(&sandbox);
}

#[test]
fn a_prune_removes_what_all_its_bounds_let_go() {
    let sandbox = Sandbox::start();
    with_checkpoints(&sandbox, 6);
    assert_eq!(done(&sandbox, &prune()).removed, [], "the retention keeps ten");
    let dry = done(&sandbox, &CheckpointPrune { keep: Some(2), dry_run: true, ..prune() });
    assert_eq!(dry.removed.iter().map(|one| one.checkpoint_id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((dry.kept, checkpoints(&sandbox).len()), (2, 6));
    let young = CheckpointPrune { keep: Some(2), older_than_ms: Some(3_600_000), ..prune() };
    assert_eq!(done(&sandbox, &young).removed, []);
    let roomy = CheckpointPrune { keep: Some(0), max_bytes: Some(1 << 40), ..prune() };
    assert_eq!(done(&sandbox, &roomy).removed, []);
    // Maintenance has nothing left to shrink between the measurement and the prune.
    sandbox.ctl(&["checkpoint", "consolidate", "web", "--everything"]);
    let some = CheckpointPrune { max_bytes: Some(show(&sandbox).project.disk_bytes.expect("measured") - 1), ..prune() };
    assert_eq!(done(&sandbox, &some).removed.len(), 1, "the oldest alone is enough");
    pin(&sandbox, 3, true);

    let said = sandbox.ctl(&["checkpoint", "prune", "web", "--keep", "1"]);
    assert!(said.contains("requested"), "{said}");
    only_these_are_left(&sandbox, &[3, 6]);
    let ids = sandbox.ctl(&["-q", "checkpoint", "prune", "web", "--older-than", "0s"]);
    assert_eq!(ids, "", "the newest of all stays");
    pin(&sandbox, 3, false);
    assert_eq!(sandbox.ctl(&["-q", "checkpoint", "rm", "web", "3"]), "3\n");
    assert_eq!(sandbox.ctl_output(&["checkpoint", "rm", "web", "3"]).status.code(), Some(3));
    assert_eq!(sandbox.ctl_output(&["checkpoint", "rm", "web", "6"]).status.code(), Some(1));
    all_verify(&sandbox);
}

fn crash(failpoint: &str, numbers: &[u64]) {
    let mut sandbox = Sandbox::builder().env(FAILPOINT, &format!("{failpoint}=abort")).start();
    let workspace = with_checkpoints(&sandbox, 5);
    let answer = sandbox.rpc().call(&remove(&[1, 2, 4]));
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    only_these_are_left(&sandbox, numbers);
    all_verify(&sandbox);
    assert_eq!(checkpoint(&sandbox).id, 6);
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 3, dry_run: false, paths: Vec::new() });
    assert_eq!(workspace.read("last.txt"), "3\n");
    all_verify(&sandbox);
}

#[test]
fn a_daemon_that_dies_in_a_removal_leaves_whole_checkpoints_or_nothing_of_them() {
    crash("retention.commit", &[1, 2, 3, 4, 5]);
    for failpoint in ["retention.committed", "retention.directory", "retention.directory@3"] {
        crash(failpoint, &[3, 5]);
    }
}

#[test]
fn a_daemon_that_dies_late_in_a_removal_leaves_nothing_of_them_either() {
    for failpoint in ["retention.ref", "retention.ref@3", "retention.swept"] {
        crash(failpoint, &[3, 5]);
    }
}

#[test]
fn a_removal_that_cannot_be_written_or_carried_out_is_refused_or_tried_again() {
    let sandbox = Sandbox::builder().env(FAILPOINT, "retention.commit=error,retention.directory=error").start();
    with_checkpoints(&sandbox, 3);
    let refusal = refused(&sandbox, &remove(&[1]));
    assert_eq!(refusal.code, Code::InternalError, "the rows cannot be written: {refusal:?}");
    only_these_are_left(&sandbox, &[1, 2, 3]);
    all_verify(&sandbox);
    done(&sandbox, &remove(&[1]));
    only_these_are_left(&sandbox, &[2, 3]);
    all_verify(&sandbox);
}

#[test]
fn a_checkpoint_that_failed_is_reported_even_where_its_packs_cannot_be_swept() {
    let points = "checkpoint.commit=error,history.sweep.walked=error";
    let sandbox = Sandbox::builder().env(FAILPOINT, points).start();
    let workspace = sandbox.workspace("web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    workspace.write("a.txt", "something\n");
    assert_ne!(sandbox.ctl_output(&["checkpoint", "create", "web"]).status.code(), Some(0));
    only_these_are_left(&sandbox, &[]);
    checkpoint(&sandbox);
    all_verify(&sandbox);
}

/// The space of a directory and everything below it.
fn disk_usage(path: &Path) -> u64 {
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    below
        .map(|entry| {
            let meta = entry.metadata().expect("it exists");
            meta.blocks() * 512 + if meta.is_dir() { disk_usage(&entry.path()) } else { 0 }
        })
        .sum()
}

#[test]
fn what_the_checkpoints_take_is_shown_as_it_is_on_disk() {
    let mut sandbox = Sandbox::start();
    let workspace = with_checkpoints(&sandbox, 1);
    workspace.write("noise.bin", noise(2 << 20));
    let added = checkpoint(&sandbox).size_bytes;
    assert!(added > 2 << 20, "{added}");
    assert!(checkpoint(&sandbox).size_bytes < 1 << 20, "what is there already is not added again");
    let dir = project_dir(&sandbox);
    // The size of the daemon's workspace state varies.
    let near = |one: u64, other: u64| one.abs_diff(other) < 128 << 10;
    let is_true = |sandbox: &Sandbox| {
        let real = || disk_usage(&dir.join("checkpoints")) + disk_usage(&dir.join("history"));
        wait_until(SOON, "the truth to be shown", || near(show(sandbox).project.disk_bytes.expect("measured"), real()));
        let list = CheckpointList { project: web(), before: None, limit: Some(1) };
        assert!(near(done(sandbox, &list).disk_bytes, real()));
        real()
    };
    let before = is_true(&sandbox);
    assert!(before > 2 << 20);
    workspace.remove("noise.bin");
    checkpoint(&sandbox);
    done(&sandbox, &remove(&[2, 3]));
    sandbox.crash_and_restart();
    is_true(&sandbox);
    let status = sandbox.ctl(&["status"]);
    assert!(status.contains("DISK") && status.contains("KiB"), "{status}");
}

#[test]
fn a_quota_lets_the_oldest_go_and_is_kept() {
    let sandbox = Sandbox::start();
    let workspace = with_checkpoints(&sandbox, 1);
    let quota = 6 << 20;
    set(&sandbox, Retention { max_bytes: Some(quota), ..Retention::default() });
    for _ in 0..8 {
        // Shares nothing with the previous checkpoint.
        workspace.write("noise.bin", noise(1 << 20));
        checkpoint(&sandbox);
    }
    wait_until(SOON, "the quota to be kept", || show(&sandbox).project.disk_bytes.is_some_and(|disk| disk <= quota));
    let left = checkpoints(&sandbox);
    assert!(left.len() < 9 && left.last() == Some(&9), "{left:?}");
    assert!(removals(&sandbox).iter().all(|(_, reason)| *reason == RemovalReason::Quota));
    all_verify(&sandbox);
}

#[test]
fn a_quota_that_cannot_be_kept_is_a_refusal_and_all_agents_run() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    sandbox.workspace("web").write("noise.bin", noise(2 << 20));
    checkpoint(&sandbox);
    sandbox.ctl(&["project", "set", "web", "--max-checkpoint-bytes", "1MiB"]);
    for _ in 0..2 {
        let create = CheckpointCreate { project: Some(web()), name: None, description: String::new() };
        let refusal = refused(&sandbox, &create);
        assert_eq!(refusal.code, Code::QuotaExceeded);
        assert!(refusal.hint.as_deref().is_some_and(|hint| hint.contains("--max-checkpoint-bytes")), "{refusal:?}");
        assert_eq!(pause(&sandbox, PauseMode::Freeze).expect_err("no room").code, Code::QuotaExceeded);
    }
    is_untouched(&sandbox, &ticker, &[1]);
    sandbox.ctl(&["project", "set", "web", "--max-checkpoint-bytes", "0"]);
    pause(&sandbox, PauseMode::Freeze).expect("without a quota");
    all_verify(&sandbox);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn below_the_disk_floor_the_oldest_go_before_a_pause_is_refused() {
    let disk = SmallDisk::mount("32m");
    let floor = 12 << 20;
    let sandbox = Sandbox::builder()
        .config(&format!("[pause]\ndisk_floor_bytes = {floor}\n"))
        .env("FERMATA_STATE_DIR", disk.path().to_str().expect("a temporary path is ASCII"))
        .start();
    let ticker = Ticker::start(&sandbox);
    let mut numbers = Vec::new();
    // Each takes 3 MiB of 20: without removals the seventh would be refused.
    for _ in 0..10 {
        sandbox.workspace("web").write("noise.bin", noise(3 << 20));
        numbers.push(checkpoint(&sandbox).id);
    }
    let kept = checkpoints(&sandbox);
    assert!(kept.len() < 8 && kept.last() == Some(&10), "{kept:?}");
    assert!(removals(&sandbox).iter().all(|(_, reason)| *reason == RemovalReason::DiskFloor));
    all_verify(&sandbox);

    // Checkpoints are not removed for space that other files take.
    done(&sandbox, &CheckpointPrune { keep: Some(2), ..prune() });
    assert_eq!(checkpoints(&sandbox), [9, 10]);
    let ballast = disk.fill(1 << 20);
    let refusal = pause(&sandbox, PauseMode::Freeze).expect_err("no room");
    assert_eq!(refusal.code, Code::DiskFull);
    assert_eq!(checkpoints(&sandbox), [9, 10]);
    ticker.runs(SOON);
    fs::remove_file(&ballast).expect("free the disk");
    pause(&sandbox, PauseMode::Freeze).expect("pause when there is room again");
    ticker.stands_still();
    all_verify(&sandbox);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}
