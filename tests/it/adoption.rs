//! The death of a daemon, and the daemon that adopts its agents.

use std::process::Command;

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_protocol::event::Event;
use fermata_protocol::subscription::{EventFilter, EventsList};
use fermata_tests::sandbox::{binary, output_of};
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, SandboxBuilder, process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::bed::{
    MECHANISMS, agent, failed, run_agent, run_dir, run_record, wait_for_end, wait_for_pid, wait_for_status, web,
};

fn shim_pid(sandbox: &Sandbox, name: &str) -> i32 {
    let pid = run_record(sandbox, name)["shim"]["pid"].as_i64();
    pid.and_then(|pid| i32::try_from(pid).ok()).expect("the record names the shim")
}

fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill");
}

#[test]
fn a_killed_daemon_costs_no_agent_and_no_line_of_output() {
    let mut sandbox = Sandbox::start();
    let script = "echo $$ > pid; i=0; while [ ! -e stop ]; do i=$((i+1)); echo line $i; sleep 0.002; done; echo end $i";
    run_agent(&sandbox, "a", script);
    let pid = wait_for_pid(&sandbox, "pid");
    let started = process::start_ticks(pid);
    for _ in 0..5 {
        sandbox.crash_and_restart();
        let adopted = agent(&sandbox, "a");
        assert_eq!((adopted.status, adopted.pid, adopted.runs), (AgentStatus::Running, Some(pid), 1));
        assert_eq!(process::start_ticks(pid), started);
    }
    sandbox.kill_daemon();
    web(&sandbox).write("stop", "");
    wait_for_end(pid);
    sandbox.start_daemon();
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    let text = sandbox.ctl(&["logs", "web/a"]);
    let lines: Vec<&str> = text.lines().collect();
    let count = lines.len() - 1;
    assert!(lines[..count].iter().enumerate().all(|(at, line)| **line == format!("line {}", at + 1)), "a gap");
    assert_eq!(lines[count], format!("end {count}"));
}

#[test]
fn the_exit_of_an_agent_that_ended_meanwhile_is_known() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "code", "echo $$ > pid.code; while [ ! -e go ]; do sleep 0.02; done; exit 42");
    run_agent(&sandbox, "signal", "echo $$ > pid.signal; exec sleep 1000");
    let pids = ["pid.code", "pid.signal"].map(|file| wait_for_pid(&sandbox, file));
    let shims = ["code", "signal"].map(|name| shim_pid(&sandbox, name));
    sandbox.kill_daemon();
    web(&sandbox).write("go", "");
    kill_hard(pids[1]);
    shims.into_iter().for_each(wait_for_end);
    sandbox.start_daemon();
    let (code, signal) = (agent(&sandbox, "code"), agent(&sandbox, "signal"));
    assert_eq!((code.status, code.exit), (AgentStatus::Failed, Some(ExitStatus::Code(42))));
    assert_eq!((signal.status, signal.exit), (AgentStatus::Failed, Some(ExitStatus::Signal(9))));
    assert_eq!(sandbox.ctl(&["wait", "web/code"]), "42\n");
}

#[test]
fn paused_stays_paused() {
    for config in MECHANISMS {
        let mut sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", "echo $$ > pid; while :; do echo x >> ticks; sleep 0.01; done");
        let pid = wait_for_pid(&sandbox, "pid");
        sandbox.ctl(&["pause", "web"]);
        let ticks = web(&sandbox).read("ticks");
        for _ in 0..2 {
            sandbox.crash_and_restart();
            assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
        }
        assert_eq!(web(&sandbox).read("ticks"), ticks, "it moved while it was paused");
        sandbox.ctl(&["resume", "web"]);
        assert_eq!(agent(&sandbox, "a").pid, Some(pid));
        wait_until(SOON, "the agent to go on", || web(&sandbox).read("ticks") != ticks);
    }
}

