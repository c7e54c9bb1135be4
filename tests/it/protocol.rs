//! The control socket: malformed requests and slow peers, idempotency, events.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;

use fermata_protocol::Code;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::client::{Client, ClientError};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::bed::{
    agent, call, members, refused, run_agent, wait_for_end, wait_for_file, wait_for_pid, wait_for_status, web,
};

/// A client that can send arbitrary bytes.
struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn connect(sandbox: &Sandbox) -> Self {
        let stream = UnixStream::connect(sandbox.socket()).expect("connect");
        stream.set_read_timeout(Some(SOON)).expect("limit reading");
        let lines = BufReader::new(stream.try_clone().expect("duplicate a descriptor"));
        Self { stream, lines }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("write to the daemon");
    }

    fn request(&mut self, id: impl Into<Value>, method: &str, params: Value) {
        let request = json!({ "jsonrpc": "2.0", "id": id.into(), "method": method, "params": params });
        self.send(format!("{request}\n"));
    }

    /// Returns the next line, `None` at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line).expect("read from the daemon");
        (read > 0).then(|| serde_json::from_str(&line).expect("the daemon writes JSON"))
    }

    fn reply(&mut self) -> Value {
        self.next().expect("a reply, not the end of the connection")
    }
}

fn code(reply: &Value) -> &str {
    reply["error"]["data"]["code"].as_str().unwrap_or("none")
}

#[test]
fn whatever_is_no_request_gets_one_error_and_the_connection_goes_on() {
    let sandbox = Sandbox::start();
    let mut peer = Raw::connect(&sandbox);
    let cases: &[(&[u8], Value, &str)] = &[
        (b"hello", Value::Null, "parse_error"),
        (b"", Value::Null, "parse_error"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}", Value::Null, "parse_error"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1", Value::Null, "parse_error"),
        (b"42", Value::Null, "invalid_request"),
        (b"\"text\"", Value::Null, "invalid_request"),
        (b"null", Value::Null, "invalid_request"),
        (b"[]", Value::Null, "invalid_request"),
        (b"[{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"daemon.status\"}]", Value::Null, "invalid_request"),
        (b"{\"id\":7,\"method\":\"daemon.status\"}", json!(7), "invalid_request"),
        (b"{\"jsonrpc\":\"1.0\",\"id\":7,\"method\":\"daemon.status\"}", json!(7), "invalid_request"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"daemon.status\"}", Value::Null, "invalid_request"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":7}", json!(7), "invalid_request"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":3}", json!(7), "invalid_request"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"daemon.status\",\"extra\":1}", json!(7), "invalid_request"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"daemon.status\",\"params\":[1]}", json!(7), "invalid_params"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":\"x\",\"method\":\"project.fly\"}", json!("x"), "method_not_found"),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":8,\"method\":\"project.show\",\"params\":{\"project\":\"web\",\"x\":1}}",
            json!(8),
            "invalid_params",
        ),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":8,\"method\":\"project.show\",\"params\":{\"project\":5}}",
            json!(8),
            "invalid_params",
        ),
        (b"{\"jsonrpc\":\"2.0\",\"id\":8,\"method\":\"project.show\"}", json!(8), "invalid_params"),
    ];
    for (line, id, expected) in cases {
        peer.send([line, b"\n".as_slice()].concat());
        let reply = peer.reply();
        assert_eq!((code(&reply), &reply["id"]), (*expected, id), "{}: {reply}", String::from_utf8_lossy(line));
    }
    // Numbers of any size are returned unchanged, and the depth of nesting is limited.
    for id in ["-1", "1.5", "18446744073709551615", "\"\\u0000 ü\""] {
        peer.send(format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"daemon.status\"}}\n"));
        let reply = peer.reply();
        assert_eq!(reply["id"], serde_json::from_str::<Value>(id).expect("valid"), "{reply}");
        assert!(reply.get("result").is_some(), "{reply}");
    }
    let deep = "[".repeat(100_000);
    peer.send(format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"daemon.status\",\"params\":{deep}\n"));
    assert_eq!(code(&peer.reply()), "parse_error");
    // A notification is never answered.
    peer.send("{\"jsonrpc\":\"2.0\",\"method\":\"daemon.status\"}\n");
    peer.request(9, "daemon.status", json!({}));
    assert_eq!(peer.reply()["id"], 9);
}

