//! Budgets: a project that reaches its budget is paused, and its resume needs a higher one.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::bed::{call, failed, run_agent, wait_for_file, wait_for_status, web};

fn use_tokens(sandbox: &Sandbox, name: &str, tokens: u64, cost_micro_usd: u64) {
    let params = json!({ "target": format!("web/{name}"), "input_tokens": tokens, "cost_micro_usd": cost_micro_usd });
    call(sandbox, "agent.usage", params).expect("report usage");
}

fn project(sandbox: &Sandbox) -> Value {
    sandbox.ctl_json(&["status", "web"])["project"].clone()
}

#[track_caller]
fn wait_for_project(sandbox: &Sandbox, status: &str) -> Value {
    wait_until(SOON, &format!("web to be {status}"), || project(sandbox)["status"] == status);
    project(sandbox)
}

#[test]
fn the_token_budget_of_a_project_pauses_it_with_the_reason_and_a_resume_needs_more() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo ok > up; while :; do echo x >> ticks; sleep 0.05; done");
    run_agent(&sandbox, "b", "exec sleep 1000");
    wait_for_file(&sandbox, "up");
    sandbox.ctl(&["project", "set", "web", "--token-budget", "1_000"]);
    use_tokens(&sandbox, "a", 600, 0);
    use_tokens(&sandbox, "b", 399, 0);
    assert_eq!(project(&sandbox)["status"], "active");
    use_tokens(&sandbox, "b", 1, 0);
    let paused = wait_for_project(&sandbox, "paused");
    assert_eq!(paused["pause"]["cause"], "token_budget");
    let reason = paused["pause"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("1000 tokens of its budget of 1000"), "{reason}");
    wait_for_status(&sandbox, "a", AgentStatus::Paused);
    let shown = sandbox.ctl(&["status", "web"]);
    assert!(shown.contains("token budget") && shown.contains("1,000 of 1,000 tokens"), "{shown}");
    // A resume without a higher budget is refused, with a hint.
    let said = failed(&sandbox.ctl_output(&["resume", "web"]), 1);
    assert!(said.contains("--token-budget") && said.contains("--over-budget"), "{said}");
    assert_eq!(project(&sandbox)["status"], "paused");
    sandbox.ctl(&["project", "set", "web", "--token-budget", "2000"]);
    let ticks = web(&sandbox).read("ticks");
    sandbox.ctl(&["resume", "web"]);
    wait_until(SOON, "the agent to go on", || web(&sandbox).read("ticks") != ticks);
    use_tokens(&sandbox, "a", 1_000, 0);
    wait_for_project(&sandbox, "paused");
    // A waived budget limits nothing until it is set again.
    sandbox.ctl(&["resume", "web", "--over-budget"]);
    use_tokens(&sandbox, "a", 5_000, 0);
    assert_eq!(project(&sandbox)["status"], "active");
    assert_eq!(project(&sandbox)["usage"]["input_tokens"], 7_000);
    sandbox.ctl(&["project", "set", "web", "--token-budget", "7001"]);
    use_tokens(&sandbox, "b", 1, 0);
    wait_for_project(&sandbox, "paused");
}

#[test]
fn the_cost_budget_of_an_agent_pauses_its_project() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    let place = ["run", "-p", "web", "-w", workspace.text(), "-n", "a", "--cost-budget", "$1.50"];
    sandbox.ctl(&[&place[..], &["--", "/bin/sleep", "1000"]].concat());
    run_agent(&sandbox, "other", "exec sleep 1000");
    use_tokens(&sandbox, "other", 1, 9_000_000);
    use_tokens(&sandbox, "a", 1, 1_499_999);
    assert_eq!(project(&sandbox)["status"], "active");
    use_tokens(&sandbox, "a", 0, 1);
    let paused = wait_for_project(&sandbox, "paused");
    assert_eq!(paused["pause"]["cause"], "cost_budget");
    assert_eq!(paused["pause"]["reason"], "agent 'a' has spent $1.50 of its budget of $1.50");
    let said = failed(&sandbox.ctl_output(&["resume", "web"]), 1);
    assert!(said.contains("--over-budget") && !said.contains("project set"), "{said}");
    sandbox.ctl(&["resume", "web", "--over-budget"]);
}

#[test]
fn a_budget_pause_outlives_the_daemon_and_one_that_was_missed_is_made_up_for() {
    let mut sandbox = Sandbox::builder().env("FERMATA_FAILPOINT", "pause.validate=abort").start();
    run_agent(&sandbox, "a", "echo ok > up; exec sleep 1000");
    wait_for_file(&sandbox, "up");
    sandbox.ctl(&["project", "set", "web", "--token-budget", "10"]);
    // The daemon dies in the first step of the pause that follows.
    let params = json!({ "target": "web/a", "input_tokens": 10 });
    drop(call(&sandbox, "agent.usage", params));
    sandbox.wait_for_daemon();
    sandbox.forget_env("FERMATA_FAILPOINT");
    sandbox.start_daemon();
    let paused = wait_for_project(&sandbox, "paused");
    assert_eq!(paused["pause"]["cause"], "token_budget");
    sandbox.crash_and_restart();
    assert_eq!(project(&sandbox)["pause"]["cause"], "token_budget");
    failed(&sandbox.ctl_output(&["resume", "web"]), 1);
}

#[test]
fn a_removed_agent_takes_nothing_of_what_it_has_spent_along() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "keep", "exec sleep 1000");
    run_agent(&sandbox, "a", "exec sleep 1000");
    sandbox.ctl(&["project", "set", "web", "--token-budget", "100"]);
    use_tokens(&sandbox, "a", 99, 0);
    sandbox.ctl(&["kill", "web/a"]);
    sandbox.ctl(&["rm", "web/a"]);
    use_tokens(&sandbox, "keep", 1, 0);
    wait_for_project(&sandbox, "paused");
}
