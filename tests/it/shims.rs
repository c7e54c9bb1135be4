//! Shims that are killed or stopped, have lost their socket or are of another version: the effect on their agents and
//! on a daemon that starts meanwhile.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_protocol::pause::{PauseMode, ResumeMethod};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bed::{MECHANISMS, agent, failed, run_agent, run_record, wait_for_end, wait_for_pid, wait_for_status, web};
use crate::scene::{self, Ticker};

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signal");
}

fn shim_pid(sandbox: &Sandbox, name: &str) -> i32 {
    let pid = run_record(sandbox, name)["shim"]["pid"].as_i64();
    pid.and_then(|pid| i32::try_from(pid).ok()).expect("the record names the shim")
}

fn socket(sandbox: &Sandbox, name: &str) -> PathBuf {
    run_record(sandbox, name)["socket"].as_str().expect("the record names the socket").into()
}

/// A tree in three sessions that writes its pids to files.
const TREE: &str = "echo $$ > pid; setsid sh -c 'echo $$ > pid.session; sleep 1000; echo on > went.on' & \
    (setsid sh -c 'echo $$ > pid.orphan; sleep 1000; echo on > went.on' &) ; sleep 1000; echo on > went.on";
const PIDS: [&str; 3] = ["pid", "pid.session", "pid.orphan"];

#[test]
fn a_killed_shim_is_noticed_at_once_and_its_whole_tree_is_ended() {
    for config in MECHANISMS {
        for paused in [false, true] {
            let sandbox = Sandbox::builder().config(config).start();
            run_agent(&sandbox, "a", TREE);
            let pids = PIDS.map(|file| wait_for_pid(&sandbox, file));
            if paused {
                sandbox.ctl(&["pause", "web"]);
            }
            signal(shim_pid(&sandbox, "a"), Signal::SIGKILL);
            wait_for_status(&sandbox, "a", AgentStatus::Interrupted);
            pids.into_iter().for_each(wait_for_end);
            assert!(!web(&sandbox).has("went.on"), "a shell saw the death of its child and went on");
            let detail = agent(&sandbox, "a").detail.expect("it says why");
            assert!(detail.contains("its shim was killed"), "{detail}");
        }
    }
}

#[test]
fn the_output_in_the_pipe_of_a_killed_shim_is_in_the_log() {
    for down in [false, true] {
        let mut sandbox = Sandbox::start();
        run_agent(
            &sandbox,
            "a",
            "echo $$ > pid; seq 1 10; while [ ! -e go ]; do sleep 0.01; done; seq 11 3000; echo > written; \
             exec sleep 1000",
        );
        let pid = wait_for_pid(&sandbox, "pid");
        wait_until(SOON, "the first lines", || sandbox.ctl(&["logs", "web/a"]).lines().count() == 10);
        let shim = shim_pid(&sandbox, "a");
        if down {
            sandbox.kill_daemon();
        }
        signal(shim, Signal::SIGSTOP);
        web(&sandbox).write("go", "");
        wait_until(SOON, "the rest to be in the pipe", || web(&sandbox).has("written"));
        signal(shim, Signal::SIGKILL);
        if down {
            sandbox.start_daemon();
        }
        wait_for_status(&sandbox, "a", AgentStatus::Interrupted);
        wait_for_end(pid);
        let text = sandbox.ctl(&["logs", "web/a"]);
        let wanted: Vec<String> = (1..=3000).map(|n| n.to_string()).collect();
        assert!(text.lines().eq(wanted.iter().map(String::as_str)), "{} lines", text.lines().count());
    }
}