#[test]
fn a_line_that_is_too_long_gets_one_error_and_the_connection_closes() {
    let sandbox = Sandbox::start();
    let mut peer = Raw::connect(&sandbox);
    let line = vec![b'x'; 2 << 20];
    // The daemon closes the connection before it has read everything, so the write may fail.
    let mut stream = peer.stream.try_clone().expect("duplicate a descriptor");
    let writer = std::thread::spawn(move || stream.write_all(&line).is_ok());
    assert_eq!(code(&peer.reply()), "line_too_long");
    let mut rest = String::new();
    // Unread bytes turn the close into a reset.
    let ended = matches!(peer.lines.read_line(&mut rest), Ok(0) | Err(_));
    assert!(ended, "the connection stayed open: {rest}");
    writer.join().expect("the writer does not panic");
    sandbox.ctl(&["status"]);
}

#[test]
fn the_longest_line_that_is_allowed_is_read() {
    let sandbox = Sandbox::start();
    let mut peer = Raw::connect(&sandbox);
    let frame = json!({ "jsonrpc": "2.0", "id": 1, "method": "daemon.status" }).to_string();
    let spaces = " ".repeat(fermata_protocol::MAX_LINE_BYTES - frame.len());
    peer.send(format!("{frame}{spaces}\n"));
    assert!(peer.reply().get("result").is_some());
}

#[test]
fn an_incomplete_line_is_not_a_request() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let mut peer = Raw::connect(&sandbox);
    peer.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"agent.kill\",\"params\":{\"target\":\"web/a\"}}");
    peer.stream.shutdown(std::net::Shutdown::Write).expect("close one side");
    assert_eq!(peer.next(), None, "half a line has no answer");
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn a_client_that_shuts_down_its_writing_side_still_gets_the_answers() {
    let sandbox = Sandbox::start();
    let mut peer = Raw::connect(&sandbox);
    for id in 0..20 {
        peer.request(id, "daemon.status", json!({}));
    }
    peer.stream.shutdown(std::net::Shutdown::Write).expect("close one side");
    let mut results = 0;
    while let Some(reply) = peer.next() {
        assert!(reply.get("result").is_some(), "{reply}");
        results += 1;
    }
    assert_eq!(results, 20);
}

#[test]
fn ten_thousand_tiny_requests_get_ten_thousand_answers() {
    const REQUESTS: usize = 10_000;
    let sandbox = Sandbox::start();
    let mut peer = Raw::connect(&sandbox);
    let mut stream = peer.stream.try_clone().expect("duplicate a descriptor");
    let writer = std::thread::spawn(move || {
        for id in 0..REQUESTS {
            let line = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"agent.list\"}}\n");
            stream.write_all(line.as_bytes()).expect("write to the daemon");
        }
    });
    let mut answered = vec![false; REQUESTS];
    for _ in 0..REQUESTS {
        let reply = peer.reply();
        let id = usize::try_from(reply["id"].as_u64().expect("an id")).expect("small");
        assert!(!std::mem::replace(&mut answered[id], true), "{id} was answered twice");
        assert!(reply.get("result").is_some() || code(&reply) == "too_many_requests", "{reply}");
    }
    writer.join().expect("the writer does not panic");
}