fn second_daemon(sandbox: &Sandbox) -> Command {
    let ctl = sandbox.ctl_command::<&str>(&[]);
    let mut command = Command::new(binary("fermatad"));
    for (name, value) in ctl.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused_and_disturbs_nothing() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    let said = failed(&output_of(second_daemon(&sandbox)), 75);
    assert!(said.contains(&sandbox.daemon_pid().to_string()), "{said}");
    let mut elsewhere = second_daemon(&sandbox);
    elsewhere.env("FERMATA_RUNTIME_DIR", sandbox.path().join("other"));
    failed(&output_of(elsewhere), 75);
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn a_killed_shim_takes_its_tree_along_and_the_agent_is_interrupted() {
    for config in MECHANISMS {
        for down in [false, true] {
            let mut sandbox = Sandbox::builder().config(config).start();
            run_agent(&sandbox, "a", "echo $$ > pid; setsid sh -c 'echo $$ > session; exec sleep 1000' & wait");
            let pids = ["pid", "session"].map(|file| wait_for_pid(&sandbox, file));
            let shim = shim_pid(&sandbox, "a");
            if down {
                sandbox.kill_daemon();
            }
            kill_hard(shim);
            if down {
                sandbox.start_daemon();
            }
            wait_for_status(&sandbox, "a", AgentStatus::Interrupted);
            pids.into_iter().for_each(wait_for_end);
            let lost = agent(&sandbox, "a");
            assert_eq!((lost.exit, lost.pid), (None, None));
            assert!(lost.detail.is_some_and(|detail| detail.contains("shim")));
        }
    }
}

#[test]
fn after_a_reboot_agents_are_interrupted_and_no_process_is_signalled() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo $$ > pid; exec sleep 1000");
    let (pid, shim) = (wait_for_pid(&sandbox, "pid"), shim_pid(&sandbox, "a"));
    let path = run_dir(&sandbox, "a").join("run.json");
    let mut record = run_record(&sandbox, "a");
    sandbox.kill_daemon();
    // As on a rebooted machine on which other processes have the same pids.
    record["boot_id"] = json!("00000000-0000-0000-0000-000000000000");
    std::fs::write(&path, record.to_string()).expect("write run.json");
    sandbox.start_daemon();
    let lost = agent(&sandbox, "a");
    assert_eq!((lost.status, lost.exit), (AgentStatus::Interrupted, None));
    assert!(lost.detail.is_some_and(|detail| detail.contains("restarted")));
    assert!(process::is_alive(pid) && process::is_alive(shim), "processes of another boot are not ours");
    kill_hard(pid);
    wait_for_end(shim);
    // The agent can still be started by hand.
    sandbox.ctl(&["restart", "web/a"]);
    assert_eq!(agent(&sandbox, "a").runs, 2);
}

#[test]
fn a_paused_agent_that_a_reboot_took_comes_back_with_the_resume() {
    let mut sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo ${FERMATA_RESUME:-0} >> runs; echo $$ > pid; exec sleep 1000");
    let (pid, shim) = (wait_for_pid(&sandbox, "pid"), shim_pid(&sandbox, "a"));
    sandbox.ctl(&["pause", "web"]);
    let path = run_dir(&sandbox, "a").join("run.json");
    let mut record = run_record(&sandbox, "a");
    sandbox.kill_daemon();
    kill_hard(pid);
    wait_for_end(shim);
    record["boot_id"] = json!("00000000-0000-0000-0000-000000000000");
    std::fs::write(&path, record.to_string()).expect("write run.json");
    std::fs::remove_file(path.with_file_name("exit.json")).ok();
    sandbox.start_daemon();
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
    let resumed = sandbox.ctl_json(&["resume", "web"]);
    assert_eq!(resumed["agents"][0]["rung"], "respawned", "{resumed}");
    wait_until(SOON, "the second run", || web(&sandbox).read("runs") == "0\n1\n");
}

/// Starts the daemon again with `--no-recover`.
fn skipping() -> SandboxBuilder {
    Sandbox::builder().env("FERMATA_SKIP_RECOVERY", "1")
}