#[test]
fn a_shim_that_another_process_has_stopped_is_continued_and_its_agent_stays() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let (pid, shim) = (wait_for_pid(&sandbox, "pid"), shim_pid(&sandbox, "a"));
    // Noticed by a request that waits for its answer, and by a daemon that starts.
    signal(shim, Signal::SIGSTOP);
    sandbox.ctl(&["pause", "web"]);
    sandbox.ctl(&["resume", "web"]);
    sandbox.kill_daemon();
    signal(shim, Signal::SIGSTOP);
    wait_until(SOON, "the shim to stand still", || process::state(shim) == Some('T'));
    sandbox.start_daemon();
    let found = agent(&sandbox, "a");
    assert_eq!((found.status, found.pid, found.runs), (AgentStatus::Running, Some(pid), 1));
    assert_eq!(sandbox.log().matches("a shim was stopped by another process").count(), 2, "{}", sandbox.log());
    // Noticed without any request.
    signal(shim, Signal::SIGSTOP);
    wait_until(SOON, "the shim to be continued", || process::state(shim) != Some('T'));
}

#[test]
fn a_socket_that_was_removed_costs_no_agent() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let pid = wait_for_pid(&sandbox, "pid");
    sandbox.kill_daemon();
    // All sockets, as when the runtime directory is removed with the service.
    std::fs::remove_dir_all(sandbox.path().join("r/shims")).expect("the directory of the sockets");
    sandbox.start_daemon();
    let found = agent(&sandbox, "a");
    assert_eq!((found.status, found.pid, found.runs), (AgentStatus::Running, Some(pid), 1));
    assert!(socket(&sandbox, "a").exists());
    sandbox.ctl(&["pause", "web"]);
    sandbox.crash_and_restart();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
    sandbox.ctl(&["resume", "web"]);
    assert_eq!(agent(&sandbox, "a").pid, Some(pid));
}

#[test]
fn an_agent_under_a_shim_of_another_version_is_left_alone_and_status_says_why() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; trap 'exit 7' TERM; while :; do sleep 0.05; done");
    let (pid, shim) = (wait_for_pid(&sandbox, "pid"), shim_pid(&sandbox, "a"));
    let path = socket(&sandbox, "a");
    sandbox.kill_daemon();
    std::fs::remove_file(&path).expect("remove the socket");
    let listener = UnixListener::bind(&path).expect("listen in its place");
    let refusing = std::thread::spawn(move || {
        // Answers as a shim of version 2 does to a daemon of version 1, until the path is replaced.
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut hello = String::new();
            BufReader::new(stream.try_clone().expect("duplicate")).read_line(&mut hello).expect("a hello");
            if hello.trim() == "end" {
                return;
            }
            let line = r#"{"refusal":{"id":null,"code":"version_mismatch","message":"the peer speaks version 1, this shim speaks version 2"}}"#;
            writeln!(stream, "{line}").expect("answer");
        }
    });
    sandbox.start_daemon();
    let says_why = || agent(&sandbox, "a").detail.is_some_and(|detail| detail.contains("this shim speaks version 2"));
    wait_until(SOON, "the status to say why", says_why);
    let found = agent(&sandbox, "a");
    assert_eq!((found.status, found.pid), (AgentStatus::Running, Some(pid)));
    let shown = sandbox.ctl_output(&["status", "web"]);
    let shown = String::from_utf8_lossy(&[shown.stdout, shown.stderr].concat()).into_owned();
    assert!(shown.contains("version 2"), "{shown}");
    // The agent cannot be frozen, so the project cannot be paused.
    let refused = scene::pause(&sandbox, PauseMode::Freeze).expect_err("it cannot be frozen");
    assert!(refused.message.contains("cannot be reached"), "{refused:?}");
    assert!(process::is_alive(pid) && process::is_alive(shim));
    // A user can still end it.
    sandbox.ctl(&["stop", "web/a"]);
    wait_for_end(pid);
    wait_for_end(shim);
    wait_until(SOON, "its end to be known", || agent(&sandbox, "a").status.is_terminal());
    assert_eq!(agent(&sandbox, "a").exit, Some(ExitStatus::Code(7)), "its shim has recorded it");
    if let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&path) {
        writeln!(stream, "end").expect("end the stand-in");
        refusing.join().expect("it ends");
    }
}

