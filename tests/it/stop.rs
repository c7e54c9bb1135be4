//! `stop`: SIGTERM, grace, SIGKILL to the whole tree.

use std::time::{Duration, Instant};

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_tests::{Sandbox, process};

use crate::bed::{MECHANISMS, agent, failed, run_agent, wait_for_end, wait_for_file, wait_for_pid, web};

const STUBBORN: &str =
    "trap '' TERM; echo $$ > pid; (trap '' TERM; setsid sleep 1000) & echo > ready; while :; do sleep 0.05; done";

#[test]
fn an_agent_that_listens_to_sigterm_ends_by_itself() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "trap 'echo > said.goodbye; exit 5' TERM; echo > ready; while :; do sleep 0.05; done");
    wait_for_file(&sandbox, "ready");
    sandbox.ctl(&["stop", "web/a"]);
    assert!(web(&sandbox).has("said.goodbye"));
    let ended = agent(&sandbox, "a");
    // An end on request is not a failure.
    assert_eq!((ended.status, ended.exit), (AgentStatus::Exited, Some(ExitStatus::Code(5))));
    failed(&sandbox.ctl_output(&["stop", "web/a"]), 1);
    failed(&sandbox.ctl_output(&["stop", "web/nobody"]), 3);
}

#[test]
fn an_agent_that_ignores_sigterm_is_killed_after_its_grace_with_its_whole_tree() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", STUBBORN);
        wait_for_file(&sandbox, "ready");
        let tree = process::tree(agent(&sandbox, "a").pid.expect("it runs"));
        assert!(tree.len() >= 2, "{tree:?}");
        let start = Instant::now();
        sandbox.ctl(&["stop", "web/a", "--grace", "300ms"]);
        assert!(start.elapsed() >= Duration::from_millis(300), "the grace was not given");
        assert!(!tree.iter().any(|pid| process::is_alive(*pid)), "left behind: {tree:?}");
        assert_eq!(agent(&sandbox, "a").exit, Some(ExitStatus::Signal(9)));
    }
}

#[test]
fn a_stop_during_a_stop_may_shorten_the_grace() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", STUBBORN);
    let pid = wait_for_pid(&sandbox, "pid");
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| sandbox.ctl(&["stop", "web/a", "--grace", "60s"]));
        crate::bed::wait_for_status(&sandbox, "a", AgentStatus::Stopping);
        sandbox.ctl(&["stop", "web/a", "--grace", "0s"]);
        patient.join().expect("both stops end");
    });
    wait_for_end(pid);
}

#[test]
fn a_paused_agent_can_be_stopped_and_hears_the_sigterm() {
    for config in MECHANISMS {
        for mode in ["freeze", "park"] {
            let sandbox = Sandbox::builder().config(config).start();
            run_agent(
                &sandbox,
                "a",
                "trap 'echo > said.goodbye; exit 0' TERM; echo $$ > pid; while :; do sleep 0.05; done",
            );
            let pid = wait_for_pid(&sandbox, "pid");
            sandbox.ctl(&["pause", "web", "--mode", mode]);
            sandbox.ctl(&["stop", "web/a"]);
            wait_for_end(pid);
            assert_eq!(web(&sandbox).has("said.goodbye"), mode == "freeze", "{mode}");
            assert!(agent(&sandbox, "a").status.is_terminal());
            // The rest of the project can be used: nothing is frozen any more.
            let output = sandbox.ctl_output(&["resume", "web"]);
            assert!(output.status.success(), "{mode}: {output:?}");
            run_agent(&sandbox, "b", "exit 0");
        }
    }
}

#[test]
fn a_stop_goes_on_over_a_crash_of_the_daemon() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", STUBBORN);
    let pid = wait_for_pid(&sandbox, "pid");
    let mut stop = sandbox.ctl_command(&["stop", "web/a", "--grace", "1s"]);
    let mut stop = stop.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("stop");
    crate::bed::wait_for_status(&sandbox, "a", AgentStatus::Stopping);
    sandbox.crash_and_restart();
    wait_for_end(pid);
    crate::bed::wait_for_status(&sandbox, "a", AgentStatus::Exited);
    stop.wait().expect("the command ends in one way or another");
}

#[test]
fn a_whole_project_is_stopped_at_once() {
    let sandbox = Sandbox::start();
    for name in ["a", "b", "c"] {
        run_agent(&sandbox, name, "exec sleep 1000");
    }
    assert_eq!(sandbox.ctl_rows(&["stop", "web"]).len(), 3);
    assert!(sandbox.agents().iter().all(|agent| agent.status == AgentStatus::Exited));
    assert!(sandbox.ctl_rows(&["stop", "web"]).is_empty(), "nothing is left to stop");
}

/// Ends one of two agents while the workspace is read under the freeze of both.
fn ended_in_mid_pause(config: &str, how: &[&str]) {
    let sandbox = Sandbox::builder().config(config).start();
    run_agent(&sandbox, "a", "trap 'echo > said.goodbye; exit 0' TERM; echo $$ > pid.a; while :; do sleep 0.05; done");
    run_agent(&sandbox, "b", "echo $$ > pid.b; while :; do sleep 0.05; done");
    let pids = ["pid.a", "pid.b"].map(|file| wait_for_pid(&sandbox, file));
    for n in 0..3_000 {
        web(&sandbox).write(&format!("many/{}/{n}.txt", n % 10), format!("{n}\n"));
    }
    let paused = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| crate::scene::pause(&sandbox, fermata_protocol::pause::PauseMode::Freeze));
        crate::scene::step_is(&sandbox, "checkpoint");
        sandbox.ctl(how);
        pausing.join().expect("an answer")
    });
    wait_for_end(pids[0]);
    assert!(agent(&sandbox, "a").status.is_terminal());
    // Either the agent was thawed and the pause reports it, or the pause had ended already, or no agent ran.
    match paused {
        Err(refusal) => {
            assert!(refusal.message.contains("agent 'a' was stopped while"), "{refusal:?}");
            assert_eq!(how[0], "stop");
            crate::scene::settled(&sandbox);
            assert_eq!(agent(&sandbox, "b").status, AgentStatus::Running);
        }
        Ok(_) => {
            assert_eq!(agent(&sandbox, "b").status, AgentStatus::Paused);
            sandbox.ctl(&["resume", "web"]);
        }
    }
    assert_eq!(web(&sandbox).has("said.goodbye"), how[0] == "stop");
    assert!(process::is_alive(pids[1]));
}

#[test]
fn an_agent_that_is_stopped_in_mid_pause_gets_sigterm_and_the_pause_does_not_claim_that_it_was_frozen() {
    MECHANISMS.iter().for_each(|config| ended_in_mid_pause(config, &["stop", "web/a"]));
}

#[test]
fn an_agent_that_is_killed_in_mid_pause_runs_no_more() {
    MECHANISMS.iter().for_each(|config| ended_in_mid_pause(config, &["kill", "web/a"]));
}
