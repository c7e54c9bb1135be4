//! A blocking client over a Unix socket.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::codec::LineBuffer;
use crate::daemon::{Hello, HelloResult};
use crate::error::{ErrorObject, Refusal};
use crate::method::Method;
use crate::rpc::Notification;

/// Replies may be longer than requests: a list of many rows is one line.
const MAX_REPLY_BYTES: usize = 64 << 20;

/// Why a call did not succeed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No daemon listens on the socket.
    #[error("connect to {}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The connection broke in the middle.
    #[error("the connection to the daemon broke")]
    Broken(#[source] io::Error),
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// The daemon sent something that this client does not understand.
    #[error("the daemon's reply makes no sense: {0}")]
    Garbled(String),
    /// The daemon said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    lines: LineBuffer,
    next_id: u64,
    notifications: VecDeque<Notification>,
    /// What is to be sent in one piece with the next request.
    unsent: Vec<u8>,
    greeting: Greeting,
}

/// How far the greeting has come.
#[derive(Debug)]
enum Greeting {
    /// There is none.
    None,
    /// It was sent, or will be with the first request, under this number.
    Awaited(u64),
    Answered(HelloResult),
}

impl Client {
    /// Connects and greets; `token` makes the connection an agent's.
    ///
    /// # Errors
    /// When no daemon listens, or the daemon does not speak this protocol version.
    pub fn connect(path: &Path, client: &str, token: Option<String>) -> Result<(Self, HelloResult), ClientError> {
        let mut client_side = Self::connect_greeting(path, client, token)?;
        let hello = client_side.hello()?.clone();
        Ok((client_side, hello))
    }

    /// Connects, and greets together with the first call: both cost one exchange. A daemon that refuses the greeting
    /// refuses the call with it, which fails of that then.
    ///
    /// # Errors
    /// When no daemon listens.
    pub fn connect_greeting(path: &Path, client: &str, token: Option<String>) -> Result<Self, ClientError> {
        let mut client_side = Self::connect_silently(path)?;
        let version = crate::rpc::PROTOCOL_VERSION;
        let hello = Hello { min: version, max: version, client: client.into(), token };
        let params = serde_json::to_value(hello).map_err(|e| ClientError::Garbled(e.to_string()))?;
        let id = client_side.add_request(Hello::NAME, &params);
        client_side.greeting = Greeting::Awaited(id);
        Ok(client_side)
    }

    /// Returns what the daemon answered to the greeting, and waits for that where it has to.
    ///
    /// # Errors
    /// The daemon's refusal, or a broken connection.
    pub fn hello(&mut self) -> Result<&HelloResult, ClientError> {
        while self.is_hello_awaited() {
            match self.whole_message()? {
                Some(ServerMessage::Notification(notification)) => self.notifications.push_back(notification),
                // The connection was refused before the greeting was read.
                Some(ServerMessage::Response(response)) => drop(outcome::<Value>(Hello::NAME, response)?),
                None if self.is_hello_awaited() => self.read_some()?,
                None => {}
            }
        }
        match &self.greeting {
            Greeting::Answered(hello) => Ok(hello),
            Greeting::None | Greeting::Awaited(_) => Err(ClientError::Garbled("there was no greeting".into())),
        }
    }

    /// Says whether the daemon has yet to answer the greeting.
    pub fn is_hello_awaited(&self) -> bool {
        matches!(self.greeting, Greeting::Awaited(_))
    }

    /// Connects without a greeting.
    ///
    /// # Errors
    /// When no daemon listens.
    pub fn connect_silently(path: &Path) -> Result<Self, ClientError> {
        let stream =
            UnixStream::connect(path).map_err(|source| ClientError::Unreachable { path: path.to_owned(), source })?;
        Ok(Self {
            stream,
            lines: LineBuffer::new(MAX_REPLY_BYTES),
            next_id: 1,
            notifications: VecDeque::new(),
            unsent: Vec::new(),
            greeting: Greeting::None,
        })
    }

    /// Calls a method and waits for its result; notifications that come meanwhile are kept.
    ///
    /// # Errors
    /// The daemon's refusal, or a broken connection.
    pub fn call<M: Method>(&mut self, params: &M) -> Result<M::Result, ClientError> {
        self.call_watching(params, |_| {})
    }

    /// Like [`Self::call`], and hands every notification that comes meanwhile to `watch`.
    ///
    /// # Errors
    /// The daemon's refusal, or a broken connection.
    pub fn call_watching<M: Method>(
        &mut self,
        params: &M,
        watch: impl FnMut(&Notification),
    ) -> Result<M::Result, ClientError> {
        let params = serde_json::to_value(params).map_err(|e| ClientError::Garbled(e.to_string()))?;
        let Value::Object(params) = params else {
            return Err(ClientError::Garbled("parameters are not an object".into()));
        };
        self.exchange(M::NAME, params, watch)
    }

    /// Calls a method by name.
    ///
    /// # Errors
    /// The daemon's refusal, or a broken connection.
    pub fn call_raw(
        &mut self,
        method: &str,
        params: Map<String, Value>,
        watch: impl FnMut(&Notification),
    ) -> Result<Value, ClientError> {
        self.exchange(method, params, watch)
    }

    fn exchange<T: DeserializeOwned>(
        &mut self,
        method: &str,
        params: Map<String, Value>,
        mut watch: impl FnMut(&Notification),
    ) -> Result<T, ClientError> {
        let id = self.send(method, &params)?;
        loop {
            match self.read_message()? {
                ServerMessage::Notification(notification) => {
                    watch(&notification);
                    self.notifications.push_back(notification);
                }
                ServerMessage::Response(response) => {
                    if response.id.as_u64() != Some(id) && !response.id.is_null() {
                        continue;
                    }
                    return outcome(method, response);
                }
            }
        }
    }

