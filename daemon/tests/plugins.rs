//! Real plugins: the host program, the plugin `exec`, and plugins in C that misbehave.
//!
//! The C plugins are compiled with `cc` from `plugins/misbehave.c`. A shared object cannot be a dev-dependency, so
//! `libfermata_exec.so` is built here with `cargo build -p fermata-plugin-exec` unless it is beside the host program
//! already.

mod plugin_bench;

use fermata_daemon::plugins::{
    CrashPolicy, HostState, PluginError, PluginFailure, PluginKind, PluginStatus, SaveRequest,
};
use plugin_bench::{Bench, PATIENCE, alive, code, event, exec_plugin};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

#[tokio::test]
async fn a_good_plugin_runs_saves_and_receives_events() {
    let bench = Bench::new();
    bench.c_plugin("good", "GOOD", &[]);
    let plugins = bench.start().await;
    let status = bench.running(&plugins, "good").await;
    assert_eq!(status.version.as_deref(), Some("1"));
    assert_eq!(status.kinds, [PluginKind::Checkpoint, PluginKind::Notify]);
    assert!(status.pid.is_some());

    let saved = plugins.checkpoint_save(&bench.save_request()).await;
    let artifact = saved[0].as_ref().unwrap();
    assert_eq!(artifact.path.to_str(), Some("good/state.bin"));
    assert_eq!(artifact.bytes, 5);
    let written = fs::read(bench.save_request().directory.join(&artifact.path)).unwrap();
    assert_eq!(written, b"state");

    plugins.notify(&event("project.paused"));
    bench.until(&plugins, "good", |s| s.calls == 2).await;
    bench.until(&plugins, "good", |s| s.recent_output.iter().any(|line| line.contains("project.paused"))).await;
    plugins.shutdown().await;
    assert!(!alive(status.pid.unwrap()));
}

#[tokio::test]
async fn one_bad_plugin_does_not_cost_the_others_their_artifacts() {
    let bench = Bench::new();
    bench.c_plugin("good", "GOOD", &[]);
    bench.c_plugin("crash", "CRASH", &[]);
    bench.c_plugin("escape", "ESCAPE", &[]);
    let plugins = bench.start().await;
    for name in ["good", "crash", "escape"] {
        bench.running(&plugins, name).await;
    }
    let request = bench.save_request();
    let results = plugins.checkpoint_save(&request).await;
    let failures: Vec<&PluginFailure> = results.iter().filter_map(|r| r.as_ref().err()).collect();
    assert_eq!(results.len(), 3, "{results:?}");
    assert_eq!((failures[0].plugin.as_str(), failures[0].code.as_str()), ("crash", "crashed"));
    assert!(failures[0].message.contains("SIGSEGV in checkpoint.save"), "{failures:?}");
    assert_eq!(failures[1].code, "artifact_invalid");
    assert_eq!(results[2].as_ref().unwrap().path.to_str(), Some("good/state.bin"));
    let left = fs::read_dir(&request.directory).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["good"], "what failed plugins have left is gone");
    assert!(!request.directory.join("crash").exists());
    assert!(!request.directory.join("escape").exists());
    let status = bench.running(&plugins, "crash").await;
    assert_eq!(status.restarts, 1);
    assert!(status.last_error.unwrap().contains("SIGSEGV"));
    plugins.shutdown().await;
}

/// Makes one call to a plugin in the given mode; returns the failure and the plugin's status afterwards.
async fn misbehaviour(mode: &str, deadline_ms: u64) -> (PluginFailure, PluginStatus) {
    let mut bench = Bench::new();
    if ["HANG", "FLOOD"].contains(&mode) {
        bench.config.cancel_grace = TOO_SOON;
    }
    bench.c_plugin("bad", mode, &[]);
    bench.settings("bad", &format!("deadline_ms = {deadline_ms}\n"));
    let plugins = bench.start().await;
    let before = bench.running(&plugins, "bad").await;
    let mut results = plugins.checkpoint_save(&bench.save_request()).await;
    assert_eq!(results.len(), 1, "{results:?}");
    let failure = results.remove(0).unwrap_err();
    let after = bench.until(&plugins, "bad", |s| s.state == HostState::Running && s.failed_calls == 1).await;
    if after.restarts > 0 {
        assert!(!alive(before.pid.unwrap()), "the old host is gone");
    }
    plugins.shutdown().await;
    (failure, after)
}

/// A grace for plugins that ignore a cancellation.
const TOO_SOON: Duration = Duration::from_millis(300);

