//! Serves one connection: reads lines, runs calls side by side, writes what they answer.

use std::sync::Arc;
use std::time::Duration;

use fermata_os::peer::{self, PeerCredentials};
use fermata_protocol::codec::LineBuffer;
use fermata_protocol::daemon::Hello;
use fermata_protocol::method::Method as _;
use fermata_protocol::rpc::{Request, Response};
use fermata_protocol::{Code, ErrorObject, MAX_LINE_BYTES, Refusal};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::daemon::Daemon;
use super::dispatch;
use crate::auth;

/// How many lines may wait to be written; whoever has more to say waits.
const OUT_QUEUE: usize = 128;

/// A peer that takes no byte for so long is given up.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long the daemon's own end waits for a peer to take the last lines.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often to look whether a peer that says no more still listens.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Tells a peer why it is not served, and closes.
pub(super) async fn refuse(mut stream: UnixStream, refusal: Refusal) {
    if let Ok(mut line) = serde_json::to_vec(&Response::failure(Value::Null, refusal)) {
        line.push(b'\n');
        drop(tokio::time::timeout(WRITE_PATIENCE, stream.write_all(&line)).await);
    }
}

/// Serves a connection until either side ends it.
pub(super) async fn serve(stream: UnixStream, credentials: PeerCredentials, daemon: &Arc<Daemon>) {
    let services = daemon.projects.services();
    let (settings, projects) = (services.settings(), Arc::clone(&daemon.projects));
    let who = match auth::recognise(&credentials, &projects) {
        Some(peer) => peer,
        None => {
            // Groups may be looked up over a network, and there may be thousands of ancestors.
            let identified =
                tokio::task::spawn_blocking(move || auth::identify(&credentials, &settings, &projects)).await;
            match identified {
                Ok(Ok(peer)) => peer,
                Ok(Err(refusal)) => return refuse(stream, refusal).await,
                Err(error) => {
                    tracing::error!(%error, "a peer could not be identified");
                    return;
                }
            }
        }
    };
    let (reader, writer) = stream.into_split();
    let (out, lines) = mpsc::channel(OUT_QUEUE);
    let closed = services.stopping.child_token();
    let connection = Arc::new(Connection::new(Arc::clone(daemon), who, out, closed.clone()));
    let writing = services.tracker.spawn(write(writer, lines, closed.clone(), services.stopping.clone()));
    read(reader, &connection).await;
    closed.cancel();
    connection.lock().channel = None;
    drop(connection);
    // The last replies, for instance the one that says why the connection closes.
    drop(writing.await);
}

async fn write(
    mut writer: OwnedWriteHalf,
    mut lines: mpsc::Receiver<Vec<u8>>,
    closed: CancellationToken,
    stopping: CancellationToken,
) {
    let writing = async {
        while let Some(line) = lines.recv().await {
            match tokio::time::timeout(WRITE_PATIENCE, writer.write_all(&line)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => {
                    closed.cancel();
                    return;
                }
            }
        }
    };
    tokio::pin!(writing);
    tokio::select! {
        () = &mut writing => {}
        // A peer that does not read must not hold up the end of the daemon.
        () = stopping.cancelled() => drop(tokio::time::timeout(LAST_WORDS, writing).await),
    }
}

async fn read(mut reader: OwnedReadHalf, connection: &Arc<Connection>) {
    let mut lines = LineBuffer::new(MAX_LINE_BYTES);
    let mut calls = JoinSet::new();
    let mut chunk = vec![0; 64 << 10];
    'connection: loop {
        loop {
            match lines.next_line() {
                Ok(Some(line)) => take_line(&line, connection, &mut calls).await,
                Ok(None) => break,
                Err(error) => {
                    let refusal = Refusal::new(Code::LineTooLong, error.to_string());
                    connection.send(&Response::failure(Value::Null, refusal)).await;
                    break 'connection;
                }
            }
        }
        let read = tokio::select! {
            read = reader.read(&mut chunk) => read,
            () = connection.closed.cancelled() => break,
            // Finished calls are taken out, so that a long connection keeps none of them.
            Some(ended) = calls.join_next() => {
                note_panic(ended);
                continue;
            }
        };
        match read {
            // Half a line that never ends is nobody's request.
            Ok(0) => {
                let listens = || !peer::is_gone(reader.as_ref());
                answer_rest(listens, &mut calls, connection).await;
                break;
            }
            Err(_) => break,
            Ok(n) => lines.push(&chunk[..n]),
        }
    }
    connection.closed.cancel();
    while let Some(ended) = calls.join_next().await {
        note_panic(ended);
    }
}

/// A peer may close its side once it has asked everything (`echo … | nc -N`): it gets its answers, for
/// as long as it listens.
async fn answer_rest(listens: impl Fn() -> bool, calls: &mut JoinSet<()>, connection: &Connection) {
    while listens() {
        tokio::select! {
            ended = calls.join_next() => match ended {
                Some(ended) => note_panic(ended),
                None => return,
            },
            () = connection.closed.cancelled() => return,
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a call panicked");
    }
}

async fn take_line(line: &[u8], connection: &Arc<Connection>, calls: &mut JoinSet<()>) {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err(bad) => return connection.send(&Response::failure(bad.id, bad.refusal)).await,
    };
    if request.method == "$/cancelRequest" {
        if let Some(id) = request.params.get("id") {
            connection.cancel(id);
        }
        return;
    }
    // A notification asks for no reply; there is none that this daemon acts on.
    let Some(id) = request.id.clone() else { return };
    if request.method == Hello::NAME {
        // In its turn: a client need not wait for the answer before it calls.
        let greeted = dispatch::call(connection, request).await.map_err(|failure| failure.to_object());
        connection.lock().not_greeted = greeted.as_ref().err().cloned();
        return connection.send(&answer(id, greeted)).await;
    }
    let refused = connection.lock().not_greeted.clone();
    if let Some(error) = refused {
        return connection.send(&Response::failure(id, error)).await;
    }
    let token = match connection.begin(&id) {
        Ok(token) => token,
        Err(refusal) => return connection.send(&Response::failure(id, refusal)).await,
    };
    let connection = Arc::clone(connection);
    calls.spawn(async move {
        let answered = tokio::select! {
            answered = dispatch::call(&connection, request) => answered.map_err(|failure| failure.to_object()),
            () = token.cancelled() => Err(cancelled(&connection)),
        };
        connection.end(&id);
        connection.send(&answer(id, answered)).await;
    });
}

fn answer(id: Value, answered: Result<Value, ErrorObject>) -> Response {
    match answered {
        Ok(result) => Response::success(id, result),
        Err(error) => Response::failure(id, error),
    }
}

fn cancelled(connection: &Connection) -> ErrorObject {
    if connection.daemon.projects.services().stopping.is_cancelled() {
        let refusal = Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned());
        return refusal.hint("the agents go on, and so does what they are asked once it is back").into();
    }
    Refusal::new(Code::RequestCancelled, "the request was cancelled; an operation that it began goes on".to_owned())
        .hint("operation.cancel ends an operation")
        .into()
}
