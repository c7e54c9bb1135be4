//! A state directory whose disk fills up at any point or becomes read-only: an operation succeeds or reports why not,
//! agents run on, nothing stays incomplete, and it succeeds once there is space.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fermata_protocol::checkpoint::{CheckpointCreate, CheckpointRestore};
use fermata_protocol::client::ClientError;
use fermata_protocol::method::Method;
use fermata_protocol::pause::{PauseMode, ProjectPause, ProjectResume};
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::transfer::CheckpointConsolidate;
use fermata_protocol::{Code, Refusal};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Disk, ReadOnly, Sandbox, Workspace, process};
use nix::sys::signal::Signal;

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// The least size of each checkpoint in these tests: incompressible bytes.
const NOISE: usize = 192 << 10;

/// How much more space each try gets: a few pages.
const STEP: u64 = 20 << 10;

/// The space that a consolidation leaves free.
const SPARED: u64 = 64 << 20;

/// More than any operation here needs.
const ENOUGH: u64 = 3 << 20;

fn bed(size: &str) -> Sandbox {
    Sandbox::builder()
        .config(
            "[pause]\ndisk_floor_bytes = 0\nlease_ms = 5000\ngrace_ms = 50\n[restore]\nfull_disk_patience_ms = 60000\n",
        )
        .small_disk(size)
        .start()
}

/// Calls a method and asserts that the daemon stays reachable.
fn ask<M: Method>(sandbox: &Sandbox, params: &M) -> Result<M::Result, Refusal> {
    match sandbox.rpc().call(params) {
        Ok(result) => Ok(result),
        Err(ClientError::Refused(refusal)) => Err(refusal),
        Err(other) => panic!("{}: the daemon broke: {other}", M::NAME),
    }
}

/// Asserts that the message says that the disk is full.
#[track_caller]
fn tells_of_the_disk(refusal: &Refusal, leave: u64) {
    let text = refusal.message.to_lowercase();
    let says_full = refusal.code == Code::DiskFull || text.contains("no space left") || text.contains("disk is full");
    assert!(says_full, "with {leave} bytes left: {refusal:?}");
}

/// Asserts that the message says that the disk cannot be written.
#[track_caller]
fn tells_of_read_only(refusal: &Refusal, what: &str) {
    let text = refusal.message.to_lowercase();
    assert!(text.contains("read-only") || text.contains("readonly"), "{what}: {refusal:?}");
}

fn creation() -> CheckpointCreate {
    CheckpointCreate { project: Some(web()), name: None, description: String::new() }
}

fn restore_of(number: u64) -> CheckpointRestore {
    CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() }
}

fn pausing() -> ProjectPause {
    ProjectPause { project: web(), reason: None, mode: PauseMode::Freeze, grace_ms: Some(50) }
}

/// Lets the disk fill up at every point: tries with ever more space, until it has been enough three times.
fn at_every_fullness(sandbox: &Sandbox, from: u64, mut one: impl FnMut(u64) -> bool) {
    let (mut enough, mut failed) = (0, 0);
    let mut leave = from;
    while enough < 3 {
        assert!(leave < from + ENOUGH, "more room than it can need, and still no success");
        if one(leave) {
            enough += 1;
        } else {
            // A little more space may be too little again: files are rounded to pages.
            enough = 0;
            failed += 1;
        }
        sandbox.disk().relieve();
        leave += STEP;
    }
    assert!(failed > 3, "the disk was never full: {failed}");
    println!("{failed} refusals, then enough with {leave} bytes");
}

#[test]
fn a_live_checkpoint_on_a_disk_that_runs_full_at_any_point_is_there_or_is_not() {
    let sandbox = bed("48m");
    let ticker = Ticker::start(&sandbox);
    let mut numbers = vec![checkpoint(&sandbox).id];
    at_every_fullness(&sandbox, 0, |leave| {
        sandbox.workspace("web").write("noise.bin", noise(NOISE));
        sandbox.disk().fill(leave);
        let answer = ask(&sandbox, &creation());
        ticker.runs(SOON);
        sandbox.disk().relieve();
        let good = match answer {
            Ok(made) => {
                numbers.push(made.checkpoint.id);
                true
            }
            Err(refusal) => {
                tells_of_the_disk(&refusal, leave);
                false
            }
        };
        settled(&sandbox);
        is_untouched(&sandbox, &ticker, &numbers);
        all_verify(&sandbox);
        good
    });
}

