//! The first command starts a daemon; two commands at once share one.

use std::process::{Command, Stdio};

use fermata_tests::Sandbox;
use fermata_tests::sandbox::output_of;
use fermata_tests::waiting::{SOON, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::bed::{failed, wait_for_end, web};

/// A `fermatactl` that may start a daemon.
fn starting(sandbox: &Sandbox, args: &[&str]) -> Command {
    let ctl = sandbox.ctl_command(args);
    let mut command = Command::new(ctl.get_program());
    command.args(ctl.get_args().filter(|word| *word != "--no-autostart")).stdin(Stdio::null());
    command.current_dir(ctl.get_current_dir().expect("the sandbox says where"));
    for (name, value) in ctl.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Ends the daemon that a command has started and that is no child of the sandbox.
fn end(sandbox: &Sandbox) -> i32 {
    let status = sandbox.ctl_json(&["call", "daemon.status"]);
    let pid = status["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("end the daemon");
    wait_for_end(pid);
    pid
}

#[test]
fn the_first_command_starts_a_daemon_that_outlives_it() {
    let sandbox = Sandbox::builder().build();
    failed(&sandbox.ctl_output(&["ps"]), 4);
    let output = output_of(starting(&sandbox, &["project", "create", "web", "-w", web(&sandbox).text()]));
    assert!(output.status.success(), "{output:?}");
    assert!(sandbox.ctl(&["project", "ls"]).contains("web"));
    let pid = end(&sandbox);
    failed(&sandbox.ctl_output(&["ps"]), 4);
    // The next daemon finds the data of the first.
    let output = output_of(starting(&sandbox, &["-q", "project", "ls"]));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "web\n");
    assert_ne!(end(&sandbox), pid);
}

#[test]
fn commands_at_the_same_time_share_one_daemon() {
    let sandbox = Sandbox::builder().build();
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| output_of(starting(&sandbox, &["--json", "call", "daemon.status"]))))
            .collect();
        all.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    let pids: Vec<Value> = outputs
        .iter()
        .map(|output| {
            assert!(output.status.success(), "{output:?}");
            serde_json::from_slice::<Value>(&output.stdout).expect("JSON")["pid"].clone()
        })
        .collect();
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    let winner = pids[0].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    assert!(daemons_of(&sandbox).contains(&winner), "the winner is not found");
    assert_eq!(end(&sandbox), winner);
    // The daemon that lost the race ends, and does not replace the winner even if that is stopped.
    wait_until(SOON, "the other daemons to give up", || daemons_of(&sandbox).is_empty());
    failed(&sandbox.ctl_output(&["ps"]), 4);
}

/// Returns the running daemons of this sandbox. Agents inherit its environment, so the name of the program is compared
/// too.
fn daemons_of(sandbox: &Sandbox) -> Vec<i32> {
    let state = format!("FERMATA_STATE_DIR={}", sandbox.state_dir().display());
    let has = |pid: i32, file: &str, words: &[u8]| {
        std::fs::read(format!("/proc/{pid}/{file}"))
            .is_ok_and(|text| text.split(|byte| *byte == 0).any(|word| word == words))
    };
    let entries = std::fs::read_dir("/proc").expect("list /proc");
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| has(*pid, "environ", state.as_bytes()))
        .filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "fermatad"))
        .collect()
}

#[test]
fn a_stale_socket_of_a_dead_daemon_is_no_obstacle() {
    let mut sandbox = Sandbox::start();
    sandbox.kill_daemon();
    assert!(sandbox.socket().exists(), "a killed daemon leaves its socket");
    failed(&sandbox.ctl_output(&["ps"]), 4);
    let output = output_of(starting(&sandbox, &["ps"]));
    assert!(output.status.success(), "{output:?}");
    end(&sandbox);
    wait_until(SOON, "the socket to go with its daemon", || !sandbox.socket().exists());
}

#[test]
fn a_daemon_that_cannot_start_says_why() {
    let sandbox = Sandbox::builder().config("nonsense = true\n").build();
    let said = failed(&output_of(starting(&sandbox, &["ps"])), 4);
    assert!(said.contains("nonsense"), "{said}");
}
