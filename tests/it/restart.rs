//! `restart`: the same agent, a new run.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::{Sandbox, process};

use crate::bed::{agent, failed, run_agent, wait_for_file, wait_for_pid, wait_for_status, web};

#[test]
fn a_restarted_agent_has_a_new_process_and_token_and_the_same_surroundings() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ >> pids; echo $FERMATA_TOKEN >> tokens; pwd >> dirs; exec sleep 1000");
    wait_for_file(&sandbox, "dirs");
    let before = agent(&sandbox, "a");
    sandbox.ctl(&["restart", "web/a"]);
    let after = agent(&sandbox, "a");
    assert_eq!((after.status, after.runs), (AgentStatus::Running, 2));
    assert_ne!(before.pid, after.pid);
    assert_ne!(before.run, after.run);
    assert!(!process::is_alive(before.pid.expect("it ran")), "the old one is gone before the new one begins");
    crate::bed::wait_for_status(&sandbox, "a", AgentStatus::Running);
    fermata_tests::wait_until(fermata_tests::waiting::SOON, "the second run to write", || {
        web(&sandbox).read("dirs").lines().count() == 2
    });
    let tokens = web(&sandbox).read("tokens");
    let tokens: Vec<&str> = tokens.lines().collect();
    assert_ne!(tokens[0], tokens[1]);
}

#[test]
fn an_agent_that_has_ended_can_be_restarted() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid.$$; exit 4");
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    sandbox.ctl(&["restart", "web/a"]);
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    assert_eq!(agent(&sandbox, "a").runs, 2);
    failed(&sandbox.ctl_output(&["restart", "web/nobody"]), 3);
}

#[test]
fn a_paused_project_restarts_nothing() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let pid = wait_for_pid(&sandbox, "pid");
    sandbox.ctl(&["pause", "web"]);
    let said = failed(&sandbox.ctl_output(&["restart", "web/a"]), 1);
    assert!(said.contains("paused"), "{said}");
    sandbox.ctl(&["resume", "web"]);
    assert_eq!(agent(&sandbox, "a").pid, Some(pid));
}

#[test]
fn a_restart_whose_daemon_dies_in_between_is_finished_by_the_next_one() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ >> pids; trap '' TERM; while :; do sleep 0.05; done");
    wait_for_file(&sandbox, "pids");
    let mut command = sandbox.ctl_command(&["restart", "web/a"]);
    let mut restart =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("restart");
    wait_for_status(&sandbox, "a", AgentStatus::Stopping);
    sandbox.kill_daemon();
    let pids = web(&sandbox).read("pids");
    let old: i32 = pids.trim().parse().expect("one pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old), nix::sys::signal::Signal::SIGKILL).expect("kill");
    crate::bed::wait_for_end(old);
    sandbox.start_daemon();
    fermata_tests::wait_until(fermata_tests::waiting::SOON, "the second run to write", || {
        web(&sandbox).read("pids").lines().count() == 2
    });
    wait_for_status(&sandbox, "a", AgentStatus::Running);
    assert_eq!(agent(&sandbox, "a").runs, 2);
    restart.wait().expect("the command ends in one way or another");
}
