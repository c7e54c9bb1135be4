//! `checkpoint.create`: what a checkpoint contains and leaves out, and what a failure or a crash leaves behind.

use std::fs;
use std::path::{Path, PathBuf};

use fermata_protocol::Code;
use fermata_protocol::Target;
use fermata_protocol::agent::{AgentRun, AgentStop};
use fermata_protocol::checkpoint::{CheckpointCreate, CheckpointRestore, CheckpointShow};
use fermata_protocol::operation::OperationState;
use fermata_protocol::pause::{PauseMode, ProjectPause};
use fermata_tests::waiting::{SOON, poll_for, wait_until};
use fermata_tests::workspace::fingerprint;
use fermata_tests::{Sandbox, process};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

fn create() -> CheckpointCreate {
    CheckpointCreate { project: Some(web()), name: None, description: String::new() }
}

#[test]
fn the_users_repository_is_never_touched() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    workspace.git_init().write("src/lib.rs", "//! More.\n").git_commit("second");
    workspace.git(&["branch", "side"]);
    workspace.git(&["tag", "v1"]);
    // A hook that would leave a trace, a staged file, and a rebase in progress.
    workspace.write(".git/hooks/post-commit", "#!/bin/sh\ntouch ran\n").write("staged.txt", "staged\n");
    workspace.git(&["add", "staged.txt"]);
    workspace.write(".git/rebase-merge/head-name", "refs/heads/main\n");
    Ticker::start(&sandbox);
    let git = workspace.path().join(".git");
    let before = fingerprint(&git);
    for round in 0..20 {
        workspace.write("src/lib.rs", format!("//! Round {round}.\n"));
        let made = checkpoint(&sandbox);
        assert_eq!(made.metadata.repository.as_ref().map(serde_json::Value::is_object), Some(true), "{made:?}");
        assert_eq!(made.metadata.warnings, Vec::<String>::new());
    }
    assert_eq!(fingerprint(&git), before, "after 20 checkpoints");
    done(&sandbox, &AgentStop { target: Target::project(web()), grace_ms: Some(0) });
    wait_until(SOON, "the agent to end", || the_agent(&sandbox).status.is_terminal());
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 15, dry_run: false, paths: Vec::new() });
    assert_eq!(workspace.read("src/lib.rs"), "//! Round 14.\n");
    assert_eq!(fingerprint(&git), before, "after a restore");
    assert!(!workspace.has("ran"));
    all_verify(&sandbox);
}

#[test]
fn a_session_file_that_is_a_fifo_blocks_no_checkpoint() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    let (home, marks) = (sandbox.path().join("claude"), sandbox.path().join("marks"));
    fs::create_dir_all(home.join("projects/x")).expect("created");
    let session = "F=\"$CLAUDE_CONFIG_DIR/projects/x/0.jsonl\"; mkfifo \"$F\"; exec 3<>\"$F\"";
    let env = [
        ("PATH", std::env::var("PATH").unwrap_or_default()),
        ("MARKS", marks.to_string_lossy().into_owned()),
        ("CLAUDE_CONFIG_DIR", home.to_string_lossy().into_owned()),
    ];
    let run = AgentRun {
        project: web(),
        workspace: Some(workspace.text().into()),
        name: Some(agent("worker")),
        argv: ["/bin/sh", "-c", &format!("{session}; {TICK}")].map(String::from).to_vec(),
        env: env.map(|(name, value)| (name.to_owned(), value)).into(),
        cwd: None,
        umask: None,
        limits: Default::default(),
        resume_argv: None,
        profile: Some("claude".to_owned()),
        stop_grace_ms: Some(0),
        supervision: Default::default(),
    };
    sandbox.rpc().call(&run).expect("start the agent");
    wait_until(SOON, "the agent's marks", || fs::metadata(&marks).is_ok_and(|meta| meta.len() > 1));
    assert_eq!(checkpoint(&sandbox).metadata.warnings, Vec::<String>::new());
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    resume(&sandbox).expect("resume");
    all_verify(&sandbox);
}

#[test]
fn a_project_without_git_has_checkpoints_too() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    let first = checkpoint(&sandbox);
    assert_eq!((first.id, first.metadata.files), (1, 3));
    assert_eq!(first.metadata.repository, None);
    assert!(!workspace.has(".git"));
    workspace.write("README.md", "# Later\n");
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert_eq!(workspace.read("README.md"), "# A project\n");
    assert!(!workspace.has(".git"));
    only_these_are_left(&sandbox, &[1, 2]);
}

