//! `run`: what an agent inherits at its start, and failures of a start.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use fermata_protocol::agent::{AgentStatus, ExitStatus};
use fermata_tests::Sandbox;
use fermata_tests::sandbox::output_of;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

use crate::bed::{agent, call, failed, run_agent, wait_for_file, wait_for_status, web};

#[test]
fn environment_directory_umask_and_limits_are_the_callers() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    workspace.write("deep/er/.keep", "");
    let out = workspace.path().join("out");
    let script = format!(
        "pwd > {0}; umask >> {0}; ulimit -n >> {0}; echo \"$CALLER\" >> {0}; cat /proc/self/limits | grep -c . >> {0}; \
         echo >> {0}; env > {0}.env",
        out.display()
    );
    // The daemon and the caller differ in everything: the agent inherits from the caller.
    let mut caller = std::process::Command::new("/bin/sh");
    let ctl = sandbox.ctl_command::<&str>(&[]);
    caller.args(["-c", "umask 027; ulimit -n 123; exec \"$0\" \"$@\""]).arg(ctl.get_program());
    caller.args(ctl.get_args()).args(["run", "-p", "web", "-w", workspace.text(), "-n", "a", "--wait", "--"]);
    caller.args(["/bin/sh", "-c", &script]).current_dir(workspace.path().join("deep/er"));
    for (name, value) in ctl.get_envs() {
        match value {
            Some(value) => caller.env(name, value),
            None => caller.env_remove(name),
        };
    }
    caller.env("CALLER", "line one\nline two = ü");
    let output = output_of(caller);
    assert!(output.status.success(), "{output:?}");
    let text = workspace.read("out");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], workspace.path().join("deep/er").to_str().expect("UTF-8"));
    assert_eq!(lines[1], "0027");
    assert_eq!(lines[2], "123");
    assert_eq!(&lines[3..5], ["line one", "line two = ü"]);
    let mode = fs::metadata(&out).expect("written").permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    let env = workspace.read("out.env");
    let value = |name: &str| env.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
    assert_eq!(value("FERMATA_PROJECT"), Some("web"));
    assert_eq!(value("FERMATA_AGENT"), Some("a"));
    assert_eq!(value("FERMATA_SOCKET"), sandbox.socket().to_str());
    assert!(value("FERMATA_TOKEN").is_some_and(|token| token.len() >= 32), "{env}");
    assert_eq!(value("FERMATA_RESUME"), None, "nothing was resumed");
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("own limit");
    assert_ne!(soft, 123, "this test needs a limit of its own");
}

#[test]
fn a_caller_that_names_no_limits_gets_those_that_the_daemon_was_started_with() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("own limit");
    // The daemon raises its own soft limit to the hard one; the test needs the two to differ.
    setrlimit(Resource::RLIMIT_NOFILE, hard - 7, hard).expect("lower the own limit");
    let sandbox = Sandbox::start();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("raise the own limit again");
    let workspace = web(&sandbox);
    let params = json!({
        "project": "web", "workspace": workspace.text(), "name": "a",
        "argv": ["/bin/sh", "-c", "echo $(ulimit -Sn) $(ulimit -Hn) > limits; mv limits limits.whole"],
    });
    call(&sandbox, "agent.run", params).expect("run");
    assert_eq!(wait_for_file(&sandbox, "limits.whole"), format!("{} {hard}", hard - 7));
    let raised = fs::read_to_string(format!("/proc/{}/limits", sandbox.daemon_pid())).expect("the daemon's limits");
    let line = raised.lines().find(|line| line.starts_with("Max open files")).expect("it has one");
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert_eq!(numbers, [hard, hard], "the daemon itself may open as many as it can");
}

#[test]
fn the_exit_code_and_the_signal_are_kept() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "code", "exit 37");
    run_agent(&sandbox, "signal", "kill -SEGV $$");
    run_agent(&sandbox, "fine", "exit 0");
    wait_for_status(&sandbox, "code", AgentStatus::Failed);
    wait_for_status(&sandbox, "signal", AgentStatus::Failed);
    wait_for_status(&sandbox, "fine", AgentStatus::Exited);
    assert_eq!(agent(&sandbox, "code").exit, Some(ExitStatus::Code(37)));
    assert_eq!(agent(&sandbox, "signal").exit, Some(ExitStatus::Signal(11)));
    assert_eq!(agent(&sandbox, "fine").exit, Some(ExitStatus::Code(0)));
}

