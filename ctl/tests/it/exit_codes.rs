//! Exit codes and error messages.

use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stub::{Answer, Ended, Stub, agent, bare_command};

#[test]
fn a_refused_call_exits_1_and_shows_the_hint() {
    let stub = Stub::new([(
        "project.pause",
        Answer::Refusal("already_paused", "web is paused already", "fermatactl resume web"),
    )]);
    let ended = stub.run(&["pause", "web", "--reason", "lunch", "--grace", "2s"]);
    assert_eq!(ended.code, 1);
    assert_eq!(ended.stdout, "");
    assert_eq!(ended.stderr, "error: web is paused already\nhint: fermatactl resume web\n");
    assert_eq!(
        stub.calls("project.pause"),
        [json!({"project": "web", "reason": "lunch", "mode": "freeze", "grace_ms": 2000})]
    );
}

#[test]
fn with_json_an_error_is_one_json_line_on_stderr() {
    let stub = Stub::new([(
        "project.show",
        Answer::Refusal("project_not_found", "there is no project web", "fermatactl project ls"),
    )]);
    let ended = stub.run(&["status", "web", "--json"]);
    assert_eq!(ended.code, 3);
    let error: Value = serde_json::from_str(&ended.stderr).expect("one JSON line");
    assert_eq!(
        error,
        json!({"error": {"code": "project_not_found", "message": "there is no project web",
                         "hint": "fermatactl project ls"}})
    );
}

#[test]
fn no_such_agent_exits_3() {
    let stub = Stub::new([("agent.list", Answer::Result(json!({"agents": []})))]);
    assert_eq!(stub.run(&["logs", "web"]).code, 3);
}

#[test]
fn an_unreachable_daemon_exits_4() {
    let dir = TempDir::new().expect("temp dir");
    let output = bare_command(dir.path(), &["--no-autostart", "ps"]).output();
    let ended = Ended::from(output.expect("runs"));
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(ended.stderr.contains("no daemon answers at"), "{ended:?}");
    assert!(ended.stderr.contains("hint: "), "{ended:?}");
}

#[test]
fn an_invalid_command_line_exits_2() {
    let dir = TempDir::new().expect("temp dir");
    for args in [
        &["fly"][..],
        &["ps", "--json", "-q"],
        &["pause", "web", "--grace", "soon"],
        &["pause", "web", "--mode", "hold"],
        &["run", "--project", "web"],
        &["answer", "3", "yes"],
        &["rm", "web/coder", "--with-checkpoints"],
    ] {
        let output = bare_command(dir.path(), args).output();
        let ended = Ended::from(output.expect("runs"));
        assert_eq!(ended.code, 2, "{args:?}: {ended:?}");
    }
}

#[test]
fn wait_prints_the_exit_code_and_returns_it_only_with_propagate() {
    for (args, code) in [(&["wait", "web/coder"][..], 0), (&["wait", "web/coder", "--propagate"], 7)] {
        let ended_agent = agent("coder", "failed", json!({"code": 7}));
        let stub = Stub::new([("agent.wait", Answer::Result(ended_agent))]);
        let ended = stub.run(args);
        assert_eq!((ended.code, ended.stdout.as_str()), (code, "7\n"), "{ended:?}");
    }
}

#[test]
fn a_signal_is_propagated_as_a_shell_would() {
    let killed = agent("coder", "failed", json!({"signal": 9}));
    let stub = Stub::new([("agent.wait", Answer::Result(killed))]);
    assert_eq!(stub.run(&["wait", "web/coder", "--propagate"]).code, 137);
}

