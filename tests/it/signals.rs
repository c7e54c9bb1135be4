//! Signals to the daemon.

use std::fs;

use fermata_protocol::agent::AgentStatus;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::bed::{agent, call, failed, run_agent, wait_for_end, wait_for_pid, wait_for_status, web};

fn configure(sandbox: &Sandbox, toml: &str) {
    fs::write(sandbox.path().join("fermata.toml"), toml).expect("write fermata.toml");
}

fn status(sandbox: &Sandbox, project: &str) -> String {
    let status = sandbox.ctl_json(&["status", project]);
    status["project"]["status"].as_str().expect("a status").to_owned()
}

/// Starts an agent in a project of its own.
fn project(sandbox: &Sandbox, name: &str) {
    let workspace = sandbox.workspace(name);
    sandbox.ctl(&["run", "-p", name, "-w", workspace.text(), "-n", "x", "--", "/bin/sleep", "1000"]);
}

#[test]
fn sighup_makes_changed_settings_count_and_a_broken_file_changes_nothing() {
    let sandbox = Sandbox::builder().config("[agents]\nstop_grace_ms = 60000\n").start();
    let stubborn = "trap '' TERM; echo $$ > pid; while :; do sleep 0.02; done";
    configure(&sandbox, "[agents]\nstop_grace_ms = 100\n");
    sandbox.signal_daemon(Signal::SIGHUP);
    wait_until(SOON, "the reload", || sandbox.log().contains("reloaded the settings"));
    run_agent(&sandbox, "a", stubborn);
    let pid = wait_for_pid(&sandbox, "pid");
    sandbox.ctl(&["stop", "web/a"]);
    wait_for_end(pid);
    for broken in ["nonsense = 1\n", "[agents\n", "[agents]\nstop_grace_ms = \"soon\"\n"] {
        configure(&sandbox, broken);
        sandbox.signal_daemon(Signal::SIGHUP);
        let said = failed(&sandbox.ctl_output(&["daemon", "reload"]), 1);
        assert!(said.contains("fermata.toml"), "{said}");
    }
    wait_until(SOON, "three complaints", || sandbox.log().matches("failed to reload the settings").count() >= 3);
    run_agent(&sandbox, "b", &stubborn.replace("> pid", "> pid.b"));
    let pid = wait_for_pid(&sandbox, "pid.b");
    sandbox.ctl(&["stop", "web/b"]);
    wait_for_end(pid);
    configure(&sandbox, "log = \"debug\"\n");
    let changed = sandbox.ctl_json(&["daemon", "reload"]);
    assert_eq!(changed["changed"], json!(["log", "agents"]), "{changed}");
}

#[test]
fn sigtstp_pauses_what_is_active_and_sigcont_resumes_that_alone() {
    let sandbox = Sandbox::start();
    for name in ["one", "two", "held"] {
        project(&sandbox, name);
    }
    sandbox.ctl(&["project", "create", "idle", "-w", sandbox.workspace("idle").text()]);
    sandbox.ctl(&["pause", "held"]);
    sandbox.signal_daemon(Signal::SIGTSTP);
    for name in ["one", "two"] {
        wait_until(SOON, "the project to be paused", || status(&sandbox, name) == "paused");
    }
    assert_ne!(status(&sandbox, "idle"), "paused");
    sandbox.signal_daemon(Signal::SIGCONT);
    for name in ["one", "two"] {
        wait_until(SOON, "the project to be active", || status(&sandbox, name) == "active");
    }
    assert_eq!(status(&sandbox, "held"), "paused", "a user has paused it");
    // After a second SIGCONT nothing is left to resume.
    sandbox.signal_daemon(Signal::SIGCONT);
    sandbox.ctl(&["pause", "one"]);
    sandbox.signal_daemon(Signal::SIGCONT);
    sandbox.signal_daemon(Signal::SIGUSR1);
    wait_until(SOON, "the status in the log", || sandbox.log().contains("project=one status=paused"));
    assert_eq!(status(&sandbox, "one"), "paused");
}

