//! `run --tty` and `attach`: a person at an agent's terminal, through the real `fermatactl`.

use std::process::Command;

use fermata_protocol::Code;
use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_protocol::event::Event;
use fermata_protocol::subscription::EventsList;
use fermata_tests::Sandbox;
use fermata_tests::sandbox::output_of;
use fermata_tests::waiting::{SOON, wait_until};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::bed::{MECHANISMS, agent, call, failed, refused, run_agent, wait_for_file, wait_for_status, web};
use crate::person::Person;

/// Starts a shell script with a terminal as the agent `web/a`.
#[track_caller]
fn run_at_terminal(sandbox: &Sandbox, script: &str) {
    let workspace = sandbox.workspace("web");
    let place = ["-w", workspace.text(), "--cwd", workspace.text()];
    sandbox.ctl(&[&["run", "--tty", "-p", "web"], &place[..], &["-n", "a", "--", "/bin/sh", "-c", script]].concat());
}

const ECHO: &str = "stty -echo; echo ready; while read line; do echo \"got $line\"; done; echo over; exit 3";
const LEAVE: &str = "\x1c";

#[test]
fn a_person_types_leaves_comes_back_and_sees_the_end() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    let mut first = Person::runs(&sandbox, &["attach", "web/a"]);
    first.sees("ready");
    first.types("one\r");
    first.sees("got one");
    assert!(first.is_raw());
    first.types(LEAVE);
    assert_eq!(first.ends().code(), Some(0));
    first.sees("detached from web/a");

    let mut second = Person::runs(&sandbox, &["attach", "web", "--detach-keys", "ctrl-p,ctrl-q"]);
    second.sees("got one");
    second.types("two\x10\r");
    second.sees("got two\x10");
    second.types("\x10\x11");
    assert_eq!(second.ends().code(), Some(0));

    let mut third = Person::runs(&sandbox, &["attach", "web/a"]);
    third.sees("got two");
    third.types("\x04");
    third.sees("over");
    assert_eq!(third.ends().code(), Some(3));
    third.sees("web/a ended with exit code 3");
    assert_eq!(agent(&sandbox, "a").exit, Some(ExitStatus::Code(3)));
}

#[test]
fn run_with_attach_sits_down_at_once_at_a_terminal_of_the_same_size() {
    let sandbox = Sandbox::start();
    let workspace = sandbox.workspace("web");
    let args = ["run", "--tty", "--attach", "-p", "web", "-w", workspace.text(), "--", "/bin/sh", "-c"];
    let script = "stty size; echo \"$TERM ${LINES-none}\"; read x; exit 5";
    let mut person = Person::runs(&sandbox, &[&args[..], &[script]].concat());
    person.sees("30 100");
    person.sees("xterm-256color none");
    person.types("\r");
    assert_eq!(person.ends().code(), Some(5));
}

#[test]
fn a_screen_comes_back_after_the_daemon_was_killed_and_so_does_the_person() {
    let mut sandbox = Sandbox::start();
    // As an editor does: the alternate screen, cleared, text at a position, a hidden cursor.
    run_at_terminal(
        &sandbox,
        "stty -echo; printf 'shell\\r\\n\\033[?1049h\\033[2J\\033[7;9H\\033[1;35mPICTURE\\033[m\\033[?25l'; echo > drawn; \
         while read line; do printf \"\\033[12;1Hread $line\"; done",
    );
    wait_for_file(&sandbox, "drawn");
    let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
    person.sees("PICTURE");
    sandbox.kill_daemon();
    person.sees("connection to the daemon lost");
    sandbox.start_daemon();
    let before = person.sees("PICTURE");
    assert!(before.contains("\x1b[?1047h") && before.contains("shell"), "{before:?}");
    person.types("on\r");
    person.sees("read on");

    sandbox.kill_daemon();
    person.sees("connection to the daemon lost");
    person.types(LEAVE);
    assert_eq!(person.ends().code(), Some(0));
    sandbox.start_daemon();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn the_writers_size_rules() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, "trap 'stty size' WINCH; stty size; while :; do sleep 0.02; done");
    let writer = Person::runs(&sandbox, &["attach", "web/a"]);
    writer.sees("30 100");
    let viewer = Person::runs(&sandbox, &["attach", "--read-only", "web/a"]);
    viewer.sees("watching web/a");
    viewer.resizes(50, 150);
    writer.resizes(41, 111);
    writer.sees("41 111");
    viewer.sees("41 111");
    assert!(!writer.shown().contains("50 150"));
}

