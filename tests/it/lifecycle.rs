//! What the daemon does with agents by itself: restarts by policy, dependencies, readiness, timeouts, staleness.

use std::time::{Duration, Instant};

use fermata_protocol::agent::{AgentStatus, AgentView};
use fermata_protocol::{Code, Target};
use fermata_tests::waiting::{SOON, wait_for, wait_until};
use fermata_tests::{Sandbox, process};
use serde_json::{Value, json};

use crate::bed::{
    agent, call, ctl_word, failed, refused, run_agent, wait_for_end, wait_for_file, wait_for_status, web,
};

/// Starts a shell script as `web/NAME` with these options.
#[track_caller]
fn run(sandbox: &Sandbox, name: &str, supervision: Value, script: &str) -> Value {
    let workspace = web(sandbox);
    let env = json!({ "PATH": std::env::var("PATH").expect("a path") });
    let params = json!({
        "project": "web", "workspace": workspace.text(), "name": name, "argv": ["/bin/sh", "-c", script],
        "env": env, "stop_grace_ms": 500, "supervision": supervision,
    });
    call(sandbox, "agent.run", params).expect("start the agent")
}

fn kinds(sandbox: &Sandbox) -> Vec<String> {
    let events = call(sandbox, "events.list", json!({ "limit": 500 })).expect("events");
    let events = events["events"].as_array().expect("a list").clone();
    events.iter().map(|event| event["kind"].as_str().expect("a kind").to_owned()).collect()
}

const HOUR_MS: i64 = 3_600_000;

fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_millis()).expect("in range")
}

fn quick(policy: &str) -> Value {
    json!({ "restart": { "policy": policy, "delay_ms": 20, "max_delay_ms": 100, "limit": 5, "within_ms": 600_000 } })
}

#[test]
fn an_agent_that_fails_is_started_again_and_goes_on() {
    let sandbox = Sandbox::start();
    let script = "echo ${FERMATA_RESUME:-0} >> runs; [ $(wc -l < runs) -ge 3 ]";
    run(&sandbox, "a", quick("on_failure"), script);
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let ended = agent(&sandbox, "a");
    assert_eq!((ended.runs, ended.starts_in_row), (3, 2));
    assert_eq!(web(&sandbox).read("runs"), "0\n1\n1\n");
    assert_eq!(kinds(&sandbox).iter().filter(|kind| *kind == "agent.backoff").count(), 2);
}

#[test]
fn an_agent_that_ends_well_begins_anew_under_always_and_a_stop_ends_that() {
    let sandbox = Sandbox::start();
    run(&sandbox, "a", quick("always"), "echo ${FERMATA_RESUME:-0} >> runs; exit 0");
    wait_until(SOON, "some runs", || web(&sandbox).read("runs").lines().count() >= 3);
    sandbox.ctl(&["stop", "web/a"]);
    let stopped = agent(&sandbox, "a");
    assert_eq!(stopped.status, AgentStatus::Exited);
    assert!(!web(&sandbox).read("runs").contains('1'));
    assert_eq!(agent(&sandbox, "a").runs, stopped.runs);
}

#[test]
fn too_many_starts_are_given_up_and_the_reason_is_shown() {
    let sandbox = Sandbox::start();
    let restart = json!({ "policy": "always", "delay_ms": 5, "max_delay_ms": 5, "limit": 3, "within_ms": 600_000 });
    run(&sandbox, "a", json!({ "restart": restart }), "exit 7");
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    let given_up = agent(&sandbox, "a");
    assert_eq!(given_up.runs, 4);
    let detail = given_up.detail.expect("a reason");
    assert!(detail.contains("exit code 7") && detail.contains("3 times"), "{detail}");
    assert_eq!(given_up.exit.map(|exit| exit.shell_code()), Some(7));
}

