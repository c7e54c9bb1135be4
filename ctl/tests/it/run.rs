//! `run`: the parameters that it sends, and its output.

use serde_json::{Value, json};

use crate::stub::{Answer, Ended, Exchange, Stub, agent, line};

/// The answer about a project that does not exist yet.
const NEW_PROJECT: Exchange = ("project.show", Answer::Refusal("project_not_found", "no project web", "create it"));

#[test]
fn an_agent_gets_the_callers_environment_directory_umask_and_limits() {
    let stub = Stub::new([("agent.run", Answer::Result(agent("codex", "running", Value::Null)))]);
    let mut command = stub.command(&[
        "run",
        "--project",
        "web",
        "--workspace",
        ".",
        "--name",
        "codex",
        "--stop-grace",
        "3s",
        "--resume-command",
        "codex resume 'a b'",
        "--",
        "codex",
        "--json",
        "-q",
    ]);
    command.env("MINE", "yes").env("FERMATA_AGENT", "other");
    let ended = Ended::from(command.output().expect("runs"));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "web/codex started, pid 42\n"), "{ended:?}");
    let sent = &stub.calls("agent.run")[0];
    let here = stub.dir.path().canonicalize().expect("exists");
    assert_eq!(sent["workspace"], here.to_str().expect("UTF-8"));
    assert_eq!(sent["cwd"], here.to_str().expect("UTF-8"));
    assert_eq!(sent["argv"], json!(["codex", "--json", "-q"]));
    assert_eq!(sent["resume_argv"], json!(["codex", "resume", "a b"]));
    assert_eq!(sent["stop_grace_ms"], 3000);
    assert_eq!(sent["env"]["MINE"], "yes");
    assert_eq!(sent["env"].get("FERMATA_AGENT"), None);
    assert!(sent["umask"].is_u64());
    assert!(sent["limits"]["nofile"].get("soft").is_some(), "{}", sent["limits"]);
}

#[test]
fn a_new_project_gets_the_current_directory_as_its_workspace() {
    let stub = Stub::new([NEW_PROJECT, ("agent.run", Answer::Result(agent("sh", "running", Value::Null)))]);
    let ended = stub.run(&["run", "-q", "-p", "web", "--", "sh"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "web/sh\n"));
    let calls = stub.calls("agent.run");
    let here = stub.dir.path().canonicalize().expect("exists");
    assert_eq!(calls[0]["workspace"], here.to_str().expect("UTF-8"));
}

#[test]
fn run_with_logs_and_wait_shows_the_output_and_exits_with_the_agents_code() {
    let stub = Stub::new([
        NEW_PROJECT,
        ("agent.run", Answer::Result(agent("sh", "running", Value::Null))),
        ("agent.logs", Answer::Result(json!({"lines": [line("stdout", "hi")], "cursor": "c", "end": true}))),
        ("agent.wait", Answer::Result(agent("sh", "failed", json!({"code": 9})))),
    ]);
    let ended = stub.run(&["run", "-p", "web", "--logs", "--wait", "--", "sh", "-c", "echo hi"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (9, "hi\n"), "{ended:?}");
}
