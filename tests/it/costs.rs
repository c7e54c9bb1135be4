//! What checkpoints, pauses and restores cost, as counts: files flushed and transactions committed.
//!
//! The files and objects that they read and write are counted in `crates/history/src/tests/costs.rs`.

use fermata_protocol::checkpoint::CheckpointRestore;
use fermata_protocol::pause::PauseMode;
use fermata_tests::recorder::{Recorder, commits};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace};

use crate::scene::*;

const DATABASE: &str = "state/fermata.sqlite-wal";

/// A project of a thousand files with a checkpoint.
struct Large {
    sandbox: Sandbox,
    recorder: Recorder,
    workspace: Workspace,
}

impl Large {
    fn new() -> Self {
        let (recorder, builder) = Recorder::preload(Sandbox::builder());
        let sandbox = builder.start();
        let workspace = sandbox.workspace("web");
        for n in 0..1_000 {
            workspace.write(&format!("d{}/f{n}", n % 50), format!("content {n}\n"));
        }
        sandbox.ctl(&["project", "create", "web", "-w", workspace.text()]);
        // The daemon scans the workspace by itself.
        recorder.wait_for(&sandbox, "state/projects/web/history/history.git/objects/pack");
        checkpoint(&sandbox);
        Self { sandbox, recorder, workspace }
    }

    fn change(&self, count: usize) {
        for n in 0..count {
            self.workspace.write(&format!("d{n}/f{n}"), format!("changed {n}\n"));
        }
    }

    /// Runs an operation; returns the files that the daemon flushed for it, and the number of its transactions.
    fn cost_of<T>(&self, act: impl FnOnce(&Sandbox) -> T) -> (Vec<String>, usize) {
        drop(self.recorder.flushed(&self.sandbox));
        let before = commits(&self.sandbox);
        act(&self.sandbox);
        (self.recorder.flushed(&self.sandbox), commits(&self.sandbox) - before)
    }
}

/// The flushes of a checkpoint: each of its files and directories once, and the row once.
fn of_checkpoint(number: u64, pack: bool) -> Vec<String> {
    let (git, checkpoints) = ("state/projects/web/history/history.git", "state/projects/web/checkpoints");
    let mut all = vec![
        DATABASE.to_owned(),
        checkpoints.to_owned(),
        format!("{checkpoints}/{number}"),
        format!("{checkpoints}/{number}/context.json"),
        format!("{checkpoints}/{number}/database.sqlite"),
        format!("{checkpoints}/{number}/manifest.json"),
        format!("{git}/pending/*/ref"),
        format!("{git}/refs/fermata/checkpoints"),
    ];
    if pack {
        let parts = ["objects/pack", "pending/*/pack-*.idx", "pending/*/incoming.pack"];
        all.extend(parts.map(|part| format!("{git}/{part}")));
    }
    all.sort();
    all
}

#[test]
fn a_checkpoint_flushes_its_own_files_once_however_many_the_workspace_has() {
    let large = Large::new();
    large.change(10);
    // Published without a flush, and committed.
    assert_eq!(large.cost_of(checkpoint), (of_checkpoint(2, true), 2));
    large.change(50);
    assert_eq!(large.cost_of(checkpoint), (of_checkpoint(3, true), 2));
}

#[test]
fn a_checkpoint_with_nothing_changed_flushes_no_pack() {
    let large = Large::new();
    assert_eq!(large.cost_of(checkpoint), (of_checkpoint(2, false), 2));
}

#[test]
fn a_pause_is_one_durable_transaction() {
    let large = Large::new();
    let ticker = Ticker::start(&large.sandbox);
    checkpoint(&large.sandbox);
    large.change(10);
    let (flushed, commits) = large.cost_of(|sandbox| pause(sandbox, PauseMode::Freeze).expect("pause"));
    // The first four steps end without a flush; the row is written with the status of project and agents.
    assert_eq!(commits, 6, "begun, four steps, committed");
    let mut expected = of_checkpoint(3, true);
    // The context snapshot is prepared before the freeze.
    expected.push("state/projects/web/checkpoints/3.partial/context.json".to_owned());
    expected.sort();
    assert_eq!(flushed, expected);
    let (flushed, commits) = large.cost_of(|sandbox| resume(sandbox).expect("resume"));
    assert_eq!((flushed, commits), (vec![DATABASE.to_owned(); 2], 2), "begun, ended");
    ticker.runs(SOON);
}

#[test]
fn a_restore_flushes_what_differs() {
    let large = Large::new();
    large.change(10);
    checkpoint(&large.sandbox);
    let restore = CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() };
    let (flushed, commits) = large.cost_of(|sandbox| {
        let result = done(sandbox, &restore);
        assert_eq!((result.changes_total, result.written, result.removed), (10, 10, 0));
        let is_checked = || operations(sandbox)[0].result.as_ref().is_some_and(|result| result.get("check").is_some());
        wait_until(SOON, "the workspace to be compared", is_checked);
    });
    assert_eq!(commits, 4, "begun, planned, restored, checked");
    let (files, others): (Vec<_>, Vec<_>) = flushed.into_iter().partition(|path| path.starts_with("ws/"));
    let of_file = |n| [format!("ws/web/d{n}"), format!("ws/web/d{n}/.fermata-restore-*")];
    assert_eq!(files, (0..10).flat_map(of_file).collect::<Vec<_>>());
    // The safety checkpoint has nothing new; the plan is written; the first three transactions are durable.
    let mut expected = of_checkpoint(3, false);
    expected.extend([DATABASE; 2].map(str::to_owned));
    expected.extend(["state/projects/web", "state/projects/web/.restore-*"].map(str::to_owned));
    expected.sort();
    assert_eq!(others, expected);
}
