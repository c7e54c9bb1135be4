//! `logs`: complete, in order, and without loss when the daemon dies.

use std::io::Read as _;
use std::process::Stdio;

use fermata_protocol::Code;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::client::ClientError;
use fermata_tests::Sandbox;
use fermata_tests::sandbox::output_of;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::Value;

use crate::bed::{agent, call, failed, run_agent, run_dir, wait_for_file, wait_for_status, web};

fn numbers(to: usize) -> String {
    (1..=to).map(|n| format!("line {n}\n")).collect()
}

#[test]
fn lines_come_in_the_order_in_which_they_were_written() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done; echo to stderr >&2");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let output = sandbox.ctl_output(&["logs", "web/a"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), numbers(2000));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "to stderr\n");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "-n", "3"]), "line 1999\nline 2000\n");
    let rows = sandbox.ctl_rows(&["logs", "web/a"]);
    assert_eq!(rows.len(), 2001);
    assert!(rows.is_sorted_by_key(|row| row["at_ns"].as_i64()), "times go forward");
    assert!(sandbox.ctl(&["logs", "web/a", "-t", "-n", "2"]).contains("Z line 2000"));
}

#[test]
fn a_follower_misses_nothing_when_the_daemon_is_killed() {
    let mut sandbox = Sandbox::start();
    let script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; [ $((i % 10)) = 0 ] && sleep 0.005; done; \
                  while [ ! -e stop ]; do sleep 0.02; done; echo line 3001";
    run_agent(&sandbox, "a", script);
    let mut command = sandbox.ctl_command(&["logs", "-f", "web/a"]);
    let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("follow");
    let mut stdout = follower.stdout.take().expect("a pipe");
    // Once it prints something it is connected; before that a missing daemon is an error.
    let mut text = vec![0];
    stdout.read_exact(&mut text).expect("the first byte");
    let reader =
        std::thread::spawn(move || stdout.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned()));
    for _ in 0..3 {
        wait_until(SOON, "some output", || !sandbox.ctl(&["logs", "web/a", "-n", "1"]).is_empty());
        sandbox.crash_and_restart();
    }
    web(&sandbox).write("stop", "");
    assert!(follower.wait().expect("wait for the follower").success());
    assert_eq!(reader.join().expect("no panic").expect("read"), numbers(3001));
}

#[test]
fn output_that_is_no_text_breaks_nothing() {
    let sandbox = Sandbox::start();
    let script =
        "printf 'a\\000b\\377\\376\\n\\033[31mred\\n'; head -c 300000 /dev/urandom; printf '\\nno newline at the end'";
    run_agent(&sandbox, "a", script);
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let output = sandbox.ctl_output(&["logs", "web/a"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("a\0b"), "{:?}", &text[..20]);
    assert!(text.ends_with("no newline at the end") || text.ends_with("no newline at the end\n"));
    assert!(sandbox.ctl_rows(&["logs", "web/a"]).len() > 3);
}

#[test]
fn a_long_line_of_wide_characters_comes_back_whole() {
    let sandbox = Sandbox::start();
    web(&sandbox).write("wide", "aü€𝄐".repeat(60_000) + "\n");
    run_agent(&sandbox, "a", "cat wide");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let shown = sandbox.ctl(&["logs", "web/a"]);
    assert!(
        shown == web(&sandbox).read("wide"),
        "{} bytes, {} replaced",
        shown.len(),
        shown.matches('\u{fffd}').count()
    );
}

#[test]
fn output_of_ten_megabytes_is_complete_after_rotations() {
    let sandbox = Sandbox::builder().config("[agents]\nlog_max_bytes = 1048576\nlog_max_files = 0\n").start();
    run_agent(&sandbox, "a", "seq 1 1000000");
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let output = output_of(sandbox.ctl_command(&["logs", "web/a"]));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.lines().enumerate().all(|(at, line)| line.parse() == Ok(at + 1)), "out of order");
    assert_eq!(text.lines().count(), 1_000_000);
}