#[test]
fn a_program_that_ends_at_once_was_started_nevertheless() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    for round in 0..30 {
        let name = format!("a{round}");
        let place = ["run", "-p", "web", "-w", workspace.text(), "-n", &name];
        let output = sandbox.ctl_output(&[&place[..], &["--wait", "--", "/bin/sh", "-c", "exit 3"]].concat());
        failed(&output, 3);
    }
}

#[test]
fn what_cannot_be_started_says_why_and_ends_with_code_1() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    workspace.write("plain", "no program").write("script", "#!/no/such/interpreter\n").write("dir/x", "");
    fs::set_permissions(workspace.path().join("script"), fs::Permissions::from_mode(0o755)).expect("chmod");
    let path = |name: &str| workspace.path().join(name).to_str().expect("UTF-8").to_owned();
    let cases = [
        ("/no/such/program".to_owned(), "no program"),
        ("no-such-program-in-the-path".to_owned(), "no-such-program-in-the-path"),
        (path("plain"), "ermission denied"),
        (path("script"), "interpreter"),
        (path("dir"), "ermission denied"),
    ];
    for (program, reason) in cases {
        let said = failed(&sandbox.ctl_output(&["run", "-p", "web", "-w", workspace.text(), "--", &program]), 1);
        assert!(said.contains(&program) && said.contains(reason), "{program}: {said}");
    }
    let place = ["run", "-p", "web", "-w", workspace.text()];
    let gone = path("gone");
    fs::create_dir(&gone).expect("create a directory");
    let said = {
        let mut command =
            sandbox.ctl_command(&[&place[..], &["-n", "lost", "--cwd", &gone, "--", "/bin/true"]].concat());
        command.current_dir("/");
        output_of(command)
    };
    assert!(said.status.success(), "{said:?}");
    fs::remove_dir(&gone).expect("remove it");
    let said = failed(&sandbox.ctl_output(&["restart", "web/lost"]), 1);
    assert!(said.contains(&gone), "{said}");
    let lost = agent(&sandbox, "lost");
    assert_eq!(lost.status, AgentStatus::Failed);
    assert!(lost.detail.is_some_and(|detail| detail.contains(&gone)));
}

#[test]
fn workspaces_that_would_hold_everything_or_nothing_are_refused() {
    let sandbox = Sandbox::start();
    let home = sandbox.home();
    for workspace in ["/", "/no/such/dir", home.to_str().expect("UTF-8"), "/etc/hostname"] {
        let output = sandbox.ctl_output(&["run", "-p", "web", "-w", workspace, "--", "/bin/true"]);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{workspace}: {output:?}");
    }
    assert!(sandbox.ctl_rows(&["project", "ls"]).is_empty());
}

#[test]
fn a_taken_name_is_refused_and_a_free_one_is_made() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    run_agent(&sandbox, "a", "exec sleep 1000");
    let said = failed(&sandbox.ctl_output(&["run", "-p", "web", "-n", "a", "--", "/bin/true"]), 1);
    assert!(said.contains("running already"), "{said}");
    let sleep = ["run", "-p", "web", "-w", workspace.text(), "--", "/bin/sleep", "1000"];
    let names: Vec<_> = (0..3).map(|_| sandbox.ctl_json(&sleep)["name"].clone()).collect();
    assert_eq!(names, ["sleep", "sleep-2", "sleep-3"]);
    let other = sandbox.workspace("other");
    let said = failed(&sandbox.ctl_output(&["run", "-p", "web", "-w", other.text(), "--", "/bin/true"]), 1);
    assert!(said.contains("has the workspace"), "{said}");
    // The name of an ended agent can be used again, and its earlier run is part of the history.
    sandbox.ctl(&["kill", "web/a"]);
    run_agent(&sandbox, "a", "echo again > again; exec sleep 1000");
    wait_for_file(&sandbox, "again");
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Running);
}

#[test]
fn twenty_agents_started_at_once_all_run_under_names_of_their_own() {
    let sandbox = Sandbox::start();
    let workspace = web(&sandbox);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| sandbox.ctl(&["run", "-p", "web", "-w", workspace.text(), "--", "/bin/sleep", "1000"]));
        }
    });
    let agents = sandbox.agents();
    assert_eq!(agents.len(), 20);
    assert!(agents.iter().all(|agent| agent.status == AgentStatus::Running && agent.pid.is_some()), "{agents:#?}");
}
