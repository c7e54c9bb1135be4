//! Restores that cannot be completed: they are given up, no agent is thawed over partly restored files, and a later
//! restore repairs the project.

use std::fs;
use std::time::Duration;

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::checkpoint::{CheckpointCreate, CheckpointRestore, CheckpointRestoreResult};
use fermata_protocol::operation::OperationState;
use fermata_protocol::pause::{PauseMode, ResumeMethod};
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{Code, Refusal};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, Workspace, process};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// Settings with few tries.
const IMPATIENT: &str = "[restore]\npatience_ms = 200\nfull_disk_patience_ms = 200\n";

/// Longer than the minimum number of tries takes.
const GIVEN_UP: Duration = Duration::from_secs(30);

fn restore_of(number: u64) -> CheckpointRestore {
    CheckpointRestore { project: web(), checkpoint: number, dry_run: false, paths: Vec::new() }
}

/// Restores a checkpoint and removes the workspace once the plan exists.
fn fails(sandbox: &Sandbox, workspace: &Workspace, number: u64) -> Refusal {
    let aside = workspace.path().with_extension("aside");
    let answer = std::thread::scope(|scope| {
        let restoring = scope.spawn(|| refusal(sandbox.rpc().call(&restore_of(number))));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        fs::rename(workspace.path(), &aside).expect("take the workspace away");
        sandbox.signal_daemon(Signal::SIGCONT);
        wait_until(GIVEN_UP, "the restore to be given up", || show(sandbox).project.broken.is_some());
        restoring.join().expect("an answer")
    });
    fs::rename(&aside, workspace.path()).expect("put the workspace back");
    answer.expect_err("it cannot be restored")
}

#[test]
fn a_restore_without_a_workspace_is_given_up_and_names_the_way_out() {
    let mut sandbox = Sandbox::builder().config(IMPATIENT).env(FAILPOINT, "restore.apply=stop").start();
    let ticker = Ticker::start(&sandbox);
    let workspace = sandbox.workspace("web");
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n");
    let pid = the_agent(&sandbox).pid.expect("it runs");
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    let answer = fails(&sandbox, &workspace, first.id);
    assert_eq!(answer.code, Code::RestoreFailed, "{answer:?}");
    let way_out = "fermatactl checkpoint restore web 3";
    assert!(answer.hint.as_deref().is_some_and(|hint| hint.contains(way_out)), "{answer:?}");

    let shown = show(&sandbox).project;
    let broken = shown.broken.expect("it says so");
    assert_eq!((shown.status, broken.checkpoint_id, broken.safety_checkpoint_id), (ProjectStatus::Failed, 1, 3));
    assert!(sandbox.ctl(&["status", "web"]).contains(way_out), "the way out is missing in the status");
    let operation = operations(&sandbox).into_iter().find(|one| one.id == broken.operation_id).expect("kept");
    assert_eq!(
        (operation.state, operation.error.map(|e| e.data.code)),
        (OperationState::Failed, Some(Code::RestoreFailed))
    );
    let kinds = sandbox.ctl(&["events", "--project", "web", "--json"]);
    assert!(kinds.contains("restore.retried") && kinds.contains("restore.given_up"), "{kinds}");

    // The frozen agent was ended, and nothing is started or resumed.
    wait_until(SOON, "the frozen agent to end", || !process::is_alive(pid));
    ticker.stands_still();
    assert_eq!(resume(&sandbox).expect_err("not over half restored files").code, Code::RestoreFailed);
    assert_eq!(pause(&sandbox, PauseMode::Freeze).expect_err("nothing runs").code, Code::RestoreFailed);
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    assert_eq!(settled(&sandbox).project.status, ProjectStatus::Failed);
    assert_eq!(the_agent(&sandbox).status, AgentStatus::Paused);
    ticker.stands_still();
    // The present files can still be saved.
    done(&sandbox, &CheckpointCreate { project: Some(web()), name: None, description: String::new() });

    // The safety checkpoint restores the previous files, and the agent starts anew.
    let restored: CheckpointRestoreResult = done(&sandbox, &restore_of(3));
    assert_eq!(workspace.read("README.md"), "# Later\n");
    assert_eq!(status(&sandbox), ProjectStatus::Paused);
    assert!(show(&sandbox).project.broken.is_none());
    let again = resume(&sandbox).expect("resume");
    assert_eq!(again.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(), [ResumeMethod::Respawned]);
    ticker.runs(SOON);
    only_these_are_left(&sandbox, &[1, paused.checkpoint_id, 3, 4, restored.safety_checkpoint_id.expect("one")]);
    all_verify(&sandbox);
}

#[test]
fn what_a_restore_that_was_given_up_has_done_is_undone_by_its_safety_checkpoint() {
    let sandbox = Sandbox::builder()
        .config(IMPATIENT)
        .env(FAILPOINT, "history.restore.staged@2=error,restore.apply@2=stop")
        .start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    for name in ["a", "b", "c", "d"] {
        workspace.write(name, "old");
    }
    let first = checkpoint(&sandbox);
    for name in ["a", "b", "c", "d"] {
        workspace.write(name, "newer");
    }
    let later = workspace.fingerprint();
    let answer = fails(&sandbox, &workspace, first.id);
    assert_eq!(answer.code, Code::RestoreFailed, "{answer:?}");
    assert_ne!(workspace.fingerprint(), later, "it got some way");
    // No staging directory and no plan are left.
    let left = |dir: &std::path::Path, text: &str| {
        fs::read_dir(dir).expect("list").flatten().any(|entry| entry.file_name().to_string_lossy().contains(text))
    };
    assert!(!left(workspace.path(), ".fermata-restore-"));
    wait_until(SOON, "the plan to be gone", || !left(&project_dir(&sandbox), "restore-"));
    let run = sandbox.ctl_output(&["run", "--project", "web", "--", "true"]);
    assert!(!run.status.success(), "{run:?}");
    // Restoring some paths does not repair the project.
    let part = CheckpointRestore { paths: vec!["a".to_owned()], ..restore_of(2) };
    done(&sandbox, &part);
    assert!(show(&sandbox).project.broken.is_some());
    done(&sandbox, &restore_of(2));
    assert!(show(&sandbox).project.broken.is_none());
    assert_eq!(workspace.fingerprint(), later);
    assert_eq!(status(&sandbox), ProjectStatus::Init);
}

