//! `kill`: the whole tree at once, or a signal to the main process.

use fermata_protocol::agent::AgentStatus;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};

use crate::bed::{MECHANISMS, agent, failed, run_agent, wait_for_file, wait_for_pid, web};

/// Three kinds of descendants: a child, one in a session of its own, and an orphan in a session of its own.
const FAMILY: &str = "sleep 1000 & echo $! > child; setsid sh -c 'echo $$ > session; exec sleep 1000' & \
    (setsid sh -c 'echo $$ > orphan; exec sleep 1000' &) ; wait";

fn family(sandbox: &Sandbox) -> [i32; 3] {
    ["child", "session", "orphan"].map(|file| wait_for_pid(sandbox, file))
}

#[test]
fn grandchildren_in_sessions_of_their_own_are_killed_too() {
    for config in MECHANISMS {
        for paused in [false, true] {
            let sandbox = Sandbox::builder().config(config).start();
            run_agent(&sandbox, "a", FAMILY);
            let pids = family(&sandbox);
            if paused {
                sandbox.ctl(&["pause", "web"]);
            }
            sandbox.ctl(&["kill", "web/a"]);
            assert!(!pids.iter().any(|pid| process::is_alive(*pid)), "left behind: {pids:?}");
            assert!(agent(&sandbox, "a").status.is_terminal());
        }
    }
}

#[test]
fn nothing_is_left_when_the_main_process_ends_by_itself() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", &FAMILY.replace("wait", "while [ ! -e go ]; do sleep 0.02; done"));
        let pids = family(&sandbox);
        web(&sandbox).write("go", "");
        crate::bed::wait_for_status(&sandbox, "a", AgentStatus::Exited);
        assert!(!pids.iter().any(|pid| process::is_alive(*pid)), "left behind: {pids:?}");
    }
}

#[test]
fn a_signal_goes_to_the_main_process_alone() {
    let sandbox = Sandbox::start();
    run_agent(
        &sandbox,
        "a",
        "trap 'echo main > got' USR1; (trap 'echo child > got.child' USR1; while :; do sleep 0.02; done) & echo > ready; while :; do sleep 0.02; done",
    );
    wait_for_file(&sandbox, "ready");
    for name in ["USR1", "SIGUSR1", "usr1", "10"] {
        sandbox.ctl(&["kill", "web/a", "-s", name]);
        wait_until(SOON, "the signal to arrive", || web(&sandbox).has("got"));
        web(&sandbox).remove("got");
    }
    assert!(!web(&sandbox).has("got.child"));
    let output = sandbox.ctl_output(&["kill", "web/a", "-s", "NONSENSE"]);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{output:?}");
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
    sandbox.ctl(&["kill", "web/a"]);
    failed(&sandbox.ctl_output(&["kill", "web/a"]), 1);
    failed(&sandbox.ctl_output(&["kill", "web/a", "-s", "USR1"]), 1);
    failed(&sandbox.ctl_output(&["kill", "web/nobody", "-s", "USR1"]), 3);
}

#[test]
fn a_signal_to_a_paused_agent_waits_for_the_resume() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", "trap 'echo > got' USR1; echo > ready; while :; do sleep 0.02; done");
        wait_for_file(&sandbox, "ready");
        sandbox.ctl(&["pause", "web"]);
        sandbox.ctl(&["kill", "web/a", "-s", "USR1"]);
        assert_eq!(agent(&sandbox, "a").status, AgentStatus::Paused);
        assert!(!web(&sandbox).has("got"));
        sandbox.ctl(&["resume", "web"]);
        wait_until(SOON, "the signal to arrive", || web(&sandbox).has("got"));
    }
}
