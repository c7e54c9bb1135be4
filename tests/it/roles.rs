//! Roles: other users, the operators' group, agents by token and by descent.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

use fermata_protocol::Code;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::client::Client;
use fermata_protocol::daemon::Role;
use fermata_tests::Sandbox;
use fermata_tests::sandbox::{binary, output_of};
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::bed::{agent, ctl_word, failed, members, refused, run_agent, wait_for_file, web};
/// A user without any rights.
const NOBODY: u32 = 65_534;

/// Runs `fermatactl` as another user, who can access the sandbox's socket and nothing else in it.
fn as_nobody(sandbox: &Sandbox, gid: u32, args: &[&str]) -> Output {
    for dir in [sandbox.path().to_owned(), sandbox.path().join("r")] {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("open the sandbox");
    }
    let mut command = Command::new(binary("fermatactl"));
    command.env_clear().env("HOME", "/nonexistent").env("PATH", "/usr/bin:/bin").current_dir("/");
    command.args(["--json", "--no-autostart", "--socket"]).arg(sandbox.socket()).args(args);
    command.uid(NOBODY).gid(gid);
    output_of(command)
}

fn role_of(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    value["role"].as_str().expect("a role").to_owned()
}

const HELLO: [&str; 3] = ["call", "hello", "{\"min\":1,\"max\":1,\"client\":\"test\"}"];

#[test]
fn other_users_may_read_and_change_nothing() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    assert_eq!(role_of(&as_nobody(&sandbox, NOBODY, &HELLO)), Role::Reader.as_str());
    for args in [&["ps"][..], &["status"], &["events"], &["inbox"], &["checkpoint", "ls", "web"], &["op", "ls"]] {
        let output = as_nobody(&sandbox, NOBODY, args);
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
    for args in [
        &["pause", "web"][..],
        &["stop", "web"],
        &["kill", "web/a"],
        &["run", "-p", "web", "--", "true"],
        &["logs", "web/a"],
        &["context", "ls", "web"],
        &["checkpoint", "create", "web"],
        &["task", "add", "web", "x"],
        &["agent", "progress", "5", "--target", "web/a"],
        &["daemon", "reload"],
        &["plugin", "reload"],
    ] {
        let said = failed(&as_nobody(&sandbox, NOBODY, args), 1);
        assert!(said.contains("permission_denied"), "{args:?}: {said}");
    }
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn other_users_may_not_even_read_when_the_settings_say_so() {
    let sandbox = Sandbox::builder().config("others_may_look = false\n").start();
    let said = failed(&as_nobody(&sandbox, NOBODY, &["ps"]), 1);
    assert!(said.contains("permission_denied"), "{said}");
}

#[test]
fn the_operators_group_may_pause_but_neither_reload_nor_run_programs_as_root() {
    let group = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(NOBODY)).expect("read groups");
    let group = group.expect("the group of nobody has a name").name;
    let sandbox = Sandbox::builder().config(&format!("operator_group = \"{group}\"\n")).start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    assert_eq!(role_of(&as_nobody(&sandbox, NOBODY, &HELLO)), Role::Operator.as_str());
    for args in [&["pause", "web"][..], &["resume", "web"], &["logs", "web/a"], &["checkpoint", "create", "web"]] {
        let output = as_nobody(&sandbox, NOBODY, args);
        assert!(output.status.success(), "{args:?}: {output:?}");
    }
    for args in [&["daemon", "reload"][..], &["plugin", "reload"], &["run", "-p", "web", "--", "/bin/true"]] {
        let said = failed(&as_nobody(&sandbox, NOBODY, args), 1);
        assert!(said.contains("permission_denied"), "{args:?}: {said}");
    }
}

