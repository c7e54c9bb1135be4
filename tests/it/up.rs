//! `up`: the agents that a `fermata.toml` declares are started, and those that run as declared are left alone.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ExitStatus, Stdio};

use fermata_protocol::agent::AgentStatus;
use fermata_tests::{Sandbox, Workspace, process};
use serde_json::Value;

use crate::bed::{agent, failed, run_agent, wait_for_file, wait_for_status, web};

/// Writes the `fermata.toml` of the project `web`.
pub fn declare(sandbox: &Sandbox, text: &str) -> PathBuf {
    let workspace = web(sandbox);
    workspace.write("fermata.toml", text);
    let file = workspace.path().join("fermata.toml");
    // Independent of the umask.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    file
}

fn file_of(workspace: &Workspace) -> String {
    format!("{}/fermata.toml", workspace.text())
}

/// Runs a command on the file of `web` and returns target and action of each row.
#[track_caller]
pub fn rows(sandbox: &Sandbox, args: &[&str]) -> Vec<(String, String)> {
    let file = file_of(&web(sandbox));
    let all = sandbox.ctl_rows(&[&args[..1], &["--file", &file], &args[1..]].concat());
    all.iter().map(pair).collect()
}

fn pair(row: &Value) -> (String, String) {
    let text = |name: &str| row[name].as_str().unwrap_or_default().to_owned();
    (text("target"), text("action"))
}

/// Returns the expected rows.
pub fn are(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(target, action)| ((*target).to_owned(), (*action).to_owned())).collect()
}

#[track_caller]
fn refused(sandbox: &Sandbox, args: &[&str], code: i32) -> String {
    let file = file_of(&web(sandbox));
    failed(&sandbox.ctl_output(&[&args[..1], &["--file", &file], &args[1..]].concat()), code)
}

/// An `up --wait` in progress.
struct Waiter {
    child: Child,
    said: BufReader<ChildStderr>,
}

impl Waiter {
    #[track_caller]
    fn start(sandbox: &Sandbox) -> Self {
        // Its own timeout ends it, so that reading its output always ends.
        let mut up = sandbox.ctl_command(&["up", "--wait", "--timeout", "60s", "--file", &file_of(&web(sandbox))]);
        let mut child = up.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start fermatactl");
        let said = BufReader::new(child.stderr.take().expect("it is piped"));
        Self { child, said }
    }

    /// Reads its output up to this text.
    #[track_caller]
    fn read_until(&mut self, word: &str) -> String {
        let mut text = String::new();
        while !text.contains(word) {
            let read = self.said.read_line(&mut text).expect("read what it says");
            assert!(read > 0, "it ended without '{word}': {text}");
        }
        text
    }

    /// Waits for its end; returns the rest of its output.
    #[track_caller]
    fn end(mut self) -> (ExitStatus, String) {
        let mut text = String::new();
        self.said.read_to_string(&mut text).expect("read what it says");
        (self.child.wait().expect("it ends"), text)
    }
}

const TWO: &str = r#"
[project]
description = "two agents"
[project.config]
exclude = ["cold/"]
[agents.db]
command = "/bin/sh -c 'pwd > said.cwd; echo $COLOUR > said.env; exec sleep 1000'"
cwd = "deep"
env = { COLOUR = "red" }
[agents.web]
command = ["/bin/sleep", "1000"]
depends_on = [{ agent = "db", until = "started" }]
"#;