#[test]
fn a_pause_on_a_disk_that_runs_full_at_any_point_is_made_or_undone() {
    let sandbox = bed("48m");
    let ticker = Ticker::start(&sandbox);
    let mut numbers = vec![checkpoint(&sandbox).id];
    at_every_fullness(&sandbox, 0, |leave| {
        sandbox.workspace("web").write("noise.bin", noise(NOISE));
        sandbox.disk().fill(leave);
        let answer = ask(&sandbox, &pausing());
        let good = match answer {
            Ok(paused) => {
                numbers.push(paused.checkpoint_id);
                ticker.stands_still();
                // Continuing needs space too; without it a user can repeat the call after making some.
                let resume = ProjectResume { project: web(), checkpoint: None, over_budget: false };
                if let Err(refusal) = ask(&sandbox, &resume) {
                    tells_of_the_disk(&refusal, leave);
                    sandbox.disk().relieve();
                    if settled(&sandbox).project.status == ProjectStatus::Paused {
                        done(&sandbox, &resume);
                    }
                }
                true
            }
            Err(refusal) => {
                // Before there is space again.
                ticker.runs(SOON);
                tells_of_the_disk(&refusal, leave);
                false
            }
        };
        sandbox.disk().relieve();
        settled(&sandbox);
        is_untouched(&sandbox, &ticker, &numbers);
        all_verify(&sandbox);
        good
    });
}

/// The files of a workspace with the hashes of their contents.
fn files(workspace: &Workspace) -> BTreeMap<String, String> {
    let all = workspace.fingerprint().into_iter();
    let files = all.filter(|(path, _)| workspace.path().join(path).is_file());
    files.map(|(path, (_, _, hash))| (path.display().to_string(), hash)).collect()
}

