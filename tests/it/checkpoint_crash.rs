//! A daemon that dies while it scans a workspace, stores the workspace state, consolidates, sweeps, removes a
//! checkpoint or verifies a restore: every listed checkpoint is complete, and all operations still work.

use std::collections::BTreeMap;
use std::fs;

use fermata_protocol::checkpoint::CheckpointRestore;
use fermata_protocol::transfer::CheckpointConsolidate;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace, process};

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// The files of a workspace with their contents.
type Files = BTreeMap<String, String>;

fn files(workspace: &Workspace) -> Files {
    let all = workspace.fingerprint().into_iter();
    let files = all.filter(|(path, _)| workspace.path().join(path).is_file());
    files.map(|(path, (_, _, hash))| (path.display().to_string(), hash)).collect()
}

fn restore_of(number: u64) -> CheckpointRestore {
    CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() }
}

/// A stopped project with checkpoints, and the content of the workspace at each.
struct Past {
    sandbox: Sandbox,
    workspace: Workspace,
    held: BTreeMap<u64, Files>,
}

impl Past {
    fn of(count: u64) -> Self {
        let sandbox = Sandbox::start();
        let workspace = furnished(&sandbox, "web");
        for n in 0..20 {
            workspace.write(&format!("many/{}/{n}.txt", n % 3), format!("{n}\n"));
        }
        sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
        let mut past = Self { sandbox, workspace, held: BTreeMap::new() };
        for round in 0..count {
            past.change(round);
            past.save();
        }
        past
    }

    fn change(&self, round: u64) {
        self.workspace.write("README.md", format!("{}round {round}\n", "a line\n".repeat(40)));
        self.workspace.write(&format!("only/{round}.txt"), format!("{round}\n"));
        let before = format!("only/{}.txt", round.wrapping_sub(1));
        if self.workspace.has(&before) {
            self.workspace.remove(&before);
        }
    }

    fn save(&mut self) {
        let number = checkpoint(&self.sandbox).id;
        self.held.insert(number, files(&self.workspace));
    }

    /// Ends this daemon and arms a failpoint for the next one.
    fn arm(&mut self, failpoint: &str) {
        self.sandbox.kill_daemon();
        self.sandbox.give_env(FAILPOINT, &format!("{failpoint}=abort"));
    }

    /// Waits until the daemon has died, and starts another one.
    #[track_caller]
    fn rise(&mut self) {
        self.sandbox.wait_for_daemon();
        self.sandbox.forget_env(FAILPOINT);
        self.sandbox.start_daemon();
        settled(&self.sandbox);
    }

    /// Asserts that nothing is lost or left over, and that all operations work.
    #[track_caller]
    fn is_whole(&mut self) {
        only_these_are_left(&self.sandbox, &self.held.keys().copied().collect::<Vec<_>>());
        all_verify(&self.sandbox);
        self.change(100);
        self.save();
        let (oldest, was) = self.held.first_key_value().map(|(n, files)| (*n, files.clone())).expect("a past");
        let later = files(&self.workspace);
        let restored = done(&self.sandbox, &restore_of(oldest));
        assert_eq!(files(&self.workspace), was);
        let safety = restored.safety_checkpoint_id.expect("a safety checkpoint");
        self.held.insert(safety, later.clone());
        self.held.insert(safety + 1, was);
        done(&self.sandbox, &restore_of(safety));
        assert_eq!(files(&self.workspace), later);
        done(&self.sandbox, &CheckpointConsolidate { project: web(), everything: true });
        all_verify(&self.sandbox);
        only_these_are_left(&self.sandbox, &self.held.keys().copied().collect::<Vec<_>>());
    }
}

/// The warm-up scan of a workspace, which the creation of a project begins.
fn dies_in_the_warm_up_scan(failpoint: &str) {
    let mut sandbox = Sandbox::builder().env(FAILPOINT, &format!("{failpoint}=abort")).start();
    let workspace = furnished(&sandbox, "web");
    // The daemon may die before it answers.
    sandbox.ctl_output(&["project", "create", "web", "--workspace", workspace.text()]);
    sandbox.wait_for_daemon();
    sandbox.forget_env(FAILPOINT);
    sandbox.start_daemon();
    settled(&sandbox);
    only_these_are_left(&sandbox, &[]);
    let mut past = Past { sandbox, workspace, held: BTreeMap::new() };
    past.change(0);
    past.save();
    past.is_whole();
}

/// A later scan: the workspace has changed while no daemon ran.
fn dies_in_a_later_scan(failpoint: &str) {
    let mut past = Past::of(3);
    past.arm(failpoint);
    past.change(50);
    // The scan is the first thing that a daemon does, so it dies by itself.
    past.sandbox.start_to_its_death();
    past.sandbox.forget_env(FAILPOINT);
    past.sandbox.start_daemon();
    settled(&past.sandbox);
    past.is_whole();
}