#[test]
fn a_second_up_changes_nothing() {
    let sandbox = Sandbox::start();
    web(&sandbox).write("deep/.keep", "");
    declare(&sandbox, TWO);
    let first = rows(&sandbox, &["up"]);
    assert_eq!(first, are(&[("web", "created"), ("web/db", "started"), ("web/web", "started")]));
    assert_eq!(wait_for_file(&sandbox, "deep/said.cwd"), web(&sandbox).path().join("deep").to_string_lossy());
    assert_eq!(wait_for_file(&sandbox, "deep/said.env"), "red");
    wait_for_status(&sandbox, "web", AgentStatus::Running);
    let project = sandbox.ctl_json(&["project", "show", "web"]);
    assert_eq!(project["project"]["description"], "two agents");
    assert_eq!(project["config"]["exclude"][0], "cold/");
    let runs = |name: &str| agent(&sandbox, name).run;
    let before = (runs("db"), runs("web"));
    let events = || sandbox.ctl_rows(&["events", "-p", "web"]).len();
    let events_before = events();
    assert_eq!(rows(&sandbox, &["up"]), are(&[("web/db", "up_to_date"), ("web/web", "up_to_date")]));
    let again = sandbox.ctl_output(&["up", "--file", &file_of(&web(&sandbox))]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("web: up to date"), "{again:?}");
    assert_eq!(((runs("db"), runs("web")), events()), (before, events_before));
    // Another terminal with other variables is no change; neither is a selection of agents.
    let mut other = sandbox.ctl_command(&["--json", "up", "web", "--file", &file_of(&web(&sandbox))]);
    other.env("TERM_SESSION", "2");
    let other = fermata_tests::sandbox::output_of(other);
    let text = String::from_utf8_lossy(&other.stdout).into_owned();
    assert_eq!(text.matches("\"up_to_date\"").count(), 2, "{text}");
}

#[test]
fn the_environment_is_the_callers_unless_the_file_says_otherwise() {
    let sandbox = Sandbox::start();
    web(&sandbox).write("vars", "FROM_FILE=1\nBOTH=file\n");
    fs::set_permissions(web(&sandbox).path().join("vars"), fs::Permissions::from_mode(0o600)).expect("chmod");
    declare(
        &sandbox,
        "[agents.all]\ncommand = \"/bin/sh -c 'env > all.env; echo > all.done; exec sleep 1000'\"\nenv_file = \"vars\"\n\
         env = { BOTH = \"table\" }\n\
         [agents.some]\ncommand = \"/bin/sh -c 'env > some.env; echo > some.done; exec sleep 1000'\"\n\
         pass_env = [\"PATH\", \"KEPT_*\", \"GONE\"]\n",
    );
    let mut up = sandbox.ctl_command(&["up", "--file", &file_of(&web(&sandbox))]);
    up.env("KEPT_A", "a").env("LOST", "l").env_remove("GONE");
    let up = fermata_tests::sandbox::output_of(up);
    assert!(up.status.success(), "{up:?}");
    assert!(String::from_utf8_lossy(&up.stderr).contains("web/some is started without GONE"), "{up:?}");
    wait_for_file(&sandbox, "all.done");
    wait_for_file(&sandbox, "some.done");
    let has = |file: &str, line: &str| web(&sandbox).read(file).lines().any(|l| l == line);
    for line in ["FROM_FILE=1", "BOTH=table", "KEPT_A=a", "LOST=l"] {
        assert!(has("all.env", line), "{line}");
    }
    assert!(has("some.env", "KEPT_A=a") && !has("some.env", "LOST=l"));
}

