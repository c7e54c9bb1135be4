//! Common parts of the tests of agents: agents that are shell scripts, and waiting for their effects.

use std::path::PathBuf;
use std::process::Output;

use fermata_protocol::Code;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::client::ClientError;
use fermata_tests::sandbox::binary;
use fermata_tests::waiting::{SOON, wait_for, wait_until};
use fermata_tests::{Sandbox, Workspace, process};
use serde_json::{Map, Value};

/// The configuration in which agents are frozen by signals.
pub const SIGNALS: &str = "[agents]\nfreezer = \"signals\"\n";

/// The configurations for the two ways to freeze agents.
pub const MECHANISMS: [&str; 2] = ["", SIGNALS];

/// Starts a shell script as the agent `web/NAME` and returns the output of `run`.
#[track_caller]
pub fn run_agent(sandbox: &Sandbox, name: &str, script: &str) -> Value {
    let workspace = sandbox.workspace("web");
    let place = ["-w", workspace.text(), "--cwd", workspace.text()];
    sandbox.ctl_json(&[&["run", "-p", "web"], &place[..], &["-n", name, "--", "/bin/sh", "-c", script]].concat())
}

pub fn web(sandbox: &Sandbox) -> Workspace {
    sandbox.workspace("web")
}

/// Returns the word that calls `fermatactl` in a shell script of an agent, without starting a daemon.
pub fn ctl_word() -> String {
    format!("{} --no-autostart", binary("fermatactl").display())
}

/// Returns an agent of the project `web` as the daemon lists it.
#[track_caller]
pub fn agent(sandbox: &Sandbox, name: &str) -> fermata_protocol::agent::AgentView {
    let found = sandbox.agents().into_iter().find(|agent| agent.name.as_str() == name);
    found.unwrap_or_else(|| panic!("there is no agent web/{name}"))
}

/// Waits until an agent of the project `web` has a status.
#[track_caller]
pub fn wait_for_status(sandbox: &Sandbox, name: &str, status: AgentStatus) {
    wait_until(SOON, &format!("web/{name} to be {status}"), || agent(sandbox, name).status == status);
}

/// Waits until a line was written to a file of the project `web`, and returns the content without the last newline.
#[track_caller]
pub fn wait_for_file(sandbox: &Sandbox, file: &str) -> String {
    let workspace = web(sandbox);
    wait_for(SOON, &format!("{file} to be written"), || Some(workspace.read(file)).filter(|text| text.ends_with('\n')))
        .trim_end()
        .to_owned()
}

/// Waits until a process id was written to a file of the project `web`, and returns it.
#[track_caller]
pub fn wait_for_pid(sandbox: &Sandbox, file: &str) -> i32 {
    wait_for_file(sandbox, file).parse().unwrap_or_else(|e| panic!("{file} holds no process id: {e}"))
}

/// Waits until a process has ended.
#[track_caller]
pub fn wait_for_end(pid: i32) {
    wait_until(SOON, &format!("process {pid} to end"), || !process::is_alive(pid));
}

/// Returns the directory of an agent's current run.
#[track_caller]
pub fn run_dir(sandbox: &Sandbox, name: &str) -> PathBuf {
    let run = agent(sandbox, name).run.expect("the agent has run");
    sandbox.state_dir().join("projects/web/agents").join(name).join("runs").join(run.as_str())
}

/// Reads the record of an agent's current run.
#[track_caller]
pub fn run_record(sandbox: &Sandbox, name: &str) -> Value {
    let path = run_dir(sandbox, name).join("run.json");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("understand {}: {e}", path.display()))
}

/// Calls a method by name.
pub fn call(sandbox: &Sandbox, method: &str, params: Value) -> Result<Value, ClientError> {
    sandbox.rpc().call_raw(method, members(params), |_| {})
}

/// Returns the members of a JSON object.
#[track_caller]
pub fn members(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        other => panic!("parameters are an object, not {other}"),
    }
}

/// Returns the code of a refusal.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Refused(refusal)) => refusal.code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Asserts the exit code of a command and returns its error output.
#[track_caller]
pub fn failed(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}{}", String::from_utf8_lossy(&output.stdout));
    said
}