macro_rules! scans {
    ($($name:ident: $point:literal;)*) => {
        $(mod $name {
            #[test]
            fn a_warm_up_scan_whose_daemon_dies_here_is_repeated() {
                super::dies_in_the_warm_up_scan($point);
            }

            #[test]
            fn a_scan_after_a_restart_whose_daemon_dies_here_costs_no_checkpoint() {
                super::dies_in_a_later_scan($point);
            }
        })*
    };
}

scans! {
    at_warm_up_written: "history.warm_up.written";
    at_warm_up_pack_moved: "history.warm_up.moved";
    at_warm_up_index_moved: "history.warm_up.moved@2";
    at_warm_up_based: "history.warm_up.based";
    at_state_written: "history.state.written";
    at_state_based: "history.state.based";
    at_state_placed: "history.state.placed";
}

fn dies_in_a_consolidation(failpoint: &str) {
    let mut past = Past::of(5);
    past.arm(failpoint);
    past.sandbox.start_daemon();
    let answer = past.sandbox.rpc().call(&CheckpointConsolidate { project: web(), everything: true });
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    past.rise();
    past.is_whole();
}

macro_rules! consolidations {
    ($($name:ident: $point:literal;)*) => {
        $(mod $name {
            #[test]
            fn a_consolidation_whose_daemon_dies_here_costs_no_checkpoint() {
                super::dies_in_a_consolidation($point);
            }
        })*
    };
}

consolidations! {
    at_consolidate: "maintenance.consolidate";
    at_written: "history.consolidation.written";
    at_pack_moved: "history.consolidation.moved";
    at_index_moved: "history.consolidation.moved@2";
    at_before_removal: "history.consolidation.before_removal";
    at_first_removed: "history.consolidation.removed";
    at_second_removed: "history.consolidation.removed@2";
    at_seventh_removed: "history.consolidation.removed@7";
    at_swapped: "history.consolidation.swapped";
}

/// A daemon dies while it removes what an earlier one left behind when it died.
fn dies_in_the_sweep_after(first: &str, sweep: &str) {
    let mut past = Past::of(3);
    past.arm(first);
    past.sandbox.start_daemon();
    past.change(50);
    let answer = match first.starts_with("history.consolidation") {
        true => past.sandbox.rpc().call(&CheckpointConsolidate { project: web(), everything: true }).map(drop),
        false => past.sandbox.rpc().call(&creation()).map(drop),
    };
    assert!(answer.is_err(), "the daemon was to die at {first}");
    past.sandbox.wait_for_daemon();
    past.sandbox.forget_env(FAILPOINT);
    past.sandbox.give_env(FAILPOINT, &format!("{sweep}=abort"));
    past.sandbox.start_to_its_death();
    past.sandbox.forget_env(FAILPOINT);
    past.sandbox.start_daemon();
    settled(&past.sandbox);
    past.is_whole();
}

fn creation() -> fermata_protocol::checkpoint::CheckpointCreate {
    fermata_protocol::checkpoint::CheckpointCreate { project: Some(web()), name: None, description: String::new() }
}

#[test]
fn a_start_that_dies_after_it_has_removed_a_draft_is_finished_by_the_next() {
    dies_in_the_sweep_after("history.pack.moved", "history.sweep.directory");
}

#[test]
fn a_start_that_dies_after_it_found_unreachable_objects_is_finished_by_the_next() {
    dies_in_the_sweep_after("history.ref.before", "history.sweep.walked");
}

#[test]
fn a_start_that_dies_between_the_two_files_of_a_pack_is_finished_by_the_next() {
    dies_in_the_sweep_after("history.ref.before", "history.sweep.index");
}

#[test]
fn a_start_that_dies_while_it_removes_what_was_consolidated_is_finished_by_the_next() {
    dies_in_the_sweep_after("history.consolidation.before_removal", "history.sweep.index");
}

#[test]
fn a_start_that_dies_over_a_checkpoint_without_a_row_is_finished_by_the_next() {
    dies_in_the_sweep_after("checkpoint.commit", "history.sweep.index");
}

/// The full verification that follows a restore.
fn dies_in_the_check_after_a_restore(failpoint: &str) {
    let mut past = Past::of(3);
    past.arm(failpoint);
    past.sandbox.start_daemon();
    past.change(50);
    let (later, was) = (files(&past.workspace), past.held[&1].clone());
    // The daemon answers first, or dies before the answer is sent.
    drop(past.sandbox.rpc().call(&restore_of(1)));
    wait_until(SOON, "the daemon to die", || !process::is_alive(past.sandbox.daemon_pid()));
    past.rise();
    assert_eq!(files(&past.workspace), was);
    past.held.insert(4, later);
    let plans = || {
        let entries = fs::read_dir(project_dir(&past.sandbox)).expect("the project's directory").flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().contains("restore-")).count()
    };
    wait_until(SOON, "the plan to be gone", || plans() == 0);
    past.is_whole();
}

#[test]
fn a_daemon_that_dies_before_the_check_after_a_restore_has_restored_all() {
    dies_in_the_check_after_a_restore("restore.check");
}

#[test]
fn a_daemon_that_dies_after_the_check_after_a_restore_has_restored_all() {
    dies_in_the_check_after_a_restore("restore.checked");
}