#[test]
fn waiting_for_a_project_waits_for_all_of_its_agents() {
    let (good, bad) = (agent("a", "exited", json!({"code": 0})), agent("b", "failed", json!({"code": 3})));
    let stub = Stub::new([
        ("agent.list", Answer::Result(json!({"agents": [good.clone(), bad.clone()]}))),
        ("agent.wait", Answer::Result(good)),
        ("agent.wait", Answer::Result(bad)),
    ]);
    let ended = stub.run(&["wait", "web", "--propagate"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (3, "web/a 0\nweb/b 3\n"));
}

#[test]
fn a_wait_that_times_out_exits_6_or_5_when_a_question_is_open() {
    for (status, code) in [("running", 6), ("waiting_for_input", 5)] {
        let stub = Stub::new([
            ("agent.wait", Answer::Refusal("timed_out", "web/coder still runs", "wait longer")),
            ("agent.list", Answer::Result(json!({"agents": [agent("coder", status, Value::Null)]}))),
        ]);
        let ended = stub.run(&["wait", "web/coder", "--timeout", "100ms"]);
        assert_eq!(ended.code, code, "{ended:?}");
        assert_eq!(stub.calls("agent.wait")[0]["timeout_ms"], 100);
    }
}

#[test]
fn a_daemon_that_does_not_answer_in_time_exits_6() {
    let stub = Stub::new([("agent.list", Answer::Silence)]);
    let ended = stub.run(&["ps", "--timeout", "100ms"]);
    assert_eq!(ended.code, 6, "{ended:?}");
}

#[test]
fn a_question_that_stays_open_exits_5_and_an_answer_is_printed() {
    let question = json!({"project": "web", "id": 4, "agent": "coder", "text": "Ship?", "asked_at": 0});
    let mut answered = question.clone();
    answered["answer"] = "yes, ship".into();
    let stub = Stub::new([
        ("question.ask", Answer::Result(question.clone())),
        ("question.wait", Answer::Refusal("timed_out", "no answer yet", "")),
        ("question.ask", Answer::Result(question)),
        ("question.wait", Answer::Result(answered)),
    ]);
    let args = ["agent", "ask", "Ship?", "--wait", "--timeout", "1s"];
    let mut command = stub.command(&args);
    let open = Ended::from(command.env("FERMATA_TOKEN", "t0k").output().expect("runs"));
    assert_eq!(open.code, 5, "{open:?}");
    assert!(open.stderr.contains("wait-answer 4"), "{open:?}");
    let mut command = stub.command(&args);
    let closed = Ended::from(command.env("FERMATA_TOKEN", "t0k").output().expect("runs"));
    assert_eq!((closed.code, closed.stdout.as_str()), (0, "yes, ship\n"));
    assert_eq!(stub.calls("hello")[0]["token"], "t0k");
}

#[test]
fn a_resume_without_one_agent_and_a_damaged_checkpoint_exit_1() {
    let stub = Stub::new([
        (
            "project.resume",
            Answer::Result(json!({
                "success": false, "operation_id": "op-1", "paused_ms": 65_000, "steps_ms": {},
                "warnings": ["one agent did not come back"],
                "agents": [{"agent": "coder", "rung": "failed", "detail": "no such file"}],
            })),
        ),
        (
            "checkpoint.verify",
            Answer::Result(json!({"checkpoints": [
                {"checkpoint_id": 3, "good": false, "problems": ["context.json: hash differs"]},
            ]})),
        ),
    ]);
    let resumed = stub.run(&["resume", "web"]);
    assert_eq!(resumed.code, 1);
    assert!(resumed.stdout.contains("no such file") && resumed.stdout.contains("1m 5s"), "{resumed:?}");
    assert_eq!(resumed.stderr, "warning: one agent did not come back\n");
    let verified = stub.run(&["checkpoint", "verify", "web"]);
    assert_eq!(verified.code, 1);
    assert!(verified.stdout.contains("hash differs"), "{verified:?}");
}

#[test]
fn a_stdout_that_is_closed_early_is_no_error() {
    let rows: Vec<Value> = (0..2_000).map(|n| agent(&format!("agent-{n}"), "running", Value::Null)).collect();
    let stub = Stub::new([("agent.list", Answer::Result(json!({"agents": rows})))]);
    let mut command = stub.command(&["ps", "--json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    drop(child.stdout.take());
    let ended = Ended::from(child.wait_with_output().expect("ends"));
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
}

#[test]
fn doctor_without_a_daemon_exits_1_with_a_hint() {
    let dir = TempDir::new().expect("temp dir");
    let output = bare_command(dir.path(), &["doctor", "--json"]).output();
    let ended = Ended::from(output.expect("runs"));
    assert_eq!(ended.code, 1, "{ended:?}");
    let first: Value = serde_json::from_str(ended.stdout.lines().next().expect("a row")).expect("JSON");
    assert_eq!((&first["check"], &first["good"]), (&"daemon".into(), &false.into()));
    assert!(first["hint"].is_string());
}