const SOON: u64 = 300;
const LATE: u64 = 60_000;

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_and_started_again() {
    let (failure, status) = misbehaviour("HANG", SOON).await;
    assert_eq!(failure.code, "crashed");
    assert!(failure.message.contains("no answer within"), "{}", failure.message);
    assert!(failure.message.contains("the host was killed"), "{}", failure.message);
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn a_plugin_that_listens_to_the_cancel_keeps_its_host() {
    let (failure, status) = misbehaviour("WAIT", SOON).await;
    assert_eq!(failure.code, "deadline");
    assert_eq!(status.restarts, 0);
}

#[tokio::test]
async fn a_plugin_that_exits_in_a_call_is_reported_with_its_exit_code() {
    let (failure, status) = misbehaviour("EXIT", LATE).await;
    assert!(failure.message.contains("exited with code 0 in checkpoint.save"), "{}", failure.message);
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn garbage_on_descriptor_3_ends_the_host() {
    let (failure, status) = misbehaviour("FD3", LATE).await;
    assert!(failure.message.contains("did not carry frames"), "{}", failure.message);
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn an_oversized_frame_ends_the_host() {
    let (failure, status) = misbehaviour("OVERSIZED", LATE).await;
    assert!(failure.message.contains("4294967295 bytes is over the limit"), "{}", failure.message);
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn a_plugin_that_closes_descriptor_3_is_ended() {
    let (failure, status) = misbehaviour("CLOSE3", SOON).await;
    // The host has a second handle on the socket for writing, so this may count as a timeout.
    assert_eq!(failure.code, "crashed");
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn a_plugin_that_logs_for_ever_still_meets_its_deadline() {
    let (failure, status) = misbehaviour("FLOOD", SOON).await;
    assert_eq!(failure.code, "crashed");
    assert_eq!(status.restarts, 1);
}

#[tokio::test]
async fn a_plugin_that_takes_all_memory_is_ended_by_its_own_host() {
    let mut bench = Bench::new();
    bench.config.memory_limit = 96 << 20;
    bench.c_plugin("leak", "LEAK", &[]);
    let plugins = bench.start().await;
    bench.running(&plugins, "leak").await;
    let results = plugins.checkpoint_save(&bench.save_request()).await;
    let failure = results[0].as_ref().unwrap_err();
    assert!(failure.message.contains("the limit is 100663296"), "{failure:?}");
    plugins.shutdown().await;
}

#[tokio::test]
async fn what_a_plugin_prints_reaches_the_log_and_disturbs_nothing() {
    let bench = Bench::new();
    bench.c_plugin("print", "PRINT", &[]);
    let plugins = bench.start().await;
    bench.running(&plugins, "print").await;
    let results = plugins.checkpoint_save(&bench.save_request()).await;
    assert!(results[0].is_ok(), "{results:?}");
    for line in ["garbage on stdout", "garbage on stderr"] {
        bench.until(&plugins, "print", |s| s.recent_output.iter().any(|l| l == line)).await;
    }
    plugins.shutdown().await;
}

#[tokio::test]
async fn repeated_crashes_lead_to_quarantine_and_enable_leads_out_of_it() {
    let mut bench = Bench::new();
    bench.config.crashes = CrashPolicy { limit: 3, backoff_base: Duration::from_millis(1), ..CrashPolicy::default() };
    bench.c_plugin("early", "CRASH_IN_DESCRIBE", &[]);
    let plugins = bench.start().await;
    let status = bench.until(&plugins, "early", |s| s.state == HostState::Quarantined).await;
    assert_eq!(status.restarts, 2);
    assert_eq!(status.pid, None);
    let error = status.last_error.unwrap();
    assert!(error.contains("killed by SIGSEGV while it was starting"), "{error}");

    // A reload alone does not enable the plugin again, a new file does.
    assert_eq!(plugins.reload().await.unwrap().kept, ["early"]);
    plugins.enable("early").await.unwrap();
    bench.until(&plugins, "early", |s| s.state == HostState::Quarantined && s.restarts == 2).await;
    bench.c_plugin("early", "GOOD", &[]);
    assert_eq!(plugins.reload().await.unwrap().restarted, ["early"]);
    bench.running(&plugins, "early").await;
    plugins.shutdown().await;
}

#[tokio::test]
async fn a_plugin_that_hangs_in_describe_counts_as_crashed() {
    let mut bench = Bench::new();
    bench.config.start_deadline = Duration::from_millis(200);
    bench.config.crashes.limit = 1;
    bench.c_plugin("slow", "HANG_IN_DESCRIBE", &[]);
    let plugins = bench.start().await;
    let status = bench.until(&plugins, "slow", |s| s.state == HostState::Quarantined).await;
    assert!(status.last_error.unwrap().contains("no answer within 200ms"));
    let checked = plugins.check(&bench.object("slow")).await.unwrap_err();
    assert!(checked.message.contains("no answer"), "{}", checked.message);
    plugins.shutdown().await;
}

#[tokio::test]
async fn a_plugin_that_refuses_its_settings_is_failed_and_not_tried_again() {
    let bench = Bench::new();
    bench.c_plugin("refuse", "REFUSE", &[]);
    let plugins = bench.start().await;
    let status = bench.until(&plugins, "refuse", |s| s.state == HostState::Failed).await;
    assert_eq!(status.last_error.as_deref(), Some("not like this (try harder)"));
    assert_eq!(status.restarts, 0);
    assert!(plugins.checkpoint_save(&bench.save_request()).await.is_empty());
    plugins.shutdown().await;
}

#[tokio::test]
async fn a_file_that_others_can_write_is_refused_until_that_is_mended() {
    let bench = Bench::new();
    bench.c_plugin("open", "GOOD", &[]);
    let object = bench.object("open");
    fs::set_permissions(&object, fs::Permissions::from_mode(0o777)).unwrap();
    let plugins = bench.start().await;
    let status = plugins.get("open").unwrap();
    assert_eq!(status.state, HostState::Failed);
    let error = status.last_error.unwrap();
    assert!(error.contains("can be written by others (mode 0777)"), "{error}");
    // The host checks the plugin itself.
    let refused = plugins.check(&object).await.unwrap_err();
    assert_eq!(refused.code, "untrusted");

    fs::set_permissions(&object, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(plugins.reload().await.unwrap().restarted, ["open"]);
    bench.running(&plugins, "open").await;
    plugins.shutdown().await;
}

#[tokio::test]
async fn reload_finds_new_changed_and_removed_plugins_and_leaves_the_rest_alone() {
    let bench = Bench::new();
    for name in ["kept", "changed", "removed", "tuned"] {
        bench.c_plugin(name, "GOOD", &[]);
    }
    let plugins = bench.start().await;
    let mut pids = std::collections::BTreeMap::new();
    for name in ["kept", "changed", "removed", "tuned"] {
        pids.insert(name, bench.running(&plugins, name).await.pid.unwrap());
    }
    bench.c_plugin("changed", "GOOD", &["-DVERSION=\"2\""]);
    bench.c_plugin("added", "GOOD", &[]);
    bench.settings("tuned", "events = []\n");
    fs::remove_file(bench.object("removed")).unwrap();
    let report = plugins.reload().await.unwrap();
    assert_eq!(report.added, ["added"]);
    assert_eq!(report.removed, ["removed"]);
    assert_eq!(report.restarted, ["changed", "tuned"]);
    assert_eq!(report.kept, ["kept"]);
    assert_eq!(bench.running(&plugins, "changed").await.version.as_deref(), Some("2"));
    assert_eq!(bench.running(&plugins, "kept").await.pid, Some(pids["kept"]));
    bench.running(&plugins, "added").await;
    assert!(plugins.get("removed").is_none());
    assert!(!alive(pids["removed"]) && !alive(pids["changed"]));
    plugins.shutdown().await;
}

#[tokio::test]
async fn enable_and_disable_outlive_the_daemon() {
    let bench = Bench::new();
    bench.c_plugin("good", "GOOD", &[]);
    bench.c_plugin("off", "GOOD", &[]);
    bench.settings("off", "enabled = false\n");
    let plugins = bench.start().await;
    let pid = bench.running(&plugins, "good").await.pid.unwrap();
    assert_eq!(plugins.get("off").unwrap().state, HostState::Disabled);
    plugins.disable("good").await.unwrap();
    plugins.enable("off").await.unwrap();
    assert!(!alive(pid));
    let unknown = plugins.disable("nobody").await.unwrap_err();
    assert!(matches!(&unknown, PluginError::NoSuchPlugin { name } if name == "nobody"), "{unknown}");
    assert!(plugins.get("nobody").is_none(), "a refused choice is not kept");
    bench.running(&plugins, "off").await;
    plugins.shutdown().await;
    for refused in [plugins.reload().await.map(drop), plugins.enable("good").await] {
        assert!(matches!(refused, Err(PluginError::ShutDown)), "{refused:?}");
    }

    let plugins = bench.start().await;
    assert_eq!(plugins.get("good").unwrap().state, HostState::Disabled);
    bench.running(&plugins, "off").await;
    plugins.shutdown().await;
}

#[tokio::test]
async fn a_full_queue_drops_events_and_counts_them_without_blocking() {
    let mut bench = Bench::new();
    bench.config.queue = 2;
    bench.c_plugin("wait", "WAIT", &[]);
    bench.settings("wait", "deadline_ms = 600000\nevents = [\"project.*\"]\n");
    let plugins = bench.start().await;
    bench.running(&plugins, "wait").await;
    for _ in 0..50 {
        plugins.notify(&event("project.paused"));
        plugins.notify(&event("task.completed"));
    }
    let status = plugins.get("wait").unwrap();
    // Two events wait and at most one more is on its way to the plugin; filtered events are not counted.
    assert!((47..=48).contains(&status.dropped_events), "{}", status.dropped_events);
    // The running call is cancelled.
    tokio::time::timeout(PATIENCE, plugins.shutdown()).await.expect("the shutdown waits for no deadline");
}

#[tokio::test]
async fn dropping_a_save_cancels_the_call() {
    let bench = Bench::new();
    bench.c_plugin("wait", "WAIT", &[]);
    bench.settings("wait", "deadline_ms = 600000\n");
    let plugins = bench.start().await;
    bench.running(&plugins, "wait").await;
    let request = bench.save_request();
    let directory = request.directory.join("wait");
    {
        let saving = plugins.checkpoint_save(&request);
        tokio::pin!(saving);
        while !directory.exists() {
            tokio::select! {
                _ = &mut saving => panic!("the plugin waits for a cancel"),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
    }
    // The next call is only possible because the first one was cancelled, perhaps before it began.
    fs::remove_dir_all(&directory).unwrap();
    plugins.notify(&event("project.paused"));
    plugins.shutdown().await;
    assert_eq!(plugins.get("wait").unwrap().restarts, 0);
}

#[tokio::test]
async fn the_children_of_a_killed_host_die_with_it() {
    let mut bench = Bench::new();
    bench.config.cancel_grace = TOO_SOON;
    bench.c_plugin("child", "CHILD", &[]);
    // Enough time to start a child and to log its pid before the deadline.
    bench.settings("child", "deadline_ms = 5000\n");
    let plugins = bench.start().await;
    bench.running(&plugins, "child").await;
    let results = plugins.checkpoint_save(&bench.save_request()).await;
    assert_eq!(code(&results[0]), "crashed");
    let output = plugins.get("child").unwrap().recent_output;
    let pid = output.iter().find_map(|line| line.strip_prefix("child "));
    let pid: u32 = pid.expect("the plugin has logged its child").parse().unwrap();
    bench.gone(pid).await;
    plugins.shutdown().await;
}

#[tokio::test]
async fn check_describes_a_file_and_says_why_another_one_is_no_plugin() {
    let bench = Bench::new();
    bench.c_plugin("good", "GOOD", &[]);
    let plugins = bench.start().await;
    let description = plugins.check(&bench.object("good")).await.unwrap();
    assert_eq!((description.name.as_str(), description.version.as_str()), ("test", "1"));
    let text = bench.plugin_dir().join("libtext.so");
    fs::write(&text, "no shared object").unwrap();
    assert_eq!(plugins.check(&text).await.unwrap_err().code, "not_loadable");
    let missing = bench.plugin_dir().join("libmissing.so");
    assert_eq!(plugins.check(&missing).await.unwrap_err().code, "untrusted");
    bench.c_plugin("early", "CRASH_IN_DESCRIBE", &[]);
    let crashed = plugins.check(&bench.object("early")).await.unwrap_err();
    assert!(crashed.message.contains("SIGSEGV"), "{}", crashed.message);
    plugins.shutdown().await;
}

#[tokio::test]
async fn a_host_ends_with_its_children_when_the_daemon_goes_away() {
    let bench = Bench::new();
    bench.c_plugin("child", "CHILD", &[]);
    let mut host = bench.bare_host("child");
    host.expect_hello();
    host.call(1, "notify");
    let grandchild: u32 = host.expect_log("child ").parse().unwrap();
    let pid = host.pid();
    assert!(alive(grandchild));
    // As after SIGKILL to the daemon: the socket of the host closes, and the host gets no signal.
    let mut child = host.hang_up();
    bench.gone(grandchild).await;
    bench.gone(pid).await;
    child.wait().unwrap();
}

#[tokio::test]
async fn a_host_ends_while_its_plugin_hangs_in_describe() {
    let bench = Bench::new();
    bench.c_plugin("slow", "HANG_IN_DESCRIBE", &[]);
    let host = bench.bare_host("slow");
    let pid = host.pid();
    let mut child = host.hang_up();
    bench.gone(pid).await;
    child.wait().unwrap();
}

#[tokio::test]
async fn the_exec_plugin_writes_artifacts_and_delivers_events() {
    let bench = Bench::new();
    exec_plugin(&bench);
    let notified = bench.path("notified");
    bench.settings(
        "exec",
        &format!(
            "[settings]\n\
             events = [\"project.*\"]\n\
             notify = [\"sh\", \"-c\", 'cat >\"$0\"; echo \" $FERMATA_EVENT\" >>\"$0\"; echo printed', \"{}\"]\n\
             checkpoint = [\"sh\", \"-c\", 'cat >request.json; mkdir sub; printf %s \"$FERMATA_PROJECT\" >sub/name']\n",
            notified.display()
        ),
    );
    let plugins = bench.start().await;
    bench.running(&plugins, "exec").await;
    let request = bench.save_request();
    let results = plugins.checkpoint_save(&request).await;
    let paths: Vec<_> = results.iter().map(|result| result.as_ref().unwrap().path.to_str().unwrap()).collect();
    assert_eq!(paths, ["exec/request.json", "exec/sub/name"]);
    assert_eq!(fs::read(request.directory.join("exec/sub/name")).unwrap(), b"web");
    let saved = fs::read(request.directory.join("exec/request.json")).unwrap();
    let saved: SaveRequest = serde_json::from_slice(&saved).unwrap();
    assert_eq!(saved.directory, request.directory.join("exec"));
    assert!(saved.deadline_ms.is_some());

    plugins.notify(&event("task.completed"));
    plugins.notify(&event("project.paused"));
    let status = bench.until(&plugins, "exec", |s| s.calls == 3).await;
    assert_eq!(status.failed_calls, 0, "{:?}", status.last_error);
    let notified = fs::read_to_string(notified).unwrap();
    assert!(notified.starts_with('{') && notified.ends_with(" project.paused\n"), "{notified}");
    bench.until(&plugins, "exec", |s| s.recent_output.iter().any(|l| l == "printed")).await;
    plugins.shutdown().await;
}

#[tokio::test]
async fn the_exec_plugin_reports_a_failing_program_and_kills_a_slow_one() {
    let bench = Bench::new();
    exec_plugin(&bench);
    let pid_file = bench.path("pid");
    bench.settings(
        "exec",
        &format!(
            "deadline_ms = 500\n[settings]\n\
             notify = [\"sh\", \"-c\", 'echo this is why >&2; exit 7']\n\
             checkpoint = [\"sh\", \"-c\", 'sleep 1000 & echo $! >\"$0\"; wait', \"{}\"]\n",
            pid_file.display()
        ),
    );
    let plugins = bench.start().await;
    bench.running(&plugins, "exec").await;
    plugins.notify(&event("project.paused"));
    let status = bench.until(&plugins, "exec", |s| s.failed_calls == 1).await;
    assert_eq!(status.last_error.as_deref(), Some("notify: sh exited with code 7: this is why"));
    let results = plugins.checkpoint_save(&bench.save_request()).await;
    assert!(["deadline", "timeout"].contains(&code(&results[0])), "{results:?}");
    let pid = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    bench.gone(pid).await;
    assert_eq!(plugins.get("exec").unwrap().restarts, 0);
    plugins.shutdown().await;
}

#[tokio::test]
async fn the_exec_plugin_without_a_checkpoint_program_takes_no_part() {
    let bench = Bench::new();
    exec_plugin(&bench);
    bench.settings("exec", "[settings]\nnotify = [\"true\"]\n");
    let plugins = bench.start().await;
    bench.running(&plugins, "exec").await;
    let request = bench.save_request();
    assert!(plugins.checkpoint_save(&request).await.is_empty());
    assert!(!request.directory.join("exec").exists());
    let status = plugins.get("exec").unwrap();
    assert_eq!((status.failed_calls, status.last_error), (0, None));
    plugins.notify(&Arc::new(serde_json::json!({"no": "type"})));
    bench.until(&plugins, "exec", |s| s.calls == 2).await;
    plugins.shutdown().await;
}