/// A project without agents and with one checkpoint.
fn at_rest(sandbox: &Sandbox) -> Workspace {
    let workspace = furnished(sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(sandbox);
    workspace
}

#[test]
fn a_restore_on_a_disk_that_runs_full_at_any_point_changes_nothing_or_is_rolled_forward() {
    let sandbox = bed("48m");
    let workspace = at_rest(&sandbox);
    let was = files(&workspace);
    let mut numbers = checkpoints(&sandbox);
    at_every_fullness(&sandbox, 0, |leave| {
        workspace.write("noise.bin", noise(NOISE)).write("README.md", "# Later\n");
        let later = files(&workspace);
        sandbox.disk().fill(leave);
        let answer = ask(&sandbox, &restore_of(1));
        sandbox.disk().relieve();
        settled(&sandbox);
        let now = files(&workspace);
        let good = match &answer {
            Ok(_) => true,
            Err(refusal) => {
                tells_of_the_disk(refusal, leave);
                false
            }
        };
        if now == was {
            numbers.push(checkpoints(&sandbox).last().copied().expect("the safety checkpoint"));
        } else {
            assert!(!good, "it said that it was restored");
            assert_eq!(now, later, "the old or the new state, with {leave} bytes left: {answer:?}");
        }
        wait_until(SOON, "the plan to be gone", || {
            let entries = fs::read_dir(project_dir(&sandbox)).expect("the project's directory").flatten();
            !entries.into_iter().any(|entry| entry.file_name().to_string_lossy().contains("restore-"))
        });
        only_these_are_left(&sandbox, &numbers);
        all_verify(&sandbox);
        good
    });
}

#[test]
fn a_restore_into_a_workspace_whose_disk_is_full_goes_on_when_there_is_room() {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("web");
    let disk = Disk::in_memory(workspace.path(), "24m");
    workspace.write(".gitignore", "ballast\n");
    for n in 0..6 {
        workspace.write(&format!("{n}.bin"), noise(60 << 10));
    }
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(&sandbox);
    let was = files(&workspace);
    for leave in (0..400).step_by(40).map(|kib| kib << 10) {
        for n in 0..6 {
            workspace.remove(&format!("{n}.bin"));
        }
        workspace.write("new/file.txt", "new\n");
        disk.fill(leave);
        match ask(&sandbox, &restore_of(1)) {
            Ok(_) => {}
            Err(refusal) => {
                tells_of_the_disk(&refusal, leave);
                assert_eq!(status(&sandbox), ProjectStatus::Restoring);
            }
        }
        disk.relieve();
        settled(&sandbox);
        assert_eq!(files(&workspace), was, "with {leave} bytes left");
    }
    all_verify(&sandbox);
    only_these_are_left(&sandbox, &checkpoints(&sandbox));
}

#[test]
fn a_consolidation_on_a_disk_that_runs_full_at_any_point_replaces_all_or_nothing() {
    let sandbox = bed("160m");
    let workspace = at_rest(&sandbox);
    let dir = project_dir(&sandbox).join("history/history.git/pending");
    at_every_fullness(&sandbox, SPARED - (100 << 10), |leave| {
        for round in 0..3 {
            workspace
                .write("noise.bin", noise(NOISE / 3))
                .write("README.md", format!("{}{round}\n", "line\n".repeat(50)));
            checkpoint(&sandbox);
        }
        sandbox.disk().fill(leave);
        let answer = ask(&sandbox, &CheckpointConsolidate { project: web(), everything: false });
        all_verify(&sandbox);
        sandbox.disk().relieve();
        let good = match answer {
            Ok(_) => true,
            Err(refusal) => {
                tells_of_the_disk(&refusal, leave);
                false
            }
        };
        // Maintenance after a checkpoint may have begun.
        let drafts = || fs::read_dir(&dir).expect("list the drafts").count();
        wait_until(SOON, &format!("drafts to go, with {leave} bytes left"), || drafts() == 0);
        done(&sandbox, &CheckpointConsolidate { project: web(), everything: !good });
        all_verify(&sandbox);
        good
    });
    only_these_are_left(&sandbox, &checkpoints(&sandbox));
}

#[test]
fn an_export_and_an_import_on_a_disk_that_runs_full_at_any_point_leave_no_half() {
    let sandbox = bed("48m");
    let workspace = furnished(&sandbox, "web");
    workspace.write("noise.bin", noise(NOISE));
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(&sandbox);
    let file = sandbox.path().join("web.exported");
    let file = file.to_str().expect("a temporary path is ASCII");
    sandbox.ctl(&["checkpoint", "export", "web", "1", file]);
    let again = sandbox.path().join("again.exported");
    let mut numbers = vec![1];
    for export in [true, false] {
        at_every_fullness(&sandbox, 0, |leave| {
            sandbox.disk().fill(leave);
            let output = match export {
                true => sandbox.ctl_output(&["checkpoint", "export", "web", "1", again.to_str().expect("ASCII")]),
                false => sandbox.ctl_output(&["checkpoint", "import", "web", file]),
            };
            sandbox.disk().relieve();
            let (said, good) = (String::from_utf8_lossy(&output.stderr).to_lowercase(), output.status.success());
            let says_full = ["no space left", "full", "free some space"].iter().any(|words| said.contains(words));
            assert!(good || says_full, "with {leave} left: {said}");
            settled(&sandbox);
            assert_eq!(again.exists(), good && export);
            if export && good {
                fs::remove_file(&again).expect("remove what was exported");
            }
            if !export && good {
                numbers.push(*checkpoints(&sandbox).last().expect("one was imported"));
            }
            only_these_are_left(&sandbox, &numbers);
            all_verify(&sandbox);
            good
        });
    }
}

#[test]
fn what_a_read_only_disk_keeps_from_being_done_is_refused_and_works_afterwards() {
    let sandbox = bed("160m");
    let ticker = Ticker::start(&sandbox);
    checkpoint(&sandbox);
    sandbox.workspace("web").write("README.md", "# Later\n");
    checkpoint(&sandbox);
    let file = sandbox.path().join("web.exported");
    let file = file.to_str().expect("a temporary path is ASCII");
    sandbox.ctl(&["checkpoint", "export", "web", "1", file]);
    {
        let _read_only = ReadOnly::at(sandbox.state_dir().join("projects"));
        sandbox.workspace("web").write("README.md", "# Later still\n");
        tells_of_read_only(&ask(&sandbox, &creation()).expect_err("not written"), "checkpoint");
        ticker.runs(SOON);
        tells_of_read_only(&ask(&sandbox, &pausing()).expect_err("not written"), "pause");
        ticker.runs(SOON);
        let consolidate = CheckpointConsolidate { project: web(), everything: true };
        tells_of_read_only(&ask(&sandbox, &consolidate).expect_err("not written"), "consolidate");
        let again = sandbox.path().join("again.exported");
        let again = again.to_str().expect("a temporary path is ASCII");
        for args in [["checkpoint", "export", "web", "2", again], ["checkpoint", "import", "web", file, "--json"]] {
            let output = sandbox.ctl_output(&args);
            let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
            assert!(!output.status.success() && said.contains("read-only"), "{args:?}: {said}");
        }
        all_verify(&sandbox);
    }
    settled(&sandbox);
    is_untouched(&sandbox, &ticker, &[1, 2]);
    let third = checkpoint(&sandbox).id;
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause").checkpoint_id;
    {
        let _read_only = ReadOnly::at(sandbox.state_dir().join("projects"));
        tells_of_read_only(&ask(&sandbox, &restore_of(1)).expect_err("not written"), "restore");
        assert_eq!(sandbox.workspace("web").read("README.md"), "# Later still\n");
        ticker.stands_still();
    }
    settled(&sandbox);
    only_these_are_left(&sandbox, &[1, 2, third, paused]);
    done(&sandbox, &restore_of(1));
    assert_eq!(sandbox.workspace("web").read("README.md"), "# A project\n");
    all_verify(&sandbox);
}

/// The disk becomes read-only in the middle of a checkpoint.
fn turns_read_only_at(failpoint: &str) {
    let sandbox =
        Sandbox::builder().config("[pause]\nlease_ms = 20000\n").env(FAILPOINT, &format!("{failpoint}=stop")).start();
    let ticker = Ticker::start(&sandbox);
    let refused = std::thread::scope(|scope| {
        let saving = scope.spawn(|| ask(&sandbox, &creation()));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        let read_only = ReadOnly::at(sandbox.state_dir().join("projects"));
        sandbox.signal_daemon(Signal::SIGCONT);
        ticker.runs(SOON);
        // Undoing needs the disk as well; a waiting caller is answered nevertheless.
        let answered = fermata_tests::waiting::poll_for(SOON, || saving.is_finished().then_some(()));
        drop(read_only);
        let answer = saving.join().expect("an answer").expect_err("nothing could be written");
        assert!(
            answered.is_some(),
            "{failpoint}: there was no answer before the disk became writable again: {answer:?}"
        );
        answer
    });
    tells_of_read_only(&refused, failpoint);
    settled(&sandbox);
    ticker.runs(SOON);
    let made = checkpoint(&sandbox).id;
    all_verify(&sandbox);
    assert_eq!(checkpoints(&sandbox), [made]);
    // Leftovers that could not be removed at once are gone after the next start at the latest.
    let mut sandbox = sandbox;
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    settled(&sandbox);
    is_untouched(&sandbox, &ticker, &[made]);
    all_verify(&sandbox);
}

#[test]
fn a_disk_that_turns_read_only_in_the_middle_of_a_checkpoint_costs_only_that_one() {
    for failpoint in ["checkpoint.begin", "checkpoint.captured", "history.pack.written", "history.pack.moved"] {
        turns_read_only_at(failpoint);
    }
}

/// Stops the daemon in the middle of a call, makes a directory read-only, and continues the daemon. The directory
/// becomes writable again when `until` returns, which is given a function that says whether the call has been
/// answered. Returns the answer.
fn meanwhile_read_only<M: Method + Sync>(
    sandbox: &Sandbox,
    params: &M,
    directory: &Path,
    until: impl FnOnce(&dyn Fn() -> bool),
) -> Result<M::Result, Refusal>
where
    M::Result: Send,
{
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask(sandbox, params));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        let read_only = ReadOnly::at(directory);
        sandbox.signal_daemon(Signal::SIGCONT);
        until(&|| asked.is_finished());
        drop(read_only);
        asked.join().expect("an answer")
    })
}