#[test]
fn an_empty_workspace_can_be_saved_and_restored() {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(&sandbox);
    workspace.write("a/b.txt", "new\n");
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert!(!workspace.has("a"));
    all_verify(&sandbox);
}

#[test]
fn after_the_freeze_of_a_live_checkpoint_all_agents_run() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    for _ in 0..5 {
        let made = done(&sandbox, &create());
        assert!(made.frozen_ms > 0.0, "{made:?}");
        for one in [ticker.clone(), ticker.beside("child"), ticker.beside("orphan")] {
            one.runs(SOON);
        }
    }
    is_untouched(&sandbox, &ticker, &[1, 2, 3, 4, 5]);
}

#[test]
fn a_checkpoint_of_a_paused_project_keeps_it_paused() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    checkpoint(&sandbox);
    ticker.stands_still();
    assert!(is_frozen(the_agent(&sandbox).pid.expect("it exists")));
    only_these_are_left(&sandbox, &[1, 2]);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn a_pause_that_comes_during_a_checkpoint_waits_for_it() {
    let sandbox = Sandbox::builder().env(FAILPOINT, "checkpoint.captured=stop").start();
    let ticker = Ticker::start(&sandbox);
    let (mut one, mut other) = (sandbox.rpc(), sandbox.rpc());
    std::thread::scope(|scope| {
        let saving = scope.spawn(move || one.call(&create()));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        let pause = ProjectPause { project: web(), reason: None, mode: PauseMode::Freeze, grace_ms: None };
        let pausing = scope.spawn(move || other.call(&pause));
        sandbox.signal_daemon(nix::sys::signal::Signal::SIGCONT);
        saving.join().expect("an answer").expect("a checkpoint");
        pausing.join().expect("an answer").expect("a pause");
    });
    ticker.stands_still();
    only_these_are_left(&sandbox, &[1, 2]);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

fn fails_cleanly(failpoint: &str, config: &str) {
    let sandbox = Sandbox::builder().config(config).env(FAILPOINT, &format!("{failpoint}=error")).start();
    let ticker = Ticker::start(&sandbox);
    let refusal = refused(&sandbox, &create());
    assert!([Code::CheckpointFailed, Code::PauseFailed].contains(&refusal.code), "{failpoint}: {refusal:?}");
    assert_eq!(operations(&sandbox)[0].state, OperationState::Failed);
    is_untouched(&sandbox, &ticker, &[]);
    let made = checkpoint(&sandbox);
    is_untouched(&sandbox, &ticker, &[made.id]);
    all_verify(&sandbox);
}

#[test]
fn a_checkpoint_that_fails_leaves_nothing_and_all_agents_run() {
    for failpoint in ["pause.validate", "pause.freeze", "pause.frozen", "checkpoint.begin", "history.pack.written"] {
        fails_cleanly(failpoint, BY_GROUP);
    }
}

#[test]
fn a_checkpoint_that_fails_late_leaves_nothing_either() {
    for failpoint in ["checkpoint.captured", "checkpoint.placed", "history.ref.before", "checkpoint.sealed"] {
        fails_cleanly(failpoint, BY_GROUP);
    }
    fails_cleanly("checkpoint.sealed", BY_SIGNALS);
}

#[test]
fn a_checkpoint_whose_row_cannot_be_written_leaves_nothing_either() {
    fails_cleanly("checkpoint.commit", BY_GROUP);
}

fn crash(failpoint: &str, config: &str, numbers: &[u64]) {
    let mut sandbox = Sandbox::builder().config(config).env(FAILPOINT, &format!("{failpoint}=abort")).start();
    let ticker = Ticker::start(&sandbox);
    let answer = sandbox.rpc().call(&create());
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    settled(&sandbox);
    is_untouched(&sandbox, &ticker, numbers);
    checkpoint(&sandbox);
    all_verify(&sandbox);
}

#[test]
fn a_daemon_that_dies_in_the_freeze_of_a_live_checkpoint_leaves_nothing_and_all_agents_run() {
    for failpoint in ["pause.frozen", "checkpoint.begin", "checkpoint.captured"] {
        crash(failpoint, BY_GROUP, &[]);
    }
}

#[test]
fn a_daemon_that_dies_after_the_freeze_of_a_live_checkpoint_leaves_nothing_or_a_complete_checkpoint() {
    for failpoint in ["checkpoint.placed", "history.ref.created", "checkpoint.commit"] {
        crash(failpoint, BY_GROUP, &[]);
    }
    crash("checkpoint.committed", BY_GROUP, &[1]);
    crash("checkpoint.sealed", BY_SIGNALS, &[]);
}

/// A small file system, unmounted when dropped.
pub struct SmallDisk {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl SmallDisk {
    pub fn mount(size: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory to mount on");
        let options = format!("size={size},mode=0700");
        mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).expect("mount");
        Self { path: dir.path().to_owned(), _dir: dir }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills the disk, leaving that many bytes free.
    pub fn fill(&self, leave: usize) -> PathBuf {
        let ballast = self.path.join("ballast");
        let free = nix::sys::statvfs::statvfs(&self.path).expect("query the free space");
        let bytes = usize::try_from(free.blocks_available() * free.fragment_size()).expect("it is small");
        fs::write(&ballast, vec![0_u8; bytes.saturating_sub(leave)]).expect("fill the disk");
        ballast
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("unmount");
    }
}

#[test]
fn a_restore_for_which_there_is_no_room_goes_on_when_there_is() {
    let disk = SmallDisk::mount("12m");
    let sandbox = Sandbox::start();
    let workspace = fermata_tests::Workspace::at(disk.path().join("ws"));
    workspace.write(".gitignore", "ballast\n").write("large.bin", vec![7_u8; 4 << 20]).write("small.txt", "small\n");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(&sandbox);
    workspace.remove("large.bin").write("small.txt", "changed\n").write("new.txt", "new\n");
    let ballast = disk.fill(1 << 20);

    let refusal =
        refused(&sandbox, &CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert!(refusal.message.contains("No space left"), "{refusal:?}");
    assert_eq!(status(&sandbox).as_str(), "restoring");
    fs::remove_file(&ballast).expect("free the disk");
    settled(&sandbox);
    assert_eq!(status(&sandbox).as_str(), "init");
    assert_eq!(workspace.read("small.txt"), "small\n");
    assert_eq!(fs::metadata(workspace.path().join("large.bin")).expect("it is back").len(), 4 << 20);
    assert!(!workspace.has("new.txt"));
    only_these_are_left(&sandbox, &[1, 2]);
}

/// Pauses with that little space left; whatever the result, nothing stays frozen or incomplete.
fn pause_on_a_full_disk(leave: usize) {
    // Dropped after the sandbox, whose daemon has files open in it.
    let disk = SmallDisk::mount("24m");
    let sandbox = Sandbox::builder()
        .config("[pause]\ndisk_floor_bytes = 0\n")
        .env("FERMATA_STATE_DIR", disk.path().to_str().expect("a temporary path is ASCII"))
        .start();
    let ticker = Ticker::start(&sandbox);
    // Random bytes do not compress.
    let mut noise = vec![0_u8; 4 << 20];
    let mut random = fs::File::open("/dev/urandom").expect("open urandom");
    std::io::Read::read_exact(&mut random, &mut noise).expect("read urandom");
    sandbox.workspace("web").write("noise.bin", &noise);
    let ballast = disk.fill(leave);

    let answer =
        sandbox.rpc().call(&ProjectPause { project: web(), reason: None, mode: PauseMode::Freeze, grace_ms: Some(50) });
    let refusal = refusal(answer).expect_err("there is no room");
    ticker.runs(SOON);
    let pid = the_agent(&sandbox).pid.expect("it runs");
    wait_until(SOON, &format!("the agent to be let go after {refusal:?}"), || !is_frozen(pid));
    assert_eq!(checkpoints(&sandbox), Vec::<u64>::new());

    fs::remove_file(&ballast).expect("free the disk");
    settled(&sandbox);
    assert_eq!(status(&sandbox).as_str(), "active");
    let left: Vec<_> = fs::read_dir(disk.path().join("projects/web/checkpoints"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new(), "what could not be written is gone");
    pause(&sandbox, PauseMode::Freeze).expect("pause when there is room again");
    ticker.stands_still();
    all_verify(&sandbox);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn a_pause_on_a_disk_without_any_room_fails_and_the_agent_runs() {
    pause_on_a_full_disk(0);
}

#[test]
fn a_pause_on_a_disk_that_fills_up_meanwhile_fails_and_the_agent_runs() {
    pause_on_a_full_disk(1 << 20);
}

#[test]
fn a_checkpoint_below_the_disk_floor_is_refused_before_an_agent_is_frozen() {
    let sandbox = Sandbox::builder().config("[pause]\ndisk_floor_bytes = 1000000000000000\n").start();
    let ticker = Ticker::start(&sandbox);
    assert_eq!(refused(&sandbox, &create()).code, Code::DiskFull);
    assert_eq!(pause(&sandbox, PauseMode::Freeze).expect_err("no room").code, Code::DiskFull);
    is_untouched(&sandbox, &ticker, &[]);
}

#[test]
fn a_checkpoint_reports_what_it_skips() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    workspace.write(".gitignore", "ignored/\n").write("ignored/big.bin", "x").write("nested/.git/HEAD", "ref: x\n");
    workspace.write("nested/file.txt", "covered\n");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text(), "--max-file-size", "1KiB"]);
    workspace.write("large.bin", vec![7_u8; 4096]);
    checkpoint(&sandbox);
    let shown = done(&sandbox, &CheckpointShow { project: web(), checkpoint: 1 });
    let skipped: Vec<&str> = shown.skipped.iter().map(|one| one.path.as_str()).collect();
    assert!(skipped.contains(&"large.bin"), "{skipped:?}");
    workspace.write("nested/file.txt", "changed\n");
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() });
    assert_eq!(workspace.read("nested/file.txt"), "covered\n");
    // A restore does not remove files that the checkpoint leaves out.
    assert!(workspace.has("large.bin") && workspace.has("ignored/big.bin") && workspace.has("nested/.git/HEAD"));
}