#[test]
fn a_daemon_that_skips_recovery_adopts_agents_and_records_which_have_ended() {
    let mut sandbox = skipping().start();
    run_agent(&sandbox, "a", "echo $$ > pid.a; exec sleep 1000");
    run_agent(&sandbox, "b", "echo $$ > pid.b; exec sleep 1000");
    let pids = ["pid.a", "pid.b"].map(|file| wait_for_pid(&sandbox, file));
    let shim = shim_pid(&sandbox, "b");
    sandbox.kill_daemon();
    kill_hard(pids[1]);
    wait_for_end(shim);
    sandbox.start_daemon();
    assert_eq!((agent(&sandbox, "a").status, agent(&sandbox, "a").pid), (AgentStatus::Running, Some(pids[0])));
    let ended = agent(&sandbox, "b");
    assert_eq!((ended.status, ended.exit), (AgentStatus::Failed, Some(ExitStatus::Signal(9))));
    sandbox.ctl(&["stop", "web/a"]);
    wait_for_end(pids[0]);
}

#[test]
fn a_launch_that_the_daemon_did_not_live_to_see_is_found() {
    for point in ["launch.before", "launch.after"] {
        let mut sandbox = Sandbox::builder().env("FERMATA_FAILPOINT", &format!("{point}=abort")).start();
        let workspace = web(&sandbox);
        let place = ["run", "-p", "web", "-w", workspace.text(), "--cwd", workspace.text(), "-n", "a"];
        let script = ["--", "/bin/sh", "-c", "echo $$ > pid; exec sleep 1000"];
        assert!(!sandbox.ctl_output(&[&place[..], &script].concat()).status.success());
        sandbox.kill_daemon();
        sandbox.start_daemon();
        let found = agent(&sandbox, "a");
        if point == "launch.after" {
            let pid = wait_for_pid(&sandbox, "pid");
            assert_eq!((found.status, found.pid), (AgentStatus::Running, Some(pid)));
        } else {
            assert_eq!((found.status, found.pid), (AgentStatus::Interrupted, None));
            assert!(!web(&sandbox).has("pid"));
            sandbox.ctl(&["rm", "web/a"]);
        }
    }
}

#[test]
fn an_agent_whose_shim_was_killed_before_it_recorded_the_start_is_ended() {
    for config in MECHANISMS {
        for down in [false, true] {
            let point = "shim.agent_started=stop";
            let mut sandbox = Sandbox::builder().config(config).env("FERMATA_FAILPOINT", point).start();
            let workspace = web(&sandbox);
            let place = ["run", "-p", "web", "-w", workspace.text(), "--cwd", workspace.text(), "-n", "a"];
            let text = "setsid sh -c 'echo $$ > pid.child; exec sleep 1000' & echo $$ > pid; wait; echo on > went.on";
            let script = ["--", "/bin/sh", "-c", text];
            let pids = std::thread::scope(|scope| {
                let started = scope.spawn(|| sandbox.ctl_output(&[&place[..], &script].concat()));
                let pids = ["pid", "pid.child"].map(|file| wait_for_pid(&sandbox, file));
                let shim = process::parent(pids[0]).expect("the agent has a parent");
                wait_until(SOON, "the shim to stand", || process::state(shim) == Some('T'));
                if down {
                    kill_hard(sandbox.daemon_pid());
                }
                kill_hard(shim);
                assert!(!started.join().expect("the command comes to an end").status.success());
                pids
            });
            if down {
                sandbox.kill_daemon();
                sandbox.forget_env("FERMATA_FAILPOINT");
                sandbox.start_daemon();
            }
            pids.into_iter().for_each(wait_for_end);
            assert!(!workspace.has("went.on"), "the agent saw the death of its child and went on");
            assert!(agent(&sandbox, "a").status.is_terminal());
        }
    }
}

