//! Serves one connection: reads lines, runs calls side by side, writes replies and notifications.

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

use super::connection::ClientConnection;
use super::daemon::Daemon;
use super::dispatch;
use crate::auth;

/// Capacity of the queue of lines to be written; a sender waits while it is full.
const OUT_QUEUE: usize = 128;

/// A connection is closed when its peer reads nothing for this long.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long the shutdown of the daemon waits for a peer to read the last lines.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(1);

/// The interval of checks whether a peer that has closed its sending side has closed the other one too.
const PEER_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Sends a refusal to a peer, and closes the connection.
pub(super) async fn refuse(mut stream: UnixStream, refusal: Refusal) {
    if let Ok(mut line) = serde_json::to_vec(&Response::failure(Value::Null, refusal)) {
        line.push(b'\n');
        drop(tokio::time::timeout(WRITE_PATIENCE, stream.write_all(&line)).await);
    }
}

/// Serves a connection until the peer closes it or the daemon shuts down.
pub(super) async fn serve(stream: UnixStream, credentials: PeerCredentials, daemon: &Arc<Daemon>) {
    let services = daemon.projects.services();
    let (settings, projects) = (services.settings(), Arc::clone(&daemon.projects));
    let peer = match auth::recognise(&credentials, &projects) {
        Some(peer) => peer,
        None => {
            // The lookup of a group may use the network, and there may be thousands of ancestors.
            let identified =
                tokio::task::spawn_blocking(move || auth::identify(&credentials, &settings, &projects)).await;
            match identified {
                Ok(Ok(peer)) => peer,
                Ok(Err(refusal)) => return refuse(stream, refusal).await,
                Err(error) => {
                    tracing::error!(%error, "failed to identify a peer");
                    return;
                }
            }
        }
    };
    let (reader, writer) = stream.into_split();
    let (out, lines) = mpsc::channel(OUT_QUEUE);
    let closed = services.stopping.child_token();
    let connection = Arc::new(ClientConnection::new(Arc::clone(daemon), peer, out, closed.clone()));
    let writing = services.tracker.spawn(write(writer, lines, closed.clone(), services.stopping.clone()));
    read(reader, &connection).await;
    closed.cancel();
    connection.lock().channel = None;
    drop(connection);
    // The queued lines are still written, for instance the reason why the connection is closed.
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
        // A peer that does not read must not delay the shutdown.
        () = stopping.cancelled() => drop(tokio::time::timeout(SHUTDOWN_PATIENCE, writing).await),
    }
}

async fn read(mut reader: OwnedReadHalf, connection: &Arc<ClientConnection>) {
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
            // Ended calls are removed from the set, which would otherwise grow with the connection.
            Some(ended) = calls.join_next() => {
                note_panic(ended);
                continue;
            }
        };
        match read {
            // An incomplete last line is ignored.
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

/// Waits for the calls of a peer that has closed its sending side (`echo … | nc -N`), until it closes the other one.
async fn answer_rest(listens: impl Fn() -> bool, calls: &mut JoinSet<()>, connection: &ClientConnection) {
    while listens() {
        tokio::select! {
            ended = calls.join_next() => match ended {
                Some(ended) => note_panic(ended),
                None => return,
            },
            () = connection.closed.cancelled() => return,
            () = tokio::time::sleep(PEER_CHECK_INTERVAL) => {}
        }
    }
}

fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a call panicked");
    }
}

async fn take_line(line: &[u8], connection: &Arc<ClientConnection>, calls: &mut JoinSet<()>) {
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
    // A notification has no reply, and the daemon handles no other one.
    let Some(id) = request.id.clone() else { return };
    if request.method == Hello::NAME {
        // Awaited, so that a client may send requests after it without waiting for the reply.
        let result = dispatch::call(connection, request).await.map_err(|failure| failure.to_object());
        connection.lock().hello_error = result.as_ref().err().cloned();
        return connection.send(&response(id, result)).await;
    }
    let hello_error = connection.lock().hello_error.clone();
    if let Some(error) = hello_error {
        return connection.send(&Response::failure(id, error)).await;
    }
    let token = match connection.begin(&id) {
        Ok(token) => token,
        Err(refusal) => return connection.send(&Response::failure(id, refusal)).await,
    };
    let connection = Arc::clone(connection);
    calls.spawn(async move {
        let result = tokio::select! {
            result = dispatch::call(&connection, request) => result.map_err(|failure| failure.to_object()),
            () = token.cancelled() => Err(cancelled(&connection)),
        };
        connection.end(&id);
        connection.send(&response(id, result)).await;
    });
}

fn response(id: Value, result: Result<Value, ErrorObject>) -> Response {
    match result {
        Ok(result) => Response::success(id, result),
        Err(error) => Response::failure(id, error),
    }
}

fn cancelled(connection: &ClientConnection) -> ErrorObject {
    if connection.daemon.projects.services().stopping.is_cancelled() {
        let refusal = Refusal::new(Code::ShuttingDown, "the daemon is shutting down".to_owned());
        return refusal.hint("the next daemon completes or undoes what was begun: see fermatactl op ls").into();
    }
    Refusal::new(Code::RequestCancelled, "the request was cancelled; an operation that it began continues".to_owned())
        .hint("operation.cancel cancels an operation")
        .into()
}
