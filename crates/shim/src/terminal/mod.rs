//! The terminal of one agent, as operated by its shim.
//!
//! ```text
//!  agent ── slave │ master ──> log.rs                         raw bytes
//!                 │        └─> sequences ──> replies ── queries are answered here
//!                 │                      ├─> screen            the present content
//!                 │                      └─> viewers           connections that watch
//!                 │ master <── typed <── `type` requests
//! ```
//!
//! The shim keeps the slave open, so that the terminal does not hang up between two programs that use it. The shim
//! closes it when the agent has ended, and then reads the remaining output to the end.
//!
//! The agent never waits for a viewer. The model exists only for agents with a terminal.

mod modes;
mod replies;
mod screen;
mod sequences;
mod viewers;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fermata_protocol::supervision::TerminalSize;

use self::replies::SequenceDecision;
use self::screen::Screen;
use self::sequences::{OutputPiece, Splitter};
use self::viewers::Viewers;
use super::connection::{ConnectionId, PeerConnection};
use super::reply::Refused;
use super::wire::RefusalCode;
use fermata_os::pty;

/// How many bytes of input may wait for an agent that does not read.
const MAX_TYPED: usize = 64 * 1024;

/// How many bytes of answers may wait for a program that queries its terminal without reading the answers.
const MAX_ANSWERS: usize = 8 * 1024;

/// One agent's terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: Option<OwnedFd>,
    splitter: Splitter,
    screen: Screen,
    viewers: Viewers,
    typed: Vec<u8>,
}

impl Terminal {
    /// Takes ownership of both ends.
    pub fn new(master: OwnedFd, slave: OwnedFd, size: TerminalSize) -> Self {
        Self {
            master: File::from(master),
            slave: Some(slave),
            splitter: Splitter::default(),
            screen: Screen::new(size),
            viewers: Viewers::default(),
            typed: Vec::new(),
        }
    }

    pub fn size(&self) -> TerminalSize {
        self.screen.size()
    }

    /// Shows output of the agent.
    pub fn show(&mut self, bytes: &[u8]) {
        let Self { splitter, screen, viewers, typed, .. } = self;
        splitter.feed(bytes, |piece| match piece {
            OutputPiece::Text(text) => {
                screen.text(text);
                viewers.output(text.as_bytes());
            }
            OutputPiece::Sequence(sequence) => match replies::judge(sequence, screen) {
                SequenceDecision::Show => {
                    screen.sequence(sequence);
                    viewers.output(sequence);
                }
                SequenceDecision::Answer(answer) if typed.len() + answer.len() <= MAX_ANSWERS => {
                    typed.extend_from_slice(answer.as_bytes());
                }
                // A program that does not read the answers gets no more of them.
                SequenceDecision::Answer(_) => {}
            },
        });
        self.flush();
    }

    /// Accepts typed input; returns the number of accepted bytes.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let room = MAX_TYPED.saturating_sub(self.typed.len());
        let taken = bytes.len().min(room);
        self.typed.extend_from_slice(&bytes[..taken]);
        self.flush();
        taken
    }

    /// Returns whether input waits for the kernel to accept it.
    pub fn wants_write(&self) -> bool {
        !self.typed.is_empty()
    }

    /// Writes as much input as the kernel accepts.
    pub fn flush(&mut self) {
        while !self.typed.is_empty() {
            match self.master.write(&self.typed) {
                Ok(0) => return,
                Ok(count) => {
                    self.typed.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // No process can read the input any more.
                Err(_) => self.typed.clear(),
            }
        }
    }

    /// Changes the size; the kernel notifies the agent.
    ///
    /// # Errors
    /// If the kernel refuses the size.
    pub fn resize(&mut self, size: TerminalSize) -> Result<(), Refused> {
        if size == self.size() {
            return Ok(());
        }
        pty::resize(&self.master, size.rows, size.cols).map_err(|error| {
            let message = format!("failed to resize the terminal to {} x {}: {error}", size.rows, size.cols);
            Refused::new(RefusalCode::ResizeFailed, message)
        })?;
        self.screen.resize(size);
        self.viewers.draw_anew();
        Ok(())
    }

    /// Adds a viewer, which is sent the screen first.
    ///
    /// # Errors
    /// If the terminal has the maximum number of viewers.
    pub fn watch(&mut self, connection: ConnectionId, scrollback: bool) -> Result<(), Refused> {
        self.viewers.add(connection, scrollback)
    }

    /// Closes the agent's end: after the remaining output, the master reads end of file.
    pub fn hang_up(&mut self) {
        self.slave = None;
    }

    /// Sends pending output to the viewers, as far as they read it.
    pub fn feed(&mut self, connections: &mut [PeerConnection]) {
        self.viewers.feed(connections, &self.screen);
    }

    /// Sends the last output to the viewers, before the agent's end is reported.
    pub fn feed_last(&mut self, connections: &mut [PeerConnection]) {
        self.viewers.feed(connections, &self.screen);
        self.viewers.finish(connections, &self.screen);
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}