#[test]
fn a_frozen_agent_is_not_continued_by_a_signal() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
        wait_for_pid(&sandbox, "pid");
        sandbox.ctl(&["pause", "web"]);
        let message = failed(&sandbox.ctl_output(&["kill", "-s", "CONT", "web/a"]), 1);
        assert!(message.contains("SIGCONT is not sent") && message.contains("fermatactl resume web"), "{message}");
        assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
        sandbox.ctl(&["resume", "web"]);
        sandbox.ctl(&["kill", "-s", "CONT", "web/a"]);
    }
}

#[test]
fn a_resume_reaches_a_shim_whose_link_is_broken() {
    for config in MECHANISMS {
        // The daemon is stopped before it thaws; meanwhile every connection breaks.
        let sandbox = Sandbox::builder().config(config).env("FERMATA_FAILPOINT", "resume.started=stop").start();
        let ticker = Ticker::start(&sandbox);
        scene::pause(&sandbox, PauseMode::Freeze).expect("pause");
        let pid = scene::the_agent(&sandbox).pid;
        let record = std::fs::read_dir(sandbox.state_dir().join("projects/web/agents/worker/runs"))
            .expect("the runs")
            .flatten()
            .find_map(|run| std::fs::read(run.path().join("run.json")).ok())
            .expect("the record");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
        let socket = record["socket"].as_str().expect("a path");
        let resumed = std::thread::scope(|scope| {
            let resuming = scope.spawn(|| scene::resume(&sandbox));
            wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
            push_out(socket);
            sandbox.signal_daemon(Signal::SIGCONT);
            resuming.join().expect("an answer").expect("resume")
        });
        assert_eq!(
            resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(),
            [ResumeMethod::Thawed],
            "{resumed:?}"
        );
        assert_eq!(scene::the_agent(&sandbox).pid, pid);
        ticker.runs(SOON);
        // The new connection is in use.
        scene::pause(&sandbox, PauseMode::Freeze).expect("pause");
        ticker.stands_still();
    }
}

#[test]
fn a_daemon_that_is_out_of_descriptors_ends_no_agent_for_that() {
    let sandbox = Sandbox::start();
    let script = "echo $$ > pid; while :; do echo x; sleep 0.01; done";
    run_agent(&sandbox, "a", script);
    let pid = wait_for_pid(&sandbox, "pid");
    let (shim, socket) = (shim_pid(&sandbox, "a"), socket(&sandbox, "a"));
    let limit = |soft: &str| {
        let daemon = sandbox.daemon_pid().to_string();
        let given =
            std::process::Command::new("prlimit").args(["--pid", &daemon, &format!("--nofile={soft}:")]).status();
        assert!(given.expect("run prlimit").success());
    };
    // The files that the daemon has open stay open, but it cannot open more.
    limit("3");
    push_out(socket.to_str().expect("text"));
    wait_until(SOON, "the daemon to say that it cannot see", || {
        sandbox.log().contains("failed to determine the state of an agent")
    });
    assert!(process::is_alive(shim) && process::is_alive(pid));
    limit("1024");
    // It can be frozen only through its shim, to which the daemon reconnects once it can open files again.
    wait_until(SOON, "the agent to be reached again", || sandbox.ctl_output(&["pause", "web"]).status.success());
    assert_eq!(agent(&sandbox, "a").pid, Some(pid));
    assert!(process::is_alive(shim));
}

/// A shim has a limited number of connections; a new one replaces the oldest.
fn push_out(socket: &str) {
    let mut all = Vec::new();
    for _ in 0..17 {
        let stream = std::os::unix::net::UnixStream::connect(socket).expect("connect to the shim");
        writeln!(&stream, r#"{{"hello":{{"version":1}}}}"#).expect("introduce oneself");
        let mut hello = String::new();
        BufReader::new(stream.try_clone().expect("duplicate")).read_line(&mut hello).expect("a hello");
        assert!(hello.contains("hello"), "{hello}");
        all.push(stream);
    }
}