#[test]
fn a_backoff_outlives_the_daemon_and_is_shown_with_its_time() {
    let mut sandbox = Sandbox::start();
    let restart =
        |delay_ms| json!({ "restart": { "policy": "on_failure", "delay_ms": delay_ms, "max_delay_ms": HOUR_MS } });
    run(&sandbox, "a", restart(HOUR_MS), "exit 1");
    run(&sandbox, "b", restart(1_500), "echo x >> runs; [ $(wc -l < runs) -ge 2 ]");
    wait_for_status(&sandbox, "a", AgentStatus::Backoff);
    let waiting = agent(&sandbox, "a");
    assert!(waiting.next_start_at.is_some() && waiting.pid.is_none(), "{waiting:?}");
    assert!(sandbox.ctl(&["ps"]).contains("backoff (starts "));
    // An agent in backoff has not ended for `wait`.
    assert_eq!(sandbox.ctl_output(&["wait", "web/a", "--timeout", "10ms"]).status.code(), Some(6));
    sandbox.crash_and_restart();
    let next_start = |agent: AgentView| (agent.status, agent.next_start_at);
    assert_eq!(next_start(agent(&sandbox, "a")), next_start(waiting));
    wait_for_status(&sandbox, "b", AgentStatus::Exited);
    assert_eq!(web(&sandbox).read("runs"), "x\nx\n");
}

#[test]
fn a_missing_program_is_reported_and_not_tried_again() {
    let sandbox = Sandbox::start();
    let params = json!({
        "project": "web", "workspace": web(&sandbox).text(), "name": "a", "argv": ["/no/such/program"],
        "supervision": quick("always"),
    });
    assert_eq!(refused(call(&sandbox, "agent.run", params)), Code::LaunchFailed);
    assert_eq!((agent(&sandbox, "a").status, agent(&sandbox, "a").runs), (AgentStatus::Failed, 1));
}

#[test]
fn a_dependent_starts_when_the_output_of_the_other_says_that_it_is_ready() {
    let mut sandbox = Sandbox::start();
    let ready = json!({ "ready": { "when": { "output": "listening on" } } });
    run(&sandbox, "db", ready, "until [ -e go ]; do sleep 0.02; done; echo now listening on 5432; exec sleep 1000");
    let waits = run(&sandbox, "app", json!({ "depends_on": [{ "agent": "db" }] }), "echo x > ran; exec sleep 1000");
    assert_eq!((&waits["status"], &waits["waits_for"]), (&json!("starting"), &json!(["db"])));
    assert!(sandbox.ctl(&["ps"]).contains("waiting for db"));
    assert!(!agent(&sandbox, "db").ready);
    sandbox.crash_and_restart();
    assert!(!web(&sandbox).has("ran"), "it waits on under the next daemon");
    web(&sandbox).write("go", "");
    wait_for_status(&sandbox, "app", AgentStatus::Running);
    assert!(agent(&sandbox, "db").ready);
    wait_for_file(&sandbox, "ran");
}

#[test]
fn readiness_is_checked_by_a_command_or_reported_by_the_agent() {
    let sandbox = Sandbox::start();
    let by_command = json!({ "ready": { "when": { "command": ["/bin/test", "-e", "up"] } } });
    run(&sandbox, "a", by_command, "exec sleep 1000");
    let script = format!("until [ -e go ]; do sleep 0.02; done; {} agent ready; exec sleep 1000", ctl_word());
    run(&sandbox, "b", json!({ "ready": { "when": "reported" } }), &script);
    let both = json!({ "depends_on": [{ "agent": "a" }, { "agent": "b", "until": "ready" }] });
    run(&sandbox, "c", both, "exec sleep 1000");
    web(&sandbox).write("up", "");
    wait_until(SOON, "a to be ready", || agent(&sandbox, "a").ready);
    assert_eq!(agent(&sandbox, "c").waits_for.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["b"]);
    web(&sandbox).write("go", "");
    wait_for_status(&sandbox, "c", AgentStatus::Running);
}

