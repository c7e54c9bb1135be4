//! `wait`: prints exit codes, and exits with them on request.

use std::process::Stdio;

use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};

use crate::bed::{ctl_word, failed, run_agent, wait_for_file, web};

#[test]
fn the_agents_code_is_printed_and_propagated_on_demand() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "code", "exit 41");
    run_agent(&sandbox, "signal", "kill -TERM $$");
    assert_eq!(sandbox.ctl(&["wait", "web/code"]), "41\n");
    for (target, code) in [("web/code", 41), ("web/signal", 143)] {
        let output = sandbox.ctl_output(&["wait", target, "--propagate"]);
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stdout).trim()),
            (Some(code), code.to_string().as_str())
        );
    }
    failed(&sandbox.ctl_output(&["wait", "web/nobody"]), 3);
}

#[test]
fn a_wait_that_takes_too_long_ends_with_code_6() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    failed(&sandbox.ctl_output(&["--timeout", "2s", "wait", "web/a"]), 6);
    sandbox.ctl(&["pause", "web"]);
    failed(&sandbox.ctl_output(&["--timeout", "2s", "wait", "web/a"]), 6);
}

#[test]
fn a_wait_for_an_agent_that_waits_for_a_person_ends_with_code_5() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", &format!("{} agent ask 'Which way?'; echo > asked; exec sleep 1000", ctl_word()));
    wait_for_file(&sandbox, "asked");
    let said = failed(&sandbox.ctl_output(&["--timeout", "2s", "wait", "web/a"]), 5);
    assert!(said.contains("inbox"), "{said}");
}

#[test]
fn a_wait_outlives_the_daemon() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "while [ ! -e go ]; do sleep 0.02; done; exit 7");
    let mut command = sandbox.ctl_command(&["wait", "web/a", "--propagate"]);
    let mut waiting = command.stdout(Stdio::null()).spawn().expect("start fermatactl");
    let pid = i32::try_from(waiting.id()).expect("a process id fits into 31 bits");
    let mut sleeping_polls = 0;
    wait_until(SOON, "fermatactl to connect", || is_connected(pid, &mut sleeping_polls));
    sandbox.crash_and_restart();
    wait_until(SOON, "fermatactl to connect again", || is_connected(pid, &mut sleeping_polls));
    assert!(sandbox.stop_daemon().success(), "a daemon that ends in order is no other case");
    sandbox.start_daemon();
    web(&sandbox).write("go", "");
    assert_eq!(waiting.wait().expect("wait for fermatactl").code(), Some(7));
}

/// Says whether a process has a socket and was asleep in more than ten polls in a row: by then it has sent `hello`.
fn is_connected(pid: i32, sleeping_polls: &mut u32) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let has_socket = entries.flatten().any(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    });
    *sleeping_polls = if has_socket && process::state(pid) == Some('S') { *sleeping_polls + 1 } else { 0 };
    *sleeping_polls > 10
}