/// The daemon dies while it gives a restore up; the next daemon gives it up as well.
fn dies_while_giving_up(point: &str) {
    let failpoints = format!("restore.apply=stop,{point}=abort");
    let mut sandbox = Sandbox::builder().config(IMPATIENT).env(FAILPOINT, &failpoints).start();
    let ticker = Ticker::start(&sandbox);
    let workspace = sandbox.workspace("web");
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n");
    let pid = the_agent(&sandbox).pid.expect("it runs");
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    let aside = workspace.path().with_extension("aside");
    std::thread::scope(|scope| {
        let restoring = scope.spawn(|| sandbox.rpc().call(&restore_of(first.id)).is_err());
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        fs::rename(workspace.path(), &aside).expect("take the workspace away");
        sandbox.signal_daemon(Signal::SIGCONT);
        assert!(restoring.join().expect("an end"), "the daemon was to die");
    });
    wait_until(GIVEN_UP, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    ticker.stands_still();
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    wait_until(GIVEN_UP, "the restore to be given up", || show(&sandbox).project.broken.is_some());
    wait_until(SOON, "the frozen agent to end", || !process::is_alive(pid));
    fs::rename(&aside, workspace.path()).expect("put the workspace back");
    done(&sandbox, &restore_of(3));
    assert_eq!((status(&sandbox), workspace.read("README.md")), (ProjectStatus::Paused, "# Later\n".to_owned()));
    assert_eq!(resume(&sandbox).expect("resume").agents[0].method, ResumeMethod::Respawned);
    ticker.runs(SOON);
    all_verify(&sandbox);
}

#[test]
fn a_daemon_that_dies_before_it_has_written_down_that_it_gives_up_gives_up_again() {
    dies_while_giving_up("restore.give_up");
}

#[test]
fn a_daemon_that_dies_right_after_giving_up_leaves_no_agent_frozen() {
    dies_while_giving_up("restore.given_up");
}

/// A small file system as a workspace; `None` without privileges.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(at: &std::path::Path) -> Option<Self> {
        fs::create_dir_all(at).expect("create the mount point");
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), Some("size=12m,mode=0755")).ok()?;
        Some(Self(at.to_owned()))
    }

    fn remount(&self, flags: MsFlags) {
        mount(None::<&str>, &self.0, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).expect("remount");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmount");
    }
}

fn has_draft(workspace: &Workspace) -> bool {
    let names = fs::read_dir(workspace.path()).expect("list").flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().starts_with(".fermata-restore-"))
}

#[test]
fn a_restore_that_a_full_disk_delays_continues_once_there_is_space() {
    let config = "[restore]\npatience_ms = 200\n[pause]\ndisk_floor_bytes = 65536\n";
    let sandbox = Sandbox::builder().config(config).start();
    let path = sandbox.workspace("web").path().to_owned();
    let Some(_small) = Small::mount(&path) else { return };
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    workspace.write(".gitignore", "*.o\n").write("large", vec![b'l'; 5 << 20]).write("zz", "old");
    let first = checkpoint(&sandbox);
    workspace.remove("large").write("zz", "newer").write("fill.o", vec![b'f'; 10 << 20]);
    let answer = refused(&sandbox, &restore_of(first.id));
    assert_eq!(answer.code, Code::DiskFull, "{answer:?}");
    assert!(answer.hint.as_deref().is_some_and(|hint| hint.contains("continues by itself")), "{answer:?}");
    assert_eq!(status(&sandbox), ProjectStatus::Restoring);
    workspace.remove("fill.o");
    wait_until(GIVEN_UP, "the restore to go on", || status(&sandbox) == ProjectStatus::Init);
    assert_eq!((workspace.read("large").len(), workspace.read("zz")), (5 << 20, "old".to_owned()));
    assert!(!has_draft(&workspace));
    assert_eq!(operations(&sandbox)[0].state, OperationState::Succeeded);
}

#[test]
fn a_restore_onto_a_read_only_file_system_is_given_up_and_works_later() {
    let sandbox = Sandbox::builder().config(IMPATIENT).start();
    let path = sandbox.workspace("web").path().to_owned();
    let Some(small) = Small::mount(&path) else { return };
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    let first = checkpoint(&sandbox);
    workspace.write("README.md", "# Later\n").write("new", "new");
    small.remount(MsFlags::MS_RDONLY);
    let answer = refused(&sandbox, &restore_of(first.id));
    assert_eq!(answer.code, Code::RestoreFailed, "{answer:?}");
    assert!(show(&sandbox).project.broken.is_some());
    small.remount(MsFlags::empty());
    assert!(!has_draft(&workspace));
    done(&sandbox, &restore_of(first.id));
    assert_eq!((workspace.read("README.md"), workspace.has("new")), ("# A project\n".to_owned(), false));
    assert!(show(&sandbox).project.broken.is_none());
}