#[test]
fn a_dependent_on_completion_waits_for_exit_code_0() {
    let sandbox = Sandbox::start();
    run(&sandbox, "setup", json!({}), "until [ -e go ]; do sleep 0.02; done; echo done > set-up");
    let after = json!({ "depends_on": [{ "agent": "setup", "until": "completed" }] });
    run(&sandbox, "app", after, "cat set-up > seen; exec sleep 1000");
    assert_eq!(agent(&sandbox, "app").status, AgentStatus::Starting);
    web(&sandbox).write("go", "");
    assert_eq!(wait_for_file(&sandbox, "seen"), "done");
}

#[test]
fn dependencies_that_cannot_work_are_refused_by_name() {
    let sandbox = Sandbox::start();
    let params = |name: &str, on: &str| {
        json!({
            "project": "web", "workspace": web(&sandbox).text(), "name": name, "argv": ["/bin/sleep", "1000"],
            "supervision": { "depends_on": [{ "agent": on }] },
        })
    };
    for (name, on) in [("a", "nobody"), ("a", "a")] {
        assert_eq!(refused(call(&sandbox, "agent.run", params(name, on))), Code::InvalidParams);
    }
    assert!(sandbox.agents().is_empty(), "nothing was left behind");
}

#[test]
fn an_agent_that_is_not_ready_in_time_is_stopped_and_counts_as_failed() {
    let sandbox = Sandbox::start();
    let ready = json!({ "ready": { "when": "reported", "timeout_ms": 200 } });
    run(&sandbox, "a", ready, "echo $$ > pid; exec sleep 1000");
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    assert!(agent(&sandbox, "a").detail.is_some_and(|detail| detail.contains("not ready")));
    wait_for_end(wait_for_file(&sandbox, "pid").parse().expect("a pid"));
}

#[test]
fn when_time_is_up_a_checkpoint_is_taken_and_the_agent_can_be_brought_back() {
    let sandbox = Sandbox::start();
    let script = "echo ${FERMATA_RESUME:-0} ${FERMATA_CHECKPOINT:-none} >> runs; exec sleep 1000";
    run(&sandbox, "a", json!({ "timeout_ms": 300 }), script);
    wait_for_status(&sandbox, "a", AgentStatus::TimedOut);
    let checkpoints = sandbox.ctl_rows(&["checkpoint", "ls", "web"]);
    assert_eq!(checkpoints.len(), 1, "{checkpoints:?}");
    assert_eq!(checkpoints[0]["trigger"], "timeout");
    let events = kinds(&sandbox);
    let place = |kind: &str| events.iter().position(|found| found == kind).unwrap_or_else(|| panic!("no {kind}"));
    assert!(place("agent.time_up") < place("checkpoint.created"));
    assert!(place("checkpoint.created") < place("agent.exited"));
    failed(&sandbox.ctl_output(&["resume", "web"]), 1);
    sandbox.ctl(&["resume", "web/a"]);
    wait_until(SOON, "the second run", || web(&sandbox).read("runs").lines().count() == 2);
    assert_eq!(web(&sandbox).read("runs"), "0 none\n1 1\n");
    assert_eq!(agent(&sandbox, "a").runs, 2);
}

#[test]
fn paused_time_does_not_count_towards_a_timeout() {
    let sandbox = Sandbox::start();
    run(&sandbox, "a", json!({ "timeout_ms": HOUR_MS }), "exec sleep 1000");
    sandbox.ctl(&["pause", "web"]);
    let left = agent(&sandbox, "a").time_left_ms.expect("it has a timeout");
    // Only time ends this wait.
    let pause = Duration::from_secs(1);
    std::thread::sleep(pause);
    assert_eq!(agent(&sandbox, "a").time_left_ms, Some(left));
    let continued = Instant::now();
    sandbox.ctl(&["resume", "web"]);
    let resumed = agent(&sandbox, "a");
    assert_eq!(resumed.status, AgentStatus::Running);
    let counted = Duration::from_millis((left - resumed.time_left_ms.expect("it has a timeout")).unsigned_abs());
    assert!(counted < continued.elapsed() + pause / 2, "{counted:?} were counted");
}

