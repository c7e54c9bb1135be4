//! `wait`: prints exit codes, and exits with them where asked.

use fermata_tests::Sandbox;
use fermata_tests::sandbox::output_of;

use crate::bed::{ctl_word, failed, run_agent, wait_for_file, web};

#[test]
fn the_agents_code_is_printed_and_propagated_on_demand() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "code", "exit 41");
    run_agent(&sandbox, "signal", "kill -TERM $$");
    assert_eq!(sandbox.ctl(&["wait", "web/code"]), "41\n");
    for (target, code) in [("web/code", 41), ("web/signal", 143)] {
        let output = sandbox.ctl_output(&["wait", target, "--propagate"]);
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout).trim()), (Some(code), code.to_string().as_str()));
    }
    failed(&sandbox.ctl_output(&["wait", "web/nobody"]), 3);
}

#[test]
fn a_wait_that_takes_too_long_ends_with_code_6() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    failed(&sandbox.ctl_output(&["--timeout", "200ms", "wait", "web/a"]), 6);
    sandbox.ctl(&["pause", "web"]);
    failed(&sandbox.ctl_output(&["--timeout", "200ms", "wait", "web/a"]), 6);
}

#[test]
fn a_wait_for_an_agent_that_waits_for_a_person_ends_with_code_5() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", &format!("{} agent ask 'Which way?'; echo > asked; exec sleep 1000", ctl_word()));
    wait_for_file(&sandbox, "asked");
    let said = failed(&sandbox.ctl_output(&["--timeout", "200ms", "wait", "web/a"]), 5);
    assert!(said.contains("inbox"), "{said}");
}

#[test]
fn a_wait_outlives_the_daemon() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "while [ ! -e go ]; do sleep 0.02; done; exit 7");
    let command = sandbox.ctl_command(&["wait", "web/a", "--propagate"]);
    let waiting = std::thread::spawn(move || output_of(command));
    for _ in 0..2 {
        sandbox.crash_and_restart();
    }
    web(&sandbox).write("go", "");
    let output = waiting.join().expect("no panic");
    assert_eq!(output.status.code(), Some(7), "{output:?}");
}
