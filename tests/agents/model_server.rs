//! A model that follows the script of a test: the answer to a request depends only on the number of commands that the
//! conversation has run so far. A test can delay an answer.
//!
//! Speaks the "responses" wire format with server-sent events. The server keeps no state of a conversation: a client
//! that lost a part of it gets an answer that fails the test.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::http::{read_request, write_reply};

/// An answer of the model.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Run this shell command.
    Run(String),
    /// Print this text and end the turn.
    Say(String),
}

/// Returns the answer after that many commands.
pub type Script = dyn Fn(usize) -> Reply + Send + Sync;

/// A running model server, which ends when this value is dropped.
pub struct ModelServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    script: Box<Script>,
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Default)]
struct State {
    /// All conversations that were received, in order.
    requests: Vec<Value>,
    /// The numbers of commands after which answers are delayed.
    delayed: BTreeSet<usize>,
    /// The number of commands before each answer that was written to its connection.
    answered: Vec<usize>,
}

impl ModelServer {
    /// Starts the server on a free port of the loopback interface.
    pub fn start(script: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            script: Box::new(script),
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self { shared, address, acceptor: Some(acceptor) }
    }

    /// Returns the URL for the configuration of a client.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Delays the answers to conversations with that many commands.
    pub fn delay_answer(&self, commands: usize) {
        self.shared.lock().delayed.insert(commands);
    }

    /// Sends the delayed answers.
    pub fn release_answer(&self, commands: usize) {
        self.shared.lock().delayed.remove(&commands);
        self.shared.changed.notify_all();
    }

    /// Waits until a conversation with that many commands was received.
    #[track_caller]
    pub fn wait_for_request(&self, commands: usize) {
        wait_until(SOON, &format!("the agent to ask the model after {commands} commands"), || {
            self.shared.lock().requests.iter().any(|request| outputs(request).len() == commands)
        });
    }

    /// Waits until an answer after that many commands was sent.
    #[track_caller]
    pub fn wait_for_answer(&self, commands: usize) {
        wait_until(SOON, &format!("the model's answer after {commands} commands"), || {
            self.shared.lock().answered.contains(&commands)
        });
    }

    /// Returns all conversations that were received so far.
    pub fn requests(&self) -> Vec<Value> {
        self.shared.lock().requests.clone()
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.lock().delayed.clear();
        self.shared.changed.notify_all();
        // Wakes the acceptor; if this fails, the acceptor has ended already.
        let woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        if let (Ok(_), Some(acceptor)) = (woken, self.acceptor.take())
            && acceptor.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the model server panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock means that a connection panicked; the state is still consistent.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Returns the answer to one conversation, once it is not delayed.
    fn answer(&self, request: Value) -> (usize, String) {
        let commands = outputs(&request).len();
        let mut state = self.lock();
        state.requests.push(request);
        let number = state.requests.len();
        while state.delayed.contains(&commands) {
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(state);
        (commands, events(number, commands, &(self.script)(commands)))
    }
}

/// Returns the command outputs in a conversation, in order.
pub fn outputs(request: &Value) -> Vec<&Value> {
    let items = request["input"].as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().filter(|item| item["type"] == "function_call_output").collect()
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut connections = Vec::new();
    for stream in listener.incoming() {
        if shared.ended.load(Ordering::SeqCst) {
            break;
        }
        let Ok(stream) = stream else { continue };
        let shared = Arc::clone(shared);
        connections.push(std::thread::spawn(move || serve(&stream, &shared)));
    }
    for connection in connections {
        connection.join().expect("a connection of the model server panicked");
    }
}

fn serve(stream: &TcpStream, shared: &Shared) {
    // A client that never sends its request must not keep the test from ending.
    stream.set_read_timeout(Some(SOON)).expect("limit the wait for a request");
    let Ok(Some(request)) = read_request(stream) else { return };
    if request.method != "POST" || !request.path.starts_with("/v1/responses") {
        // The client works without lists of models and the like. It may have disconnected already.
        write_reply(stream, "404 Not Found", "application/json", "{}").ok();
        return;
    }
    let Ok(conversation) = serde_json::from_slice(&request.body) else {
        write_reply(stream, "400 Bad Request", "application/json", "{}").ok();
        return;
    };
    let (commands, body) = shared.answer(conversation);
    // A test may have killed the client of a delayed answer.
    if write_reply(stream, "200 OK", "text/event-stream", &body).is_ok() {
        shared.lock().answered.push(commands);
    }
}

/// Returns the events of one answer.
fn events(number: usize, commands: usize, reply: &Reply) -> String {
    let item = match reply {
        Reply::Run(command) => json!({
            "type": "function_call",
            "id": format!("fc_{number}"),
            "call_id": format!("call_{}", commands + 1),
            "name": "exec_command",
            "arguments": json!({ "cmd": command }).to_string(),
        }),
        Reply::Say(text) => json!({
            "type": "message",
            "id": format!("msg_{number}"),
            "role": "assistant",
            "content": [{ "type": "output_text", "text": text }],
        }),
    };
    let id = format!("resp_{number}");
    let usage = json!({
        "input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
        "input_tokens_details": null, "output_tokens_details": null,
    });
    let events = [
        json!({ "type": "response.created", "response": { "id": id } }),
        json!({ "type": "response.output_item.done", "item": item }),
        json!({ "type": "response.completed", "response": { "id": id, "usage": usage } }),
    ];
    events.iter().map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or("?"))).collect()
}