#[test]
fn what_has_changed_is_named_and_started_anew_only_when_asked() {
    let sandbox = Sandbox::start();
    let text = "[agents.a]\ncommand = [\"/bin/sleep\", \"1000\"]\nenv = { KEY = \"one\" }\n\
                [agents.b]\ncommand = [\"/bin/sleep\", \"1000\"]\n";
    let file = declare(&sandbox, text);
    rows(&sandbox, &["up"]);
    let pid = agent(&sandbox, "a").pid.expect("it runs");
    let other = agent(&sandbox, "b").run;
    // The same declaration, written differently.
    fs::write(&file, text.replace("[\"/bin/sleep\", \"1000\"]\nenv", "\"/bin/sleep 1000\" # the same\nenv"))
        .expect("write");
    assert_eq!(rows(&sandbox, &["up"]), are(&[("web/a", "up_to_date"), ("web/b", "up_to_date")]));
    fs::write(&file, text.replace("\"one\"", "\"two\"").replacen("1000", "1001", 1)).expect("write");
    let changed = sandbox.ctl_rows(&["up", "--file", file.to_str().expect("UTF-8")]);
    assert_eq!(pair(&changed[0]), ("web/a".into(), "changed".into()));
    assert_eq!(changed[0]["detail"], "command, env.KEY");
    assert!(process::is_alive(pid), "it was left alone");
    let all = sandbox.ctl_rows(&["events", "-p", "web"]);
    let text = serde_json::to_string(&all).expect("events");
    assert!(!text.contains("two"), "the value of a variable is shown");
    assert_eq!(rows(&sandbox, &["up", "--recreate", "--dry-run"])[0].1, "recreated");
    assert!(process::is_alive(pid), "a dry run ended the agent");
    assert_eq!(rows(&sandbox, &["up", "--recreate"]), are(&[("web/a", "recreated"), ("web/b", "up_to_date")]));
    assert!(!process::is_alive(pid));
    assert_eq!(agent(&sandbox, "a").argv, ["/bin/sleep", "1001"]);
    assert_eq!(agent(&sandbox, "b").run, other, "the other one was left alone");
    assert_eq!(rows(&sandbox, &["up", "--recreate"]), are(&[("web/a", "up_to_date"), ("web/b", "up_to_date")]));
}

#[test]
fn what_ended_is_started_again_unless_its_work_is_done() {
    let sandbox = Sandbox::start();
    let text = "[agents.done]\ncommand = \"/bin/sh -c 'exit 0'\"\n\
                [agents.broken]\ncommand = \"/bin/sh -c 'exit 3'\"\n\
                [agents.stopped]\ncommand = \"/bin/sh -c 'trap \\\"exit 0\\\" TERM; echo > trapped; while :; do sleep 0.05; done'\"\n";
    let file = declare(&sandbox, text);
    rows(&sandbox, &["up"]);
    wait_for_status(&sandbox, "done", AgentStatus::Exited);
    wait_for_status(&sandbox, "broken", AgentStatus::Failed);
    wait_for_file(&sandbox, "trapped");
    // It ends with 0 as well, but because a user stopped it.
    sandbox.ctl(&["stop", "web/stopped"]);
    let again = rows(&sandbox, &["up"]);
    assert_eq!(again, are(&[("web/broken", "started"), ("web/done", "completed"), ("web/stopped", "started")]));
    wait_for_status(&sandbox, "broken", AgentStatus::Failed);
    fs::write(&file, text.replace("exit 0'\"\n[agents.b", "exit  0'\"\n[agents.b")).expect("write");
    assert!(rows(&sandbox, &["up"]).contains(&("web/done".into(), "started".into())), "it is declared otherwise now");
}

#[test]
fn agents_that_are_not_declared_are_named_and_stopped_only_when_asked() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "byhand", "exec sleep 1000");
    let file =
        declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n[agents.b]\ncommand = \"/bin/sleep 1000\"\n");
    rows(&sandbox, &["up"]);
    fs::write(&file, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n").expect("write");
    let named = are(&[("web/a", "up_to_date"), ("web/b", "orphan"), ("web/byhand", "orphan")]);
    assert_eq!(rows(&sandbox, &["up"]), named);
    assert_eq!(rows(&sandbox, &["up", "a"]), named[..1]);
    assert_eq!(agent(&sandbox, "b").status, AgentStatus::Running);
    let stopped = are(&[("web/a", "up_to_date"), ("web/b", "stopped"), ("web/byhand", "stopped")]);
    assert_eq!(rows(&sandbox, &["up", "--remove-orphans", "--dry-run"]), stopped);
    assert_eq!(agent(&sandbox, "b").status, AgentStatus::Running);
    assert_eq!(rows(&sandbox, &["up", "--remove-orphans"]), stopped);
    assert!(agent(&sandbox, "b").status.is_terminal());
    assert_eq!(rows(&sandbox, &["up", "--remove-orphans"]), named[..1]);
    // An agent of that name that was started by hand is not the declared one.
    declare(&sandbox, "[agents.byhand]\ncommand = \"/bin/sleep 1000\"\n");
    run_agent(&sandbox, "byhand", "exec sleep 1000");
    assert_eq!(rows(&sandbox, &["up"])[0], ("web/byhand".into(), "changed".into()));
}

