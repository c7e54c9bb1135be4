//! Codex paused in the middle of a turn, and parked across a crash of the daemon.

use fermata_tests::metronome::wait_for_beats;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Fingerprint, Sandbox, Workspace, process};
use serde_json::Value;

use crate::codex::Codex;
use crate::model_server::{ModelServer, Reply, outputs};

const STEPS: usize = 6;

/// How often a running process writes while the paused project must not change.
const BEATS: u64 = 50;

/// Lets the model ask for six commands, each of which appends its own line to `steps.txt`.
pub fn six_steps(commands: usize) -> Reply {
    match commands + 1 {
        step @ 1..=STEPS => Reply::Run(format!("echo step {step} >> steps.txt")),
        _ => Reply::Say("all steps are done".into()),
    }
}

/// Returns the content of `steps.txt` after all steps.
pub fn all_steps() -> String {
    (1..=STEPS).map(|step| format!("step {step}\n")).collect()
}

fn repository(sandbox: &Sandbox) -> Workspace {
    let workspace = sandbox.workspace("web");
    workspace.write("README.md", "# A project\n").write("src/lib.rs", "//! Empty.\n").git_init();
    workspace
}

/// Waits until the agent has done that many steps, recorded them in its session file, and asked the model again.
fn wait_for_steps(server: &ModelServer, codex: &Codex, workspace: &Workspace, steps: usize) {
    server.wait_for_request(steps);
    assert_eq!(workspace.read("steps.txt").lines().count(), steps);
    wait_until(SOON, "the session file to hold all outputs", || codex.session().outputs() == steps);
}

/// Returns the fingerprints of all files that a running agent would change.
fn fingerprints(codex: &Codex, workspace: &Workspace) -> (Fingerprint, Fingerprint) {
    (workspace.fingerprint(), codex.sessions_fingerprint())
}

/// Returns the resume result of the only agent.
fn resumed(result: &Value) -> &Value {
    assert_eq!(result["success"], true, "{result}");
    assert_eq!(result["agents"].as_array().map(Vec::len), Some(1), "{result}");
    &result["agents"][0]
}

fn agent_pid(sandbox: &Sandbox) -> i32 {
    let agents = sandbox.agents();
    assert_eq!(agents.len(), 1, "{agents:?}");
    agents[0].pid.expect("the agent runs")
}

#[test]
#[ignore = "needs the Codex CLI: make test-agents"]
fn codex_is_frozen_while_it_waits_for_the_model_and_continues_after_the_resume() {
    let server = ModelServer::start(six_steps);
    server.delay_answer(3);
    let codex = Codex::with_model(&server);
    let sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    codex.run(&sandbox, "web", &workspace, "Do the six steps.");
    wait_for_steps(&server, &codex, &workspace, 3);
    let pid = agent_pid(&sandbox);
    let session = codex.session();

    let pause = sandbox.ctl_json(&["pause", "web"]);
    assert_eq!((&pause["success"], &pause["mode"]), (&Value::Bool(true), &Value::from("freeze")), "{pause}");
    let before = fingerprints(&codex, &workspace);
    // The answer that asks for step 4 reaches the agent's socket during the pause.
    server.release_answer(3);
    server.wait_for_answer(3);
    wait_for_beats(BEATS);
    assert_eq!(fingerprints(&codex, &workspace), before, "a paused agent changed something");

    let resume = sandbox.ctl_json(&["resume", "web"]);
    assert_eq!(resumed(&resume)["rung"], "thawed", "{resume}");
    assert_eq!(agent_pid(&sandbox), pid);
    sandbox.ctl(&["wait", "web/codex", "--propagate", "--timeout", "60s"]);
    assert_eq!(workspace.read("steps.txt"), all_steps());
    assert_eq!(codex.session().id(), session.id());
    assert_eq!(server.requests().len(), STEPS + 1, "no request was lost or sent twice");
}