#[test]
fn the_output_of_a_restarted_agent_follows_the_earlier_one() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo run >> runs; echo run $(grep -c . runs); exec sleep 1000");
    wait_for_file(&sandbox, "runs");
    let first =
        call(&sandbox, "agent.logs", serde_json::json!({ "target": "web/a", "wait_ms": 10_000 })).expect("logs");
    assert_eq!(first["lines"][0]["text"], "run 1");
    sandbox.ctl(&["restart", "web/a"]);
    let next = serde_json::json!({ "target": "web/a", "cursor": first["cursor"], "wait_ms": 10_000 });
    let second = call(&sandbox, "agent.logs", next).expect("logs");
    assert_eq!(second["lines"][0]["text"], "run 2");
    assert_eq!(second["end"], Value::Bool(false));
}

#[test]
fn cursors_and_agents_that_do_not_exist_are_refused() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    failed(&sandbox.ctl_output(&["logs", "web/nobody"]), 3);
    failed(&sandbox.ctl_output(&["logs", "nothing/a"]), 3);
    for cursor in ["", "x", "../../../etc:1:2:3", "run-1:1:2:3:4"] {
        let logs = serde_json::json!({ "target": "web/a", "cursor": cursor });
        let error = call(&sandbox, "agent.logs", logs).expect_err(cursor);
        let ClientError::Refused(refusal) = error else { panic!("{cursor}: {error}") };
        assert_eq!(refusal.code, Code::InvalidParams, "{cursor}");
    }
}

/// Two writers, each on a stream of its own, with numbered lines; each writes `NAME end` last.
const TWO_WRITERS: &str = "w() { i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo \"$1 $i\"; done; echo \"$1 end\"; }; \
    w err >&2 & w out; wait; seq -f 'bulk %.0f' 1 300000; while [ ! -e stop ]; do sleep 0.02; done; echo all";

/// Asserts that the lines of each writer are complete, without duplicates and in order.
fn assert_complete(text: &str, names: &[(&str, usize)]) {
    for (name, count) in names {
        let numbers: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).collect();
        let numbers: Vec<usize> = numbers.iter().filter_map(|number| number.parse().ok()).collect();
        assert!(numbers.iter().copied().eq(1..=*count), "{name}: {} of {count} lines", numbers.len());
    }
}

#[test]
fn no_line_is_lost_under_load_with_tiny_files_while_the_daemon_is_killed() {
    let mut sandbox = Sandbox::builder().config("[agents]\nlog_max_bytes = 50000\nlog_max_files = 0\n").start();
    run_agent(&sandbox, "a", TWO_WRITERS);
    let mut command = sandbox.ctl_command(&["logs", "-f", "web/a"]);
    let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("follow");
    let mut stdout = follower.stdout.take().expect("a pipe");
    let mut stderr = follower.stderr.take().expect("a pipe");
    let mut text = vec![0];
    stdout.read_exact(&mut text).expect("the first byte");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let output =
        std::thread::spawn(move || stdout.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned()));
    for _ in 0..4 {
        wait_until(SOON, "some output", || !sandbox.ctl(&["logs", "web/a", "-n", "1"]).is_empty());
        sandbox.crash_and_restart();
    }
    web(&sandbox).write("stop", "");
    assert!(follower.wait().expect("wait for the follower").success());
    let followed = output.join().expect("no panic").expect("read");
    assert_complete(&followed, &[("out", 20_000), ("bulk", 300_000)]);
    assert!(followed.ends_with("\nall\n"));
    assert_complete(&errors.join().expect("no panic").expect("read"), &[("err", 20_000)]);
    let output = sandbox.ctl_output(&["logs", "web/a"]);
    assert!(String::from_utf8_lossy(&output.stdout) == followed, "read later it is the same");
    assert_complete(&String::from_utf8_lossy(&output.stderr), &[("err", 20_000)]);
}