#[test]
fn only_the_named_agents_and_what_they_need_are_started() {
    let sandbox = Sandbox::start();
    declare(
        &sandbox,
        "[agents.a]\ncommand = \"/bin/sleep 1000\"\n[agents.b]\ncommand = \"/bin/sleep 1000\"\ndepends_on = [\"a\"]\n\
         [agents.c]\ncommand = \"/bin/sleep 1000\"\n",
    );
    let would = rows(&sandbox, &["up", "b", "--dry-run"]);
    assert_eq!(would, are(&[("web", "created"), ("web/a", "started"), ("web/b", "started")]));
    assert!(sandbox.ctl_rows(&["project", "ls"]).is_empty(), "a dry run does nothing");
    assert_eq!(rows(&sandbox, &["up", "b"]), would);
    assert_eq!(sandbox.agents().len(), 2);
    let said = refused(&sandbox, &["up", "nobody"], 3);
    assert!(said.contains("declares no agent 'nobody'") && said.contains("a, b, c"), "{said}");
}

#[test]
fn a_broken_file_starts_nothing() {
    let sandbox = Sandbox::start();
    declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n[agents.b]\ncomand = \"/bin/sleep 1000\"\n");
    let said = refused(&sandbox, &["up"], 2);
    assert!(said.contains("line 4, column 1") && said.contains("did you mean 'command'?"), "{said}");
    assert!(said.contains("4 | comand = \"/bin/sleep 1000\"\n  | ^^^^^^"), "{said}");
    assert!(sandbox.ctl_rows(&["project", "ls"]).is_empty());
    refused(&sandbox, &["down"], 2);
}

#[test]
fn the_file_is_found_above_and_must_be_trustworthy() {
    let sandbox = Sandbox::start();
    let file = declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n");
    web(&sandbox).write("deep/er/.keep", "");
    let from = |directory: &str| {
        let mut up = sandbox.ctl_command(&["up"]);
        up.current_dir(web(&sandbox).path().join(directory));
        fermata_tests::sandbox::output_of(up)
    };
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).expect("chmod");
    let said = failed(&from("."), 2);
    assert!(said.contains("writable by other users") && said.contains("chmod go-w"), "{said}");
    assert!(sandbox.ctl_rows(&["project", "ls"]).is_empty());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("chmod");
    let found = from("deep/er");
    assert!(found.status.success(), "{found:?}");
    let said = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(said.contains(&format!("using {}", file.display())), "{said}");
    assert_eq!(agent(&sandbox, "a").cwd, web(&sandbox).text());
    // Directories above the home directory are not searched, although the daemon's own file is there.
    let mut up = sandbox.ctl_command(&["up"]);
    up.current_dir(sandbox.home());
    let said = failed(&fermata_tests::sandbox::output_of(up), 3);
    assert!(said.contains("there is no fermata.toml"), "{said}");
}

#[test]
fn a_project_that_is_paused_or_has_another_workspace_is_left_alone() {
    let sandbox = Sandbox::start();
    declare(&sandbox, "[agents.a]\ncommand = \"/bin/sleep 1000\"\n");
    rows(&sandbox, &["up"]);
    sandbox.ctl(&["pause", "web"]);
    let said = refused(&sandbox, &["up"], 1);
    assert!(said.contains("is paused") && said.contains("fermatactl resume web"), "{said}");
    sandbox.ctl(&["resume", "web"]);
    assert_eq!(rows(&sandbox, &["up"]), are(&[("web/a", "up_to_date")]));
    let elsewhere = sandbox.workspace("elsewhere");
    elsewhere.write("fermata.toml", "project = \"web\"\n");
    fs::set_permissions(file_of(&elsewhere), fs::Permissions::from_mode(0o644)).expect("chmod");
    let said = failed(&sandbox.ctl_output(&["up", "--file", &file_of(&elsewhere)]), 1);
    assert!(said.contains("has the workspace") && said.contains("another project name"), "{said}");
}