    /// Sends a request without waiting for its answer, which comes by [`Self::try_receive`].
    ///
    /// # Errors
    /// A broken connection.
    pub fn begin<M: Method>(&mut self, params: &M) -> Result<u64, ClientError> {
        let Value::Object(params) = serde_json::to_value(params).map_err(|e| ClientError::Garbled(e.to_string()))?
        else {
            return Err(ClientError::Garbled("parameters are not an object".into()));
        };
        self.send(M::NAME, &params)
    }

    /// Takes the next message that is there; reads at most once, so that it does not wait when the
    /// connection is readable. `None` when no whole message has come yet.
    ///
    /// # Errors
    /// A broken connection.
    pub fn try_receive(&mut self) -> Result<Option<Incoming>, ClientError> {
        if let Some(notification) = self.notifications.pop_front() {
            return Ok(Some(Incoming::Notification(notification)));
        }
        let message = match self.whole_message()? {
            Some(message) => message,
            None => {
                self.read_some()?;
                match self.whole_message()? {
                    Some(message) => message,
                    None => return Ok(None),
                }
            }
        };
        Ok(Some(match message {
            ServerMessage::Notification(notification) => Incoming::Notification(notification),
            ServerMessage::Response(response) => {
                Incoming::Answer(response.id.as_u64().unwrap_or_default(), outcome("a request", response))
            }
        }))
    }

    /// Says whether a message is there without reading: it has come together with another one.
    pub fn has_whole_message(&self) -> bool {
        !self.notifications.is_empty() || self.lines.has_line()
    }

    fn send(&mut self, method: &str, params: &Map<String, Value>) -> Result<u64, ClientError> {
        let id = self.add_request(method, params);
        self.send_unsent()?;
        Ok(id)
    }

    fn add_request(&mut self, method: &str, params: &impl Serialize) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let line = json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }).to_string();
        self.unsent.extend_from_slice(line.as_bytes());
        self.unsent.push(b'\n');
        id
    }

    fn send_unsent(&mut self) -> Result<(), ClientError> {
        let unsent = std::mem::take(&mut self.unsent);
        match self.stream.write_all(&unsent) {
            // A daemon that refuses the connection answers before it reads; its reason is worth more than the broken pipe
            // of this write.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(ClientError::Broken(error)),
            _ => Ok(()),
        }
    }

    /// Waits for the next notification.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn next_notification(&mut self) -> Result<Notification, ClientError> {
        loop {
            if let Some(notification) = self.notifications.pop_front() {
                return Ok(notification);
            }
            if let ServerMessage::Notification(notification) = self.read_message()? {
                return Ok(notification);
            }
        }
    }

    /// Limits how long a read waits, until the greeting is answered; `None` waits for ever.
    ///
    /// # Errors
    /// When the system refuses the limit.
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn read_message(&mut self) -> Result<ServerMessage, ClientError> {
        loop {
            if let Some(message) = self.whole_message()? {
                return Ok(message);
            }
            self.read_some()?;
        }
    }

    /// Takes the next message out of what was read, but for the answer to the greeting.
    fn whole_message(&mut self) -> Result<Option<ServerMessage>, ClientError> {
        loop {
            match (self.whole_line()?, &self.greeting) {
                (Some(ServerMessage::Response(response)), Greeting::Awaited(id))
                    if response.id.as_u64() == Some(*id) =>
                {
                    self.greeting = Greeting::Answered(outcome(Hello::NAME, response)?);
                    self.stream.set_read_timeout(None).map_err(ClientError::Broken)?;
                }
                (message, _) => return Ok(message),
            }
        }
    }

    fn whole_line(&mut self) -> Result<Option<ServerMessage>, ClientError> {
        let line = self.lines.next_line().map_err(|e| ClientError::Garbled(e.to_string()))?;
        let Some(line) = line else { return Ok(None) };
        let garbled = |e: serde_json::Error| ClientError::Garbled(e.to_string());
        let reply: Reply = serde_json::from_slice(&line).map_err(garbled)?;
        match reply.method {
            Some(_) => {
                serde_json::from_slice(&line).map(|value| Some(ServerMessage::Notification(value))).map_err(garbled)
            }
            None => Ok(Some(ServerMessage::Response(reply))),
        }
    }

    /// Reads once; waits where nothing is there.
    fn read_some(&mut self) -> Result<(), ClientError> {
        // Nothing comes from whom nothing was said to.
        self.send_unsent()?;
        let mut chunk = [0; 64 << 10];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(ClientError::Closed),
            Ok(n) => {
                self.lines.push(&chunk[..n]);
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(ClientError::Broken(e)),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Understands a result once, from its text: a list of a thousand agents is too much to be made a tree
/// of values first.
fn outcome<T: DeserializeOwned>(method: &str, reply: Reply) -> Result<T, ClientError> {
    if let Some(error) = reply.error {
        return Err(ClientError::Refused(error.into()));
    }
    let result = reply.result.as_deref().map_or("null", RawValue::get);
    serde_json::from_str(result).map_err(|e| ClientError::Garbled(format!("result of {method}: {e}")))
}

/// A line of the daemon: the answer to a request, or, with a method, a notification.
#[derive(Deserialize)]
struct Reply {
    method: Option<String>,
    #[serde(default)]
    id: Value,
    result: Option<Box<RawValue>>,
    error: Option<ErrorObject>,
}

/// What [`Client::try_receive`] finds.
#[derive(Debug)]
pub enum Incoming {
    /// Something that answers no request.
    Notification(Notification),
    /// The answer to the request with this number.
    Answer(u64, Result<Value, ClientError>),
}

enum ServerMessage {
    Response(Reply),
    Notification(Notification),
}
