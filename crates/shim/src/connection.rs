//! One connection to the shim: turns bytes into calls and replies into bytes, without waiting.
//!
//! A peer that does not read is disconnected once [`MAX_OUTBOX`] bytes wait for it: the shim's first duty is its agent.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::wire::{FromShim, MAX_LINE_BYTES, RefusalCode, ShimCall, ToShim, WIRE_VERSION, id_of_call};

/// How many bytes may wait for a peer.
pub const MAX_OUTBOX: usize = 256 * 1024;

/// Identifies a connection during the life of the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionStage {
    /// No hello has been received: other lines are refused.
    New,
    Open,
    /// Lines are no longer received; queued bytes are still sent.
    Closing,
    Dead,
}

/// A line to be handled by the supervisor.
#[derive(Debug, PartialEq, Eq)]
pub enum PeerLine {
    /// The peer has introduced itself with a matching version.
    Hello,
    Call(ShimCall),
}

/// The connection of one peer.
#[derive(Debug)]
pub struct PeerConnection {
    id: ConnectionId,
    stream: UnixStream,
    stage: ConnectionStage,
    level: u32,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
}

impl PeerConnection {
    /// Takes over an accepted stream.
    pub fn new(id: ConnectionId, stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { id, stream, stage: ConnectionStage::New, level: 0, inbox: Vec::new(), outbox: Vec::new() })
    }

    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Returns whether the peer has sent a hello. Only then it receives events.
    pub fn is_open(&self) -> bool {
        self.stage == ConnectionStage::Open
    }

    /// The peer's level of additions to the protocol, see [`super::wire::LEVEL`].
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Returns whether the connection can be removed.
    pub fn is_dead(&self) -> bool {
        self.stage == ConnectionStage::Dead || (self.stage == ConnectionStage::Closing && self.outbox.is_empty())
    }

    /// Returns whether bytes wait for the peer.
    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Returns how many bytes wait for the peer.
    pub fn waiting(&self) -> usize {
        self.outbox.len()
    }

    /// Reads the available bytes and returns the complete lines. Invalid lines are refused here.
    pub fn receive(&mut self) -> Vec<PeerLine> {
        let mut chunk = [0u8; 8192];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.stage = ConnectionStage::Dead;
                    break;
                }
                Ok(count) => self.inbox.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.stage = ConnectionStage::Dead;
                    break;
                }
            }
            if self.inbox.len() > 2 * MAX_LINE_BYTES {
                // The rest waits in the socket until these are answered.
                break;
            }
        }
        let mut incoming = Vec::new();
        // Lines that a peer has sent before closing still count, for instance a last `hold`.
        while self.stage != ConnectionStage::Closing {
            let Some(end) = self.inbox.iter().position(|&b| b == b'\n') else {
                break;
            };
            let line: Vec<u8> = self.inbox.drain(..=end).collect();
            if line.len() > MAX_LINE_BYTES {
                self.refuse_too_long();
            } else if !line.trim_ascii().is_empty() {
                incoming.extend(self.understand(&line));
            }
        }
        if self.inbox.len() > MAX_LINE_BYTES {
            self.refuse_too_long();
        }
        incoming
    }

    fn understand(&mut self, line: &[u8]) -> Option<PeerLine> {
        match (serde_json::from_slice::<ToShim>(line), self.stage) {
            (Ok(ToShim::Hello { version: WIRE_VERSION, level }), ConnectionStage::New) => {
                self.stage = ConnectionStage::Open;
                self.level = level;
                Some(PeerLine::Hello)
            }
            (Ok(ToShim::Hello { version: WIRE_VERSION, .. }), _) => Some(PeerLine::Hello),
            (Ok(ToShim::Hello { version, .. }), _) => {
                let message = format!("the peer speaks version {version}, this shim speaks version {WIRE_VERSION}");
                self.refuse(None, RefusalCode::VersionMismatch, message);
                self.close();
                None
            }
            (Ok(ToShim::Call(call)), ConnectionStage::New) => {
                self.refuse(Some(call.id), RefusalCode::BadRequest, "the first line must be a hello");
                self.close();
                None
            }
            (Ok(ToShim::Call(call)), _) => Some(PeerLine::Call(call)),
            (Err(error), _) => {
                let id = id_of_call(line).filter(|_| self.stage == ConnectionStage::Open);
                self.refuse(id, RefusalCode::BadRequest, format!("not a line of this protocol: {error}"));
                None
            }
        }
    }

    fn refuse_too_long(&mut self) {
        self.refuse(None, RefusalCode::LineTooLong, format!("a line has at most {MAX_LINE_BYTES} bytes"));
        self.inbox.clear();
        self.close();
    }

    fn refuse(&mut self, id: Option<u64>, code: RefusalCode, message: impl Into<String>) {
        self.send(&FromShim::Refusal { id, code, message: message.into() });
    }

    fn close(&mut self) {
        if self.stage != ConnectionStage::Dead {
            self.stage = ConnectionStage::Closing;
        }
    }

    /// Queues a line and sends what the socket accepts at once.
    pub fn send(&mut self, line: &FromShim) {
        if self.stage == ConnectionStage::Dead {
            return;
        }
        match serde_json::to_vec(line) {
            Ok(bytes) => {
                self.outbox.extend_from_slice(&bytes);
                self.outbox.push(b'\n');
            }
            Err(error) => eprintln!("fermata-shim: failed to encode {line:?}: {error}"),
        }
        self.flush();
        if self.outbox.len() > MAX_OUTBOX {
            self.stage = ConnectionStage::Dead;
        }
    }

    /// Sends what the socket accepts.
    pub fn flush(&mut self) {
        while !self.outbox.is_empty() && self.stage != ConnectionStage::Dead {
            match self.stream.write(&self.outbox) {
                Ok(count) => {
                    self.outbox.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.stage = ConnectionStage::Dead,
            }
        }
    }

    /// Sends the remaining bytes for at most `patience`, since the shim is about to exit.
    pub fn send_rest(mut self, patience: Duration) {
        let sendable = self.stage != ConnectionStage::Dead
            && self.stream.set_nonblocking(false).is_ok()
            && self.stream.set_write_timeout(Some(patience)).is_ok();
        if sendable {
            // A peer that does not receive them finds the same information in exit.json.
            self.stream.write_all(&self.outbox).ok();
        }
    }
}