#[test]
fn a_follower_that_never_reads_delays_nothing() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "while [ ! -e go ]; do sleep 0.01; done; seq 1 3000000; touch written; exec sleep 1000");
    let mut command = sandbox.ctl_command(&["logs", "-f", "web/a"]);
    let mut silent = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("follow");
    web(&sandbox).write("go", "");
    wait_until(SOON, "the agent to have written everything", || web(&sandbox).path().join("written").exists());
    assert_eq!(sandbox.ctl(&["logs", "web/a", "-n", "2"]), "2999999\n3000000\n");
    silent.kill().expect("end it");
    silent.wait().expect("wait for it");
}

#[test]
fn a_line_of_ten_megabytes_and_bytes_that_are_no_text_are_shown_by_a_daemon_that_stays_small() {
    let sandbox = Sandbox::start();
    let peak = || {
        let pid = sandbox.daemon_pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak").to_owned();
        line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number")
    };
    let script = "head -c 10000000 /dev/zero | tr '\\0' x; echo; head -c 2000000 /dev/zero; echo; \
                  head -c 2000000 /dev/zero | tr '\\0' '\\377'; printf 'a\\rb\\n'";
    run_agent(&sandbox, "a", script);
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let before = peak();
    let output = sandbox.ctl_output(&["logs", "web/a"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = [
        vec![b'x'; 10_000_000],
        b"\n".to_vec(),
        vec![0; 2_000_000],
        b"\n".to_vec(),
        "\u{fffd}".repeat(2_000_000).into_bytes(),
        b"a\rb\n".to_vec(),
    ];
    assert!(output.stdout == expected.concat(), "{} bytes", output.stdout.len());
    assert!(peak() < before + 32 * 1024, "the daemon grew from {before} to {} KiB", peak());
}

#[test]
fn what_came_before_is_left_out_by_number_or_by_time() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo one; echo two; while [ ! -e go ]; do sleep 0.01; done; echo three; exec sleep 1000");
    wait_until(SOON, "two lines", || sandbox.ctl(&["logs", "web/a"]) == "one\ntwo\n");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "-n", "0"]), "");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--since", "1h"]), "one\ntwo\n");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--since", "2099-01-01T00:00:00Z"]), "");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--since", "1h", "-n", "1"]), "two\n");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--since", "2099-01-01T00:00:00Z", "-n", "1"]), "");
    let first = call(&sandbox, "agent.logs", serde_json::json!({ "target": "web/a", "tail": 0 })).expect("logs");
    assert_eq!(first["lines"], serde_json::json!([]));
    let next = serde_json::json!({ "target": "web/a", "cursor": first["cursor"], "wait_ms": 10_000 });
    web(&sandbox).write("go", "");
    let next = call(&sandbox, "agent.logs", next).expect("logs");
    assert_eq!(next["lines"][0]["text"], "three");
}

#[test]
fn the_output_of_earlier_runs_is_kept_for_a_while() {
    let sandbox = Sandbox::builder().config("[agents]\nkeep_runs = 3\n").start();
    run_agent(&sandbox, "a", "echo run >> runs; echo run $(grep -c . runs)");
    let mut ids = Vec::new();
    for number in 1..=5 {
        wait_until(SOON, "the end of a run", || sandbox.ctl(&["logs", "web/a"]) == format!("run {number}\n"));
        wait_for_status(&sandbox, "a", AgentStatus::Exited);
        ids.push(agent(&sandbox, "a").run.expect("a run").to_string());
        if number < 5 {
            sandbox.ctl(&["restart", "web/a"]);
        }
    }
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--previous"]), "run 4\n");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "-f", "--previous"]), "run 4\n", "it does not go on with the next run");
    assert_eq!(sandbox.ctl(&["logs", "web/a", "--run", &ids[2]]), "run 3\n");
    let said = failed(&sandbox.ctl_output(&["logs", "web/a", "--run", &ids[1]]), 3);
    assert!(said.contains(&ids[1]) && said.contains(&ids[2]) && said.contains(&ids[4]), "{said}");
    let kept = std::fs::read_dir(run_dir(&sandbox, "a").parent().expect("runs")).expect("read").count();
    assert_eq!(kept, 3);
}