#[test]
fn a_process_inside_an_agent_has_the_role_of_the_agent_whatever_it_claims() {
    let sandbox = Sandbox::start();
    let ctl = ctl_word();
    let hello = "call hello '{\"min\":1,\"max\":1,\"client\":\"test\"}'";
    // With its token, without it, and from a session of its own whose parent has ended.
    run_agent(
        &sandbox,
        "a",
        &format!(
            "{ctl} --json {hello} > with; env -u FERMATA_TOKEN {ctl} --json {hello} > without; \
             (setsid sh -c 'sleep 0.1; env -u FERMATA_TOKEN {ctl} --json {} > orphan; echo > done' &) ; exec sleep 1000",
            hello.replace('\'', "'\\''")
        ),
    );
    wait_until(SOON, "the agent to have greeted", || web(&sandbox).has("done"));
    for file in ["with", "without", "orphan"] {
        let text = web(&sandbox).read(file);
        let reply: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{file}: {e}: {text}"));
        assert_eq!((&reply["role"], &reply["agent"]), (&json!("agent"), &json!("web/a")), "{file}");
    }
}

#[test]
fn an_agent_is_recognised_in_its_first_moment_and_however_deep_it_nests() {
    let sandbox = Sandbox::start();
    let hello =
        format!("env -u FERMATA_TOKEN {} --json call hello '{{\"min\":1,\"max\":1,\"client\":\"test\"}}'", ctl_word());
    // Not the last command: the shell would replace itself with it.
    let nest = format!("if [ $1 -gt 0 ]; then sh ./nest $(( $1 - 1 )); else {hello} > deep; fi; :");
    web(&sandbox).write("nest", nest);
    for round in 0..10 {
        run_agent(&sandbox, &format!("a{round}"), &format!("{hello} > first.{round}; echo > done.{round}"));
        wait_for_file(&sandbox, &format!("done.{round}"));
        let text = web(&sandbox).read(&format!("first.{round}"));
        let reply: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!((&reply["role"], &reply["agent"]), (&json!("agent"), &json!(format!("web/a{round}"))));
    }
    run_agent(&sandbox, "b", "sh ./nest 100; echo > done.deep");
    wait_for_file(&sandbox, "done.deep");
    let reply: Value = serde_json::from_str(&web(&sandbox).read("deep")).expect("JSON");
    assert_eq!((&reply["role"], &reply["agent"]), (&json!("agent"), &json!("web/b")));
}

#[test]
fn a_token_makes_a_peer_that_agent_and_ends_with_the_run() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $FERMATA_TOKEN > token; exec sleep 1000");
    let token = wait_for_file(&sandbox, "token");
    let greet = |token: &str| Client::connect(sandbox.socket(), "test", Some(token.to_owned()));
    let (mut client, hello) = greet(&token).expect("greet");
    assert_eq!((hello.role, hello.agent.map(|a| a.to_string())), (Role::Agent, Some("web/a".into())));
    for (method, params) in [
        ("agent.list", json!({})),
        ("agent.kill", json!({ "target": "web/a" })),
        ("agent.progress", json!({ "target": "web/b", "percent": 1 })),
        ("project.pause", json!({ "project": "api" })),
        ("daemon.reload", json!({})),
    ] {
        assert_eq!(refused(client.call_raw(method, members(params), |_| {})), Code::PermissionDenied, "{method}");
    }
    client.call_raw("agent.progress", members(json!({ "percent": 40 })), |_| {}).expect("its own progress");
    assert_eq!(agent(&sandbox, "a").progress.and_then(|p| p.percent), Some(40.0));
    sandbox.ctl(&["restart", "web/a"]);
    assert_eq!(refused(greet(&token).map(|(_, hello)| hello)), Code::BadToken);
}

#[test]
fn an_agent_with_another_agents_token_is_refused() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $FERMATA_TOKEN > token; exec sleep 1000");
    let token = wait_for_file(&sandbox, "token");
    let script =
        format!("FERMATA_TOKEN={token} {} agent progress 5 2> said; echo $? > code; exec sleep 1000", ctl_word());
    run_agent(&sandbox, "b", &script);
    assert_eq!(wait_for_file(&sandbox, "code"), "1");
    assert!(web(&sandbox).read("said").contains("may not act as"), "{}", web(&sandbox).read("said"));
    assert_eq!(agent(&sandbox, "a").progress, None);
}
