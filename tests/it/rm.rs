//! `rm`: agents that have ended, and projects.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};

use crate::bed::{failed, run_agent, wait_for_status, web};

#[test]
fn only_what_has_ended_can_be_removed() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let said = failed(&sandbox.ctl_output(&["rm", "web/a"]), 1);
    assert!(said.contains("fermatactl stop web/a"), "{said}");
    failed(&sandbox.ctl_output(&["rm", "web"]), 1);
    sandbox.ctl(&["kill", "web/a"]);
    sandbox.ctl(&["rm", "web/a"]);
    assert!(sandbox.agents().is_empty());
    failed(&sandbox.ctl_output(&["rm", "web/a"]), 3);
    let dir = sandbox.state_dir().join("projects/web/agents/a");
    wait_until(SOON, "the agent's files to go", || !dir.exists());
}

#[test]
fn a_name_can_be_used_again_after_its_agent_was_removed() {
    let sandbox = Sandbox::start();
    for round in 0..10 {
        run_agent(&sandbox, "a", &format!("echo {round}"));
        wait_for_status(&sandbox, "a", AgentStatus::Exited);
        let logs = sandbox.ctl(&["logs", "web/a"]);
        assert_eq!(logs, format!("{round}\n"), "the files of the removed agent are gone, the new one's are not");
        sandbox.ctl(&["rm", "web/a"]);
    }
}

#[test]
fn a_project_with_checkpoints_needs_the_word_and_its_workspace_stays() {
    let sandbox = Sandbox::start();
    web(&sandbox).write("precious", "mine");
    run_agent(&sandbox, "a", "exit 0");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    sandbox.ctl(&["checkpoint", "create", "web"]);
    let said = failed(&sandbox.ctl_output(&["rm", "web"]), 1);
    assert!(said.contains("checkpoint"), "{said}");
    sandbox.ctl(&["rm", "web", "--with-checkpoints"]);
    failed(&sandbox.ctl_output(&["status", "web"]), 3);
    assert!(!sandbox.state_dir().join("projects/web").exists());
    assert_eq!(web(&sandbox).read("precious"), "mine");
    // The name can be used again.
    run_agent(&sandbox, "a", "exit 0");
    assert!(sandbox.ctl_rows(&["checkpoint", "ls", "web"]).is_empty());
}
