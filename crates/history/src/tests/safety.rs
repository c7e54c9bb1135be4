//! What must never happen: a write to the user's `.git` or outside the workspace, or a half-restored workspace.

use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;

use super::*;

#[test]
fn the_users_git_stays_byte_identical_over_twenty_checkpoints_and_restores() {
    let sandbox = Sandbox::new();
    sandbox.git(&["init", "-q"]);
    for n in 0..10 {
        sandbox.write(format!("f{n}"), "1");
    }
    sandbox.git(&["add", "."]);
    sandbox.git(&["commit", "-qm", "one"]);
    // A file with a new time makes git refresh its index.
    sandbox.write("f0", "1");
    let before = files_on_disk(&sandbox.at(".git"));
    for round in 0..20 {
        sandbox.write(format!("f{}", round % 10), format!("{round}"));
        sandbox.checkpoint(2 * round + 1);
        if round > 0 {
            sandbox.restore_cleanly(2 * round - 1, 2 * round + 2);
        }
    }
    assert_eq!(files_on_disk(&sandbox.at(".git")), before);
}

#[test]
fn a_link_planted_in_the_middle_is_not_followed() {
    let sandbox = Sandbox::new();
    sandbox.write("dir/sub/a", "1");
    sandbox.write("dir/gone", "1");
    sandbox.checkpoint(1);
    sandbox.write("dir/sub/a", "22");
    fs::remove_file(sandbox.at("dir/gone")).unwrap();
    sandbox.write("dir/sub/extra", "x");
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);

    let outside = sandbox.outside("outside");
    fs::create_dir_all(outside.join("sub")).unwrap();
    fs::write(outside.join("sub/a"), "22").unwrap();
    fs::write(outside.join("sub/extra"), "x").unwrap();
    let before = files_on_disk(&outside);
    fs::rename(sandbox.at("dir"), sandbox.at("moved")).unwrap();
    symlink(&outside, sandbox.at("dir")).unwrap();
    let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
    let wrong: Vec<_> = report.mismatches.iter().map(|mismatch| mismatch.path.to_string()).collect();
    assert!(wrong.iter().any(|path| path.starts_with("dir/")), "{wrong:?}");
    assert_eq!(files_on_disk(&outside), before);

    // The same holds for planning and for taking a checkpoint.
    sandbox.checkpoint(3);
    assert!(sandbox.covered(3).contains(&"dir".to_owned()));
    assert!(!sandbox.covered(3).contains(&"dir/sub/a".to_owned()));
    sandbox.restore(1, 4);
    assert_eq!(files_on_disk(&outside), before);
    assert_eq!(fs::read(sandbox.at("dir/sub/a")).unwrap(), b"1");
}

#[test]
fn a_directory_that_is_swapped_for_a_link_while_a_restore_runs_leads_nowhere() {
    let sandbox = Sandbox::new();
    let outside = sandbox.outside("outside");
    for n in 0..60 {
        sandbox.write(format!("dir/sub/f{n}"), format!("old {n}"));
        let path = outside.join(format!("sub/f{n}"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("newer {n}")).unwrap();
    }
    fs::write(outside.join("sub/extra"), "x").unwrap();
    sandbox.checkpoint(1);
    for n in 0..60 {
        sandbox.write(format!("dir/sub/f{n}"), format!("newer {n}"));
    }
    sandbox.write("dir/sub/extra", "x");
    set_mode(&sandbox.at("dir/sub/f3"), 0o600);
    sandbox.checkpoint(2);
    let before = (files_on_disk(&outside), finer(&outside));
    let (real, aside) = (sandbox.at("dir"), sandbox.at("aside"));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(&real, &aside).unwrap();
                symlink(&outside, &real).unwrap();
                std::thread::yield_now();
                fs::remove_file(&real).unwrap();
                fs::rename(&aside, &real).unwrap();
            }
        });
        for round in 0..15 {
            let (from, to) = if round % 2 == 0 { (1, 2) } else { (2, 1) };
            let planned = sandbox.planned(from, Some(to), None);
            // It may fail or report what it could not do.
            drop(sandbox.history.apply_restore(&planned.plan, &quiet));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!((files_on_disk(&outside), finer(&outside)), before);
    // Once nothing changes any more, the restore completes.
    sandbox.restore_cleanly(1, 3);
    assert_eq!(fs::read(sandbox.at("dir/sub/f7")).unwrap(), b"old 7");
}

#[test]
fn a_plan_with_an_unsafe_path_is_refused_as_a_whole() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    let mut plan = sandbox.plan(1, 1, None);
    plan.operations.push(Operation::MakeDirectory { path: rel("x/.Git/hooks") });
    assert!(matches!(sandbox.history.apply_restore(&plan, &quiet), Err(HistoryError::UnsafePath { .. })));
    let text = serde_json::to_string(&plan).unwrap().replace("x/.Git/hooks", "../outside");
    let error = serde_json::from_str::<RestorePlan>(&text).unwrap_err().to_string();
    assert!(error.contains("../outside"), "{error}");
    assert_eq!(fs::read_dir(sandbox.path()).unwrap().count(), 1, "nothing was made");
}