#[test]
fn one_that_cannot_be_started_does_not_keep_the_others_from_it() {
    let sandbox = Sandbox::start();
    declare(&sandbox, "[agents.a]\ncommand = \"/no/such/program\"\n[agents.b]\ncommand = \"/bin/sleep 1000\"\n");
    let said = failed(&sandbox.ctl_output(&["up", "--file", &file_of(&web(&sandbox))]), 1);
    assert!(said.contains("web: 1 failed"), "{said}");
    assert_eq!(agent(&sandbox, "a").status, AgentStatus::Failed);
    assert_eq!(agent(&sandbox, "b").status, AgentStatus::Running);
}

#[test]
fn a_wait_ends_when_all_agents_are_ready_and_fails_when_one_cannot_become_ready() {
    let sandbox = Sandbox::start();
    let file = declare(
        &sandbox,
        "[agents.once]\ncommand = \"/bin/sh -c 'exit 0'\"\n[agents.stays]\ncommand = \"/bin/sleep 1000\"\n",
    );
    let output = sandbox.ctl_output(&["up", "--wait", "--file", &file_of(&web(&sandbox))]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("web/stays is ready"), "{said}");
    fs::write(&file, "[agents.fails]\ncommand = \"/no/such/program\"\n").expect("write");
    let said = failed(&sandbox.ctl_output(&["up", "--wait", "--file", &file_of(&web(&sandbox))]), 1);
    assert!(said.contains("web/fails will not become ready: failed, there is no program"), "{said}");
}

#[test]
fn a_wait_goes_by_readiness_and_dependents_start_after_it() {
    let sandbox = Sandbox::start();
    declare(
        &sandbox,
        "[agents.db]\ncommand = [\"/bin/sh\", \"-c\", \"until [ -e go ]; do sleep 0.02; done; echo listening; exec sleep 1000\"]\n\
         ready = { output = \"listening\" }\n\
         [agents.api]\ncommand = [\"/bin/sh\", \"-c\", \"echo > api.up; exec sleep 1000\"]\ndepends_on = [\"db\"]\n\
         [agents.plain]\ncommand = \"/bin/sleep 1000\"\n",
    );
    let all = sandbox.ctl_rows(&["up", "--file", &file_of(&web(&sandbox))]);
    let api = all.iter().find(|row| row["target"] == "web/api").expect("a row");
    assert_eq!((&api["action"], &api["status"]), (&Value::from("started"), &Value::from("starting")));
    assert!(api["detail"].as_str().expect("a word on it").contains("waits for db"), "{api}");
    let waiting = rows(&sandbox, &["up"]);
    assert_eq!(waiting, are(&[("web/db", "up_to_date"), ("web/plain", "up_to_date"), ("web/api", "up_to_date")]));
    let mut wait = Waiter::start(&sandbox);
    // They are checked in the order of a start: db was not ready when plain was.
    assert!(!wait.read_until("web/plain is ready").contains("web/db"), "db was reported as ready");
    assert!(!web(&sandbox).has("api.up"));
    web(&sandbox).write("go", "");
    let (done, said) = wait.end();
    assert!(done.success() && said.contains("web/db is ready") && said.contains("web/api is ready"), "{said}");
    assert!(agent(&sandbox, "db").ready && agent(&sandbox, "api").ready);
    wait_for_file(&sandbox, "api.up");
}

#[test]
fn a_wait_fails_with_an_agent_that_ends_before_it_is_ready_and_outlives_the_daemon() {
    let mut sandbox = Sandbox::start();
    declare(
        &sandbox,
        "[agents.a]\ncommand = [\"/bin/sh\", \"-c\", \"echo > a.up; until [ -e go ]; do sleep 0.02; done; exit 3\"]\n\
         ready = { reported = true }\n[agents.b]\ncommand = \"/bin/sleep 1000\"\ndepends_on = [\"a\"]\n\
         [agents.c]\ncommand = \"/bin/sleep 1000\"\n",
    );
    let mut wait = Waiter::start(&sandbox);
    wait.read_until("web/c is ready");
    sandbox.crash_and_restart();
    web(&sandbox).write("go", "");
    let (done, said) = wait.end();
    // In either order after the end of a.
    let reasons = ["web/a will not become ready: failed (exit code 3)", "waiting for web/a, failed (exit code 3)"];
    assert!(done.code() == Some(1) && reasons.iter().any(|reason| said.contains(reason)), "{said}");
    assert!(said.contains("not all agents are ready"), "{said}");
}