#[test]
fn the_sixty_fifth_request_under_way_is_refused_and_a_cancelled_one_makes_room() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let mut peer = Raw::connect(&sandbox);
    for id in 0..65 {
        peer.request(id, "agent.wait", json!({ "target": "web/a" }));
    }
    let reply = peer.reply();
    assert_eq!((&reply["id"], code(&reply)), (&json!(64), "too_many_requests"));
    peer.send("{\"jsonrpc\":\"2.0\",\"method\":\"$/cancelRequest\",\"params\":{\"id\":3}}\n");
    let reply = peer.reply();
    assert_eq!((&reply["id"], code(&reply)), (&json!(3), "request_cancelled"));
    peer.request("again", "daemon.status", json!({}));
    let reply = peer.reply();
    assert_eq!(reply["id"], "again");
    assert!(reply.get("result").is_some(), "{reply}");
    // Cancelling an unknown request has no effect.
    peer.send("{\"jsonrpc\":\"2.0\",\"method\":\"$/cancelRequest\",\"params\":{\"id\":\"nobody\"}}\n");
    sandbox.ctl(&["kill", "web/a"]);
    let mut answered: Vec<u64> = (0..63).map(|_| peer.reply()["id"].as_u64().expect("an id")).collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..64).filter(|id| *id != 3).collect::<Vec<u64>>());
}

#[test]
fn a_second_request_with_the_same_id_is_refused_and_the_first_stays_cancellable() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let mut peer = Raw::connect(&sandbox);
    peer.request(1, "agent.wait", json!({ "target": "web/a" }));
    peer.request(1, "daemon.status", json!({}));
    assert_eq!(code(&peer.reply()), "invalid_request");
    peer.send("{\"jsonrpc\":\"2.0\",\"method\":\"$/cancelRequest\",\"params\":{\"id\":1}}\n");
    assert_eq!(code(&peer.reply()), "request_cancelled");
    peer.request(1, "daemon.status", json!({}));
    assert!(peer.reply().get("result").is_some(), "the id is free again");
}

fn resident_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a process has memory");
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).expect("a number of KiB")
}

#[test]
fn a_subscriber_that_never_reads_costs_the_others_nothing() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let mut deaf = Raw::connect(&sandbox);
    deaf.request(1, "events.subscribe", json!({}));
    assert!(deaf.reply().get("result").is_some());
    let before = resident_kib(sandbox.daemon_pid());
    let mut client = sandbox.rpc();
    // 48 MB of events, of which the client reads none.
    let message = "m".repeat(16_000);
    for _ in 0..3_000 {
        let progress = json!({ "target": "web/a", "message": message });
        client.call_raw("agent.progress", members(progress), |_| {}).expect("report progress");
    }
    let grown = resident_kib(sandbox.daemon_pid()).saturating_sub(before);
    assert!(grown < 32 << 10, "the daemon has grown by {grown} KiB");
    sandbox.ctl(&["kill", "web/a"]);
    assert!(sandbox.stop_daemon().success(), "the daemon did not end beside a client that does not read");
    sandbox.start_daemon();
}

#[test]
fn the_same_call_with_the_same_key_is_carried_out_once() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let calls = [
        ("task.put", json!({ "target": "web", "title": "first", "idempotency_key": "k1" })),
        ("agent.usage", json!({ "target": "web/a", "input_tokens": 5, "idempotency_key": "k2" })),
        ("question.ask", json!({ "target": "web/a", "text": "Why?", "idempotency_key": "k3" })),
        (
            "context.put",
            json!({ "target": "web/a", "items": [{ "type": "TASK", "text": "remember" }], "idempotency_key": "k4" }),
        ),
        ("checkpoint.create", json!({ "project": "web", "idempotency_key": "k5" })),
        ("context.flash_save", json!({ "target": "web", "idempotency_key": "k6" })),
    ];
    let first: Vec<Value> =
        calls.iter().map(|(method, params)| call(&sandbox, method, params.clone()).expect(method)).collect();
    for ((method, params), reply) in calls.iter().zip(&first) {
        assert_eq!(&call(&sandbox, method, params.clone()).expect(method), reply, "{method}");
        let other = json!({ "target": "web/a", "state": 1, "idempotency_key": params["idempotency_key"] });
        assert_eq!(refused(call(&sandbox, "state.put", other)), Code::IdempotencyConflict, "{method}");
    }
    sandbox.crash_and_restart();
    for ((method, params), reply) in calls.iter().zip(&first) {
        assert_eq!(&call(&sandbox, method, params.clone()).expect(method), reply, "{method} after a crash");
    }
    assert_eq!(
        call(&sandbox, "task.list", json!({ "project": "web" })).expect("tasks")["tasks"].as_array().map(Vec::len),
        Some(1)
    );
    assert_eq!(agent(&sandbox, "a").usage.input_tokens, 5);
    assert_eq!(sandbox.ctl_rows(&["checkpoint", "ls", "web"]).len(), 1);
    assert_eq!(sandbox.ctl_rows(&["context", "ls", "web"]).len(), 1);
    assert_eq!(sandbox.ctl_rows(&["inbox"]).len(), 1);
}