#[test]
fn one_types_and_the_others_watch_until_it_leaves_or_is_replaced() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    let mut writer = Person::runs(&sandbox, &["attach", "web/a"]);
    writer.sees("ready");
    let mut second = Person::runs(&sandbox, &["attach", "web/a"]);
    second.sees("has the input");
    let watcher = Person::runs(&sandbox, &["attach", "--read-only", "web/a"]);
    watcher.sees("watching web/a");

    second.types("in vain\r");
    second.sees("the terminal of agent web/a is in use by");
    watcher.types("in vain\r");
    watcher.sees("input is off");
    writer.types("first\r");
    for person in [&writer, &second, &watcher] {
        let before = person.sees("got first");
        assert!(!before.contains("got in vain"), "{before:?}");
    }

    // After `--steal` the other writer's input is rejected.
    let mut thief = Person::runs(&sandbox, &["attach", "--steal", "web/a"]);
    writer.sees("has taken over the input of web/a");
    thief.types("mine\r");
    writer.sees("got mine");
    writer.types("not mine\r");
    writer.sees("is in use by");

    // After it has left, no client owns the input until one of them types.
    thief.types(LEAVE);
    assert!(thief.ends().success());
    second.types("now me\r");
    second.sees("got now me");
    writer.types("x\r");
    writer.sees("is in use by");
    for person in [&mut writer, &mut second] {
        person.types(LEAVE);
        assert!(person.ends().success());
    }
    let logs = sandbox.ctl(&["logs", "web/a"]);
    assert!(!logs.contains("vain") && !logs.contains("not mine") && !logs.contains("got x"), "{logs}");
}

#[test]
fn ctrl_c_interrupts_and_ctrl_z_suspends_what_is_shown_and_can_be_continued() {
    for config in MECHANISMS {
        let mut sandbox = Sandbox::builder().config(config).start();
        run_at_terminal(
            &sandbox,
            "exec perl -e '$| = 1; $SIG{INT} = sub { print qq(interrupted\\n) }; print qq(ready\\n); \
             while (1) { open(my $f, q(>>), q(marks)); print $f q(.); close $f; select(undef, undef, undef, 0.02) }'",
        );
        let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
        person.sees("ready");
        person.types("\x03");
        person.sees("interrupted");
        person.types("\x1a");
        person.sees("web/a is suspended");
        assert!(agent(&sandbox, "a").suspended_at.is_some());
        assert!(sandbox.ctl(&["ps"]).contains("running, suspended"));

        // A pause, a resume and a new daemon do not change the screen.
        let paused = sandbox.ctl_json(&["pause", "web"]);
        assert!(paused["warnings"].to_string().contains("already stopped by another process"), "{paused}");
        person.sees("web/a is paused");
        sandbox.ctl(&["resume", "web"]);
        person.sees("web/a is suspended");
        sandbox.crash_and_restart();
        person.sees("connection to the daemon lost");
        assert!(agent(&sandbox, "a").suspended_at.is_some());
        let before = web(&sandbox).read("marks").len();
        assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);

        sandbox.ctl(&["kill", "-s", "CONT", "web/a"]);
        wait_until(SOON, "the agent to go on", || web(&sandbox).read("marks").len() > before);
        wait_until(SOON, "that to be shown", || agent(&sandbox, "a").suspended_at.is_none());
        let kinds = kinds(&sandbox);
        assert!(kinds.contains(&"agent.suspended") && kinds.contains(&"agent.continued"), "{kinds:?}");
        person.types(LEAVE);
        assert!(person.ends().success());
    }
}

fn kinds(sandbox: &Sandbox) -> Vec<&'static str> {
    let events = sandbox.rpc().call(&EventsList { limit: Some(500), ..EventsList::default() }).expect("events").events;
    events.iter().map(|recorded| Event::kind(&recorded.event)).collect()
}

