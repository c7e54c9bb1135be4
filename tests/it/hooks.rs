//! Commands before an agent's start and after its end: `run --pre-start`, `run --post-stop`.

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_tests::Sandbox;
use fermata_tests::process;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::json;

use crate::bed::{
    MECHANISMS, agent, call, failed, run_dir, run_record, wait_for_file, wait_for_pid, wait_for_status, web,
};

fn run_with(sandbox: &Sandbox, flags: &[&str], script: &str) {
    let workspace = web(sandbox);
    let place = ["run", "-p", "web", "-w", workspace.text(), "--cwd", workspace.text(), "-n", "a"];
    sandbox.ctl(&[&place[..], flags, &["--", "/bin/sh", "-c", script]].concat());
}

#[test]
fn a_pre_start_comes_first_and_a_post_stop_last() {
    for mechanism in MECHANISMS {
        let sandbox = Sandbox::builder().config(mechanism).start();
        let post_stop = "/bin/sh -c 'echo after $FERMATA_EXIT_CODE $FERMATA_AGENT >> steps'";
        run_with(
            &sandbox,
            &["--pre-start", "/bin/sh -c 'echo before >> steps; echo \"it speaks\"'", "--post-stop", post_stop],
            "echo agent >> steps; exit 9",
        );
        wait_for_status(&sandbox, "a", AgentStatus::Failed);
        assert_eq!(agent(&sandbox, "a").exit, Some(ExitStatus::Code(9)));
        assert_eq!(web(&sandbox).read("steps"), "before\nagent\nafter 9 a\n");
        let rows = sandbox.ctl_rows(&["logs", "web/a"]);
        let streams: Vec<_> = rows.iter().filter_map(|row| row["stream"].as_str()).collect();
        assert_eq!(streams, ["note", "stdout", "note", "note", "note"]);
        assert_eq!(sandbox.ctl(&["logs", "web/a"]), "it speaks\n", "notes are no output");
    }
}

#[test]
fn a_failed_pre_start_is_a_failed_agent_that_says_which_command_it_was() {
    let sandbox = Sandbox::start();
    run_with(&sandbox, &["--pre-start", "/bin/sh -c 'exit 5'"], "touch ran");
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    let detail = agent(&sandbox, "a").detail.expect("a reason");
    assert_eq!(detail, "the pre-start command '/bin/sh -c exit 5' ended with exit code 5");
    assert!(!web(&sandbox).path().join("ran").exists());
}

#[test]
fn a_project_is_paused_and_resumed_in_the_middle_of_a_pre_start() {
    for mechanism in MECHANISMS {
        let sandbox = Sandbox::builder().config(mechanism).start();
        let hook = "/bin/sh -c 'echo $$ > pid; while [ ! -e go ]; do echo x >> near; sleep 0.01; done'";
        run_with(&sandbox, &["--pre-start", hook], "echo agent > ran; exec sleep 1000");
        let pid = wait_for_pid(&sandbox, "pid");
        let workspace = web(&sandbox);
        let grown = |than: usize| workspace.read("near").len() > than;
        wait_until(SOON, "the hook to work", || grown(0));
        sandbox.ctl(&["pause", "web"]);
        let size = workspace.read("near").len();
        workspace.write("go", "");
        assert!(process::is_alive(pid), "the hook is frozen although the file exists");
        assert_eq!(workspace.read("near").len(), size);
        assert!(!workspace.path().join("ran").exists());
        sandbox.ctl(&["resume", "web"]);
        wait_for_file(&sandbox, "ran");
        sandbox.ctl(&["kill", "web/a"]);
    }
}

#[test]
fn the_next_run_waits_for_the_post_stop_of_the_last_one() {
    let sandbox = Sandbox::start();
    let post_stop = "/bin/sh -c 'echo post-stop >> steps; while [ ! -e go ]; do sleep 0.01; done; echo over >> steps'";
    run_with(&sandbox, &["--post-stop", post_stop], "echo agent >> steps; exec sleep 1000");
    wait_until(SOON, "the agent", || web(&sandbox).read("steps") == "agent\n");
    let mut restart = sandbox.ctl_command(&["restart", "web/a"]);
    let mut restart = restart.stdout(std::process::Stdio::null()).spawn().expect("restart");
    wait_until(SOON, "the post-stop", || web(&sandbox).read("steps") == "agent\npost-stop\n");
    web(&sandbox).write("go", "");
    assert!(restart.wait().expect("wait for it").success());
    wait_until(SOON, "the next run", || web(&sandbox).read("steps") == "agent\npost-stop\nover\nagent\n");
    // The second post-stop finds the file and ends at once.
    sandbox.ctl(&["stop", "web/a"]);
}

#[test]
fn the_exit_is_known_when_shim_or_daemon_are_killed_during_a_post_stop() {
    for daemon_too in [false, true] {
        let mut sandbox = Sandbox::start();
        let post_stop = "/bin/sh -c 'echo $$ > hook; exec sleep 1000'";
        run_with(&sandbox, &["--post-stop", post_stop], "exit 42");
        let hook = wait_for_pid(&sandbox, "hook");
        let shim = run_record(&sandbox, "a")["shim"]["pid"].as_i64().expect("a pid");
        let shim = nix::unistd::Pid::from_raw(i32::try_from(shim).expect("a pid"));
        assert!(run_dir(&sandbox, "a").join("ended.json").exists());
        if daemon_too {
            sandbox.kill_daemon();
        }
        nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).expect("kill the shim");
        if daemon_too {
            sandbox.start_daemon();
        }
        wait_for_status(&sandbox, "a", AgentStatus::Failed);
        assert_eq!(agent(&sandbox, "a").exit, Some(ExitStatus::Code(42)));
        wait_until(SOON, "the hook's end", || !process::is_alive(hook));
    }
}

#[test]
fn hooks_without_a_program_are_refused() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    let place = ["run", "-p", "web", "-w", workspace.text()];
    for (flag, value) in [("--pre-start", " "), ("--post-stop", ""), ("--pre-start", "'open")] {
        let said = failed(&sandbox.ctl_output(&[&place[..], &[flag, value, "--", "/bin/true"]].concat()), 2);
        assert!(said.contains(flag), "{said}");
    }
    let params = json!({ "project": "web", "workspace": workspace.text(), "argv": ["/bin/true"],
        "supervision": { "post_stop": { "argv": [] } } });
    let refused = call(&sandbox, "agent.run", params).expect_err("no program").to_string();
    assert!(refused.contains("supervision.post_stop"), "{refused}");
}