impl AsFd for PeerConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    fn pair() -> (PeerConnection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (PeerConnection::new(ConnectionId(1), ours).unwrap(), theirs)
    }

    fn answer(theirs: &UnixStream) -> String {
        let mut line = String::new();
        BufReader::new(theirs).read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn another_version_is_refused_with_both_versions_in_the_message() {
        let (mut connection, mut theirs) = pair();
        theirs.write_all(b"{\"hello\":{\"version\":99}}\n").unwrap();
        assert_eq!(connection.receive(), []);
        let line = answer(&theirs);
        assert!(line.contains("version 99") && line.contains("version 1"), "{line}");
        assert!(connection.is_dead());
    }

    #[test]
    fn calls_come_only_after_the_hello_and_garbage_does_not_end_the_connection() {
        let (mut connection, mut theirs) = pair();
        theirs.write_all(b"{\"hello\":{\"version\":1}}\nrubbish\n").unwrap();
        theirs.write_all(b"{\"call\":{\"id\":5,\"method\":\"thaw\",\"params\":{}}}\n{\"ca").unwrap();
        let incoming = connection.receive();
        assert_eq!(incoming.len(), 2, "{incoming:?}");
        assert!(answer(&theirs).contains("bad_request"));
        assert!(connection.is_open());

        let (mut early, mut theirs) = pair();
        theirs.write_all(b"{\"call\":{\"id\":5,\"method\":\"kill\",\"params\":{}}}\n").unwrap();
        assert_eq!(early.receive(), []);
        assert!(early.is_dead());
    }

    #[test]
    fn an_endless_line_and_a_peer_that_never_reads_are_dropped() {
        let (mut connection, mut theirs) = pair();
        theirs.set_nonblocking(true).unwrap();
        let flood = vec![b'x'; MAX_LINE_BYTES];
        for _ in 0..8 {
            theirs.write_all(&flood).ok();
            connection.receive();
        }
        assert!(connection.is_dead());

        let (mut silent, _theirs) = pair();
        let line = FromShim::Refusal { id: None, code: RefusalCode::Busy, message: "y".repeat(8000) };
        for _ in 0..200 {
            silent.send(&line);
        }
        assert!(silent.is_dead());
    }
}
