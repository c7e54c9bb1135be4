//! Commands that follow logs, events and pause requests, also across a restart of the daemon.

use std::io::{BufRead as _, BufReader};
use std::process::Child;

use serde_json::{Value, json};

use crate::stub::{Answer, Stub, event, line};

fn batch(lines: &[Value], cursor: &str, end: bool) -> Answer {
    Answer::Result(json!({"lines": lines, "cursor": cursor, "end": end}))
}

#[test]
fn followed_logs_end_with_the_agent_and_keep_the_streams_apart() {
    let mut part = line("stdout", "half ");
    part["partial"] = true.into();
    let stub = Stub::new([
        ("agent.logs", batch(&[line("stdout", "one"), line("stderr", "oops")], "c1", false)),
        ("agent.logs", batch(&[], "c1", false)),
        ("agent.logs", batch(&[part], "c2", false)),
        ("agent.logs", batch(&[line("stdout", "line"), line("gap", "9 lines lost")], "c3", true)),
    ]);
    let ended = stub.run(&["logs", "-f", "-n", "5", "web/coder"]);
    assert_eq!(ended.code, 0);
    assert_eq!(ended.stdout, "one\nhalf line\n");
    assert_eq!(ended.stderr, "oops\n-- 9 lines lost\n");
    let calls = stub.calls("agent.logs");
    assert_eq!((&calls[0]["tail"], &calls[0]["wait_ms"]), (&5.into(), &0.into()));
    assert_eq!((&calls[1]["tail"], &calls[1]["cursor"]), (&Value::Null, &"c1".into()));
    assert!(calls[1]["wait_ms"].as_u64() > Some(0));
}

#[test]
fn logs_without_follow_end_with_the_existing_output() {
    let stub = Stub::new([
        ("agent.logs", batch(&[line("stdout", "one")], "c1", false)),
        ("agent.logs", batch(&[], "c1", false)),
    ]);
    let ended = stub.run(&["logs", "web/coder", "--timestamps"]);
    assert_eq!(ended.stdout, "1970-01-01T00:00:01.000Z one\n");
    assert!(stub.calls("agent.logs").iter().all(|call| call["wait_ms"] == 0));
}

#[test]
fn followed_logs_continue_from_their_cursor_when_the_daemon_restarts() {
    let stub = Stub::new([
        ("agent.logs", batch(&[line("stdout", "before")], "c1", false)),
        ("agent.logs", Answer::HangUp),
        ("agent.logs", batch(&[line("stdout", "after")], "c2", true)),
    ]);
    let ended = stub.run(&["logs", "--follow", "web/coder"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "before\nafter\n"));
    assert_eq!(stub.calls("agent.logs")[2]["cursor"], "c1");
}

fn lines(child: &mut Child, count: usize) -> Vec<Value> {
    let stdout = child.stdout.take().expect("piped");
    let lines = BufReader::new(stdout).lines().take(count);
    let parse = |line: std::io::Result<String>| serde_json::from_str(&line.expect("a line"));
    let lines = lines.map(parse).collect::<Result<_, _>>().expect("JSON");
    child.kill().expect("kill");
    child.wait().expect("wait");
    lines
}

#[test]
fn events_are_followed_without_gap_across_a_restart() {
    let subscribed = json!({"subscription": 1, "cursor": "c0"});
    let stub = Stub::new([
        ("events.subscribe", Answer::HangUpAfter(subscribed.clone(), vec![event("c1"), event("c2")])),
        ("events.subscribe", Answer::Before(subscribed, vec![event("c3")])),
    ]);
    let mut child = stub.spawn(&["events", "-f", "--json", "--kind", "agent.*", "--project", "web"]);
    let rows = lines(&mut child, 3);
    let cursors: Vec<_> = rows.iter().map(|row| row["cursor"].as_str()).collect();
    assert_eq!(cursors, [Some("c1"), Some("c2"), Some("c3")]);
    let calls = stub.calls("events.subscribe");
    assert_eq!(calls[0]["filter"], json!({"project": "web", "kinds": ["agent.*"]}));
    assert_eq!(calls[1]["cursor"], "c2");
}

#[test]
fn events_are_listed_page_by_page() {
    let page = |events: &[Value], cursor| Answer::Result(json!({"events": events, "cursor": cursor}));
    let stored = event("c1")["params"]["event"].clone();
    let stub = Stub::new([
        ("events.list", page(&[stored], "c1")),
        // The filter dropped the whole page, but the cursor moved.
        ("events.list", page(&[], "c2")),
        ("events.list", page(&[], "c2")),
    ]);
    let ended = stub.run(&["events", "-q"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "c1\n"));
}

#[test]
fn pause_requests_are_json_lines() {
    let request = json!({"jsonrpc": "2.0", "method": "pause_requested", "params": {"grace_ms": 2000}});
    let stub = Stub::new([("agent.listen", Answer::Before(json!({}), vec![request]))]);
    let mut child = stub.spawn(&["agent", "listen"]);
    assert_eq!(lines(&mut child, 1), [json!({"grace_ms": 2000})]);
}