#[test]
fn a_live_checkpoint_whose_freeze_ends_early_fails() {
    let sandbox = Sandbox::builder().config(&short_lease()).env(FAILPOINT, "checkpoint.captured=stop").start();
    let ticker = Ticker::start(&sandbox);
    let mut client = sandbox.rpc();
    let answer = std::thread::scope(|scope| {
        let saving = scope.spawn(move || client.call(&create()));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        ticker.runs(SOON);
        sandbox.signal_daemon(nix::sys::signal::Signal::SIGCONT);
        saving.join().expect("an answer")
    });
    let refusal = refusal(answer).expect_err("the agent ran meanwhile");
    assert!(refusal.message.contains("did not stay frozen"), "{refusal:?}");
    is_untouched(&sandbox, &ticker, &[]);
}

#[test]
fn the_warm_up_scan_runs_in_the_background_and_reports_its_progress() {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("web");
    let noise = noise(256 << 10);
    for n in 0..300_u32 {
        workspace.write(&format!("f{n}"), [&noise[..], &n.to_le_bytes()].concat());
    }
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    let (scan, text) = poll_for(SOON, || {
        let scan = show(&sandbox).project.look.filter(|scan| scan.step == "read" && scan.done > 0)?;
        Some((scan, format!("{}{}", sandbox.ctl(&["project", "show", "web"]), sandbox.ctl(&["status"]))))
    })
    .expect("files that are being read");
    assert!(scan.total >= 300 && scan.unit == "files", "{scan:?}");
    // The scan may end before the text is produced.
    let mut lines =
        text.lines().filter(|line| line.contains("workspace scan") || line.contains("scanning the workspace"));
    assert!(lines.all(|line| line.contains(" of ") || line.contains("pack") || line.contains("trees")), "{text}");
    wait_until(SOON, "the scan to end", || show(&sandbox).project.look.is_none());
    let made = checkpoint(&sandbox);
    assert!(made.size_bytes < 1 << 20, "the background has stored it: {made:?}");
}

/// A mount that is removed when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmount");
    }
}

#[test]
fn a_file_that_is_mounted_into_the_workspace_is_saved_as_it_is() {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("web");
    workspace.write("config/settings", "nothing yet\n").write("other", "other\n");
    let outside = sandbox.path().join("settings");
    fs::write(&outside, "first\n").expect("write");
    let place = workspace.path().join("config/settings");
    mount(Some(&outside), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("mount the file");
    let mounted = Mounted(place);
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    checkpoint(&sandbox);
    workspace.write("other", "changed\n");
    checkpoint(&sandbox);
    // No notification reports this write, since its path is outside the workspace.
    fs::write(&outside, "second\n").expect("write");
    checkpoint(&sandbox);
    drop(mounted);
    let changed = |from: &str, to: &str| sandbox.ctl(&["-q", "checkpoint", "diff", "web", from, to]);
    assert_eq!(changed("1", "2"), "other\n");
    assert_eq!(changed("2", "3"), "config/settings\n");
    all_verify(&sandbox);
}