/// Creates the two states between which the killed restore moves.
fn two_states(sandbox: &Sandbox) -> (FilesOnDisk, RestorePlan) {
    for n in 0..6 {
        sandbox.write(format!("d{n}/a"), format!("old {n}"));
    }
    sandbox.write("swap", "a file");
    symlink("swap", sandbox.at("link")).unwrap();
    sandbox.checkpoint(1);
    let wanted = files_on_disk(&sandbox.path());
    for n in 0..3 {
        sandbox.write(format!("d{n}/a"), format!("newer {n}"));
        sandbox.write(format!("d{n}/b"), "unwanted");
    }
    fs::remove_dir_all(sandbox.at("d5")).unwrap();
    sandbox.write("d5", "a file where a directory was");
    fs::remove_file(sandbox.at("swap")).unwrap();
    sandbox.write("swap/dir/x", "a directory where a file was");
    fs::remove_file(sandbox.at("link")).unwrap();
    sandbox.write("extra/deep/file", "unwanted");
    sandbox.checkpoint(2);
    (wanted, sandbox.plan(1, 2, None))
}

/// The body of the process that the next test kills; it does nothing unless started by that test.
#[test]
fn killed_restore_body() {
    let Some(state) = std::env::var_os("FERMATA_TEST_RESTORE") else {
        return;
    };
    let state = PathBuf::from(state);
    let plan: RestorePlan = serde_json::from_slice(&fs::read(state.join("plan.json")).unwrap()).unwrap();
    History::open(&state).unwrap().apply_restore(&plan, &quiet).unwrap();
}

#[test]
fn a_restore_killed_at_any_step_rolls_forward_to_the_same_end() {
    let operations = two_states(&Sandbox::new()).1.operations;
    let steps = operations.len();
    let is_write = |step: &&Operation| matches!(step, Operation::WriteFile { .. } | Operation::WriteLink { .. });
    let writes = operations.iter().filter(is_write).count();
    assert!(writes > 0 && steps > writes);
    let points = (1..=steps).map(|n| format!("history.restore.step@{n}=abort"));
    let staged = (1..=writes).map(|n| format!("history.restore.staged@{n}=abort"));
    for point in points.chain(staged).chain(["history.restore.flushed=abort".to_owned()]) {
        let sandbox = Sandbox::new();
        let (wanted, plan) = two_states(&sandbox);
        let state = sandbox.outside("state");
        fs::write(state.join("plan.json"), serde_json::to_vec(&plan).unwrap()).unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::safety::killed_restore_body"])
            .env("FERMATA_TEST_RESTORE", &state)
            .env(fermata_failpoint::VARIABLE, &point)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{point}");
        let report = sandbox.history.apply_restore(&plan, &quiet).unwrap();
        assert_eq!(report.mismatches, [], "{point}");
        assert_eq!(files_on_disk(&sandbox.path()), wanted, "{point}");
    }
}

/// The body of the process that the next test kills.
#[test]
fn killed_publication_body() {
    let Some(state) = std::env::var_os("FERMATA_TEST_PUBLISH") else {
        return;
    };
    let state = PathBuf::from(state);
    let history = History::open(&state).unwrap();
    let workspace = state.parent().unwrap().join("work");
    let rules = Rules::default();
    let request = SnapshotRequest {
        workspace,
        number: 2,
        message: String::new(),
        parent: Some(1),
        rules,
        mapped: Mapped::default(),
        full_scan_after: None,
    };
    let snapshot = history.snapshot(&request, 7, &quiet, &NEVER).unwrap();
    history.publish(&snapshot).unwrap();
}

#[test]
fn a_checkpoint_killed_at_any_instant_is_there_or_is_swept() {
    let points = [
        ("history.pack.written=abort", false),
        ("history.pack.moved@1=abort", false),
        ("history.pack.moved@2=abort", false),
        ("history.ref.before=abort", false),
        ("history.ref.created=abort", true),
    ];
    for (point, exists) in points {
        let sandbox = Sandbox::new();
        sandbox.write("a", "1");
        sandbox.checkpoint(1);
        sandbox.write("a", "22");
        let packs = walk(&sandbox.history.repository().join("objects/pack"));
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::safety::killed_publication_body"])
            .env("FERMATA_TEST_PUBLISH", sandbox.outside("state"))
            .env(fermata_failpoint::VARIABLE, point)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "{point}");
        let history = History::open(&sandbox.outside("state")).unwrap();
        history.sweep().unwrap();
        assert_eq!(history.list().unwrap(), if exists { vec![1, 2] } else { vec![1] }, "{point}");
        assert_eq!(fs::read_dir(history.repository().join("pending")).unwrap().count(), 0, "{point}");
        if !exists {
            assert_eq!(walk(&history.repository().join("objects/pack")), packs, "{point}");
        }
        let next = history.snapshot(&sandbox.request(3), 8, &quiet, &NEVER).unwrap();
        history.publish(&next).unwrap();
        assert_eq!(history.verify(3, &quiet, &NEVER).unwrap().bad, [], "{point}");
        git_in(history.repository(), &["fsck", "--strict", "--no-dangling"]);
    }
}

#[test]
fn a_workspace_that_became_a_link_is_not_restored() {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    sandbox.write("a", "22");
    sandbox.checkpoint(2);
    let plan = sandbox.plan(1, 2, None);
    fs::rename(sandbox.path(), sandbox.outside("elsewhere")).unwrap();
    symlink(sandbox.outside("elsewhere"), sandbox.path()).unwrap();
    let result = sandbox.history.apply_restore(&plan, &quiet);
    assert!(matches!(result, Err(HistoryError::WorkspaceRefused { .. })));
    assert_eq!(fs::read(sandbox.outside("elsewhere/a")).unwrap(), b"22");
}
