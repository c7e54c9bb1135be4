//! The start of a daemon by the first command.
//!
//! The daemon is a shell script beside a copy of fermatactl; the test does its work.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use crate::stub::{Answer, Ended, Stub, isolate};

/// Puts a copy of fermatactl and a scripted fermatad into one directory.
fn installed(dir: &Path, script: &str) -> Command {
    let bin = dir.join("bin");
    fs::create_dir(&bin).expect("mkdir");
    let program = bin.join("fermatactl");
    let source = dir.join("fermatad.sh");
    fs::write(&source, format!("#!/bin/sh\n{script}\n")).expect("write");
    // Another process makes the copy: a program cannot be executed while this process, or a child that it is forking,
    // has it open for writing (ETXTBSY).
    for (from, to) in [(Path::new(env!("CARGO_BIN_EXE_fermatactl")), &program), (&source, &bin.join("fermatad"))] {
        let status = Command::new("cp").arg(from).arg(to).status().expect("cp runs");
        assert!(status.success());
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    let mut command = Command::new(program);
    isolate(&mut command, dir);
    command
}

#[test]
fn the_log_of_a_daemon_that_fails_to_start_is_shown() {
    let dir = TempDir::new().expect("temp dir");
    let mut command = installed(dir.path(), "echo \"args: $*\"; echo 'no such disk' >&2; exit 3");
    let ended = Ended::from(command.arg("ps").output().expect("runs"));
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(ended.stderr.contains("args: --background\nno such disk"), "{ended:?}");
    let log = dir.path().join("state/fermatad.log");
    assert!(ended.stderr.contains(&format!("hint: the complete log is {}", log.display())));
    let mode = fs::metadata(dir.path().join("state")).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn of_two_starts_the_one_without_the_lock_waits_for_the_other() {
    let dir = TempDir::new().expect("temp dir");
    let mark = dir.path().join("lost");
    let script = format!("env > '{}.tmp'; mv '{0}.tmp' '{0}'; exit 75", mark.display());
    let mut command = installed(dir.path(), &script);
    command.env("FERMATA_CONFIG", "relative.toml");
    command.arg("ps").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("starts");
    // The winner begins to listen only after the loser has ended.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !mark.exists() {
        assert!(Instant::now() < deadline, "the daemon was never started");
        std::thread::sleep(Duration::from_millis(5));
    }
    let environment = fs::read_to_string(&mark).expect("read");
    let here = dir.path().canonicalize().expect("exists");
    let state = here.join("state");
    assert!(environment.contains(&format!("FERMATA_STATE_DIR={}\n", state.display())), "{environment}");
    assert!(environment.contains(&format!("FERMATA_RUNTIME_DIR={}\n", here.display())), "{environment}");
    let config = here.join("relative.toml");
    assert!(environment.contains(&format!("FERMATA_CONFIG={}\n", config.display())), "{environment}");
    let socket = dir.path().join("fermata.sock");
    let winner = Stub::listen(dir, socket, [("agent.list", Answer::Result(json!({"agents": []})))]);
    let ended = Ended::from(child.wait_with_output().expect("ends"));
    assert_eq!(ended.code, 0, "{ended:?}");
    drop(winner);
}

#[test]
fn an_agent_never_starts_a_daemon() {
    let dir = TempDir::new().expect("temp dir");
    let mark = dir.path().join("started");
    let mut command = installed(dir.path(), &format!("touch '{}'", mark.display()));
    command.args(["agent", "ack"]).env("FERMATA_TOKEN", "t");
    let ended = Ended::from(command.output().expect("runs"));
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(!mark.exists());
}

#[test]
fn version_and_doctor_never_start_a_daemon() {
    let dir = TempDir::new().expect("temp dir");
    let mark = dir.path().join("started");
    let program = installed(dir.path(), &format!("touch '{}'", mark.display()));
    for (argument, code) in [("version", 0), ("doctor", 1)] {
        let mut command = Command::new(program.get_program());
        isolate(&mut command, dir.path());
        let ended = Ended::from(command.arg(argument).output().expect("runs"));
        assert_eq!(ended.code, code, "{ended:?}");
    }
    assert!(!mark.exists());
}
