//! The calls of agents: their context, reports, questions and state.

use fermata_protocol::Code;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::client::{Client, ClientError};
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::bed::{agent, call, ctl_word, failed, members, refused, run_agent, wait_for_file, wait_for_status, web};

/// Starts an agent that only writes its token to a file, and returns a connection that authenticates as the agent.
fn token_agent(sandbox: &Sandbox, name: &str) -> Client {
    run_agent(sandbox, name, &format!("echo $FERMATA_TOKEN > token.{name}; exec sleep 1000"));
    let token = wait_for_file(sandbox, &format!("token.{name}"));
    Client::connect(sandbox.socket(), "test", Some(token)).expect("greet").0
}

fn say(client: &mut Client, method: &str, params: Value) -> Result<Value, ClientError> {
    client.call_raw(method, members(params), |_| {})
}

#[test]
fn progress_usage_and_tasks_are_shown_and_survive_a_crash() {
    let mut sandbox = Sandbox::start();
    let ctl = ctl_word();
    let script = format!(
        "{ctl} agent progress 25 -m 'a quarter' --units 3 --phase review && \
         {ctl} agent usage --input 100 --output 20 --cost 7 && {ctl} agent usage --input 11 --output 2 --cost 1 && \
         {ctl} -q agent task 'write tests' > task && {ctl} agent task --id $(cat task | tr -dc 0-9) -s in_progress --percent 50; \
         echo $? > code; exec sleep 1000"
    );
    run_agent(&sandbox, "a", &script);
    assert_eq!(wait_for_file(&sandbox, "code"), "0", "{}", sandbox.ctl(&["logs", "web/a"]));
    for _ in 0..2 {
        let shown = agent(&sandbox, "a");
        let progress = shown.progress.expect("reported");
        assert_eq!(
            (progress.percent, progress.message.as_deref(), progress.units_done),
            (Some(25.0), Some("a quarter"), Some(3))
        );
        assert_eq!(
            (shown.usage.input_tokens, shown.usage.output_tokens, shown.usage.cost_micro_usd),
            (111, 22, 8_000_000)
        );
        let tasks = sandbox.ctl_rows(&["task", "ls", "web"]);
        assert_eq!(tasks.len(), 1);
        assert_eq!(
            (&tasks[0]["status"], &tasks[0]["percent"], &tasks[0]["agent"]),
            (&json!("in_progress"), &json!(50.0), &json!("a"))
        );
        assert_eq!(sandbox.ctl_json(&["status", "web"])["project"]["phase"], "review");
        sandbox.crash_and_restart();
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let sandbox = Sandbox::start();
    let mut a = token_agent(&sandbox, "a");
    for (method, params, code) in [
        ("agent.progress", json!({ "percent": 101 }), Code::InvalidParams),
        ("agent.progress", json!({ "percent": -1 }), Code::InvalidParams),
        ("agent.progress", json!({ "message": "  " }), Code::InvalidParams),
        ("agent.progress", json!({ "message": "x".repeat(17 << 10) }), Code::TooLarge),
        ("task.put", json!({}), Code::InvalidParams),
        ("task.put", json!({ "id": 99, "title": "x" }), Code::TaskNotFound),
        ("task.put", json!({ "title": "" }), Code::InvalidParams),
        ("question.ask", json!({ "text": "" }), Code::InvalidParams),
        ("question.wait", json!({ "id": 99 }), Code::QuestionNotFound),
        ("context.put", json!({ "items": [] }), Code::InvalidParams),
        ("context.put", json!({ "items": [{ "type": "TASK", "text": "x".repeat(257 << 10) }] }), Code::TooLarge),
        ("context.put", json!({ "items": [{ "type": "NONSENSE", "text": "x" }] }), Code::InvalidParams),
        ("context.show", json!({ "id": 99 }), Code::ContextItemNotFound),
        ("state.put", json!({ "state": "x".repeat(256 << 10) }), Code::TooLarge),
    ] {
        assert_eq!(refused(say(&mut a, method, params)), code, "{method}");
    }
    let most = say(&mut a, "agent.usage", json!({ "input_tokens": u64::MAX }));
    let again = say(&mut a, "agent.usage", json!({ "input_tokens": u64::MAX }));
    assert!(most.is_ok() && again.is_ok(), "a sum that is full stays full: {most:?} {again:?}");
    sandbox.ctl(&["ps"]);
}

#[test]
fn the_state_blob_is_kept_whole_up_to_its_limit() {
    let mut sandbox = Sandbox::start();
    let mut a = token_agent(&sandbox, "a");
    assert_eq!(say(&mut a, "state.get", json!({})).expect("get")["state"], Value::Null);
    // Exactly the limit, including the two quotes.
    let largest = json!("s".repeat((256 << 10) - 2));
    say(&mut a, "state.put", json!({ "state": largest })).expect("put");
    sandbox.crash_and_restart();
    let kept = call(&sandbox, "state.get", json!({ "target": "web/a" })).expect("get");
    assert_eq!(kept["state"], largest);
    assert!(kept["saved_at"].is_i64());
    for state in [json!(null), json!({ "step": 3, "deep": [1, { "ü": "\u{0}" }] })] {
        call(&sandbox, "state.put", json!({ "target": "web/a", "state": state })).expect("put");
        assert_eq!(call(&sandbox, "state.get", json!({ "target": "web/a" })).expect("get")["state"], state);
    }
}

#[test]
fn tiers_archive_search_and_recall_are_exact() {
    let sandbox = Sandbox::start();
    let mut a = token_agent(&sandbox, "a");
    let put = |a: &mut Client, kind: &str, text: &str, pinned: bool| {
        let items = json!({ "items": [{ "type": kind, "text": text, "pinned": pinned }] });
        say(a, "context.put", items).expect("put")["ids"][0].as_i64().expect("an id")
    };
    let task = put(&mut a, "TASK", "finish the walrus module", false);
    let code = put(&mut a, "CODE", "fn walrus() {}", false);
    let other = put(&mut a, "OTHER", "the sea is cold", true);
    let items = sandbox.ctl_rows(&["context", "ls", "web/a"]);
    let tier = |id: i64| {
        items
            .iter()
            .find(|item| item["id"] == id)
            .map(|item| (item["tier"].clone(), item["score"].as_f64().unwrap_or(-1.0)))
    };
    let about = |id: i64, expected: &str, score: f64| {
        let (tier, found) = tier(id).expect("listed");
        assert_eq!(tier, expected);
        assert!((found - score).abs() < 1e-6, "{id}: {found}, not {score}");
    };
    // 0.4 * weight + 0.4 for a new item that was never read.
    about(task, "hot", 0.8);
    about(code, "warm", 0.72);
    about(other, "hot", 0.6);
    let saved = say(&mut a, "context.flash_save", json!({})).expect("flash save");
    assert_eq!(
        (&saved["items_archived"], &saved["hot_items_retained"], &saved["warm_items_retained"]),
        (&json!(0), &json!(2), &json!(1))
    );
    assert_eq!(saved["tokens_before"], saved["tokens_after"]);
    let found = say(&mut a, "context.search", json!({ "query": "walrus" })).expect("search");
    assert_eq!(found["items"].as_array().map(Vec::len), Some(2));
    // Operators of the full-text engine are taken as words.
    for query in ["\"", "walrus OR", "*", "NEAR(", "a:b", "-", "'", "(", "walrus\u{0}"] {
        let found = say(&mut a, "context.search", json!({ "query": query }));
        assert!(matches!(found, Ok(_) | Err(ClientError::Refused(_))), "{query}: {found:?}");
        if let Err(ClientError::Refused(refusal)) = found {
            assert_ne!(refusal.code, Code::InternalError, "{query}: {refusal}");
        }
    }
    say(&mut a, "context.pin", json!({ "id": other, "pinned": false })).expect("unpin");
    say(&mut a, "context.show", json!({ "id": code })).expect("show");
    let item = say(&mut a, "context.show", json!({ "id": code })).expect("show");
    assert_eq!((&item["text"], &item["access_count"]), (&json!("fn walrus() {}"), &json!(1)));
}

#[test]
fn a_flash_save_that_is_due_by_tokens_archives_the_lowest_down_to_half() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    sandbox.ctl(&[
        "project",
        "create",
        "web",
        "-w",
        workspace.text(),
        "--token-limit",
        "1000",
        "--flash-save-at",
        "80",
    ]);
    let mut a = token_agent(&sandbox, "a");
    let words = |word: &str| format!("{word} ").repeat(100);
    let mut last = json!({});
    let mut texts = Vec::new();
    while last["items_archived"].as_u64().unwrap_or(0) == 0 {
        assert!(texts.len() < 50, "no flash save became due: {last}");
        let text = words(&format!("w{}", texts.len()));
        last = say(&mut a, "context.put", json!({ "items": [{ "type": "OTHER", "text": text }] })).expect("put");
        texts.push((last["ids"][0].as_i64().expect("an id"), last["tokens"].as_u64().expect("tokens")));
    }
    let all: u64 = texts.iter().map(|(_, tokens)| tokens).sum();
    assert!(all >= 800 && all - texts[texts.len() - 1].1 < 800, "due at 80 %, not at {all}");
    // Of equal items the oldest are archived first, one by one until half of the limit is reached.
    let (mut left, mut archived) = (all, 0);
    while left > 500 {
        left -= texts[archived].1;
        archived += 1;
    }
    assert_eq!((&last["items_archived"], &last["total_tokens"]), (&json!(archived), &json!(left)));
    let shown = sandbox.ctl_rows(&["context", "ls", "web", "--archived=true"]);
    assert_eq!(shown.len(), archived);
    let first = texts[0].0;
    let found = sandbox.ctl_rows(&["context", "search", "-t", "web", "w0"]);
    assert_eq!((found[0]["id"].as_i64(), &found[0]["archived"]), (Some(first), &json!(true)), "archived and found");
    sandbox.ctl(&["context", "recall", &format!("web/{first}")]);
    assert_eq!(sandbox.ctl_rows(&["context", "ls", "web", "--archived=true"]).len(), archived - 1);
    let whole = call(&sandbox, "context.show", json!({ "project": "web", "id": first })).expect("show");
    assert_eq!(whole["text"].as_str().map(str::to_owned), Some(words("w0")), "the text came back whole");
}