#[test]
fn a_shim_that_is_killed_while_its_agent_is_resumed_is_reported_once_and_leaves_no_pid_behind() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "exec sleep 1000");
    run_agent(&sandbox, "b", "exec sleep 1000");
    // The daemon notices the loss of the shim or the failed thaw first; ten rounds cover both.
    for _ in 0..10 {
        sandbox.ctl(&["pause", "web"]);
        let shim = shim_pid(&sandbox, "a");
        std::thread::scope(|scope| {
            let resumed = scope.spawn(|| sandbox.ctl_output(&["resume", "web"]));
            kill_hard(shim);
            resumed.join().expect("the resume comes to an end");
        });
        wait_until(SOON, "the agent to be given up", || agent(&sandbox, "a").status.is_terminal());
        let lost = agent(&sandbox, "a");
        assert_eq!((lost.status, lost.pid, lost.exit), (AgentStatus::Interrupted, None, None), "{lost:?}");
        assert!(lost.ended_at.is_some(), "{lost:?}");
        let kinds = ["agent.interrupted", "agent.exited", "agent.parked"].map(str::to_owned).to_vec();
        let filter = EventFilter { project: None, kinds };
        let interrupted =
            sandbox.rpc().call(&EventsList { cursor: None, filter, limit: None }).expect("list events").events;
        let run = lost.run.expect("it has run");
        let ends = interrupted
            .iter()
            .filter(|recorded| matches!(&recorded.event, Event::AgentInterrupted { run: of, .. } if *of == run));
        assert_eq!(ends.count(), 1, "{interrupted:?}");
        sandbox.ctl(&["restart", "web/a"]);
    }
}

/// Starts agents in parallel that count lines until they are stopped, and end with different exit codes.
fn counting(sandbox: &Sandbox, names: &[String]) {
    let workspace = web(sandbox);
    sandbox.ctl(&["project", "create", "web", "-w", workspace.text()]);
    std::thread::scope(|scope| {
        for names in names.chunks(names.len().div_ceil(8)) {
            scope.spawn(move || {
                for name in names {
                    let number: u32 = name.trim_start_matches('a').parse().expect("a number");
                    let script = format!(
                        "echo $$ > pid.{name}; i=0; while [ ! -e stop.{} ] && [ ! -e stop ]; do i=$((i+1)); \
                         echo line $i; sleep 0.05; done; echo end $i; exit {}",
                        number % 2,
                        number % 7
                    );
                    run_agent(sandbox, name, &script);
                }
            });
        }
    });
    for name in names {
        wait_for_pid(sandbox, &format!("pid.{name}"));
    }
}

#[test]
fn sixty_agents_are_adopted_side_by_side_and_miss_no_line_and_no_exit_code() {
    let mut sandbox = Sandbox::start();
    let names: Vec<String> = (0..60).map(|number| format!("a{number}")).collect();
    counting(&sandbox, &names);
    let before = sandbox.agents();
    sandbox.kill_daemon();
    // Every other agent ends while no daemon runs.
    web(&sandbox).write("stop.1", "");
    for agent in before.iter().filter(|agent| is_odd(agent.name.as_str())) {
        wait_for_end(agent.pid.expect("it ran"));
    }
    sandbox.start_daemon();
    for (was, is) in before.iter().zip(sandbox.agents()) {
        assert_eq!((&was.name, is.runs), (&is.name, 1));
        if !is_odd(is.name.as_str()) {
            assert_eq!((is.status, is.pid), (AgentStatus::Running, was.pid), "{}", is.name);
        }
    }
    web(&sandbox).write("stop", "");
    for name in &names {
        let number: i32 = name.trim_start_matches('a').parse().expect("a number");
        wait_until(SOON, "its end", || agent(&sandbox, name).status.is_terminal());
        assert_eq!(agent(&sandbox, name).exit, Some(ExitStatus::Code(number % 7)), "{name}");
        let text = sandbox.ctl(&["logs", &format!("web/{name}")]);
        let lines: Vec<&str> = text.lines().collect();
        let count = lines.len() - 1;
        assert!(
            lines[..count].iter().enumerate().all(|(at, line)| **line == format!("line {}", at + 1)),
            "{name}: a gap"
        );
        assert_eq!(lines[count], format!("end {count}"), "{name}");
    }
}

fn is_odd(name: &str) -> bool {
    name.trim_start_matches('a').parse::<u32>().expect("a number") % 2 == 1
}