#[test]
fn a_repeated_run_or_stop_shows_the_same_agent_as_the_first() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    let run = json!({
        "project": "web", "workspace": workspace.text(), "name": "a", "argv": ["/bin/sleep", "1000"],
        "idempotency_key": "run",
    });
    let first = call(&sandbox, "agent.run", run.clone()).expect("run");
    let again = call(&sandbox, "agent.run", run).expect("run again");
    assert_eq!((&first["run"], &first["pid"]), (&again["run"], &again["pid"]), "{again}");
    assert_eq!(agent(&sandbox, "a").runs, 1);
    for (method, key) in
        [("agent.restart", "restart"), ("agent.stop", "stop"), ("agent.run", "new"), ("agent.kill", "kill")]
    {
        let mut params = json!({ "target": "web/a", "idempotency_key": key });
        if method == "agent.run" {
            params = json!({ "project": "web", "name": "a", "argv": ["/bin/sleep", "999"], "idempotency_key": key });
        }
        // `ran_ms` differs between the two answers.
        let without_clock = |mut shown: serde_json::Value| {
            shown.as_object_mut().expect("an object").remove("ran_ms");
            shown
        };
        let first = call(&sandbox, method, params.clone()).expect(method);
        let again = call(&sandbox, method, params).expect(method);
        assert_eq!(without_clock(first), without_clock(again), "{method}");
    }
    assert_eq!(agent(&sandbox, "a").runs, 3);
    let missing = json!({ "project": "web", "name": "b", "argv": ["/no/such/program"], "idempotency_key": "missing" });
    assert_eq!(refused(call(&sandbox, "agent.run", missing.clone())), Code::LaunchFailed);
    assert_eq!(refused(call(&sandbox, "agent.run", missing)), Code::LaunchFailed);
}

#[test]
fn a_signal_with_a_key_is_sent_once() {
    let sandbox = Sandbox::start();
    let traps = "trap 'echo 1 >> got' USR1; trap 'echo 2 >> got' USR2";
    run_agent(&sandbox, "a", &format!("touch got; {traps}; echo y > ready; while :; do sleep 0.02; done"));
    wait_for_file(&sandbox, "ready");
    let kill = |signal: &str, key: &str| {
        let params = json!({ "target": "web/a", "signal": signal, "idempotency_key": key });
        call(&sandbox, "agent.kill", params).expect("signal");
    };
    let expect = |signals: &[&str]| {
        let got = || web(&sandbox).read("got").lines().map(str::to_owned).collect::<Vec<_>>();
        wait_until(SOON, "the signals to arrive", || got().len() >= signals.len());
        assert_eq!(got(), signals);
    };
    kill("USR1", "one");
    expect(&["1"]);
    // A shell that has received both runs the trap of SIGUSR1 before that of SIGUSR2.
    kill("USR1", "one");
    kill("USR2", "two");
    expect(&["1", "2"]);
    kill("USR1", "three");
    expect(&["1", "2", "1"]);
}

