//! Plugins as users install them: the plugin `exec`, copied into the plugin directory.

use std::fs;

use fermata_tests::sandbox::target_dir;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::bed::{failed, run_agent};

/// Installs the plugin `exec` with its settings in the plugin directory.
fn install(sandbox: &Sandbox, settings: &str) {
    let plugin = sandbox.plugin_dir().join("exec.so");
    fs::copy(target_dir().join("libfermata_exec.so"), plugin).expect("copy the plugin");
    configure(sandbox, settings);
}

fn configure(sandbox: &Sandbox, settings: &str) {
    let dir = sandbox.path().join("plugins.d");
    fs::create_dir_all(&dir).expect("create plugins.d");
    fs::write(dir.join("exec.toml"), settings).expect("write exec.toml");
}

fn with_exec(settings: &str) -> Sandbox {
    let mut sandbox = Sandbox::builder().build();
    install(&sandbox, settings);
    sandbox.start_daemon();
    wait_for_state(&sandbox, "running");
    sandbox
}

fn exec(sandbox: &Sandbox) -> Value {
    sandbox.ctl_rows(&["plugin", "ls"]).into_iter().find(|row| row["name"] == "exec").unwrap_or_default()
}

fn wait_for_state(sandbox: &Sandbox, state: &str) {
    wait_until(SOON, &format!("the plugin to be {state}"), || exec(sandbox)["state"] == state);
}

fn program(script: &str) -> String {
    format!("[\"/bin/sh\", \"-c\", {}]", json!(script))
}

#[test]
fn a_program_receives_the_events_it_subscribed_to_and_no_others() {
    let sandbox = with_exec("");
    let output = sandbox.path().join("output");
    let script =
        format!("echo $FERMATA_EVENT $FERMATA_PROJECT >> {0}; cat >> {0}.json; echo >> {0}.json", output.display());
    configure(&sandbox, &format!("[settings]\nevents = [\"project.paused\"]\nnotify = {}\n", program(&script)));
    sandbox.ctl(&["plugin", "reload"]);
    wait_for_state(&sandbox, "running");
    run_agent(&sandbox, "a", "exec sleep 1000");
    sandbox.ctl(&["pause", "web", "--reason", "lunch"]);
    sandbox.ctl(&["resume", "web"]);
    sandbox.ctl(&["pause", "web"]);
    let lines = || fs::read_to_string(&output).unwrap_or_default();
    wait_until(SOON, "both events", || lines().lines().count() == 2);
    assert_eq!(lines(), "project.paused web\nproject.paused web\n");
    let text = fs::read_to_string(output.with_extension("json")).expect("written");
    let first: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&first["kind"], &first["project"]), (&json!("project.paused"), &json!("web")), "{first}");
}

#[test]
fn artifacts_are_part_of_the_checkpoint_with_their_hashes() {
    let script = "mkdir -p sub; printf dump > dump.sql; printf $FERMATA_FROZEN > sub/frozen";
    let sandbox = with_exec(&format!("[settings]\ncheckpoint = {}\n", program(script)));
    run_agent(&sandbox, "a", "exec sleep 1000");
    let paused = sandbox.ctl_json(&["pause", "web"]);
    assert_eq!(paused["warnings"], json!([]), "{paused}");
    let shown = sandbox.ctl_json(&["checkpoint", "show", "web", "1"]);
    let text = shown.to_string();
    for (name, content) in [("dump.sql", "dump"), ("sub/frozen", "1")] {
        let hash: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(text.contains(name) && text.contains(&hash), "{name} with {hash} is missing in {shown:#}");
    }
    sandbox.ctl(&["checkpoint", "verify", "web", "1"]);
    // A part that was changed on disk is detected.
    let dir = sandbox.state_dir().join("projects/web/checkpoints/1");
    let found = find(&dir, "dump.sql").expect("the artifact lies in the checkpoint");
    fs::write(found, "dumb").expect("damage it");
    let output = sandbox.ctl_output(&["checkpoint", "verify", "web", "1"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

fn find(dir: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() { find(&path, name) } else { (entry.file_name() == name).then_some(path) }
    })
}

#[test]
fn a_program_that_fails_or_hangs_costs_a_warning_and_not_the_pause() {
    for (script, limit) in [("echo broken >&2; exit 3", 5_000), ("sleep 1000", 300), ("kill -9 $PPID; sleep 5", 5_000)]
    {
        let sandbox = with_exec(&format!("[settings]\ntimeout_ms = {limit}\ncheckpoint = {}\n", program(script)));
        run_agent(&sandbox, "a", "exec sleep 1000");
        let paused = sandbox.ctl_json(&["pause", "web"]);
        assert_eq!(paused["success"], true, "{script}: {paused}");
        assert!(paused["warnings"].to_string().contains("exec"), "{script}: {paused}");
        sandbox.ctl(&["checkpoint", "verify", "web", "1"]);
        sandbox.ctl(&["resume", "web"]);
    }
}

#[test]
fn plugins_are_listed_switched_reloaded_and_removed_without_a_restart() {
    let mut sandbox = Sandbox::start();
    assert!(sandbox.ctl_rows(&["plugin", "ls"]).is_empty());
    install(&sandbox, "");
    sandbox.ctl(&["plugin", "reload"]);
    wait_for_state(&sandbox, "running");
    let row = exec(&sandbox);
    assert_eq!(row["kinds"], json!(["checkpoint", "notify"]), "{row}");
    let host = row["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a host");
    assert!(process::is_alive(host));
    sandbox.ctl(&["plugin", "disable", "exec"]);
    wait_for_state(&sandbox, "disabled");
    wait_until(SOON, "the host to end", || !process::is_alive(host));
    // The choice is stored.
    sandbox.crash_and_restart();
    wait_for_state(&sandbox, "disabled");
    sandbox.ctl(&["plugin", "enable", "exec"]);
    wait_for_state(&sandbox, "running");
    configure(&sandbox, "[settings]\nnonsense = 1\n");
    sandbox.ctl(&["plugin", "reload"]);
    wait_for_state(&sandbox, "failed");
    assert!(exec(&sandbox)["last_error"].as_str().is_some_and(|error| error.contains("nonsense")));
    configure(&sandbox, "");
    sandbox.ctl(&["plugin", "reload"]);
    wait_for_state(&sandbox, "running");
    fs::remove_file(sandbox.plugin_dir().join("exec.so")).expect("remove the plugin");
    sandbox.ctl(&["plugin", "reload"]);
    assert!(sandbox.ctl_rows(&["plugin", "ls"]).is_empty());
    failed(&sandbox.ctl_output(&["plugin", "enable", "exec"]), 3);
}

#[test]
fn a_plugin_is_checked_without_being_installed() {
    let sandbox = Sandbox::start();
    let plugin = sandbox.path().join("try.so");
    fs::copy(target_dir().join("libfermata_exec.so"), &plugin).expect("copy the plugin");
    let described = sandbox.ctl_json(&["plugin", "check", plugin.to_str().expect("UTF-8")]);
    assert_eq!(described["name"], "exec", "{described}");
    fs::write(&plugin, "no shared object").expect("break it");
    failed(&sandbox.ctl_output(&["plugin", "check", plugin.to_str().expect("UTF-8")]), 1);
    failed(&sandbox.ctl_output(&["plugin", "check", "/no/such.so"]), 1);
    assert!(sandbox.ctl_rows(&["plugin", "ls"]).is_empty());
}
