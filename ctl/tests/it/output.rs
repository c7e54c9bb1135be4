//! Output for users and for programs.

use serde_json::{Value, json};

use crate::stub::{Answer, Stub, agent};

fn two_agents() -> Answer {
    Answer::Result(json!({"agents": [
        agent("coder", "running", Value::Null),
        agent("tester", "failed", json!({"code": 2})),
    ]}))
}

#[test]
fn a_list_is_a_table_json_lines_or_ids() {
    let stub = Stub::new([("agent.list", two_agents()), ("agent.list", two_agents()), ("agent.list", two_agents())]);
    let table = stub.run(&["ps"]).stdout;
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("AGENT       STATUS"), "{table}");
    assert!(lines[1].starts_with("web/coder   running"), "{table}");
    assert!(lines[2].contains("failed (exit code 2)"), "{table}");
    assert!(!table.contains('\u{1b}'), "no colours off a terminal");
    let rows = stub.run(&["ps", "--json"]).stdout;
    let rows: Vec<Value> = rows.lines().map(|row| serde_json::from_str(row).expect("one object per line")).collect();
    assert_eq!((rows.len(), &rows[1]["exit"]), (2, &json!({"code": 2})));
    assert_eq!(stub.run(&["ps", "-q"]).stdout, "web/coder\nweb/tester\n");
}

#[test]
fn colours_can_be_forced() {
    let stub = Stub::new([("agent.list", two_agents())]);
    let table = stub.run(&["ps", "--color", "always"]).stdout;
    assert!(table.contains("\u{1b}[32mrunning"), "{table}");
}

#[test]
fn an_empty_list_leaves_stdout_empty() {
    let stub = Stub::new([("project.list", Answer::Result(json!({"projects": []})))]);
    let ended = stub.run(&["project", "ls"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, ""));
    assert_eq!(ended.stderr, "no projects\n");
}

#[test]
fn a_pause_prints_all_fields_for_people_and_the_reply_for_programs() {
    let reply = json!({
        "success": true, "operation_id": "op-1", "checkpoint_id": 3,
        "tokens_before": 150_000, "tokens_after": 60_000, "reduction_percentage": 60.0,
        "items_archived": 41, "hot_items_retained": 5, "warm_items_retained": 9,
        "paused_at": 0, "mode": "freeze", "mechanism": "cgroup", "processes": 12,
        "frozen_ms": 34.5, "steps_ms": {"freeze": 4.0, "snapshot": 21.0},
        "warnings": ["2 files were skipped"],
    });
    // Progress is shown on a terminal only, so there is none here.
    let progress = json!({"jsonrpc": "2.0", "method": "$/progress", "params":
        {"operation_id": "op-1", "step": "snapshot", "done": 1, "total": 2, "unit": "files"}});
    let stub = Stub::new([
        ("project.pause", Answer::After(vec![progress], reply.clone())),
        ("project.pause", Answer::Result(reply.clone())),
        ("project.pause", Answer::Result(reply.clone())),
    ]);
    let people = stub.run(&["pause", "web"]);
    for part in [
        "checkpoint:           3\n",
        "mode:                 freeze\n",
        "mechanism:            cgroup\n",
        "processes:            12\n",
        "frozen before commit: 34 ms\n",
        "steps:                freeze 4.0 ms, snapshot 21 ms\n",
        "150,000 -> 60,000 (60.0% reduction)",
        "41 items (5 hot and 9 warm kept)",
    ] {
        assert!(people.stdout.contains(part), "{part} in {}", people.stdout);
    }
    assert_eq!(people.stderr, "warning: 2 files were skipped\n");
    let programs = stub.run(&["pause", "web", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&programs.stdout).expect("JSON"), reply);
    assert_eq!(stub.run(&["pause", "web", "-q"]).stdout, "3\n");
}

#[test]
fn text_from_agents_cannot_control_the_terminal() {
    let question = json!({"project": "web", "id": 1, "agent": "coder", "asked_at": 0,
                          "text": "\u{1b}]0;owned\u{7}Ship?\nNow?"});
    let stub = Stub::new([("question.list", Answer::Result(json!({"questions": [question]})))]);
    let ended = stub.run(&["inbox"]);
    assert!(ended.stdout.contains("Ship? Now?"), "{ended:?}");
    assert!(!ended.stdout.contains('\u{1b}') && !ended.stdout.contains('\u{7}'));
    assert_eq!(ended.stderr, "answer with: fermatactl answer web/1 TEXT\n");
}

#[test]
fn call_passes_parameters_and_results_through() {
    let stub = Stub::new([("project.fly", Answer::Result(json!({"height": 3})))]);
    let ended = stub.run(&["call", "project.fly", r#"{"project": "web"}"#, "--json"]);
    assert_eq!(ended.stdout, "{\"height\":3}\n");
    assert_eq!(stub.calls("project.fly"), [json!({"project": "web"})]);
}

#[test]
fn settings_that_are_not_given_are_kept() {
    let config = json!({"include": [], "exclude": ["target/"], "use_gitignore": true,
        "max_file_bytes": 1, "token_limit": 2, "flash_save_at_percent": 3});
    let project = json!({"name": "web", "description": "", "workspace": "/w", "status": "active",
        "phase": "active", "created_at": 0, "total_paused_ms": 0, "agents": 0,
        "agents_running": 0, "tasks_total": 0, "tasks_completed": 0, "open_questions": 0});
    let detail = json!({"project": project, "config": config, "agents": [], "checkpoints": 0,
        "context": {"items": 0, "archived": 0, "tokens": 0, "hot": 0, "warm": 0, "cold": 0}});
    let stub = Stub::new([("project.show", Answer::Result(detail)), ("project.set", Answer::Result(project))]);
    let ended = stub.run(&["project", "set", "web", "--max-file-size", "64KiB"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "web updated\n"), "{ended:?}");
    let sent = &stub.calls("project.set")[0]["config"];
    assert_eq!((&sent["max_file_bytes"], &sent["exclude"]), (&65_536.into(), &json!(["target/"])));
}