#[test]
fn only_an_agent_that_has_reported_becomes_stale_and_a_heartbeat_ends_it() {
    let sandbox = Sandbox::start();
    let stale = || json!({ "stale_after_ms": 300 });
    let told_stale = || kinds(&sandbox).iter().filter(|kind| *kind == "agent.stale").count();
    run(&sandbox, "silent", stale(), "exec sleep 1000");
    run(&sandbox, "talker", stale(), "exec sleep 1000");
    sandbox.ctl(&["agent", "progress", "40", "-m", "building", "--target", "web/talker"]);
    wait_until(SOON, "the talker to be stale", || agent(&sandbox, "talker").stale_at.is_some());
    assert!(sandbox.ctl(&["ps"]).contains("(stale)"));
    assert_eq!(told_stale(), 1);
    sandbox.ctl(&["agent", "heartbeat", "--target", "web/talker"]);
    // Only an agent that reported again can become stale again.
    wait_until(SOON, "the talker to be stale again", || told_stale() == 2);
    assert_eq!(agent(&sandbox, "silent").stale_at, None, "it never reported");
    let alive = agent(&sandbox, "talker");
    assert_eq!(alive.progress.and_then(|progress| progress.message).as_deref(), Some("building"));
    assert!(alive.remaining_ms.is_some());
}

#[test]
fn a_stale_agent_is_started_again_after_a_checkpoint_where_that_is_wanted() {
    let sandbox = Sandbox::start();
    let script = format!("echo ${{FERMATA_RESUME:-0}} >> runs; {} agent progress 1; exec sleep 1000", ctl_word());
    run(&sandbox, "a", json!({ "stale_after_ms": 500, "on_stale": "restart" }), &script);
    wait_until(SOON, "the second run", || web(&sandbox).read("runs").lines().count() >= 2);
    assert!(web(&sandbox).read("runs").starts_with("0\n1\n"));
    assert_eq!(sandbox.ctl_rows(&["checkpoint", "ls", "web"])[0]["trigger"], "auto");
    sandbox.ctl(&["stop", "web/a"]);
}

#[test]
fn an_agent_whose_shim_is_killed_is_brought_back_by_policy() {
    let sandbox = Sandbox::start();
    run(&sandbox, "a", json!({ "recover": "always" }), "echo ${FERMATA_RESUME:-0} >> runs; exec sleep 1000");
    let pid = wait_for(SOON, "a process", || agent(&sandbox, "a").pid);
    let shim = process::parent(pid).expect("the shim");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
    wait_until(SOON, "the second run", || web(&sandbox).read("runs") == "0\n1\n");
    wait_for_end(pid);
    assert!(kinds(&sandbox).contains(&"agent.interrupted".to_owned()));
}

#[test]
fn nothing_starts_in_a_paused_project() {
    let sandbox = Sandbox::start();
    run(&sandbox, "other", json!({}), "exec sleep 1000");
    let restart = json!({ "policy": "always", "delay_ms": 300, "max_delay_ms": 300 });
    run(&sandbox, "a", json!({ "restart": restart }), "echo x >> runs; exit 1");
    // The start may come before the pause; then the pause falls into the next backoff.
    wait_until(SOON, "a pause in a backoff", || {
        sandbox.ctl(&["pause", "web"]);
        let waits = agent(&sandbox, "a").next_start_at.is_some();
        if !waits {
            sandbox.ctl(&["resume", "web"]);
        }
        waits
    });
    let runs = web(&sandbox).read("runs");
    let due = agent(&sandbox, "a").next_start_at.expect("a start is to come");
    wait_until(SOON, "its time to come", || now_ms() > due.0);
    assert_eq!(web(&sandbox).read("runs"), runs);
    sandbox.ctl(&["resume", "web"]);
    wait_until(SOON, "another run", || web(&sandbox).read("runs").len() > runs.len());
    sandbox.ctl(&["stop", "web"]);
}

#[test]
fn bringing_back_a_running_agent_is_refused() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let target: Target = "web/a".parse().expect("valid");
    assert_eq!(refused(call(&sandbox, "agent.resume", json!({ "target": target }))), Code::AgentRunning);
}