#[test]
fn a_project_that_a_person_has_resumed_and_paused_again_is_not_resumed_by_sigcont() {
    let sandbox = Sandbox::start();
    project(&sandbox, "one");
    sandbox.signal_daemon(Signal::SIGTSTP);
    wait_until(SOON, "the project to be paused", || status(&sandbox, "one") == "paused");
    sandbox.ctl(&["resume", "one"]);
    sandbox.ctl(&["pause", "one", "--reason", "mine"]);
    sandbox.signal_daemon(Signal::SIGCONT);
    sandbox.signal_daemon(Signal::SIGUSR1);
    wait_until(SOON, "the status in the log", || sandbox.log().contains("project=one status="));
    assert_eq!(status(&sandbox, "one"), "paused");
}

#[test]
fn sigterm_leaves_agents_running_and_a_later_sigcont_resumes_no_project() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let pid = wait_for_pid(&sandbox, "pid");
    project(&sandbox, "held");
    sandbox.signal_daemon(Signal::SIGTSTP);
    wait_until(SOON, "the project to be paused", || status(&sandbox, "held") == "paused");
    wait_for_status(&sandbox, "a", AgentStatus::Paused);
    sandbox.ctl(&["resume", "web"]);
    sandbox.signal_daemon(Signal::SIGTERM);
    // As systemd does; the daemon may have ended already.
    if process::is_alive(sandbox.daemon_pid()) {
        sandbox.signal_daemon(Signal::SIGCONT);
    }
    assert!(sandbox.stop_daemon().success());
    assert!(process::is_alive(pid));
    assert!(!sandbox.socket().exists(), "a daemon that ended in order takes its socket along");
    sandbox.start_daemon();
    assert_eq!(agent(&sandbox, "a").pid, Some(pid));
    assert_eq!(status(&sandbox, "held"), "paused");
}

#[test]
fn on_shutdown_park_ends_the_processes_and_the_resume_brings_them_back() {
    let mut sandbox = Sandbox::builder().config("on_shutdown = \"park\"\n").start();
    run_agent(&sandbox, "a", "echo ${FERMATA_RESUME:-0} >> runs; echo $$ > pid; exec sleep 1000");
    let pid = wait_for_pid(&sandbox, "pid");
    assert!(sandbox.stop_daemon().success());
    assert!(!process::is_alive(pid), "its memory is free");
    sandbox.start_daemon();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
    let list = call(&sandbox, "checkpoint.list", json!({ "project": "web" })).expect("list");
    assert_eq!(list["checkpoints"].as_array().map(Vec::len), Some(1));
    sandbox.ctl(&["resume", "web"]);
    wait_until(SOON, "the second run", || web(&sandbox).read("runs") == "0\n1\n");
}

#[test]
fn sigusr1_writes_the_status_to_the_log() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    sandbox.signal_daemon(Signal::SIGUSR1);
    wait_until(SOON, "the status in the log", || {
        sandbox.log().lines().any(|line| line.contains("project=web status=active agents=1 running=1"))
    });
}

#[test]
fn sigterm_in_the_middle_of_a_pause_undoes_it() {
    let mut sandbox = Sandbox::start();
    // An agent that does not stop by itself, so that the pause waits for the whole grace.
    run_agent(&sandbox, "a", "trap '' TSTP; echo $$ > pid; while :; do echo x >> ticks; sleep 0.02; done");
    let pid = wait_for_pid(&sandbox, "pid");
    let mut command = sandbox.ctl_command(&["pause", "web", "--grace", "60s"]);
    let mut pause =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("pause");
    wait_until(SOON, "the pause to begin", || status(&sandbox, "web") == "pausing");
    assert!(sandbox.stop_daemon().success());
    assert!(!pause.wait().expect("wait for the command").success());
    assert_eq!(process::state(pid).filter(|state| *state == 'T'), None, "it is not left stopped");
    sandbox.start_daemon();
    assert_eq!((status(&sandbox, "web").as_str(), agent(&sandbox, "a").status), ("active", AgentStatus::Running));
    let ticks = web(&sandbox).read("ticks");
    wait_until(SOON, "the agent to go on", || web(&sandbox).read("ticks") != ticks);
}
