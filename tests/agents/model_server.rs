//! A model that does what a test wrote down: it answers each request by how many commands the
//! conversation has run so far, and can hold an answer back until the test lets it go.
//!
//! Speaks the "responses" wire format with server-sent events. It has no memory of its own: a
//! client that lost a part of the conversation gets the wrong answer, and the test sees it.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::http::{read_request, write_reply};

/// What the model says.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Run this shell command.
    Run(String),
    /// Say this and end the turn.
    Say(String),
}

/// Gives the answer after so many commands.
pub type Script = dyn Fn(usize) -> Reply + Send + Sync;

/// A running model server; it ends with its value.
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
    /// Every conversation that was sent, as it came.
    requests: Vec<Value>,
    /// After how many commands answers are held back.
    delayed: BTreeSet<usize>,
    /// After how many commands an answer was handed to the kernel, once per answer.
    answered: Vec<usize>,
}

impl ModelServer {
    /// Starts on a free port of the loopback interface.
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

    /// Returns the URL that a client is configured with.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Holds back the answers to conversations with so many commands.
    pub fn delay_answer(&self, commands: usize) {
        self.shared.lock().delayed.insert(commands);
    }

    /// Lets held answers go.
    pub fn release_answer(&self, commands: usize) {
        self.shared.lock().delayed.remove(&commands);
        self.shared.changed.notify_all();
    }

    /// Waits until a conversation with so many commands has come.
    #[track_caller]
    pub fn wait_for_request(&self, commands: usize) {
        wait_until(SOON, &format!("the agent to ask the model after {commands} commands"), || {
            self.shared.lock().requests.iter().any(|request| outputs(request).len() == commands)
        });
    }

    /// Waits until an answer after so many commands was sent.
    #[track_caller]
    pub fn wait_for_answer(&self, commands: usize) {
        wait_until(SOON, &format!("the model's answer after {commands} commands"), || {
            self.shared.lock().answered.contains(&commands)
        });
    }

    /// Returns all conversations that came so far.
    pub fn requests(&self) -> Vec<Value> {
        self.shared.lock().requests.clone()
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.lock().delayed.clear();
        self.shared.changed.notify_all();
        // Wakes the acceptor; when that fails it has ended already.
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
        // A poisoned lock means that a connection panicked; what it guards is still whole.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Answers one conversation, when the test lets it.
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

/// Returns the outputs of commands that a conversation holds, in order.
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
        // Lists of models and the like: the client does without. It may have gone already.
        write_reply(stream, "404 Not Found", "application/json", "{}").ok();
        return;
    }
    let Ok(conversation) = serde_json::from_slice(&request.body) else {
        write_reply(stream, "400 Bad Request", "application/json", "{}").ok();
        return;
    };
    let (commands, body) = shared.answer(conversation);
    // The client of a held answer may have been killed in the meantime: that is what tests do.
    if write_reply(stream, "200 OK", "text/event-stream", &body).is_ok() {
        shared.lock().answered.push(commands);
    }
}

/// Writes the events of one answer.
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
