//! `down`: the agents that a `fermata.toml` declares are stopped, dependents first, and nothing else is lost.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::{Sandbox, process};

use crate::bed::{agent, run_agent, wait_for_file, wait_for_status, web};
use crate::up::{are, declare, rows};

/// Three agents that append to one file when they receive SIGTERM.
const CHAIN: &str = r#"
[agents.db]
command = ["/bin/sh", "-c", "trap 'echo db >> ended; exit 0' TERM; echo > db.up; while :; do sleep 0.05; done"]
[agents.api]
command = ["/bin/sh", "-c", "trap 'sleep 0.3; echo api >> ended; exit 0' TERM; echo > api.up; while :; do sleep 0.05; done"]
depends_on = [{ agent = "db", until = "started" }]
[agents.web]
command = ["/bin/sh", "-c", "trap 'sleep 0.3; echo web >> ended; exit 0' TERM; echo > web.up; while :; do sleep 0.05; done"]
depends_on = [{ agent = "api", until = "started" }]
"#;

fn up(sandbox: &Sandbox) {
    declare(sandbox, CHAIN);
    rows(sandbox, &["up"]);
    for name in ["db", "api", "web"] {
        wait_for_file(sandbox, &format!("{name}.up"));
    }
}

#[test]
fn those_that_depend_on_others_end_first() {
    let sandbox = Sandbox::start();
    up(&sandbox);
    run_agent(&sandbox, "byhand", "exec sleep 1000");
    sandbox.ctl(&["checkpoint", "create", "web"]);
    let stopped = rows(&sandbox, &["down"]);
    assert_eq!(stopped, are(&[("web/web", "stopped"), ("web/api", "stopped"), ("web/db", "stopped")]));
    assert_eq!(web(&sandbox).read("ended"), "web\napi\ndb\n");
    assert_eq!(agent(&sandbox, "byhand").status, AgentStatus::Running, "it is not declared");
    assert_eq!(sandbox.ctl_rows(&["checkpoint", "ls", "web"]).len(), 1);
    let again = rows(&sandbox, &["down"]);
    assert_eq!(again, are(&[("web/web", "not_running"), ("web/api", "not_running"), ("web/db", "not_running")]));
    // All agents can be started again.
    let back = rows(&sandbox, &["up"]);
    assert!(back.contains(&("web/db".into(), "started".into())), "{back:?}");
}

#[test]
fn only_the_named_agents_are_stopped() {
    let sandbox = Sandbox::start();
    up(&sandbox);
    assert_eq!(rows(&sandbox, &["down", "db", "web"]), are(&[("web/web", "stopped"), ("web/db", "stopped")]));
    assert_eq!(web(&sandbox).read("ended"), "web\ndb\n");
    assert_eq!(agent(&sandbox, "api").status, AgentStatus::Running);
}

#[test]
fn a_down_that_removes_leaves_the_project_and_its_checkpoints() {
    let sandbox = Sandbox::start();
    up(&sandbox);
    sandbox.ctl(&["checkpoint", "create", "web"]);
    let done = rows(&sandbox, &["down", "--remove"]);
    assert_eq!(done.iter().filter(|(_, action)| action == "removed").count(), 3, "{done:?}");
    assert!(sandbox.agents().is_empty());
    assert_eq!(sandbox.ctl_rows(&["checkpoint", "ls", "web"]).len(), 1);
    assert!(rows(&sandbox, &["down", "--remove"]).iter().all(|(_, action)| action == "not_running"));
}

#[test]
fn a_paused_project_can_be_taken_down() {
    let sandbox = Sandbox::start();
    up(&sandbox);
    sandbox.ctl(&["pause", "web"]);
    rows(&sandbox, &["down"]);
    assert!(sandbox.agents().iter().all(|agent| agent.status.is_terminal()));
}

#[test]
fn a_down_by_pause_can_be_resumed() {
    let sandbox = Sandbox::start();
    declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n");
    rows(&sandbox, &["up"]);
    let pid = agent(&sandbox, "a").pid.expect("it runs");
    let file = format!("{}/fermata.toml", web(&sandbox).text());
    sandbox.ctl(&["down", "--pause", "--file", &file]);
    assert!(!process::is_alive(pid), "its memory is free");
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
    sandbox.ctl(&["down", "--pause", "--file", &file]);
    sandbox.ctl(&["resume", "web"]);
    wait_for_status(&sandbox, "a", AgentStatus::Running);
    assert_eq!(rows(&sandbox, &["up"]), are(&[("web/a", "up_to_date")]));
}

#[test]
fn where_nothing_is_nothing_is_stopped() {
    let sandbox = Sandbox::start();
    declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n");
    assert!(rows(&sandbox, &["down"]).is_empty());
    assert!(sandbox.ctl_rows(&["project", "ls"]).is_empty());
}