#[test]
#[ignore = "needs the Codex CLI: make test-agents"]
fn codex_is_frozen_together_with_its_running_command() {
    // Step 3 takes two seconds and writes every 50 ms, so that the pause interrupts it.
    let slow = "for i in $(seq 40); do echo $i >> ticks.txt; sleep 0.05; done; echo step 3 >> steps.txt";
    let server = ModelServer::start(move |commands| match commands {
        2 => Reply::Run(slow.into()),
        other => six_steps(other),
    });
    let codex = Codex::with_model(&server);
    let sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    codex.run(&sandbox, "web", &workspace, "Do the six steps.");
    wait_until(SOON, "the slow command to begin", || workspace.read("ticks.txt").lines().count() >= 5);
    let pid = agent_pid(&sandbox);

    let pause = sandbox.ctl_json(&["pause", "web"]);
    // The shell of the command has a session of its own and is counted too.
    assert!(pause["processes"].as_u64() >= Some(process::tree(pid).len() as u64), "{pause}");
    let before = fingerprints(&codex, &workspace);
    assert!(workspace.read("ticks.txt").lines().count() < 40, "the pause came too late for this test");
    wait_for_beats(BEATS);
    assert_eq!(fingerprints(&codex, &workspace), before, "a paused command changed something");

    let resume = sandbox.ctl_json(&["resume", "web"]);
    assert_eq!(resumed(&resume)["rung"], "thawed", "{resume}");
    sandbox.ctl(&["wait", "web/codex", "--propagate", "--timeout", "60s"]);
    assert_eq!(workspace.read("steps.txt"), all_steps());
    assert_eq!(workspace.read("ticks.txt").lines().count(), 40);
}

#[test]
#[ignore = "needs the Codex CLI: make test-agents"]
fn codex_parked_through_a_crash_of_the_daemon_goes_on_in_the_same_session() {
    let server = ModelServer::start(six_steps);
    server.delay_answer(3);
    let codex = Codex::with_model(&server);
    let mut sandbox = Sandbox::start();
    let workspace = repository(&sandbox);
    codex.run(&sandbox, "web", &workspace, "Do the six steps.");
    wait_for_steps(&server, &codex, &workspace, 3);
    let tree = process::tree(agent_pid(&sandbox));
    let session = codex.session();
    let asked_before = server.requests().len();

    let pause = sandbox.ctl_json(&["pause", "web", "--mode", "park"]);
    assert_eq!((&pause["success"], &pause["mode"]), (&Value::Bool(true), &Value::from("park")), "{pause}");
    wait_until(SOON, "the parked processes to be gone", || !tree.iter().any(|&pid| process::is_alive(pid)));
    let text_before = session.text();

    sandbox.kill_daemon();
    server.release_answer(3);
    sandbox.start_daemon();
    let project = sandbox.ctl_json(&["status", "web"]);
    assert_eq!(project["project"]["status"], "paused", "{project}");
    assert_eq!(workspace.read("steps.txt").lines().count(), 3, "a parked agent did something");

    let resume = sandbox.ctl_json(&["resume", "web"]);
    let agent = resumed(&resume);
    assert_eq!(agent["rung"], "respawned", "{resume}");
    let argv: Vec<&str> = agent["argv"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    assert_eq!(argv.first(), Some(&codex.program()));
    assert_eq!(argv.get(1), Some(&"exec"), "{argv:?}");
    assert!(argv.contains(&"--json"), "flags that the user gave stay: {argv:?}");
    assert!(argv.windows(2).any(|pair| pair == ["resume", &session.id()]), "{argv:?}");

    sandbox.ctl(&["wait", "web/codex", "--propagate", "--timeout", "60s"]);
    assert_eq!(workspace.read("steps.txt"), all_steps());
    let after = codex.session();
    assert_eq!(after.path(), session.path(), "the session continues in its own file");
    assert!(after.text().starts_with(&text_before), "the session file lost earlier content");
    // The model received the whole conversation before the pause.
    let first = &server.requests()[asked_before];
    assert_eq!(outputs(first).len(), 3, "{first}");
}
