//! A reboot of the machine: every process is gone, and the boot id is different.

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::project::ProjectStatus;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use serde_json::{Value, json};

use crate::bed::{SIGNALS, agent, call, wait_for_file, wait_for_status, web};

/// Writes a line at each start, then runs until it is ended.
const LIVES: &str = "echo \"${FERMATA_RESUME:-0} ${FERMATA_CHECKPOINT:-none} $COLOUR $(pwd) $(umask) $1\" >> lives-$1; \
                     echo up; exec sleep 1000";

#[track_caller]
fn run(sandbox: &Sandbox, name: &str, supervision: Value) {
    let workspace = web(sandbox);
    let params = json!({
        "project": "web", "workspace": workspace.text(), "name": name, "umask": 0o027,
        "argv": ["/bin/sh", "-c", LIVES, "sh", name], "supervision": supervision, "stop_grace_ms": 100,
        "env": { "PATH": std::env::var("PATH").expect("a path"), "COLOUR": "blue" },
    });
    call(sandbox, "agent.run", params).expect("start the agent");
    wait_for_file(sandbox, &format!("lives-{name}"));
}

fn status_of_project(sandbox: &Sandbox) -> ProjectStatus {
    let shown = call(sandbox, "project.show", json!({ "project": "web" })).expect("show");
    serde_json::from_value(shown["project"]["status"].clone()).expect("a status")
}

#[test]
fn agents_return_by_policy_with_everything_that_they_had() {
    for config in ["", SIGNALS] {
        let mut sandbox = Sandbox::builder().config(config).machine().start();
        run(&sandbox, "returns", json!({ "recover": "always" }));
        run(&sandbox, "plain", json!({}));
        run(&sandbox, "never", json!({ "recover": "never", "restart": { "policy": "always" } }));
        sandbox.ctl(&["checkpoint", "create", "web"]);
        sandbox.power_off();
        sandbox.start_daemon();
        wait_until(SOON, "the second life", || web(&sandbox).read("lives-returns").lines().count() == 2);
        let lives = web(&sandbox).read("lives-returns");
        let place = web(&sandbox).path().canonicalize().expect("it exists").display().to_string();
        assert_eq!(
            lives,
            format!("0 none blue {place} 0027 returns\n1 1 blue {place} 0027 returns\n"),
            "environment, directory, umask and arguments are the same"
        );
        wait_for_status(&sandbox, "returns", AgentStatus::Running);
        assert_eq!(agent(&sandbox, "returns").runs, 2);
        for stays in ["plain", "never"] {
            let lost = agent(&sandbox, stays);
            assert_eq!((lost.status, lost.exit, lost.runs), (AgentStatus::Interrupted, None, 1), "{stays}");
            assert!(lost.detail.is_some_and(|detail| detail.contains("machine")), "{stays}");
        }
        assert!(sandbox.ctl(&["logs", "web/returns"]).contains("up"));
    }
}

#[test]
fn a_paused_project_stays_paused_and_its_agents_come_back_with_the_resume() {
    for mode in ["freeze", "park"] {
        let mut sandbox = Sandbox::builder().machine().start();
        run(&sandbox, "a", json!({ "recover": "always", "timeout_ms": 3_600_000 }));
        run(&sandbox, "b", json!({}));
        sandbox.ctl(&["pause", "web", "--mode", mode]);
        for _ in 0..2 {
            sandbox.power_off();
            sandbox.start_daemon();
            assert_eq!(status_of_project(&sandbox), ProjectStatus::Paused);
            assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
        }
        assert_eq!(web(&sandbox).read("lives-a").lines().count(), 1, "nothing was started");
        sandbox.ctl(&["resume", "web"]);
        for name in ["a", "b"] {
            wait_until(SOON, "the second life", || web(&sandbox).read(&format!("lives-{name}")).contains("\n1 1 blue"));
        }
        assert!(agent(&sandbox, "a").time_left_ms.is_some_and(|left| left < 3_600_000));
    }
}

#[test]
fn recovery_can_be_switched_off() {
    let mut sandbox = Sandbox::builder().machine().start();
    run(&sandbox, "a", json!({ "recover": "always" }));
    sandbox.power_off();
    sandbox.give_env("FERMATA_SKIP_RECOVERY", "1");
    sandbox.start_daemon();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Interrupted);
    assert_eq!(web(&sandbox).read("lives-a").lines().count(), 1);
    // A start by hand still works, and the agent continues.
    sandbox.ctl(&["resume", "web/a"]);
    wait_until(SOON, "the second life", || web(&sandbox).read("lives-a").contains("\n1 none blue"));
}

#[test]
fn a_power_failure_in_mid_pause_leaves_nothing_half_done() {
    let mut sandbox = Sandbox::builder().machine().env("FERMATA_FAILPOINT", "pause.commit=stop").start();
    run(&sandbox, "a", json!({ "recover": "always" }));
    let mut command = sandbox.ctl_command(&["pause", "web"]);
    let mut pause = command.stderr(std::process::Stdio::null()).spawn().expect("start the pause");
    let stands = |pid: &i32| process::state(*pid) == Some('T') && process::command_line(*pid).contains("fermatad");
    wait_until(SOON, "the daemon to stand before the commit", || {
        sandbox.daemon_group().expect("a cgroup of its own").iter().any(stands)
    });
    sandbox.power_off();
    pause.wait().expect("it ends with the daemon");
    sandbox.forget_env("FERMATA_FAILPOINT");
    sandbox.start_daemon();
    wait_until(SOON, "the second life", || web(&sandbox).read("lives-a").lines().count() == 2);
    wait_until(SOON, "the project to be at work", || status_of_project(&sandbox) == ProjectStatus::Active);
    assert!(sandbox.ctl_rows(&["checkpoint", "ls", "web"]).is_empty());
}
