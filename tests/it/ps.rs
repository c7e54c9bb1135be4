//! `ps` and `status`: what is shown is what is there.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::{Sandbox, process};
use serde_json::{Value, json};

use crate::bed::{agent, failed, run_agent, wait_for_status, web};

#[test]
fn the_pid_is_the_main_processs_and_goes_with_it() {
    let sandbox = Sandbox::start();
    let started = run_agent(&sandbox, "a", "exec sleep 1000");
    let pid = agent(&sandbox, "a").pid.expect("it runs");
    assert_eq!(started["pid"], pid);
    assert!(process::command_line(pid).starts_with("sleep"), "{}", process::command_line(pid));
    sandbox.ctl(&["kill", "web/a"]);
    let ended = agent(&sandbox, "a");
    assert_eq!((ended.status, ended.pid, ended.runs), (AgentStatus::Exited, None, 1));
    assert!(ended.ended_at >= ended.started_at);
}

#[test]
fn rows_ids_and_tables_show_the_same_agents() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    run_agent(&sandbox, "b", "exit 3");
    wait_for_status(&sandbox, "b", AgentStatus::Failed);
    let other = sandbox.workspace("api");
    sandbox.ctl(&["run", "-p", "api", "-w", other.text(), "-n", "c", "--", "/bin/sleep", "1000"]);
    let rows = sandbox.ctl_rows(&["ps"]);
    let names: Vec<&Value> = rows.iter().map(|row| &row["name"]).collect();
    assert_eq!(names, [&json!("c"), &json!("a"), &json!("b")], "by project and name");
    assert_eq!(sandbox.ctl(&["-q", "ps", "web"]), "web/a\nweb/b\n");
    let table = sandbox.ctl(&["ps"]);
    for word in ["web/a", "web/b", "api/c", "running", "failed"] {
        assert!(table.contains(word), "{word} is missing in:\n{table}");
    }
    failed(&sandbox.ctl_output(&["ps", "nothing"]), 3);
    let status = sandbox.ctl_json(&["status", "web"]);
    assert_eq!((&status["project"]["agents"], &status["project"]["agents_running"]), (&json!(2), &json!(1)));
    assert_eq!(web(&sandbox).text(), status["project"]["workspace"]);
}