#[test]
fn a_repeated_pause_has_the_result_of_the_first() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let pause = json!({ "project": "web", "idempotency_key": "p" });
    // Both at the same time: one joins the other.
    let (first, second) = std::thread::scope(|scope| {
        let other = scope.spawn(|| call(&sandbox, "project.pause", pause.clone()));
        let first = call(&sandbox, "project.pause", pause.clone()).expect("pause");
        (first, other.join().expect("no panic").expect("pause"))
    });
    assert_eq!(first, second);
    sandbox.ctl(&["resume", "web"]);
    let again = call(&sandbox, "project.pause", pause).expect("pause again");
    assert_eq!(first, again);
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running, "the repeated call must pause nothing");
}

#[test]
fn a_key_where_nothing_changes_or_of_the_wrong_kind_is_refused() {
    let sandbox = Sandbox::start();
    for (method, params) in [
        ("daemon.status", json!({ "idempotency_key": "k" })),
        ("project.create", json!({ "name": "x", "workspace": "/tmp", "idempotency_key": "" })),
        ("project.create", json!({ "name": "x", "workspace": "/tmp", "idempotency_key": 7 })),
        ("project.create", json!({ "name": "x", "workspace": "/tmp", "idempotency_key": "k".repeat(129) })),
    ] {
        assert_eq!(refused(call(&sandbox, method, params)), Code::InvalidParams, "{method}");
    }
}

#[test]
fn a_client_of_another_protocol_version_is_refused() {
    let sandbox = Sandbox::start();
    let mut client = Client::connect_silently(sandbox.socket()).expect("connect");
    for (min, max) in [(2, 9), (0, 0)] {
        let hello = json!({ "min": min, "max": max, "client": "test" });
        assert_eq!(refused(client.call_raw("hello", members(hello), |_| {})), Code::UnsupportedVersion);
    }
    let hello = json!({ "min": 0, "max": 9, "client": "test" });
    let reply = client.call_raw("hello", members(hello), |_| {}).expect("a common version");
    assert_eq!(reply["protocol"], fermata_protocol::PROTOCOL_VERSION);
    let wrong = json!({ "min": 1, "max": 1, "client": "test", "token": "nobody's" });
    assert_eq!(refused(client.call_raw("hello", members(wrong), |_| {})), Code::BadToken);
}

#[test]
fn the_description_that_is_served_is_the_one_in_the_repository() {
    let sandbox = Sandbox::start();
    let served = call(&sandbox, "rpc.discover", json!({})).expect("discover");
    let kept = include_str!("../../crates/protocol/openrpc.json");
    assert_eq!(served, serde_json::from_str::<Value>(kept).expect("valid JSON"));
}

// --- events ---

fn titles(events: &[Value]) -> Vec<String> {
    let title = |event: &Value| event["data"]["task"]["title"].as_str().map(str::to_owned);
    events.iter().filter_map(title).collect()
}

#[test]
fn events_are_replayed_from_a_cursor_without_gap_across_a_crash() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let mut subscriber = sandbox.rpc();
    let filter = json!({ "kinds": ["task.*"] });
    let begun =
        subscriber.call_raw("events.subscribe", members(json!({ "filter": filter })), |_| {}).expect("subscribe");
    let mut cursor = begun["cursor"].clone();
    let mut received = Vec::new();
    let mut sent = 0;
    let mut put = |sandbox: &Sandbox, count: usize| {
        for _ in 0..count {
            call(sandbox, "task.put", json!({ "target": "web", "title": sent.to_string() })).expect("put a task");
            sent += 1;
        }
        sent
    };
    for _ in 0..3 {
        let expected = put(&sandbox, 20);
        while received.len() < expected {
            let notification = subscriber.next_notification().expect("an event").params;
            cursor = notification["event"]["cursor"].clone();
            received.extend(titles(&[notification["event"].clone()]));
        }
        // No client subscribes to these.
        drop(subscriber);
        put(&sandbox, 20);
        sandbox.crash_and_restart();
        put(&sandbox, 20);
        subscriber = sandbox.rpc();
        subscriber
            .call_raw("events.subscribe", members(json!({ "filter": filter, "cursor": cursor })), |_| {})
            .expect("subscribe again");
        let expected = put(&sandbox, 1);
        while received.len() < expected {
            let notification = subscriber.next_notification().expect("an event").params;
            cursor = notification["event"]["cursor"].clone();
            received.extend(titles(&[notification["event"].clone()]));
        }
    }
    assert_eq!(received, (0..put(&sandbox, 0)).map(|n| n.to_string()).collect::<Vec<_>>());
}

