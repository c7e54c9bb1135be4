//! A scripted daemon on a Unix socket: answers `hello`, then exactly the calls of a script.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use tempfile::TempDir;

/// The answer to one call.
pub enum Answer {
    /// A result.
    Result(Value),
    /// A refusal: code and message, with a hint.
    Refusal(&'static str, &'static str, &'static str),
    /// Notifications, then a result.
    After(Vec<Value>, Value),
    /// A result, then notifications.
    Before(Value, Vec<Value>),
    /// A result and notifications, then the connection is closed.
    HangUpAfter(Value, Vec<Value>),
    /// The connection is closed without an answer.
    HangUp,
    /// No answer, and the connection stays open.
    Silence,
}

/// One expected call and its answer.
pub type Exchange = (&'static str, Answer);

struct Shared {
    script: Mutex<VecDeque<Exchange>>,
    calls: Mutex<Vec<(String, Value)>>,
    surprises: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

/// A scripted daemon and the directory for all files of the test.
pub struct Stub {
    pub dir: TempDir,
    socket: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    pub fn new(script: impl IntoIterator<Item = Exchange>) -> Self {
        let dir = TempDir::new().expect("temp dir");
        let socket = dir.path().join("s");
        Self::listen(dir, socket, script)
    }

    pub fn listen(dir: TempDir, socket: PathBuf, script: impl IntoIterator<Item = Exchange>) -> Self {
        let listener = UnixListener::bind(&socket).expect("bind");
        let shared = Arc::new(Shared {
            script: Mutex::new(script.into_iter().collect()),
            calls: Mutex::new(Vec::new()),
            surprises: Mutex::new(Vec::new()),
            stopped: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::SeqCst) {
                    return;
                }
                // One connection at a time: the program under test never opens more.
                serve(stream.expect("accept"), &serving);
            }
        });
        Self { dir, socket, shared, thread: Some(thread) }
    }

    /// Returns a command that connects to this daemon.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = bare_command(self.dir.path(), args);
        command.env("FERMATA_SOCKET", &self.socket);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> Ended {
        Ended::from(self.command(args).output().expect("runs"))
    }

    /// Starts a command with a piped stdout.
    pub fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("starts")
    }

    /// Returns the parameters of every call of a method, in order.
    pub fn calls(&self, method: &str) -> Vec<Value> {
        let calls = self.shared.calls.lock().expect("no panic");
        let of_method = calls.iter().filter(|(name, _)| name == method);
        of_method.map(|(_, params)| params.clone()).collect()
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        drop(UnixStream::connect(&self.socket));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the peer did not panic");
        }
        if !std::thread::panicking() {
            let left: Vec<_> = self.shared.script.lock().expect("no panic").drain(..).map(|(m, _)| m).collect();
            assert!(left.is_empty(), "never called: {left:?}");
            let surprises = self.shared.surprises.lock().expect("no panic");
            assert!(surprises.is_empty(), "{surprises:?}");
        }
    }
}

fn serve(stream: UnixStream, shared: &Shared) {
    let mut writer = stream.try_clone().expect("clone");
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        let request: Value = serde_json::from_str(&line).expect("a request is JSON");
        let method = request["method"].as_str().expect("a method").to_owned();
        let id = request["id"].clone();
        let call = (method.clone(), request["params"].clone());
        shared.calls.lock().expect("no panic").push(call);
        // A client that disconnects during an answer is not an error of the stub.
        let mut send = |value: Value| drop(writer.write_all(format!("{value}\n").as_bytes()));
        let result = |value: Value| json!({"jsonrpc": "2.0", "id": id, "result": value});
        if method == "hello" {
            send(result(json!({
                "protocol": 1, "version": env!("CARGO_PKG_VERSION"), "role": "admin",
                "limits": {"line_bytes": 1_048_576, "in_flight": 64}, "boot_epoch": "e",
            })));
            continue;
        }
        let next = shared.script.lock().expect("no panic").pop_front();
        let answer = match next {
            Some((expected, answer)) if expected == method => answer,
            other => {
                let expected = other.map(|(m, _)| m);
                let surprise = format!("called {method}, expected {expected:?}");
                shared.surprises.lock().expect("no panic").push(surprise);
                return;
            }
        };
        match answer {
            Answer::Result(value) => send(result(value)),
            Answer::Refusal(code, message, hint) => send(json!({
                "jsonrpc": "2.0", "id": id,
                "error": {"code": -32000, "message": message, "data": {"code": code, "hint": hint}},
            })),
            Answer::After(before, value) => {
                before.into_iter().for_each(&mut send);
                send(result(value));
            }
            Answer::Before(value, after) => {
                send(result(value));
                after.into_iter().for_each(&mut send);
            }
            Answer::HangUpAfter(value, after) => {
                send(result(value));
                after.into_iter().for_each(&mut send);
                return;
            }
            Answer::HangUp => return,
            Answer::Silence => {}
        }
    }
}

/// The exit code and output of a command.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("no signal"),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

/// Returns a command whose environment has only PATH.
pub fn bare_command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fermatactl"));
    isolate(&mut command, dir);
    command.args(args);
    command
}

/// Clears the environment, so that the command cannot find a real daemon.
pub fn isolate(command: &mut Command, dir: &Path) {
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .env("FERMATA_STATE_DIR", dir.join("state"))
        .env("FERMATA_RUNTIME_DIR", dir)
        .current_dir(dir)
        .stdin(Stdio::null());
}

/// An agent as in a reply of the daemon.
pub fn agent(name: &str, status: &str, exit: Value) -> Value {
    let mut agent = json!({
        "project": "web", "name": name, "status": status, "argv": ["codex", "exec"],
        "cwd": "/w", "runs": 1, "pid": 42,
        "usage": {"input_tokens": 0, "output_tokens": 0, "cost_micro_usd": 0},
    });
    if !exit.is_null() {
        agent["exit"] = exit;
    }
    agent
}

/// A line of output.
pub fn line(stream: &str, text: &str) -> Value {
    json!({"at_ns": 1_000_000_000, "stream": stream, "text": text})
}

/// An `event` notification.
pub fn event(cursor: &str) -> Value {
    json!({"jsonrpc": "2.0", "method": "event", "params": {"subscription": 1, "event": {
        "cursor": cursor, "at": 0, "project": "web",
        "kind": "agent.removed", "data": {"agent": "coder"},
    }}})
}
