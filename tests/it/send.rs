//! `send`: typing into an agent's terminal without attaching to it.

use std::process::Stdio;

use fermata_protocol::event::Event;
use fermata_protocol::subscription::EventsList;
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};

use crate::bed::{failed, run_agent};
use crate::person::Person;

const ECHO: &str = "stty -echo; echo ready; while read line; do echo \"got $line\"; done";

fn run_at_terminal(sandbox: &Sandbox, script: &str) {
    let workspace = sandbox.workspace("web");
    let place = ["-w", workspace.text(), "--cwd", workspace.text()];
    sandbox.ctl(&[&["run", "-t", "-p", "web"], &place[..], &["-n", "a", "--", "/bin/sh", "-c", script]].concat());
    shows(sandbox, "ready");
}

#[track_caller]
fn shows(sandbox: &Sandbox, text: &str) {
    wait_until(SOON, &format!("{text:?} in the log"), || sandbox.ctl(&["logs", "web/a"]).contains(text));
}

#[test]
fn text_keys_and_stdin_are_typed_and_an_event_records_sender_and_length() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    let sent = sandbox.ctl_json(&["send", "web/a", "two", "words", "--enter"]);
    assert_eq!(sent["bytes"], 10);
    shows(&sandbox, "got two words");
    sandbox.ctl(&["send", "web", "thren", "--keys", "Backspace,e,Enter"]);
    shows(&sandbox, "got three");
    let text = "a line of some length\n".repeat(3000);
    std::fs::write(sandbox.path().join("input"), &text).expect("write a file");
    let mut command = sandbox.ctl_command(&["send", "web/a", "--stdin"]);
    command.stdin(Stdio::from(std::fs::File::open(sandbox.path().join("input")).expect("open a file")));
    assert!(command.status().expect("run fermatactl").success());
    wait_until(SOON, "all lines", || {
        sandbox.ctl(&["logs", "web/a"]).matches("got a line of some length").count() == 3000
    });

    let events = sandbox.rpc().call(&EventsList { limit: Some(500), ..EventsList::default() }).expect("events").events;
    let typed: Vec<(String, u64)> = events
        .into_iter()
        .filter_map(|recorded| match recorded.event {
            Event::AgentTyped { by, bytes, .. } => Some((by, bytes)),
            _ => None,
        })
        .collect();
    let me = format!("uid:{}", nix::unistd::getuid());
    assert!(typed.iter().all(|(by, _)| *by == me), "{typed:?}");
    assert_eq!(typed[..2], [(me.clone(), 10), (me, 8)]);
    assert_eq!(typed.iter().map(|(_, bytes)| bytes).sum::<u64>(), 18 + text.len() as u64);
}

#[test]
fn a_person_who_types_is_not_interrupted_unless_it_is_meant() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
    person.sees("ready");
    let said = failed(&sandbox.ctl_output(&["send", "web/a", "-e", "over you"]), 1);
    assert!(said.contains("is in use by") && said.contains("--anyway"), "{said}");
    sandbox.ctl(&["send", "web/a", "-e", "--anyway", "all the same"]);
    let before = person.sees("got all the same");
    assert!(!before.contains("over you"), "{before:?}");
    person.types("\x1c");
    assert!(person.ends().success());
    sandbox.ctl(&["send", "web/a", "-e", "nobody minds"]);
    shows(&sandbox, "got nobody minds");
}

#[test]
fn input_that_no_process_would_read_is_refused_or_reported() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "plain", "exec sleep 1000");
    let said = failed(&sandbox.ctl_output(&["send", "web/plain", "x"]), 1);
    assert!(said.contains("has no terminal") && said.contains("logs -f"), "{said}");
    failed(&sandbox.ctl_output(&["send", "web/nobody", "x"]), 3);
    failed(&sandbox.ctl_output(&["send", "web/plain"]), 2);
    failed(&sandbox.ctl_output(&["send", "web/plain", "--keys", "no-such-key"]), 2);

    run_at_terminal(&sandbox, "stty raw -echo; echo ready; exec sleep 1000");
    std::fs::write(sandbox.path().join("input"), vec![b'x'; 300_000]).expect("write a file");
    let mut command = sandbox.ctl_command(&["send", "web/a", "--stdin"]);
    command.stdin(Stdio::from(std::fs::File::open(sandbox.path().join("input")).expect("open a file")));
    let said = failed(&fermata_tests::sandbox::output_of(command), 1);
    assert!(said.contains("does not read") && said.contains("of 300000 bytes"), "{said}");

    sandbox.ctl(&["pause", "web"]);
    let said = failed(&sandbox.ctl_output(&["send", "web/a", "x"]), 1);
    assert!(said.contains("cannot read input") && said.contains("fermatactl resume web"), "{said}");
}
