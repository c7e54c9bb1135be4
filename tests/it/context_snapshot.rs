//! The context snapshot of a checkpoint: the context of agents at one instant, whatever is written meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use fermata_protocol::checkpoint::{CheckpointRestore, CheckpointView};
use fermata_protocol::context::{ContextList, ContextPut, ContextShow, ItemType, NewItem};
use fermata_protocol::pause::PauseMode;
use fermata_protocol::project::{ProjectConfig, ProjectSet};
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::bed::call;
use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

/// Reads the context snapshot of a checkpoint of `web`.
#[track_caller]
fn snapshot(view: &CheckpointView) -> Value {
    let bytes = std::fs::read(&view.context_snapshot).expect("read the context snapshot");
    serde_json::from_slice(&bytes).expect("it is JSON")
}

fn texts(snapshot: &Value, agent: &str) -> Vec<String> {
    let items = snapshot["agents"][agent]["items"].as_array().expect("a list of items");
    items.iter().map(|item| item["text"].as_str().expect("a text").to_owned()).collect()
}

fn item(text: String) -> ContextPut {
    let items = vec![NewItem { kind: ItemType::Code, text, pinned: false }];
    ContextPut { target: Some(worker()), items }
}

/// A token count at which no flash save becomes due.
fn without_limit(sandbox: &Sandbox) {
    let config = ProjectConfig { token_limit: 1_000_000_000, ..show(sandbox).config };
    done(sandbox, &ProjectSet { project: web(), description: None, phase: None, config: Some(config) });
}

#[track_caller]
fn newest(sandbox: &Sandbox) -> CheckpointView {
    show(sandbox).last_checkpoint.expect("there is one")
}

#[test]
fn what_is_put_while_a_pause_is_made_is_in_both_parts_or_in_neither() {
    let sandbox = Sandbox::builder().config("[pause]\ngrace_ms = 30\n").start();
    let ticker = Ticker::start(&sandbox);
    without_limit(&sandbox);
    let stop = AtomicBool::new(false);
    let mut client = sandbox.rpc();
    std::thread::scope(|scope| {
        let putting = scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                client.call(&item(format!("item {n}"))).expect("a user may always put one");
            }
        });
        for _ in 0..8 {
            pause(&sandbox, PauseMode::Freeze).expect("pause");
            let view = newest(&sandbox);
            let found = texts(&snapshot(&view), "worker");
            assert_eq!(found.len() as u64, view.metadata.context_items, "the rows and the snapshot are of one instant");
            let wanted: Vec<String> = (1..=found.len()).map(|n| format!("item {n}")).collect();
            assert_eq!(found, wanted, "oldest first, without a gap");
            resume(&sandbox).expect("resume");
        }
        stop.store(true, Ordering::Relaxed);
        putting.join().expect("it ended well");
    });
    ticker.runs(SOON);
    all_verify(&sandbox);
}

#[test]
fn a_pause_keeps_what_was_read_and_saved_last_and_says_which_it_is() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    without_limit(&sandbox);
    for n in 1..=3 {
        done(&sandbox, &item(format!("item {n}")));
    }
    // An access publishes no event, but is in the snapshot.
    let list = ContextList { target: Some(worker()), tier: None, archived: None, before: None, limit: None };
    let id = done(&sandbox, &list).items[0].id;
    done(&sandbox, &ContextShow { project: Some(web()), id });
    call(&sandbox, "state.put", json!({ "target": "web/worker", "state": { "step": 7 } })).expect("put the blob");
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    let read = snapshot(&newest(&sandbox));
    assert_eq!((&read["checkpoint"], &read["phase"]), (&json!(paused.checkpoint_id), &json!("discovery")));
    assert_eq!(read["agents"]["worker"]["state"], json!({ "step": 7 }));
    let counts: Vec<i64> = read["agents"]["worker"]["items"]
        .as_array()
        .expect("items")
        .iter()
        .filter_map(|item| item["access_count"].as_i64())
        .collect();
    assert_eq!(counts, [0, 0, 1]);
    resume(&sandbox).expect("resume");
    ticker.runs(SOON);
    all_verify(&sandbox);
}

#[test]
fn a_pause_whose_early_context_snapshot_fails_still_succeeds() {
    for failpoint in ["checkpoint.stage=error", "checkpoint.staged=error"] {
        let sandbox = Sandbox::builder().env(FAILPOINT, failpoint).start();
        let ticker = Ticker::start(&sandbox);
        fill_context(&sandbox);
        let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
        assert!(paused.items_archived > 0);
        let view = newest(&sandbox);
        let kept = texts(&snapshot(&view), "worker").len() as u64;
        assert_eq!((kept + paused.items_archived, view.metadata.context_items), (10, 10), "{failpoint}");
        all_verify(&sandbox);
        resume(&sandbox).expect("resume");
        ticker.runs(SOON);
        only_these_are_left(&sandbox, &[1]);
    }
}

#[test]
fn a_restore_of_one_project_takes_nothing_from_another() {
    let sandbox = Sandbox::start();
    for name in ["web", "other"] {
        Ticker::running(&sandbox, name, "worker", TICK);
        let put = json!({ "target": format!("{name}/worker"), "items": [{ "type": "CODE", "text": "one" }] });
        call(&sandbox, "context.put", put).expect("put");
    }
    checkpoint(&sandbox);
    for name in ["web", "other"] {
        let put = json!({ "target": format!("{name}/worker"), "items": [{ "type": "CODE", "text": "two" }] });
        call(&sandbox, "context.put", put).expect("put");
    }
    checkpoint(&sandbox);
    sandbox.ctl(&["kill", "web"]);
    wait_until(SOON, "the end", || show(&sandbox).project.agents_running == 0);
    let restore = CheckpointRestore { project: web(), checkpoint: 1, dry_run: false, paths: Vec::new() };
    done(&sandbox, &restore);
    let known = |name: &str| {
        let listed = call(&sandbox, "context.list", json!({ "target": format!("{name}/worker") })).expect("list");
        listed["items"].as_array().expect("items").len()
    };
    assert_eq!((known("web"), known("other")), (1, 2));
    assert_eq!(checkpoints(&sandbox), [1, 2, 3], "later checkpoints stay");
    done(&sandbox, &CheckpointRestore { project: web(), checkpoint: 2, dry_run: false, paths: Vec::new() });
    assert_eq!(known("web"), 2);
    all_verify(&sandbox);
}