#[test]
fn a_paused_agent_is_seen_and_not_typed_to() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    sandbox.ctl(&["send", "web/a", "-e", "before"]);
    wait_until(SOON, "the answer", || sandbox.ctl(&["logs", "web/a"]).contains("got before"));
    sandbox.ctl(&["pause", "web"]);
    let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
    person.sees("got before");
    person.types("surprise\r");
    person.sees("it cannot read input");
    sandbox.ctl(&["resume", "web"]);
    person.sees("web/a is running");
    person.types("after\r");
    let before = person.sees("got after");
    assert!(!before.contains("surprise"), "{before:?}");
    sandbox.ctl(&["stop", "--grace", "0s", "web/a"]);
    person.sees("web/a ended with signal");
    assert!(!person.ends().success());
}

#[test]
fn the_terminal_is_restored_on_signals_too() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, ECHO);
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
        person.sees("ready");
        person.signals(signal);
        assert_eq!(person.ends().code(), Some(code));
    }
}

#[test]
fn a_client_that_does_not_read_delays_neither_the_agent_nor_other_clients() {
    let sandbox = Sandbox::start();
    run_at_terminal(
        &sandbox,
        "stty -echo; echo ready; read x; yes 0123456789012345678901234567890123456789 | head -c 50M; echo the end; echo > done; read x",
    );
    let mut person = Person::runs(&sandbox, &["attach", "web/a"]);
    let looker = Person::runs(&sandbox, &["attach", "--read-only", "web/a"]);
    person.sees("ready");
    looker.sees("ready");
    // The client does not read its terminal while 50 MB are written.
    looker.signals(Signal::SIGSTOP);
    person.types("\r");
    wait_for_file(&sandbox, "done");
    looker.signals(Signal::SIGCONT);
    looker.sees("the end");
    person.sees("the end");
    person.types("\r");
    assert!(person.ends().success());
}

#[test]
fn what_cannot_be_attached_to_is_refused_with_a_way_out() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "plain", "exec sleep 1000");
    let said = failed(&sandbox.ctl_output(&["attach", "web/plain"]), 2);
    assert!(said.contains("needs a terminal") && said.contains("logs -f web/plain"), "{said}");
    let mut person = Person::runs(&sandbox, &["attach", "web/plain"]);
    assert_eq!(person.ends().code(), Some(1));
    person.sees("agent web/plain has no terminal");
    person.sees("fermatactl logs -f web/plain");
    for (target, code) in [("web/nobody", Code::AgentNotFound), ("none/a", Code::ProjectNotFound)] {
        assert_eq!(refused(call(&sandbox, "agent.attach", json!({ "target": target }))), code);
    }
    let too_large = json!({ "target": "web/plain", "size": { "rows": 0, "cols": 80 } });
    assert_eq!(refused(call(&sandbox, "agent.attach", too_large)), Code::InvalidParams);
    assert_eq!(refused(call(&sandbox, "agent.input", json!({ "attachment": 1, "data": "YQ==" }))), Code::NotAttached);
    run_at_terminal(&sandbox, "exit 0");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    assert_eq!(refused(call(&sandbox, "agent.attach", json!({ "target": "web/a" }))), Code::AgentNotRunning);
    for keys in ["", "nonsense"] {
        failed(&sandbox.ctl_output(&["attach", "web/a", "--detach-keys", keys]), 2);
    }
}

#[test]
fn without_a_terminal_of_its_own_run_gives_a_usual_one() {
    let sandbox = Sandbox::start();
    run_at_terminal(&sandbox, "stty size; echo \"$TERM\" > term");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    assert!(sandbox.ctl(&["logs", "web/a"]).contains("24 80"));
    let workspace = sandbox.workspace("web");
    let mut command: Command =
        sandbox.ctl_command(&["run", "--tty", "-p", "web", "--cwd", workspace.text(), "-n", "b"]);
    command.args(["--", "/bin/sh", "-c", "echo \"$TERM\" > without"]).env_remove("TERM").env("LINES", "7");
    assert!(output_of(command).status.success());
    assert_eq!(wait_for_file(&sandbox, "without"), "xterm-256color");
}