#[test]
fn a_question_and_its_answer_survive_crashes_of_the_daemon() {
    let mut sandbox = Sandbox::start();
    let ctl = ctl_word();
    let script =
        format!("{ctl} agent ask 'Which way?' -c left -c right --wait > answer; echo $? > code; exec sleep 1000");
    run_agent(&sandbox, "a", &script);
    wait_for_status(&sandbox, "a", AgentStatus::WaitingForInput);
    sandbox.crash_and_restart();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::WaitingForInput);
    let inbox = sandbox.ctl_rows(&["inbox"]);
    assert_eq!(
        (inbox.len(), &inbox[0]["text"], &inbox[0]["choices"]),
        (1, &json!("Which way?"), &json!(["left", "right"]))
    );
    let said = failed(&sandbox.ctl_output(&["answer", "web/1", "up"]), 1);
    assert!(said.contains("left, right"), "{said}");
    sandbox.ctl(&["answer", "web/1", "left"]);
    assert_eq!(wait_for_file(&sandbox, "code"), "0");
    assert_eq!(web(&sandbox).read("answer"), "left\n");
    wait_for_status(&sandbox, "a", AgentStatus::Running);
    let said = failed(&sandbox.ctl_output(&["answer", "web/1", "right"]), 1);
    assert!(said.contains("already"), "{said}");
    failed(&sandbox.ctl_output(&["answer", "web/7", "left"]), 3);
    sandbox.crash_and_restart();
    assert!(sandbox.ctl_rows(&["inbox"]).is_empty());
    assert_eq!(sandbox.ctl_rows(&["inbox", "--all"])[0]["answer"], "left");
}

