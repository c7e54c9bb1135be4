//! `ps` and `status`: the output matches the state of the agents.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::{Sandbox, process};
use serde_json::{Value, json};

use crate::bed::{agent, call, failed, run_agent, wait_for_status, web};

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

#[test]
fn more_agents_than_fit_into_one_line_are_listed_page_by_page() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    // Each agent shows its arguments of 200 kB: five do not fit into one reply.
    let long = "x".repeat(100_000);
    for number in 0..6 {
        let params = json!({
            "project": "web", "workspace": workspace.text(), "name": format!("a{number}"),
            "argv": ["/bin/true", long, long],
        });
        call(&sandbox, "agent.run", params).expect("start an agent");
    }
    let first = call(&sandbox, "agent.list", json!({})).expect("the first page");
    let count = first["agents"].as_array().map(Vec::len);
    assert!(count.is_some_and(|count| (1..6).contains(&count)), "{count:?}");
    assert_eq!(first["next"], format!("web/a{}", count.unwrap_or(0) - 1));
    let names: Vec<String> = sandbox.ctl_rows(&["ps"]).iter().map(|row| row["name"].to_string()).collect();
    assert_eq!(names, ["\"a0\"", "\"a1\"", "\"a2\"", "\"a3\"", "\"a4\"", "\"a5\""]);
}