#[test]
fn a_consolidation_whose_disk_turns_read_only_replaces_all_or_nothing() {
    for failpoint in ["history.consolidation.written", "history.consolidation.moved", "history.consolidation.removed@3"]
    {
        let sandbox = Sandbox::builder().env(FAILPOINT, &format!("{failpoint}=stop")).start();
        let workspace = at_rest(&sandbox);
        for round in 0..4 {
            workspace.write("README.md", format!("round {round}\n"));
            checkpoint(&sandbox);
        }
        let consolidate = CheckpointConsolidate { project: web(), everything: true };
        let until = |answered: &dyn Fn() -> bool| {
            all_verify(&sandbox);
            // The consolidation yields to all other work on this machine.
            wait_until(SOON, "the consolidation to fail", answered);
        };
        let answer = meanwhile_read_only(&sandbox, &consolidate, &sandbox.state_dir().join("projects"), until);
        tells_of_read_only(&answer.expect_err(&format!("nothing could be written at {failpoint}")), failpoint);
        all_verify(&sandbox);
        workspace.write("README.md", "round 5\n");
        let made = checkpoint(&sandbox).id;
        done(&sandbox, &consolidate);
        all_verify(&sandbox);
        only_these_are_left(&sandbox, &(1..=made).collect::<Vec<_>>());
    }
}

#[test]
fn a_restore_into_a_workspace_that_turns_read_only_goes_on_when_it_can_be_written() {
    // Once the workspace is open, a mount over it has no effect.
    let sandbox = Sandbox::builder().env(FAILPOINT, "restore.apply=stop").start();
    let workspace = at_rest(&sandbox);
    let was = files(&workspace);
    workspace.write("README.md", "# Later\n").write("new/file.txt", "new\n").remove("src/lib.rs");
    let tried = |_: &dyn Fn() -> bool| {
        let retried = || sandbox.ctl(&["events", "--project", "web", "--json"]).contains("restore.retried");
        wait_until(SOON, "a try to be reported", retried);
    };
    let answer = meanwhile_read_only(&sandbox, &restore_of(1), workspace.path(), tried);
    answer.expect("it continues by itself");
    assert_eq!(files(&workspace), was);
    only_these_are_left(&sandbox, &[1, 2]);
    all_verify(&sandbox);
}