#[test]
fn an_agent_with_two_questions_waits_until_both_are_answered() {
    let sandbox = Sandbox::start();
    let mut a = token_agent(&sandbox, "a");
    for text in ["first?", "second?"] {
        say(&mut a, "question.ask", json!({ "text": text })).expect("ask");
    }
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::WaitingForInput);
    sandbox.ctl(&["answer", "web/2", "yes"]);
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::WaitingForInput);
    // The question still waits after a pause and a resume.
    sandbox.ctl(&["pause", "web"]);
    sandbox.ctl(&["resume", "web"]);
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::WaitingForInput);
    sandbox.ctl(&["answer", "web/1", "yes"]);
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn an_agent_touches_nothing_of_another_agents() {
    let sandbox = Sandbox::start();
    let mut a = token_agent(&sandbox, "a");
    let mut b = token_agent(&sandbox, "b");
    let item = say(&mut a, "context.put", json!({ "items": [{ "type": "TASK", "text": "secret walrus" }] }))
        .expect("put")["ids"][0]
        .clone();
    let task = say(&mut a, "task.put", json!({ "title": "mine" })).expect("task")["id"].clone();
    let question = say(&mut a, "question.ask", json!({ "text": "mine?" })).expect("ask")["id"].clone();
    say(&mut a, "state.put", json!({ "state": 1 })).expect("state");
    for (method, params) in [
        ("context.show", json!({ "id": item })),
        ("context.pin", json!({ "id": item, "pinned": true })),
        ("context.recall", json!({ "ids": [item] })),
        ("context.list", json!({ "target": "web/a" })),
        ("context.list", json!({ "target": "web" })),
        ("context.search", json!({ "target": "web", "query": "walrus" })),
        ("context.flash_save", json!({ "target": "web" })),
        ("task.put", json!({ "id": task, "status": "cancelled" })),
        ("question.wait", json!({ "id": question, "timeout_ms": 1 })),
        ("question.answer", json!({ "project": "web", "id": question, "answer": "no" })),
        ("question.list", json!({})),
        ("state.get", json!({ "target": "web/a" })),
        ("state.put", json!({ "target": "web/a", "state": 2 })),
        ("agent.usage", json!({ "target": "web/a", "input_tokens": 1 })),
        ("agent.logs", json!({ "target": "web/a" })),
        ("agent.stop", json!({ "target": "web/b" })),
        ("checkpoint.restore", json!({ "project": "web", "checkpoint": 1 })),
        ("project.resume", json!({ "project": "web" })),
        ("events.subscribe", json!({})),
    ] {
        let code = refused(say(&mut b, method, params));
        assert!(
            matches!(code, Code::PermissionDenied | Code::ContextItemNotFound | Code::QuestionNotFound),
            "{method}: {code}"
        );
    }
    assert!(
        say(&mut b, "context.search", json!({ "query": "walrus" })).expect("its own")["items"]
            .as_array()
            .is_some_and(Vec::is_empty)
    );
    // A task without an owner may be taken by any agent of the project.
    let shared = call(&sandbox, "task.put", json!({ "target": "web", "title": "shared" })).expect("task")["id"].clone();
    say(&mut b, "task.put", json!({ "id": shared, "status": "in_progress" })).expect("taken up");
}

#[test]
fn an_agent_that_listens_is_asked_before_the_pause_and_may_take_its_time() {
    let sandbox = Sandbox::builder().config("[pause]\nchannel_grace_ms = 20000\n").start();
    let mut a = token_agent(&sandbox, "a");
    say(&mut a, "agent.listen", json!({})).expect("listen");
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| sandbox.ctl_json(&["pause", "web", "--reason", "lunch"]));
        let asked = a.next_notification().expect("a pause request");
        assert_eq!(asked.method, "pause_requested");
        assert_eq!(asked.params["reason"], "lunch", "{}", asked.params);
        assert_eq!(sandbox.ctl_json(&["status", "web"])["project"]["status"], "pausing");
        say(&mut a, "state.put", json!({ "state": "at a good place" })).expect("saves its state first");
        say(&mut a, "agent.ack", json!({})).expect("acknowledge");
        let paused = pause.join().expect("no panic");
        assert_eq!(paused["success"], true, "{paused}");
    });
    wait_until(SOON, "the agent to be paused", || agent(&sandbox, "a").status == AgentStatus::Paused);
}