#[test]
fn a_wait_fails_with_an_agent_whose_dependency_was_ready_once_and_is_no_more() {
    let sandbox = Sandbox::start();
    declare(
        &sandbox,
        "[agents.a]\ncommand = [\"/bin/sh\", \"-c\", \"until [ -e go ]; do sleep 0.02; done; exit 3\"]\n\
         [agents.b]\ncommand = \"/bin/sleep 1000\"\ndepends_on = [{ agent = \"a\", until = \"completed\" }]\n",
    );
    let mut wait = Waiter::start(&sandbox);
    wait.read_until("web/a is ready");
    web(&sandbox).write("go", "");
    let (done, said) = wait.end();
    let reason = "web/b will not become ready: waiting for web/a, failed";
    assert!(done.code() == Some(1) && said.contains(reason), "{said}");
}

#[test]
fn restarts_and_hooks_of_the_file_reach_the_daemon() {
    let sandbox = Sandbox::start();
    declare(
        &sandbox,
        "[agents.a]\ncommand = [\"/bin/sh\", \"-c\", \"echo x >> runs; [ $(wc -l < runs) -ge 3 ]\"]\n\
         restart = { policy = \"on-failure\", delay = \"10ms\", limit = 5 }\ntimeout = \"2h\"\n\
         post_stop = [\"/bin/true\"]\n",
    );
    rows(&sandbox, &["up"]);
    wait_for_status(&sandbox, "a", AgentStatus::Exited);
    assert_eq!(web(&sandbox).read("runs"), "x\nx\nx\n");
    let shown = crate::bed::call(&sandbox, "agent.show", serde_json::json!({ "target": "web/a" })).expect("shown");
    let supervision = &shown["spec"]["supervision"];
    assert_eq!(supervision["timeout_ms"], 7_200_000);
    assert_eq!(supervision["post_stop"]["argv"][0], "/bin/true");
    assert_eq!(shown["completed"], true);
    assert!(shown["spec"].get("env").is_none() && !shown.to_string().contains("PATH"), "no environment is shown");
}

#[test]
fn the_flags_of_run_mean_the_same() {
    let sandbox = Sandbox::start();
    let place = ["-p", "web", "-w", web(&sandbox).text()].map(str::to_owned);
    let place: Vec<&str> = place.iter().map(String::as_str).collect();
    let workspace = web(&sandbox);
    let run = |flags: &[&str], script: &str| {
        let cwd = ["--cwd", workspace.text()];
        sandbox.ctl_json(&[&["run"], &place[..], &cwd[..], flags, &["--", "/bin/sh", "-c", script]].concat())
    };
    run(
        &["-n", "db", "--ready-output", "up", "--ready-timeout", "1m"],
        "until [ -e go ]; do sleep 0.02; done; echo up; exec sleep 1000",
    );
    let held = run(
        &["-n", "api", "--depends-on", "db", "--restart", "on-failure", "--restart-delay", "10ms"],
        "echo x >> runs; [ $(wc -l < runs) -ge 2 ]",
    );
    assert_eq!(held["waits_for"][0], "db");
    workspace.write("go", "");
    wait_for_status(&sandbox, "api", AgentStatus::Exited);
    assert_eq!(workspace.read("runs"), "x\nx\n");
    let said = failed(&sandbox.ctl_output(&["run", "-p", "web", "--restart", "often", "--", "/bin/true"]), 2);
    assert!(said.contains("no, on-failure, always"), "{said}");
}