#[test]
fn cursors_that_are_gone_or_not_ours_are_refused_with_a_way_out() {
    let mut sandbox = Sandbox::start();
    sandbox.ctl(&["project", "create", "web", "-w", web(&sandbox).text()]);
    for title in ["one", "two", "three"] {
        sandbox.ctl(&["task", "add", "web", title]);
    }
    let page = call(&sandbox, "events.list", json!({ "limit": 1 })).expect("list");
    let early = page["cursor"].clone();
    for foreign in ["", "1", "nonsense", "0000.1", "x.y", "-1"] {
        for method in ["events.list", "events.subscribe"] {
            assert_eq!(refused(call(&sandbox, method, json!({ "cursor": foreign }))), Code::InvalidParams, "{foreign}");
        }
    }
    assert!(sandbox.stop_daemon().success());
    let database = rusqlite::Connection::open(sandbox.state_dir().join("fermata.sqlite")).expect("open the database");
    database.execute("DELETE FROM events WHERE seq <= 3", []).expect("age the events");
    drop(database);
    sandbox.start_daemon();
    for method in ["events.list", "events.subscribe"] {
        let error = call(&sandbox, method, json!({ "cursor": early })).expect_err("the cursor is gone");
        let ClientError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.code, Code::CursorExpired);
        let oldest = refusal.details.expect("details")["oldest_cursor"].clone();
        let rest = call(&sandbox, "events.list", json!({ "cursor": oldest })).expect("the oldest cursor works");
        assert_eq!(titles(rest["events"].as_array().expect("events")), ["three"]);
    }
}

#[test]
fn a_cursor_beyond_the_last_event_does_not_swallow_the_next_ones() {
    let sandbox = Sandbox::start();
    sandbox.ctl(&["project", "create", "web", "-w", web(&sandbox).text()]);
    let cursor = call(&sandbox, "events.list", json!({})).expect("list")["cursor"].as_str().expect("text").to_owned();
    let (database, number) = cursor.rsplit_once('.').expect("a cursor");
    let beyond = format!("{database}.{}", number.parse::<i64>().expect("a number") + 100);
    let refusal = refused(call(&sandbox, "events.list", json!({ "cursor": beyond })));
    assert_eq!(refusal, Code::InvalidParams);
    assert_eq!(refused(call(&sandbox, "events.subscribe", json!({ "cursor": beyond }))), Code::InvalidParams);
}

#[test]
fn a_wait_ends_when_its_agent_is_removed_or_the_daemon_goes() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let pid = wait_for_pid(&sandbox, "pid");
    let mut peer = Raw::connect(&sandbox);
    peer.request(1, "agent.wait", json!({ "target": "web/a" }));
    peer.request(2, "daemon.status", json!({}));
    assert_eq!(peer.reply()["id"], 2);
    sandbox.signal_daemon(Signal::SIGTERM);
    let reply = peer.reply();
    assert!(["shutting_down", "request_cancelled"].contains(&code(&reply)), "{reply}");
    assert!(sandbox.stop_daemon().success());
    assert!(process::is_alive(pid), "the agent does not run on");
    sandbox.start_daemon();
    wait_for_status(&sandbox, "a", AgentStatus::Running);
    sandbox.ctl(&["kill", "web/a"]);
    wait_for_end(pid);
}
